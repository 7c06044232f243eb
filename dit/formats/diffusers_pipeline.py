"""DiT pipelines of diffusers: folders with transformer/, vae/, scheduler/ and model_index.json.

diffusers' DiTTransformer2DModel is the adaLN-Zero model with two differences from the official code, even for weights
that were converted from it: the frequencies of the timestep embedding are spaced over 127 steps instead of 128
(outputs differ by more than 1), and the norm before each MLP has an epsilon of 1e-5 unless its config says otherwise.
DiTConfig has a field for each, so that either computation can be reproduced exactly. Weights do not reveal which one
they were trained with.

A model with frequency shift 1 is written as a plain pipeline. One with shift 0, as in the official code, is written
with a class of its own, which diffusers loads with trust_remote_code=True and refuses to load without it.
"""

import inspect
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.autoencoder import Autoencoder, describe_autoencoder, save_autoencoder
from dit.autoencoders.kinds import KINDS, autoencoder_class, latent_channels
from dit.autoencoders.latent_scale import LatentScale, scaling_factor
from dit.config import NORM_EPS, DiTConfig, Numerics, UViTConfig
from dit.formats.diffusers_files import find_weights
from dit.formats.diffusers_weights import PIPELINE_NULL_CLASS, from_diffusers, to_diffusers
from dit.formats.digests import read_object
from dit.formats.foreign_weights import to_float32
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file

CUSTOM_MODULE_NAME, CUSTOM_CLASS_NAME = "official_dit", "OfficialDiT"
CUSTOM_NORM_TYPE = "ada_norm_zero_official"
"""Recorded for this class, so that diffusers' own, which would compute something else, refuses the config."""
CUSTOM_MODULE = f'''"""diffusers' DiT with the timestep frequencies of the official code."""

import functools

from diffusers import DiTTransformer2DModel


class {CUSTOM_CLASS_NAME}(DiTTransformer2DModel):
    @functools.wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{{**kwargs, "norm_type": "ada_norm_zero"}})
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
'''
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
FIXED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
"""Fields of diffusers' config, with the only values that DiT implements."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusion transformer read from a pipeline folder; weights have official names and are in float32."""

    config: DiTConfig
    objective: dict[str, Any]
    weights: dict[str, Tensor]
    class_names: list[str]
    taken: str
    """What was taken from the folder, in words; empty if the weights are one file in float32."""

    @property
    def numerics(self) -> Numerics:
        """The code that computes the same as this configuration."""
        return "diffusers" if self.config.timestep_frequency_shift else "official"


