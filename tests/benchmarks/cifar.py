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
    """Return the folder of CIFAR-10's Parquet files; skip the benchmark if there is none."""
    folder = Path(os.environ.get("RAYDIT_CIFAR10", ROOT.parent / "shared" / "data" / "cifar10"))
    if not any(folder.glob("*.parquet")):
        pytest.skip(f"no Parquet files in {folder}; set RAYDIT_CIFAR10")
    return folder


def cifar_images(target: Path, num_images: int) -> Path:
    """Write the first images to one Parquet file, and return its path."""
    return first_images(cifar_folder(), num_images, target)


def cifar_recipe(folder: Path, images: Path, autoencoder: Path, **encode) -> Recipe:
    """Return a recipe for 64 pixels with its output in `folder`, and with defaults except for the given fields of
    [encode]."""
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
