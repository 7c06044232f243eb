"""Whether a device can draw samples in the precision of a protocol, and what another precision would take."""

from dit.hardware.measured_speeds import transformer_speedups
from evaluation.protocol import EvaluationProtocol
from pipelines.config.evaluate import EvaluateConfig


def require_sampling_precision(drawn: EvaluationProtocol | EvaluateConfig, device: str) -> None:
    """Raise InvalidInput if samples are to be drawn in TF32 and a device has none: a score says how it was computed."""
    from dit.precision import require_precision  # imports torch

    require_precision("evaluate.dtype", drawn.dtype, device)
    require_precision("evaluate.decoder_dtype", drawn.decoder_dtype or "float32", device)


def check_precision(evaluate: EvaluateConfig, drawn: EvaluationProtocol | EvaluateConfig) -> None:
    """Raise InvalidInput before any work if workers on CPUs are to draw samples in a precision that CPUs lack.

    evaluate: the workers' settings. drawn: how samples are drawn. Workers on GPUs refuse for themselves, because this
    process need not have one.
    """
    if not evaluate.gpus_per_worker:
        require_sampling_precision(drawn, "cpu")


def faster_precisions(evaluate: EvaluateConfig, protocol: EvaluationProtocol) -> list[str]:
    """Return in a line what other precisions take, if workers on GPUs are to draw samples in float32."""
    if not evaluate.gpus_per_worker or protocol.dtype != "float32":
        return []
    speedups = transformer_speedups("evaluate")
    return [f"samples in float32, as published figures are; {speedups}, each by a protocol of its own"]
