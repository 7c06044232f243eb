"""Labelled grids of a checkpoint's samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster import storage
from dit.config import RandomKind
from dit.hardware.device_errors import explain_full_memory
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.images.grids import labelled_grid, require_png_name, save_png
from pipelines.images.labels import are_numbers
from pipelines.scoring.checks import check_sampling_steps
from pipelines.scoring.protocols.build_protocol import sampling_protocol
from raydit.compilers import explain_failed_compilation, require_compiler
from raydit.errors import InvalidInput

MAX_ROWS = 20
"""Classes in a grid for which none were chosen."""


def sample_grid(
    checkpoint: str | Path | LocatedCheckpoint,
    evaluate: EvaluateConfig,
    seed: int,
    out: str,
    *,
    classes: Sequence[str] | None,
    columns: int,
    random: RandomKind | None = None,
) -> str:
    """Sample `columns` images of each class in this process, and write them as one PNG to a path or URI.

    seed, random: of the recipe. classes: names or numbers; None: the first MAX_ROWS classes. Raises InvalidInput for an
    unknown class, for a name of another format than PNG, and for a recipe that samples on GPUs if this machine has
    none.
    """
    import torch

    from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
    from pipelines.scoring.samples.guide import guide_location

    require_png_name(out)
    if evaluate.gpus_per_worker and not torch.cuda.is_available():
        raise InvalidInput(
            f"evaluate.gpus_per_worker: found {evaluate.gpus_per_worker:g}, and no usable GPU on this machine",
            "0 for a grid, which is sampled on this machine",
            "add --set evaluate.gpus_per_worker=0",
        )
    if evaluate.compile:
        require_compiler(bool(evaluate.gpus_per_worker))
    storage.refuse_unwritable(out)
    opened = open_checkpoint(checkpoint)
    check_sampling_steps(evaluate, opened.record.process_kind)
    names = opened.record.class_names
    labels = [class_label(name, names) for name in classes] if classes else list(range(min(len(names), MAX_ROWS)))
    labels = labels or [0]
    protocol = sampling_protocol(evaluate, seed, opened, random)
    with explain_failed_compilation(), explain_full_memory("lower evaluate.batch_size"):
        sampler = CheckpointSampler(
            opened.shared,
            protocol,
            batch_size=evaluate.batch_size,
            device="cuda" if evaluate.gpus_per_worker else "cpu",
            compiled=evaluate.compile,
            guide=guide_location(protocol, evaluate, opened),
        )
        images = sampler.sample(range(len(labels) * columns), np.repeat(labels, columns).astype(np.int64))
    rows = images.reshape(len(labels), columns, *images.shape[1:])
    titles = [names[label] if names else "" for label in labels]
    return save_png(labelled_grid(list(zip(titles, rows, strict=True))), out)


def split_class_list(text: str, class_names: Sequence[str]) -> list[str]:
    """Split what a user lists as classes at its commas, unless all of it is the name of one class."""
    if text in class_names:
        return [text]
    return [part if part in class_names else part.strip() for part in text.split(",")]


def class_label(name: str, class_names: Sequence[str]) -> int:
    """Return the number of a class, given its name or its number. Raises InvalidInput for an unknown class."""
    if name in class_names:
        return list(class_names).index(name)
    # Where names are numbers, a number is a name: 0 must not mean the class "1".
    is_number = name.isascii() and name.isdigit() and not are_numbers(class_names)
    if is_number and int(name) < len(class_names):
        return int(name)
    known = ", ".join(map(repr, class_names[:MAX_ROWS])) + (", ..." if len(class_names) > MAX_ROWS else "")
    number = "" if are_numbers(class_names) else f", or a number below {len(class_names)}"
    raise InvalidInput(f"class {name!r}", f"one of {known}{number}" if class_names else "none", "choose one of them")
