"""Make recipes for jobs that only read images, and name images after their folder or file."""

from typing import Any

from cluster import storage
from pipelines.config.reader import apply_override, validate_recipe
from pipelines.config.recipe import Recipe
from pipelines.images.sources.table import TEXT_SUFFIXES

FILE_SUFFIXES = (".npz", ".parquet", ".tar", *TEXT_SUFFIXES)
"""Suffixes of single files of images, or of tables that name images."""


def image_recipe(path: str, output: str, overrides: tuple[str, ...] = (), **images: Any) -> Recipe:
    """Return a recipe for jobs that only read images and build no model. images: more fields of [images]."""
    content: dict[str, Any] = {
        "name": images_name(path) if path else "images",
        "output": output,
        "images": {"path": path, **images},
        "autoencoder": {"id": "none"},
        "model": {"name": "DiT-S/2"},
    }
    for override in overrides:
        apply_override(content, override)
    return validate_recipe(content)


def images_name(path: str) -> str:
    """Return the name of images, after their folder or file, for their report or experiment. path: path or URI."""
    _, name = storage.split(storage.absolute(path))
    name = name.removesuffix(next((suffix for suffix in FILE_SUFFIXES if name.endswith(suffix)), ""))
    return name if name.strip(".") else "images"
