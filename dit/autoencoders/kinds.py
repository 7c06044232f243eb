"""The autoencoder classes of diffusers that raydit supports, and what their configs say about images and latents.

Imports no torch. A config is the content of config.json in a diffusers folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from raydit.errors import InvalidInput

DETERMINISTIC: Literal["deterministic"] = "deterministic"
"""Recorded as "posterior" where moments are the latents themselves, (C, H, W), without a log variance."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderKind:
    """What one class of diffusers is, whatever its weights."""

    levels_field: str | None
    """Field of the config that lists the channels by resolution, each half of the one before; None for a ViT."""
    required: tuple[str, ...] = ()
    """Fields of the config without which sizes are unknown; diffusers always writes them."""
    scaling_factor: float | None
    """Scaling factor of a config that has none; None where the weights hold the scale."""
    deterministic: bool = False
    """Whether moments are stored without a log variance."""
    unit_range: bool = False
    """Whether the class takes and returns pixels in [0, 1] instead of [-1, 1]."""


_DC_HALF = ("block_out_channels", "layers_per_block", "qkv_multiscales")
KINDS = {
    "AutoencoderKL": AutoencoderKind(levels_field="block_out_channels", scaling_factor=0.18215),
    "AutoencoderTiny": AutoencoderKind(levels_field="encoder_block_out_channels", scaling_factor=1.0),
    "AutoencoderKLFlux2": AutoencoderKind(
        levels_field="block_out_channels",
        required=("latent_channels", "block_out_channels", "layers_per_block"),
        scaling_factor=None,
    ),
    "AutoencoderDC": AutoencoderKind(
        levels_field="encoder_block_out_channels",
        required=("latent_channels", *(f"{half}_{name}" for half in ("encoder", "decoder") for name in _DC_HALF)),
        scaling_factor=1.0,
        deterministic=True,
    ),
    "AutoencoderRAE": AutoencoderKind(levels_field=None, scaling_factor=None, deterministic=True, unit_range=True),
}
"""Supported classes. An AutoencoderTiny has no posterior either, but its moments have a constant log variance."""
FLAT_SCALE = ("AutoencoderKL", "AutoencoderTiny")
"""Classes whose scale is recorded as latents_mean and latents_std; of all others it is recorded as "scale"."""
_OTHER = "choose another autoencoder, such as stabilityai/sd-vae-ft-ema or madebyollin/taesd"


def class_of(config: Mapping[str, Any]) -> str:
    """Return the name of the diffusers class in a config; old configs of AutoencoderKL have none."""
    return config.get("_class_name", "AutoencoderKL")