def write_pipeline(
    folder: Path,
    config: DiTConfig | UViTConfig,
    objective: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    class_names: Sequence[str],
    autoencoder: Path,
    scale: LatentScale,
) -> None:
    """Write a DiTPipeline into `folder`.

    weights: by official names. autoencoder: a diffusers folder. scale: that of the latents the model was trained on.
    Raises InvalidInput if a DiTPipeline cannot compute what the configuration and the objective describe, or if the
    autoencoder cannot absorb the scale.
    """
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    from diffusers import __version__ as diffusers_version

    config = check_expressible(config, objective)
    fields, state = to_diffusers(config, weights)
    with torch.device("meta"):
        transformer: Any = DiTTransformer2DModel(**fields)
    transformer.load_state_dict(state, assign=True)
    transformer.save_pretrained(folder / "transformer")
    scheduler: Any = DDIMScheduler(
        **SCHEDULES[objective.get("schedule", "linear")],
        prediction_type=PREDICTIONS[objective.get("prediction", "eps")],
        clip_sample=False,
    )
    scheduler.save_pretrained(folder / "scheduler")
    write_autoencoder(autoencoder, folder / "vae", scale)
    custom = config.timestep_frequency_shift == 0
    if custom:
        (folder / "transformer" / f"{CUSTOM_MODULE_NAME}.py").write_text(CUSTOM_MODULE)
        _update_json(folder / "transformer" / "config.json", _class_name=CUSTOM_CLASS_NAME, norm_type=CUSTOM_NORM_TYPE)
    names = class_names or [str(label) for label in range(config.num_classes)]
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers_version,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": [CUSTOM_MODULE_NAME, CUSTOM_CLASS_NAME] if custom else ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", describe_autoencoder(autoencoder)["class"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_expressible(config: DiTConfig | UViTConfig, objective: Mapping[str, Any]) -> DiTConfig:
    """Return the configuration if a DiTPipeline can compute what it describes; raise InvalidInput otherwise.

    The message names the first field that cannot be expressed.
    """
    if isinstance(config, UViTConfig):
        raise InvalidInput("a U-ViT, which DiTPipeline cannot run", "a DiT", "use --format official instead")
    wanted: dict[str, tuple[Any, Any]] = {
        "objective kind": (objective["kind"], "diffusion"),
        "conditioning": (config.conditioning, "adaln_zero"),
        "qk_norm": (config.qk_norm, False),
        "norm": (config.norm, "layer"),
        "mlp": (config.mlp, "gelu"),
        "position": (config.position, "sincos"),
        "head_width": (config.head_width, None),
        "MLP width": (config.mlp_size, 4 * config.hidden_size),
        "width of the latents": (config.latent_size[1], config.latent_size[0]),
        "num_timesteps": (objective.get("num_timesteps", 1000), 1000),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise InvalidInput(
                f"DiTPipeline cannot express {name} = {found!r}",
                f"{expected!r}",
                "use --format official, or keep the checkpoint as it is",
            )
    if config.num_classes > PIPELINE_NULL_CLASS:
        raise InvalidInput(
            f"found {config.num_classes} classes",
            f"at most {PIPELINE_NULL_CLASS}, because DiTPipeline uses class {PIPELINE_NULL_CLASS} for no label",
            "use --format official instead",
        )
    return config


def read_pipeline(folder: str | Path, numerics: Numerics = "diffusers") -> Pipeline:
    """Read a pipeline folder without running code from it.

    numerics: "diffusers" computes the same as diffusers with these files. "official" is for weights converted from
    official ones, such as facebook/DiT-XL-2-256, and computes the same as the official code. It has no effect on a
    pipeline that raydit wrote with the official frequencies.
    Raises NotFound if a file is missing, and InvalidInput for pipelines that cannot be imported.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json", folder)
    named = index.get("transformer")
    kind = tuple(map(str, named)) if isinstance(named, list) else ()
    custom = kind == (CUSTOM_MODULE_NAME, CUSTOM_CLASS_NAME)
    stock = kind in (("diffusers", "DiTTransformer2DModel"), ("diffusers", "Transformer2DModel"))
    if index.get("_class_name") != "DiTPipeline" or not (custom or stock):
        raise InvalidInput(
            f"{folder} is not a DiT pipeline: found {index.get('_class_name')} with transformer "
            f"{'.'.join(kind) or None}",
            "DiTPipeline with diffusers.DiTTransformer2DModel",
            "choose a DiT pipeline: no others can be imported",
        )
    fields = _transformer_defaults() | _read_json(folder / "transformer" / "config.json", folder)
    for name, expected in FIXED.items():
        if fields[name] != expected:
            raise InvalidInput(
                f"{folder}/transformer/config.json: found {name} = {fields[name]!r}",
                f"{expected!r}",
                "choose another pipeline: this one cannot be imported",
            )
    if custom:
        numerics_fields = {"timestep_frequency_shift": 0, "mlp_norm_eps": fields["norm_eps"]}
    elif numerics == "diffusers":
        numerics_fields = {"timestep_frequency_shift": 1, "mlp_norm_eps": fields["norm_eps"]}
    else:
        numerics_fields = {"timestep_frequency_shift": 0, "mlp_norm_eps": NORM_EPS}
    names = _class_names(index, folder)
    files = find_weights(folder / "transformer")
    state = files.read()
    taken = files.describe(state)
    state = to_float32(state, files.index or files.files[0])
    config, weights = from_diffusers({**fields, **numerics_fields}, state, None if names is None else len(names))
    class_names = [(names or {}).get(str(label), str(label)) for label in range(config.num_classes)]
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    return Pipeline(config, _objective(scheduler, config.learn_sigma), weights, class_names, taken)


def _class_names(index: Mapping[str, Any], folder: Path) -> dict[str, str] | None:
    """Return the names of the classes by their labels, as texts; None if a model_index.json has none."""
    names = index.get("id2label")
    if names is None or isinstance(names, dict) and all(isinstance(name, str) for name in names.values()):
        return names
    raise InvalidInput(
        f"{folder}/model_index.json: found id2label {str(names)[:80]}", "names by their labels", "correct id2label"
    )


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise NotFound(
            f"{folder} is not a diffusers pipeline: found no {file.relative_to(folder)}",
            "a folder with model_index.json, transformer/, vae/ and scheduler/, as save_pretrained writes it",
            "check the path",
        )
    refuse_lfs_pointer_file(file, "JSON")
    return read_object(file)


def _transformer_defaults() -> dict[str, Any]:
    """Return the defaults of diffusers' DiTTransformer2DModel, for fields that older configs do not contain."""
    from diffusers import DiTTransformer2DModel

    parameters = inspect.signature(DiTTransformer2DModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _update_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def _objective(scheduler: Mapping[str, Any], learn_sigma: bool) -> dict[str, Any]:
    """Return the objective that a scheduler's config describes. Raises InvalidInput if it cannot be expressed."""
    defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    found = defaults | {name: scheduler[name] for name in defaults if name in scheduler}
    known = {name: defaults | settings for name, settings in SCHEDULES.items()}
    schedule = next((name for name, settings in known.items() if settings == found), None)
    prediction = scheduler.get("prediction_type", "epsilon")
    altered = [name for name in ("trained_betas", "rescale_betas_zero_snr") if scheduler.get(name)]
    if schedule is None or prediction not in PREDICTIONS.values() or altered:
        raise InvalidInput(
            f"the scheduler's noise schedule is not supported: found {found} with prediction_type {prediction!r}"
            f"{''.join(f' and {name}' for name in altered)}",
            f"{' or '.join(map(str, SCHEDULES.values()))}, with 1000 timesteps",
            "choose another pipeline: this one cannot be imported",
        )
    return {
        "kind": "diffusion",
        "schedule": schedule,
        "prediction": next(name for name, diffusers_name in PREDICTIONS.items() if diffusers_name == prediction),
        "variance": "learned_range" if learn_sigma else "fixed_small",
    }


def pipeline_scale(autoencoder: Path) -> LatentScale:
    """Return the scale that DiTPipeline reads from an autoencoder's config: only the scaling factor.

    Raises InvalidInput for a class whose scale is in its weights, where DiTPipeline does not look, and as
    `scaling_factor`.
    """
    config = json.loads((autoencoder / "config.json").read_text())
    name = autoencoder_class(config, autoencoder)
    default = KINDS[name].scaling_factor
    if default is None:
        raise InvalidInput(
            f"DiTPipeline cannot express the scale of {name}, which is in the weights of {autoencoder}",
            "an autoencoder with a scaling_factor",
            "use --format official, or keep the checkpoint as it is",
        )
    factor = scaling_factor(config, default)
    channels = latent_channels(config)
    return LatentScale((0.0,) * channels, (1.0 / factor,) * channels)


def write_autoencoder(source: Path, target: Path, scale: LatentScale) -> None:
    """Copy an autoencoder for a model trained on latents of the given scale, in a form that DiTPipeline reads.

    A scale with means, or with standard deviations that differ by channel, is absorbed by the 1x1 convolutions next
    to the latents, and the scaling factor becomes 1: the same function, up to rounding.
    Raises InvalidInput if there are no such convolutions.
    """
    plain = pipeline_scale(source)
    if not any(scale.mean) and all(map(math.isclose, scale.std, plain.std)):
        weights = find_weights(source)
        target.mkdir(parents=True)
        shutil.copy(source / "config.json", target)
        for file in weights.files if weights.index else ():
            shutil.copy(file, target)
        named = weights.index or weights.files[0]
        # Without the variant in its name, which whoever loads the pipeline would have to know.
        shutil.copy(named, target / (named.name.replace(f".{weights.variant}", "") if weights.variant else named.name))
        return
    module = Autoencoder.load(source).module
    _fold_scale(module, scale)
    module.register_to_config(scaling_factor=1.0, shift_factor=None)
    channels = len(scale.mean)
    save_autoencoder(module, target, LatentScale((0.0,) * channels, (1.0,) * channels))


@torch.no_grad()
def _fold_scale(module: Any, scale: LatentScale) -> None:
    """Change the 1x1 convolutions of an AutoencoderKL in place, so that its latents are the scaled ones."""
    before, after = getattr(module, "quant_conv", None), getattr(module, "post_quant_conv", None)
    if before is None or after is None:
        raise InvalidInput(
            "the latents have a scale per channel, which DiTPipeline cannot express and this autoencoder cannot "
            "absorb: found use_quant_conv or use_post_quant_conv off",
            "both on",
            "use --format official instead",
        )
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scale.mean, scale.std))
    kernel = after.weight.double()[:, :, 0, 0]
    after.bias.copy_(after.bias.double() + kernel @ mean)
    after.weight.copy_(after.weight.double() * std.view(1, -1, 1, 1))
    # Of the moments, means are scaled, and log variances shifted.
    channels = len(mean)
    before.weight[:channels].copy_(before.weight[:channels].double() / std.view(-1, 1, 1, 1))
    before.bias[:channels].copy_((before.bias[:channels].double() - mean) / std)
    before.bias[channels:].sub_(2 * std.log())
