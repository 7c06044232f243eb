"""The sample job: a labelled grid from a checkpoint, to look at."""

from pathlib import Path

import numpy as np

from pipelines.config import Recipe
from pipelines.grids import labelled_grid, save_png


def sample_grid(checkpoint: str | Path, config: Recipe, out: Path, *, classes: list[str] | None, columns: int) -> Path:
    """Sample `columns` images of each class and write them as one PNG.

    classes: names or numbers; left out, all (at most 20). Raises ValueError for a class that does not exist.
    """
    from dit.checkpoint import load_checkpoint
    from pipelines.evaluate import evaluation_protocol
    from pipelines.sampling import Sampler

    opened = load_checkpoint(checkpoint)
    names = opened.config["class_names"]
    labels = [class_label(name, names) for name in classes] if classes else list(range(min(len(names), 20)))
    labels = labels or [0]
    protocol = evaluation_protocol(config, opened)
    device = "cuda" if config.evaluate.gpus_per_worker else "cpu"
    sampler = Sampler(opened.path, protocol, batch_size=config.evaluate.batch_size, device=device)
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
