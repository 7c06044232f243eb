"""The record that a checkpoint's config.json contains: what was trained, on which latents, with which recipe.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dit.config import DiTConfig, Numerics, ProcessKind, UViTConfig, config_from_dict, recorded_fields
from raydit import __version__
from raydit.errors import InvalidInput
from raydit.listed_names import require_inside

if TYPE_CHECKING:
    from dit.autoencoders.latent_scale import LatentScale

FURTHER_DIGESTS = ("tensors_sha256", "config_sha256")
"""Fields of an autoencoder's record that no fingerprint, identity of latents or protocol contains."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecord:
    """The autoencoder whose latents a model was trained on."""

    id: str
    """Hub id or folder; "autoencoder" for one that raydit trained next to the checkpoints."""
    class_name: str
    """Name of the diffusers class; recorded as "class"."""
    sha256: str | None
    """Digest of the weights file; None if the autoencoder was not on the machine that imported the checkpoint."""
    latent_channels: int
    """Channels of the latents."""
    downsample: int
    """Image pixels per latent pixel along each side."""
    latents_mean: tuple[float, ...]
    """Mean of the scale, per channel."""
    latents_std: tuple[float, ...]
    """Standard deviation of the scale, per channel."""
    tensors_sha256: str | None = None
    """Digest of the tensors, whatever file they are saved in; None in older records. Only used to accept weights."""
    config_sha256: str | None = None
    """Digest of the config's fields that the result depends on; None in older records."""

    @property
    def scale(self) -> "LatentScale":
        """Scale of the latents that the model was trained on."""
        from dit.autoencoders.latent_scale import LatentScale  # imports torch

        return LatentScale(self.latents_mean, self.latents_std)

    def encodes_like(self, other: "AutoencoderRecord") -> bool:
        """Return whether two autoencoders are known to be the same, by their weights; by their ids if a digest lacks.

        Their scales may differ.
        """
        digests = (self.sha256, other.sha256), (self.tensors_sha256, other.tensors_sha256)
        if None in digests[0]:
            return self.id == other.id
        return any(None not in pair and pair[0] == pair[1] for pair in digests)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "AutoencoderRecord":
        """Read the record from its JSON form. Raises KeyError for a missing field, InvalidInput for a wrong one."""
        scale = content.get("scale")
        if scale is not None:
            return ScaledAutoencoderRecord(**cls._fields(content), latents_mean=(), latents_std=(), latents_scale=scale)
        mean, std = (tuple(_entry(content, name, (list, tuple))) for name in ("latents_mean", "latents_std"))
        return cls(**cls._fields(content), latents_mean=mean, latents_std=std)

    @staticmethod
    def _fields(content: Mapping[str, Any]) -> dict[str, Any]:
        return dict(
            id=content["id"],
            class_name=content["class"],
            sha256=content["sha256"],
            latent_channels=content["latent_channels"],
            downsample=content["downsample"],
            tensors_sha256=content.get("tensors_sha256"),
            config_sha256=content.get("config_sha256"),
        )


