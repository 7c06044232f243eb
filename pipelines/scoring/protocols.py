"""What is asked of a checkpoint: its recipe, and the protocol by which its samples are drawn and scored."""

from typing import Any

from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.protocol import EvaluationProtocol
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.scoring.references import reference_digest


def evaluation_protocol(config: Recipe, opened: LocatedCheckpoint) -> EvaluationProtocol:
    """The protocol that a recipe's [evaluate] means for a checkpoint."""
    chosen = config.evaluate
    weights = extractor_sha256(chosen.extractor, chosen.extractor_weights)
    return EvaluationProtocol(
        num_samples=chosen.num_samples,
        extractor=extractor_name(chosen.extractor, weights),
        extractor_sha256=weights,
        reference_digest=reference_digest(config),
        **sampling_settings(config, opened),
    )


def sampling_protocol(config: Recipe, opened: LocatedCheckpoint) -> EvaluationProtocol:
    """The same samples, to be looked at or kept: nothing is scored, so neither images nor an extractor are needed."""
    settings = sampling_settings(config, opened)
    return EvaluationProtocol(extractor="none", extractor_sha256="none", reference_digest="none", **settings)


def sampling_settings(config: Recipe, opened: LocatedCheckpoint) -> dict[str, Any]:
    """What samples depend on beside the checkpoint.

    Raises ValueError if the autoencoder is not the checkpoint's, FileNotFoundError if it lacks the weights.
    """
    from dit.autoencoder import describe_autoencoder
    from dit.checkpoint import weights_name
    from pipelines.checkpoints.autoencoder import checkpoint_autoencoder

    weights = weights_name(config.evaluate.weights)
    if not (opened.path / f"{weights}.safetensors").is_file():
        opened.weights(weights)  # raises, and says which there are
    decoder = describe_autoencoder(checkpoint_autoencoder(opened))["sha256"]
    chosen = config.evaluate
    return {
        "seed": config.seed,
        "labels": chosen.labels,
        "sampler": chosen.sampler,
        "sampling_steps": chosen.sampling_steps,
        "cfg_scale": chosen.cfg_scale,
        "cfg_channels": chosen.cfg_channels,
        "cfg_interval": chosen.cfg_interval,
        "weights": chosen.weights,
        "dtype": chosen.dtype,
        "decoder": decoder,
    }


def checkpoint_recipe(opened: LocatedCheckpoint, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a checkpoint records, with its output where the checkpoint lies now.

    An imported one records none: its recipe says what its config does, and its output is the folder it lies in.
    """
    from pipelines.checkpoints.importing import recipe_for_imported
    from pipelines.config.reader import apply_override, validate_recipe

    recorded = opened.record.recipe
    content = {**(recipe_for_imported(opened.record) if recorded is None else recorded), "output": opened.output}
    for override in overrides:
        apply_override(content, override)
    return validate_recipe(content)
