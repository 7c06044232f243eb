"""CIFAR-10 as Parquet, in the layout of Hugging Face: RAYDIT_CIFAR10, or shared/data/cifar10 beside the repository."""

import os
from pathlib import Path

import pytest
from study import first_images

from pipelines.config.reader import validate_recipe
from pipelines.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64


def cifar_folder() -> Path:
    """Skips the benchmark where there is none."""
    folder = Path(os.environ.get("RAYDIT_CIFAR10", ROOT.parent / "shared" / "data" / "cifar10"))
    if not any(folder.glob("*.parquet")):
        pytest.skip(f"no Parquet files in {folder}; set RAYDIT_CIFAR10")
    return folder


def cifar_images(target: Path, num_images: int) -> Path:
    """The first images as one Parquet file."""
    return first_images(cifar_folder(), num_images, target)


def cifar_recipe(folder: Path, images: Path, autoencoder: Path, **encode) -> Recipe:
    """At 64 pixels, with everything in `folder`; all defaults but for what is given of [encode]."""
    return validate_recipe(
        {
            "name": "benchmark",
            "output": str(folder / "output"),
            "tracking": {"uri": f"sqlite:///{folder.parent / 'mlflow.db'}"},
            "images": {"path": str(images), "size": SIZE},
            "autoencoder": {"id": str(autoencoder)},
            "encode": encode,
            "model": {"name": "DiT-S/2"},
        }
    )
