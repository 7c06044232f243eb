"""The listing of a recipe's real images. Listing millions of images takes minutes, so a job does it only once."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cluster import storage
from pipelines.images.held_out import split_images
from pipelines.images.listing import Listing
from pipelines.latents.recorded_images import list_recorded_images
from pipelines.scoring.settings import ScoringSettings

_listed: ContextVar[list[tuple[Any, tuple[Listing, Listing]]] | None] = ContextVar("listed", default=None)
"""What has been listed in the context of `listed_once`, with what it depends on; None outside of any."""


@contextmanager
def listed_once() -> Iterator[None]:
    """List the same real images only once inside of the context, whatever happens to them meanwhile."""
    if _listed.get() is not None:
        yield
        return
    token = _listed.set([])
    try:
        yield
    finally:
        _listed.reset(token)


def list_real_images(settings: ScoringSettings) -> tuple[Listing, Listing]:
    """List the training images and the held-out images of a recipe. Raises NotFound or InvalidInput."""
    latents = settings.latents or storage.join(settings.output, "latents")
    depends, listed = (settings.images, latents, settings.output), _listed.get()
    for known, listings in listed or []:
        if known == depends:  # not hashed, because settings of images may hold tables
            return listings
    images, listing = list_recorded_images(*depends)
    listings = split_images(images, listing)
    if listed is not None:
        listed.append((depends, listings))
    return listings
