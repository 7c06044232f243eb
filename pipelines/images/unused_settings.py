"""Report settings of [images] that have no effect, because the images have neither columns nor subsets."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig


def note_unused(images: "ImagesConfig", what: str) -> tuple[str, ...]:
    """Return a line for each such setting that a recipe has. what: the images, which lack them."""
    lacking = {"image_column": "columns", "label_column": "columns", "subset": "subsets"}
    return tuple(
        f"images.{name} = {value!r} is of no effect, because {what} have no {lack}"
        for name, lack in lacking.items()
        if (value := getattr(images, name)) is not None
    )
