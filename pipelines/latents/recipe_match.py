"""Check that latents match the recipe, before anything is trained on them."""

from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.listing import falls_into_share, shorten_list
from pipelines.latents.autoencoder import autoencoder_of, explain_other, is_autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.identity import preprocessing
from pipelines.latents.shards import recorded_keys
from raydit.errors import InvalidInput


def require_latents_of(config: Recipe, latents: LatentDataset) -> None:
    """Raise InvalidInput if another autoencoder made the latents, of images of another size or crop, or of none."""
    autoencoder = autoencoder_of(config)
    found, folder = latents.autoencoder, autoencoder.folder()
    if not is_autoencoder_of(found, folder):
        ours = explain_other(found, folder).removeprefix("sha256 ")
        raise InvalidInput(
            f"latents at {latents.path} were made by the autoencoder {found['id']!r} ({found['sha256'][:12]})",
            f"the recipe's, {autoencoder.id!r} ({ours})",
            "run `raydit encode` again, or set autoencoder.id to the one that made them",
        )
    for name, value in preprocessing(config.images).items():
        if (made := latents.preprocessing.get(name, value)) != value:
            raise InvalidInput(
                f"latents at {latents.path} were made of images with images.{name} = {made!r}",
                f"the recipe's, {value!r}",
                f"run `raydit encode` again, or set images.{name} to {made!r}",
            )
    if len(latents) == 0:
        raise InvalidInput(
            f"latents at {latents.path}: found 0 usable images",
            "at least one",
            "see quarantine.parquet there for the reasons",
        )


def require_training_images(images: ImagesConfig, latents: LatentDataset) -> None:
    """Raise InvalidInput if training on the latents would be on images that the recipe holds out, or of other classes.

    Images themselves are not looked for: they need not be on this machine. Reads all keys if more are to be held out
    than when the latents were made.
    """
    if images.classes and {*images.classes} != {*latents.class_names}:
        raise InvalidInput(
            f"latents at {latents.path} were made of the classes {shorten_list(latents.class_names)}",
            f"the recipe's, {shorten_list(images.classes)}",
            "run `raydit encode` again, or correct images.classes",
        )
    if leaked := sorted(find_leaked(latents, images.held_out)):
        before = recorded_share(latents)
        raise InvalidInput(
            f"latents at {latents.path} were made with images.held_out = {before:g}: {len(leaked):,} of their images, "
            f"such as {leaked[0]}, would be trained on",
            f"none of those that the recipe keeps from training, with images.held_out = {images.held_out:g}",
            f"run `raydit encode` again, or set images.held_out to {before:g}",
        )


def find_leaked(latents: LatentDataset, share: float) -> set[str]:
    """Return the keys of a data set that a larger share of held-out images than its own holds out.

    Reads no key unless the share is larger. Empty where the data set records no recipe.
    """
    if not latents.recipe or share <= recorded_share(latents):
        return set()
    return {key for key in recorded_keys(latents) if falls_into_share(key, share)}


def recorded_share(latents: LatentDataset) -> float:
    """Return images.held_out of the recipe by which latents were made."""
    share: float = latents.recipe.get("images", {}).get("held_out", 0.0)
    return share