def autoencoder_class(config: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the diffusers class in an autoencoder's config. Raises InvalidInput if it is unsupported."""
    name = class_of(config)
    if name not in KINDS:
        *most, last = KINDS
        raise InvalidInput(f"{folder} is an autoencoder of class {name!r}", f"{', '.join(most)} or {last}", _OTHER)
    if "quantization_config" in config:
        raise InvalidInput(
            f"{folder}/config.json: found quantization_config, which changes the weights that diffusers computes with",
            "an autoencoder that is not quantized",
            "choose another one",
        )
    if missing := [field for field in KINDS[name].required if field not in config]:
        raise InvalidInput(f"{folder}/config.json: found no {missing[0]}", "the config of the class", "copy it again")
    if name == "AutoencoderKLFlux2" and len({*flux2_patch(config)}) > 1:
        raise InvalidInput(f"{folder}/config.json: found patch_size = {config['patch_size']}", "a square", _OTHER)
    if name == "AutoencoderRAE" and not config.get("reshape_to_2d", True):
        raise InvalidInput(f"{folder}/config.json: found reshape_to_2d = false", "latents (C, H, W)", _OTHER)
    return name


def require_installed(name: str) -> None:
    """Raise InvalidInput if the class needs a package that is not installed. name: of the class, one of KINDS."""
    if name == "AutoencoderRAE" and find_spec("transformers") is None:
        raise InvalidInput(
            "found no package transformers",
            "transformers, which provides the encoder of an AutoencoderRAE",
            "run `pip install 'raydit[rae]'`",
        )


def import_class(name: str) -> Any:
    """Return a class of diffusers, which takes seconds to import. Raises InvalidInput if it is not installed."""
    import diffusers

    require_installed(name)
    if not hasattr(diffusers, name):
        raise InvalidInput(
            f"found diffusers {diffusers.__version__}, which has no {name}", "a later version", "upgrade diffusers"
        )
    return getattr(diffusers, name)


def flux2_patch(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the patches by whose channels AutoencoderKLFlux2 is scaled, in latent pixels."""
    height, width = config.get("patch_size", (2, 2))
    return height, width


@dataclass(frozen=True, kw_only=True)
class RepresentationGrid:
    """Sizes of an AutoencoderRAE: a vision transformer that resizes its images, and a decoder with its own patches."""

    input_size: int
    """Side in pixels to which the encoder resizes images."""
    encoder_patch: int
    """Side of the encoder's patches in pixels; each patch is one latent pixel."""
    decoder_patch: int
    """Side in pixels of what the decoder makes of one latent pixel."""

    @property
    def side(self) -> int:
        """Side of the latents in latent pixels."""
        return self.input_size // self.encoder_patch

    @property
    def image_size(self) -> int:
        """Side of decoded images in pixels, and thus of the images to encode."""
        return self.side * self.decoder_patch


def representation_grid(config: Mapping[str, Any]) -> RepresentationGrid:
    """Return the sizes in the config of an AutoencoderRAE."""
    return RepresentationGrid(
        input_size=config.get("encoder_input_size", 224),
        encoder_patch=config.get("encoder_patch_size", 14),
        decoder_patch=config.get("patch_size", 16),
    )


def latent_channels(config: Mapping[str, Any]) -> int:
    """Return the number of channels of the latents. Raises InvalidInput for a config that does not say."""
    if class_of(config) == "AutoencoderRAE":
        return config.get("encoder_hidden_size", 768)
    return _required(config, "latent_channels")


def downsample(config: Mapping[str, Any]) -> int:
    """Return the number of image pixels per latent pixel along each side.

    Raises InvalidInput for a config that does not say.
    """
    field = KINDS[class_of(config)].levels_field
    return representation_grid(config).decoder_patch if field is None else 2 ** (len(_required(config, field)) - 1)


def _required(config: Mapping[str, Any], field: str) -> Any:
    if field not in config:
        found = f"the config.json of an {class_of(config)}: found no {field}"
        raise InvalidInput(found, "all fields, which diffusers writes", "copy it again")
    return config[field]


def describe_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an autoencoder's record that say which images and latents it has.

    They are latent_channels and downsample; "posterior", if it is deterministic; "image_size" in pixels, if there is
    only one; and "scale" with the "patch" in latent pixels into which the latents must be divisible.
    """
    name = class_of(config)
    shape: dict[str, Any] = {"latent_channels": latent_channels(config), "downsample": downsample(config)}
    if KINDS[name].deterministic:
        shape["posterior"] = DETERMINISTIC
    if name == "AutoencoderRAE":
        shape["image_size"] = representation_grid(config).image_size
    if name == "AutoencoderKLFlux2":
        shape["scale"] = {"patch": flux2_patch(config)[0]}
    return shape


def is_deterministic(record: Mapping[str, Any]) -> bool:
    """Return whether an autoencoder's record, or a description of latents, says that moments have no log variance."""
    return record.get("posterior") == DETERMINISTIC


def moments_channels(record: Mapping[str, Any]) -> int:
    """Return the channels of stored moments by an autoencoder's record: C if they are latents, and 2C otherwise."""
    return record["latent_channels"] * (1 if is_deterministic(record) else 2)


def latent_side(size: int, record: Mapping[str, Any]) -> int:
    """Return the side of the latents of square images in latent pixels.

    size: side of the images in pixels. record: of the autoencoder, or only `describe_shape`. Raises InvalidInput for
    another size than the autoencoder's only one, or for one that latent pixels or their patches do not divide, because
    decoded images would be of another size than those that they are compared with.
    """
    fixed, downsample = record.get("image_size"), record["downsample"]
    if fixed is not None and size != fixed:
        raise InvalidInput(
            f"images.size: found {size}",
            f"{fixed}, the only size of the images that this {record.get('class', 'autoencoder')} decodes",
            f"set images.size = {fixed}, or choose another autoencoder",
        )
    patch = (record.get("scale") or {}).get("patch", 1)
    if size % (downsample * patch):
        step, of_patch = downsample * patch, f" and its {patch}x{patch} patches" if patch > 1 else ""
        nearest = [side for side in (size // step * step, -(-size // step) * step) if side]
        raise InvalidInput(
            f"images.size: found {size}",
            f"a multiple of {step}, the image pixels that the autoencoder makes one latent pixel{of_patch} of",
            f"set images.size = {' or '.join(map(str, nearest))}, or choose another autoencoder",
        )
    return size // downsample


def require_latent_size(described: Mapping[str, Any], latent_size: tuple[int, int]) -> None:
    """Raise InvalidInput if an autoencoder cannot decode latents of a model's height and width."""
    sides = {side * described["downsample"] for side in latent_size}
    fixed, patch = described.get("image_size"), (described.get("scale") or {}).get("patch", 1)
    if (fixed is not None and sides != {fixed}) or any(side % patch for side in latent_size):
        found = f"the model has latents of {latent_size[0]}x{latent_size[1]}, for images of {max(sides)} pixels"
        only = f"images of {fixed} pixels" if fixed else f"latents that {patch}x{patch} patches divide"
        raise InvalidInput(
            found, f"{only} for the autoencoder {described['id']!r}", "pass the autoencoder that it was trained with"
        )
