"""The two sets of images that a recipe may encode, training and held-out images, and the latents of the latter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.listing import Listing
from pipelines.images.validation import held_out_source
from pipelines.latents.dataset import MANIFEST, LatentDataset
from pipelines.latents.identity import LATER_FIELDS, encode_defaults, encode_identity
from pipelines.latents.recorded_autoencoder import scale_changes
from raydit.errors import InvalidInput


@dataclass(frozen=True)
class ImageSet:
    """Images that are encoded into a data set of their own."""

    name: str
    """Name of the input in tracking."""
    metric: str
    """Metric of the number of images that are encoded."""
    folder: str
    """Path or URI of the latents."""
    images: ImagesConfig
    """Settings with which the images are read."""
    listing: Listing
    held_out: bool = False

    def encode_settings(self, settings: EncodeConfig) -> EncodeConfig:
        """Return how the images are encoded: as [encode] says, but moments of held-out images, few, are always stored.

        The validation loss needs them again and again.
        """
        return replace(settings, store=None) if self.held_out else settings

    def identity(self, settings: EncodeConfig, autoencoder: dict[str, Any]) -> dict[str, Any]:
        """Return what the latents depend on (see `encode_identity`), and that the images are held out if they are.

        autoencoder: its record.
        """
        identity = encode_identity(self.images, self.encode_settings(settings), self.listing, autoencoder)
        if self.held_out:
            identity["images"]["held_out"] = True
        return identity

    def artifact(self, settings: EncodeConfig, autoencoder: dict[str, Any]) -> Artifact:
        """Return the latents as an artifact. autoencoder: its record."""
        return Artifact(
            "encode",
            self.folder,
            self.identity(settings, autoencoder),
            defaults=encode_defaults(settings),
            later_fields=LATER_FIELDS,
            other_changes=partial(scale_changes, autoencoder=autoencoder),
        )


def training_set(config: Recipe, listing: Listing) -> ImageSet:
    """Return the training images of a recipe, which it always encodes."""
    return ImageSet("images", "encode/images", config.latents, config.images, listing)


def held_out_set(config: Recipe, listing: Listing) -> ImageSet:
    """Return the held-out images of a recipe, which it encodes if `Recipe.encodes_held_out`."""
    metric, images = "encode/held_out_images", held_out_source(config.images)
    return ImageSet("held-out images", metric, config.latents_held_out, images, listing, held_out=True)


def require_training(config: Recipe, training: Listing) -> None:
    """Raise InvalidInput if a recipe has no image to train on."""
    if len(training):
        return
    images = config.images
    fields = [f"images.classes = {list(images.classes)}"] if images.classes else []
    fields += [f"images.held_out = {images.held_out:g}"] if images.held_out else []
    settings = f", with {' and '.join(fields)}" if fields else ""
    raise InvalidInput(
        f"images.path: found no image to train on in {images.path}{settings}",
        "at least one",
        f"correct {' or '.join(['images.path', *(field.partition(' ')[0] for field in fields)])}",
    )


def require_held_out(config: Recipe, held_out: Listing) -> None:
    """Raise InvalidInput if a recipe encodes held-out images and has none."""
    if config.encodes_held_out and not len(held_out):
        raise InvalidInput(
            f"train.validate_every: found {config.train.validate_every} without held-out images",
            "images to validate on",
            "set images.held_out to a share of the images, or images.validation to other images or a split of them",
        )


def is_held_out(dataset: LatentDataset) -> bool:
    """Return whether latents are those of held-out images, which nothing was trained on."""
    return dataset.identity.get("images", {}).get("held_out", False)


def held_out_latents(config: Recipe) -> LatentDataset | None:
    """Open the latents of a recipe's held-out images; None unless the recipe encodes them.

    Raises NotFound if they are not finished, and InvalidInput unless they were made as the training images' latents
    were: of the same classes, in the same size and shape, by the same autoencoder.
    """
    if not config.encodes_held_out:
        return None
    held_out = LatentDataset.open(config.latents_held_out)
    if storage.exists(storage.join(config.latents, MANIFEST)):
        refuse_other_latents(LatentDataset.open(config.latents), held_out)
    return held_out


def refuse_other_latents(training: LatentDataset, held_out: LatentDataset) -> None:
    """Raise InvalidInput if held-out images were not encoded as the training images were."""
    pairs = {
        "classes": (training.class_names, held_out.class_names),
        "size or crop": (training.preprocessing, held_out.preprocessing),
        "moments": (training.moments_shape, held_out.moments_shape),
    }
    found = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    found += [] if _is_same_autoencoder(training.autoencoder, held_out.autoencoder) else ["autoencoder"]
    if found:
        raise InvalidInput(
            f"latents at {held_out.path} were not made as those at {training.path}: found other {', '.join(found)}",
            "the same",
            "run `raydit encode` again",
        )


def _is_same_autoencoder(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Return whether two records are of the same weights and the same config; older records have no digest of it."""

    def agree(name: str) -> bool:
        return None not in (ours.get(name), theirs.get(name)) and ours[name] == theirs[name]

    configs = {record["config_sha256"] for record in (ours, theirs) if record.get("config_sha256")}
    return (agree("sha256") or agree("tensors_sha256")) and len(configs) < 2