@dataclass(frozen=True, kw_only=True)
class ScaledAutoencoderRecord(AutoencoderRecord):
    """The record of a class whose scale may be one per position, or per channel of patches."""

    latents_scale: Mapping[str, Any]
    """The scale, recorded as "scale" instead of latents_mean and latents_std; see `dit.autoencoders.latent_scale`."""

    @property
    def scale(self) -> "LatentScale":
        """Scale of the latents that the model was trained on."""
        from dit.autoencoders.latent_scale import LatentScale  # imports torch

        return LatentScale.from_json(self.latents_scale)


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The file or folder that an imported checkpoint was made from, or the checkpoints that were merged."""

    format: Literal["official", "diffusers", "adapter", "merge"]
    name: str
    """Name of the file or folder, without its path."""
    numerics: Numerics | None = None
    """Whose numerics an imported pipeline reproduces; None for an official file."""
    taken: str | None = None
    """Description of what was taken from the file; None if all of it was taken unchanged."""
    parts: Sequence[Mapping[str, Any]] | None = None
    """For a merged checkpoint: location, digest and share of each checkpoint whose adapter was merged into the base."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SourceRecord":
        """Read the record from its JSON form, whose names are those of the fields. Raises InvalidInput for others."""
        try:
            return cls(**content)
        except TypeError:
            raise InvalidInput(
                f"config.json: found the source {str(content)[:200]}",
                f"the fields {', '.join(field.name for field in fields(cls))}",
                "use the version of raydit that wrote it",
            ) from None


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The weights that a checkpoint's adapter changes, which it holds no copy of."""

    uri: str
    """Path or URI of the base's checkpoint, or of the file or pipeline that it was imported from."""
    file: str
    """Name of the file of the weights in the checkpoint."""
    sha256: str
    """Digest of that file. Weights of another digest are refused, and the same elsewhere are as good."""
    digest: str
    """Digest of the checkpoint."""
    imported: Mapping[str, Any] | None = None
    """For a weights file, which records no model: the model and the overrides that it was imported with."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "BaseRecord":
        """Read the record from its JSON form, whose names are those of the fields. Raises InvalidInput for others."""
        try:
            require_inside(content["file"], "config.json")
            return cls(**content)
        except (TypeError, KeyError):
            raise InvalidInput(
                f"config.json: found the base {str(content)[:200]}", "what raydit wrote", "copy the checkpoint again"
            ) from None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What a checkpoint says about itself in config.json."""

    step: int
    """Number of finished optimizer steps."""
    model: Mapping[str, Any]
    """Fields of the model's configuration, as recorded."""
    objective: Mapping[str, Any]
    """Kind and settings of the process: the arguments of `dit.objective.create_process`."""
    autoencoder: AutoencoderRecord
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their labels."""
    seed: int = 0
    """Seed of the training."""
    preprocessing: Mapping[str, Any] | None = None
    """How images were cropped and resized before encoding; None if unknown."""
    latents_fingerprint: str | None = None
    """Fingerprint of the latent data set that the model was trained on; None if unknown."""
    recipe: Mapping[str, Any] | None = None
    """The resolved recipe; None for an imported checkpoint."""
    start: Mapping[str, Any] | None = None
    """The weights that the training started from, as `pipelines.training.starting.training_start` records them; None if
    they were random."""
    source: SourceRecord | None = None
    """Origin of an imported checkpoint; None for one that raydit trained."""
    raydit_version: str = ""
    """Version of raydit that wrote the checkpoint."""

    @property
    def model_config(self) -> DiTConfig | UViTConfig:
        """The model's configuration. Raises InvalidInput if a newer version of raydit recorded unknown fields."""
        return config_from_dict(self.model)

    @property
    def process_kind(self) -> ProcessKind:
        """Kind of process that the model was trained with."""
        return self.objective["kind"]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CheckpointRecord":
        """Read the record from the content of config.json.

        Raises KeyError for a missing field, and InvalidInput for one that holds something else.
        """
        source = content.get("source")
        return cls(
            step=content["step"],
            seed=content.get("seed", 0),
            model=_entry(content, "model", Mapping),
            objective=_objective(content),
            autoencoder=AutoencoderRecord.from_dict(_entry(content, "autoencoder", Mapping)),
            class_names=tuple(_entry(content, "class_names", (list, tuple))) if "class_names" in content else (),
            preprocessing=content.get("preprocessing"),
            latents_fingerprint=content.get("latents_fingerprint"),
            recipe=content.get("recipe"),
            start=content.get("start"),
            source=None if source is None else SourceRecord.from_dict(source),
            raydit_version=content.get("raydit_version", ""),
        )


def _entry(content: Mapping[str, Any], name: str, kind: Any) -> Any:
    """Return an entry of config.json of a kind. Raises KeyError if there is none, and InvalidInput for another kind."""
    if not isinstance(content[name], kind):
        expected = "a JSON object" if kind is Mapping else "a list"
        raise InvalidInput(f"config.json: found {name} {str(content[name])[:200]!r}", expected, "copy it again")
    return content[name]


def _objective(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the objective in config.json. Raises the same errors as `_entry`, and InvalidInput for an unknown kind."""
    objective, known = _entry(content, "objective", Mapping), get_args(ProcessKind)
    if objective.get("kind") not in known:
        raise InvalidInput(
            f"config.json: found an objective of the kind {str(objective.get('kind'))[:80]!r}",
            " or ".join(known),
            "use the version of raydit that wrote it",
        )
    return objective


def model_label(model: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    """Return a model in a few words: "DiT-S/2", or without a name in the recipe its dimensions; and its wide head.

    model: fields of its configuration, as recorded. recipe: the resolved recipe; None if it is unknown.
    """
    sizes = {"width": "hidden_size", "depth": "depth", "patch": "patch_size"}
    words = ["transformer", *(f"{word} {model[field]}" for word, field in sizes.items() if field in model)]
    name = ((recipe or {}).get("model") or {}).get("name")
    return (name or ", ".join(words)) + head_label(model.get("head_width"), model.get("head_depth"))


def head_label(width: int | None, depth: int | None) -> str:
    """Return the words about a wide head that follow the name of a model: nothing for a model without one."""
    return "" if width is None else f" with a head of width {width} and depth {depth}"


def describe_checkpoint(
    *,
    model: DiTConfig | UViTConfig,
    objective: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    class_names: Sequence[str],
    seed: int,
    latents_fingerprint: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    **further: Any,
) -> dict[str, Any]:
    """Return the content of config.json, except for format, version and step; None means that a value is unknown.

    autoencoder: id, and the fields that `dit.autoencoder.describe_autoencoder` returns. further: more fields.
    """
    return {
        "model": recorded_fields(model),
        "objective": dict(objective),
        "autoencoder": dict(autoencoder),
        "preprocessing": preprocessing,
        "class_names": list(class_names),
        "seed": seed,
        "latents_fingerprint": latents_fingerprint,
        "raydit_version": __version__,
        "recipe": recipe,
        **further,
    }


def describe_source(format: str, path: Path, taken: str, **further: Any) -> dict[str, Any]:
    """Return what an imported checkpoint records about the file or folder that it was made from.

    taken: what was taken of it, in words; left out where it is empty. further: more fields of `SourceRecord`.
    """
    return {"format": format, "name": path.absolute().name, **further, **({"taken": taken} if taken else {})}
