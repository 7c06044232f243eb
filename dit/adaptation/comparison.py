"""Whether the weights of one model can be fitted to another: refusals that name the field, before any work."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dit.adaptation.draft_weights import TrainedModel
from dit.adaptation.labels import shorten
from dit.config import DiTConfig, UViTConfig
from dit.imagenet import match_names
from raydit.errors import InvalidInput

SIZE_FIELDS = ("architecture", "hidden_size", "num_heads")
"""Fields that the name of a model fixes, and that cannot be another than those of the start."""
SHARED_FIELDS = (*SIZE_FIELDS, "mlp_ratio")
DIT_FIELDS = (
    *("conditioning", "qk_norm", "norm", "mlp", "timestep_frequency_shift", "head_width", "head_depth", "flow_time"),
)
"""Fields of [model] that must be those of the start, because nothing can be copied sensibly otherwise."""
UVIT_FIELDS = ("qkv_bias", "mlp_time_embed", "final_conv")
"""Fields of [model] that must be those of the start if both are U-ViTs."""
INHERITED = {"dit": ("mlp_norm_eps",), "uvit": (*UVIT_FIELDS, "first_timestep")}
"""Fields that a model takes over from its start where its recipe does not set them, by architecture. mlp_norm_eps and
first_timestep are in no recipe."""
OBJECTIVE_DEFAULTS = {
    "flow": {},
    "diffusion": {"schedule": "linear", "prediction": "eps", "variance": "learned_range"},
}
"""Settings of the objective that decide what a network's inputs and outputs mean, with the value that applies if none
is recorded."""


def with_inherited_fields(
    config: DiTConfig | UViTConfig, base: DiTConfig | UViTConfig, chosen: Collection[str] = ()
) -> DiTConfig | UViTConfig:
    """Return the configuration of a model that starts from another: it has the start's values of fields left out.

    chosen: names of the fields that the recipe sets. A model with another value of a field that cannot be left out, and
    must be that of the start, is returned as it is, because the two together may be no model. `require_adaptable`
    refuses every field that must be that of the start and is not, by its name.
    """
    inherited = INHERITED[base.architecture]
    if _first_difference(base, config, ignored=inherited) is not None:
        return config
    return replace(config, **{name: getattr(base, name) for name in inherited if name not in chosen})


def require_adaptable(base: TrainedModel, target: TrainedModel, reset: Collection[str]) -> None:
    """Raise InvalidInput if weights of the base cannot become those of the target.

    reset: parts that need not be taken over (`dit.config.ResetPart`).
    """
    _require_equal_fields(base.config, target.config, reset)
    _require_equal_objective(base.objective, target.objective, reset)
    if base.config.in_channels != target.config.in_channels and not {"embedding", "final"} <= {*reset}:
        raise InvalidInput(
            f"train.start: found a model of latents with {base.config.in_channels} channels",
            f"{target.config.in_channels}, as the latents have",
            'set train.start.reset = ["embedding", "final"], which learns both ends of the model anew',
        )
    if "labels" not in reset:
        _require_common_classes(base, target)


def _first_difference(
    base: DiTConfig | UViTConfig, target: DiTConfig | UViTConfig, ignored: Collection[str] = ()
) -> str | None:
    """Return the first field that must be equal in a model and its start, and is not; None if all are."""
    own = {"dit": DIT_FIELDS, "uvit": UVIT_FIELDS}[base.architecture] if type(base) is type(target) else ()
    names = (name for name in (*SHARED_FIELDS, *own) if name not in ignored)
    return next((name for name in names if getattr(base, name) != getattr(target, name)), None)


def _require_equal_fields(base: DiTConfig | UViTConfig, target: DiTConfig | UViTConfig, reset: Collection[str]) -> None:
    name = _first_difference(base, target)
    if name is not None:
        expected, found = getattr(base, name), getattr(target, name)
        change = f"remove model.{name}" if expected is None else f"set model.{name} = {_toml(expected)}"
        named = ", or the model.name that has it" if name in SIZE_FIELDS else ""
        raise InvalidInput(
            f"model.{name}: found {found!r}",
            f"{expected!r}, as in the checkpoint of train.start",
            f"{change}{named}, or train without train.start",
        )
    if isinstance(base, DiTConfig) and isinstance(target, DiTConfig) and "positions" not in reset:
        if base.position != target.position:
            raise InvalidInput(
                f"model.position: found {target.position!r}",
                f"{base.position!r}, as in the checkpoint of train.start",
                f'set model.position = "{base.position}", or train.start.reset = ["positions"]',
            )


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def meaning_of(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of an objective on which the meaning of a network's inputs and outputs depends."""
    defaults = OBJECTIVE_DEFAULTS[objective["kind"]]
    return {"kind": objective["kind"]} | {name: objective.get(name) or value for name, value in defaults.items()}


def _require_equal_objective(base: Mapping[str, Any], target: Mapping[str, Any], reset: Collection[str]) -> None:
    if "objective" in reset:
        return
    expected, found = meaning_of(base), meaning_of(target)
    for name in expected.keys() | found.keys():
        values = expected.get(name), found.get(name)
        # Channels of learned sigma are added or dropped, and no other output is concerned.
        if values[0] == values[1] or (name == "variance" and "learned_range" in values):
            continue
        if name != "kind" and base["kind"] != target["kind"]:
            continue  # the kind itself is reported
        raise InvalidInput(
            f"objective.{name}: found {values[1]!r}",
            f"{values[0]!r}, as in the checkpoint of train.start",
            f'set objective.{name} = "{values[0]}", or train.start.reset = ["objective"] to continue with another'
            " objective; of a weights file that records none, train.start.objective says which it is",
        )


def _require_common_classes(base: TrainedModel, target: TrainedModel) -> None:
    """Raise InvalidInput if the two models have no class in common, and one of them has classes."""
    num_base, num_target = base.config.num_classes, target.config.num_classes
    if num_base == num_target == 0:
        return
    if not num_base or not num_target:
        found, expected = ("classes", "none") if num_base else ("no classes", f"{num_target}, as the images have")
        raise InvalidInput(f"train.start: found a model with {found}", expected, 'set train.start.reset = ["labels"]')
    if all(match is None for match in match_names(base.class_names, target.class_names)):
        raise InvalidInput(
            f"train.start: found a model of the classes {shorten(base.class_names)}, none of which the images have",
            f"some of {shorten(target.class_names)}",
            'set train.start.reset = ["labels"] to learn all classes anew, or correct images.class_names',
        )
