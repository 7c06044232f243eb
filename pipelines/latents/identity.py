"""What latents depend on, and what they record about themselves."""

from typing import Any

from dit.autoencoders.kinds import latent_side, moments_channels
from dit.formats.record import FURTHER_DIGESTS
from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.latents.schema import MOMENTS_FIELDS, LatentDescription

PREPROCESSING_FIELDS = frozenset({"size", "crop"})
"""Settings of [images] that artifacts record. The others say where the images come from; their listing's digest, which
is recorded, follows from them."""
ENCODE_FIELDS = ("flip", "shard_rows", "dtype")
OPTIONAL_ENCODE_FIELDS = {"memory_format": (None, "channels_last"), "compile": (False,), "store": (None,)}
"""Settings of [encode] that the bytes of the latents depend on; the second are recorded unless they have one of these
values, so that latents made before these options existed stay valid. Layouts differ in the last digits at most."""


LATER_FIELDS = ("images.image_column",)
"""Dotted fields of the identity that earlier releases did not record, whatever their value was."""


def encode_identity(
    images: ImagesConfig, settings: EncodeConfig, listing: Listing, autoencoder: dict[str, Any]
) -> dict[str, Any]:
    """Return everything that the bytes of the latents depend on. Latents of another identity are encoded again.

    autoencoder: its record (`AutoencoderHandle.describe`).
    """
    # The config's digest, which is younger than the identity, only where it alone tells latents from earlier ones.
    recorded = ("sha256", *(["config_sha256"] if "config_sha256" in autoencoder else []))
    return {
        "images": {
            "digest": listing.digest,
            "count": len(listing),
            **preprocessing(images),
            **listing.column_identity,
        },
        "autoencoder": {name: autoencoder[name] for name in recorded},
        "encode": _recorded_settings(settings),
    }


def encode_defaults(settings: EncodeConfig) -> dict[str, Any]:
    """Return what optional fields of the identity mean where they are left out.

    A recipe leaves them out itself (`EncodeConfig`); earlier releases recorded them.
    """
    return {"encode": {"memory_format": "contiguous"} if settings.gpus_per_worker else {}}


def _recorded_settings(settings: EncodeConfig) -> dict[str, Any]:
    recorded = {name: getattr(settings, name) for name in ENCODE_FIELDS}
    for name, unrecorded in OPTIONAL_ENCODE_FIELDS.items():
        if getattr(settings, name) not in unrecorded:
            recorded[name] = getattr(settings, name)
    return recorded


def preprocessing(images: ImagesConfig) -> dict[str, Any]:
    """Return how images are cropped, as artifacts record it."""
    return {"size": images.size, "crop": images.crop}


def describe_latents(
    images: ImagesConfig, settings: EncodeConfig, class_names: tuple[str, ...], autoencoder: dict[str, Any]
) -> LatentDescription:
    """Return the description of latents before they are encoded. autoencoder: its record, or only its shape.

    Raises InvalidInput if the autoencoder does not fit the size of the images.
    """
    side = latent_side(images.size, autoencoder)
    apart = (*FURTHER_DIGESTS, *MOMENTS_FIELDS)
    # Where moments are stored, their bytes tell how they were computed.
    computed = {
        name: value
        for name, value in _recorded_settings(settings).items()
        if name not in ("flip", "shard_rows", "store")
    }
    return LatentDescription(
        moments_shape=(moments_channels(autoencoder), side, side),
        flip=settings.flip,
        autoencoder={name: value for name, value in autoencoder.items() if name not in apart},
        **{name: autoencoder[name] for name in MOMENTS_FIELDS if name in autoencoder},
        preprocessing=preprocessing(images),
        class_names=class_names,
        encoding=None if settings.stores_moments else computed,
    )
