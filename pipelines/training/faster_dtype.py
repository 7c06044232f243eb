"""What a training in float32 could gain by another dtype, said where it begins."""

from dit.precision import has_tf32
from pipelines.training.group.worker import Worker


def explain_faster_dtype(worker: Worker, dtype: str, speedups: str, *, is_begun: bool) -> None:
    """Show in a line what another dtype takes, if a training begins in float32 on a GPU that has faster ones.

    GPUs with TF32 have fast bfloat16 as well. speedups: in words, from `dit.hardware.measured_speeds`. is_begun:
    whether the training has done steps, after which another dtype would make it another training.
    """
    if dtype == "float32" and not is_begun and has_tf32(worker.device):
        cost = "another dtype makes it another training, whose losses differ by rounding"
        worker.notice(f"trains in float32; {speedups}; {cost}")
