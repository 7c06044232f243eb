"""The sample job: a labelled grid from a checkpoint, to look at, or many samples in a file, for other tools."""

from pathlib import Path

import numpy as np

from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.images.grids import labelled_grid, save_png
from pipelines.scoring.protocols import sampling_protocol


def sample_grid(
    checkpoint: str | Path | LocatedCheckpoint, config: Recipe, out: str, *, classes: list[str] | None, columns: int
) -> str:
    """Sample `columns` images of each class and write them as one PNG to a path or URI.

    classes: names or numbers; left out, all (at most 20). Raises ValueError for a class that does not exist.
    """
    from pipelines.scoring.checkpoint_sampler import Sampler

    opened = open_checkpoint(checkpoint)
    names = opened.config["class_names"]
    labels = [class_label(name, names) for name in classes] if classes else list(range(min(len(names), 20)))
    labels = labels or [0]
    protocol = sampling_protocol(config, opened)
    settings = config.evaluate
    device = "cuda" if settings.gpus_per_worker else "cpu"
    sampler = Sampler(opened.shared, protocol, batch_size=settings.batch_size, device=device, compiled=settings.compile)
    images = sampler.sample(range(len(labels) * columns), np.repeat(labels, columns).astype(np.int64))
    rows = images.reshape(len(labels), columns, *images.shape[1:])
    titles = [names[label] if names else "" for label in labels]
    return save_png(labelled_grid(list(zip(titles, rows, strict=True))), out)


def class_label(name: str, class_names: list[str]) -> int:
    """Number of a class, by its name or its number."""
    if name in class_names:
        return class_names.index(name)
    if name.isdigit() and int(name) < len(class_names):
        return int(name)
    raise ValueError(
        f"class {name!r}: expected one of {', '.join(class_names[:20])} or a number below {len(class_names)}"
    )
