"""A tiny data set and recipe for the tests that run whole stages."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.config.reader import load_recipe
from pipelines.config.recipe import Recipe

RECIPE = Path(__file__).resolve().parent / "recipes" / "tiny.toml"


BROKEN = "blob/broken.png"
"""Its key puts it among the images that are encoded, not the held-out ones."""


def write_images(folder: Path, *, per_class: int = 12, size: int = 20) -> Path:
    """PNG images of three classes, smooth and coloured, the same in every call; one of them is unreadable."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blob", "ring", "stripe")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = image.resize((size + label, size), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{index:03d}.png")
    (folder / BROKEN).write_bytes(b"no image")
    return folder


def places(folder: Path) -> tuple[str, ...]:
    """Overrides that put images, output and store into `folder`; the images are written if they are not there."""
    images = folder / "images"
    if not images.exists():
        write_images(images)
    return (
        f"output={folder / 'output'}",
        f"images.path={images}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    )


def place_flags(folder: Path) -> list[str]:
    """The same for a command line."""
    return [part for place in places(folder) for part in ("--set", place)]


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe with everything in `folder`."""
    return load_recipe(RECIPE, (*places(folder), *overrides))
