"""DiT pipelines of diffusers: folders with transformer/, vae/, scheduler/ and model_index.json, read and written.

diffusers' DiTTransformer2DModel is the adaLN-Zero model with two deviations from the official code, also for weights
that were converted from it: frequencies of the timestep embedding are spaced over 127 steps, not 128 (outputs
differ by more than 1), and the norm before each MLP has an epsilon of 1e-5 unless its config says otherwise. Our
configuration has a field for each, so either computation can be had exactly; weights tell nothing of which one they
were trained with. On the way out, a model with frequency shift 1 becomes a plain pipeline. One with shift 0, the
official code's, comes with a class of its own that diffusers loads with trust_remote_code=True, and without refuses.
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

from dit.autoencoder import (
    SCALING_FACTORS,
    WEIGHTS,
    Autoencoder,
    LatentScale,
    autoencoder_class,
    describe_autoencoder,
    save_autoencoder,
)
from dit.config import NORM_EPS, DiTConfig, Numerics, UViTConfig
from dit.formats.diffusers_weights import PIPELINE_NULL_CLASS, from_diffusers, to_diffusers
from dit.formats.weights import read_weights

MODULE, CLASS = "official_dit", "OfficialDiT"
OWN_NORM_TYPE = "ada_norm_zero_official"
"""Recorded for our class, so that diffusers' own, which would compute something else, refuses to load it."""
OWN_MODULE = f'''"""diffusers' DiT with the timestep frequencies of the official code."""

import functools

from diffusers import DiTTransformer2DModel


class {CLASS}(DiTTransformer2DModel):
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
"""What diffusers lets a DiT's config say, and ours has no other value of."""


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline folder holds of a diffusion transformer; weights by official names, in float32."""

    config: DiTConfig
    objective: dict[str, Any]
    weights: dict[str, Tensor]
    class_names: list[str]


def write_pipeline(
    folder: Path,
    config: DiTConfig | UViTConfig,
    objective: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    class_names: Sequence[str],
    autoencoder: Path,
    scale: LatentScale,
) -> None:
    """Write a DiTPipeline into `folder`; autoencoder is a diffusers folder. Raises as check_expressible does."""
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
    own = config.timestep_frequency_shift == 0
    if own:
        (folder / "transformer" / f"{MODULE}.py").write_text(OWN_MODULE)
        _update_json(folder / "transformer" / "config.json", _class_name=CLASS, norm_type=OWN_NORM_TYPE)
    names = class_names or [str(label) for label in range(config.num_classes)]
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers_version,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": [MODULE, CLASS] if own else ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", describe_autoencoder(autoencoder)["class"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_expressible(config: DiTConfig | UViTConfig, objective: Mapping[str, Any]) -> DiTConfig:
    """The configuration, if DiTPipeline can compute what it describes. Raises ValueError naming what it cannot."""
    if isinstance(config, UViTConfig):
        raise ValueError("DiTPipeline runs no U-ViT: found one, expected a DiT. Export as official instead")
    wanted: dict[str, tuple[Any, Any]] = {
        "objective kind": (objective["kind"], "diffusion"),
        "conditioning": (config.conditioning, "adaln_zero"),
        "qk_norm": (config.qk_norm, False),
        "norm": (config.norm, "layer"),
        "mlp": (config.mlp, "gelu"),
        "position": (config.position, "sincos"),
        "MLP width": (config.mlp_size, 4 * config.hidden_size),
        "width of the latents": (config.latent_size[1], config.latent_size[0]),
        "num_timesteps": (objective.get("num_timesteps", 1000), 1000),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ValueError(
                f"DiTPipeline cannot express {name} = {found!r}: expected {expected!r}. Export as official, or keep "
                "the checkpoint as it is"
            )
    if config.num_classes > PIPELINE_NULL_CLASS:
        raise ValueError(
            f"DiTPipeline takes class {PIPELINE_NULL_CLASS} for no label: found {config.num_classes} classes, expected "
            f"at most {PIPELINE_NULL_CLASS}. Export as official instead"
        )
    return config


def read_pipeline(folder: str | Path, numerics: Numerics = "diffusers") -> Pipeline:
    """Read a pipeline folder; nothing in it is run.

    numerics: "diffusers" computes what diffusers computes with these files. "official" is for weights converted from
    official ones, such as facebook/DiT-XL-2-256, and computes what the official code does. A pipeline written by us
    with the official frequencies has only one answer. Raises FileNotFoundError or ValueError for anything else.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json", folder)
    kind = tuple(index.get("transformer") or ())
    own = kind == (MODULE, CLASS)
    stock = kind in (("diffusers", "DiTTransformer2DModel"), ("diffusers", "Transformer2DModel"))
    if index.get("_class_name") != "DiTPipeline" or not (own or stock):
        raise ValueError(
            f"{folder} is no DiT pipeline: found {index.get('_class_name')} with transformer {'.'.join(kind) or None}, "
            "expected DiTPipeline with diffusers.DiTTransformer2DModel. Other pipelines cannot be imported"
        )
    fields = _transformer_defaults() | _read_json(folder / "transformer" / "config.json", folder)
    for name, expected in FIXED.items():
        if fields[name] != expected:
            raise ValueError(
                f"{folder}/transformer/config.json: found {name} = {fields[name]!r}, expected {expected!r}"
            )
    if own:
        numerics_fields = {"timestep_frequency_shift": 0, "mlp_norm_eps": fields["norm_eps"]}
    elif numerics == "diffusers":
        numerics_fields = {"timestep_frequency_shift": 1, "mlp_norm_eps": fields["norm_eps"]}
    else:
        numerics_fields = {"timestep_frequency_shift": 0, "mlp_norm_eps": NORM_EPS}
    names: dict[str, str] | None = index.get("id2label")
    state = read_weights(_weights_file(folder / "transformer"))
    config, weights = from_diffusers({**fields, **numerics_fields}, state, None if names is None else len(names))
    class_names = [(names or {}).get(str(label), str(label)) for label in range(config.num_classes)]
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    return Pipeline(config, _objective(scheduler, config.learn_sigma), weights, class_names)


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no diffusers pipeline: found no {file.relative_to(folder)}, expected a folder with "
            "model_index.json, transformer/, vae/ and scheduler/, as save_pretrained writes it"
        )
    return json.loads(file.read_text())


def _transformer_defaults() -> dict[str, Any]:
    """diffusers' own defaults, for what older configs leave out."""
    from diffusers import DiTTransformer2DModel

    parameters = inspect.signature(DiTTransformer2DModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _weights_file(folder: Path) -> Path:
    file = folder / f"{WEIGHTS}.safetensors"
    return file if file.is_file() else folder / f"{WEIGHTS}.bin"


def _update_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def _objective(scheduler: Mapping[str, Any], learn_sigma: bool) -> dict[str, Any]:
    """The diffusion that a scheduler's config describes. Raises ValueError for one that ours cannot be."""
    defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    found = defaults | {name: scheduler[name] for name in defaults if name in scheduler}
    known = {name: defaults | settings for name, settings in SCHEDULES.items()}
    schedule = next((name for name, settings in known.items() if settings == found), None)
    prediction = scheduler.get("prediction_type", "epsilon")
    altered = [name for name in ("trained_betas", "rescale_betas_zero_snr") if scheduler.get(name)]
    if schedule is None or prediction not in PREDICTIONS.values() or altered:
        raise ValueError(
            f"the scheduler's noise is none of ours: found {found} with prediction_type {prediction!r}"
            f"{''.join(f' and {name}' for name in altered)}; expected {' or '.join(map(str, SCHEDULES.values()))}, "
            "1000 timesteps. It cannot be imported"
        )
    return {
        "kind": "diffusion",
        "schedule": schedule,
        "prediction": next(ours for ours, theirs in PREDICTIONS.items() if theirs == prediction),
        "variance": "learned_range" if learn_sigma else "fixed_small",
    }


def pipeline_scale(autoencoder: Path) -> LatentScale:
    """The scale that DiTPipeline takes from an autoencoder's config: the factor and nothing else."""
    config = json.loads((autoencoder / "config.json").read_text())
    factor = config.get("scaling_factor") or SCALING_FACTORS[autoencoder_class(config, autoencoder)]
    channels = config["latent_channels"]
    return LatentScale((0.0,) * channels, (1.0 / factor,) * channels)


def write_autoencoder(source: Path, target: Path, scale: LatentScale) -> None:
    """Copy an autoencoder for a model of latents by `scale`, in the form that DiTPipeline reads.

    A scale with means, or a deviation per channel, goes into the 1x1 convolutions next to the latents, after which
    the scaling factor is 1: the same function, to rounding. Raises ValueError if there are no such convolutions.
    """
    plain = pipeline_scale(source)
    if not any(scale.mean) and all(map(math.isclose, scale.std, plain.std)):
        weights = source / f"{WEIGHTS}.safetensors"
        target.mkdir(parents=True)
        for file in (source / "config.json", weights if weights.is_file() else source / f"{WEIGHTS}.bin"):
            shutil.copy(file, target / file.name)
        return
    module = Autoencoder.load(source).module
    _fold_scale(module, scale)
    module.register_to_config(scaling_factor=1.0, shift_factor=None)
    channels = len(scale.mean)
    save_autoencoder(module, target, LatentScale((0.0,) * channels, (1.0,) * channels))


@torch.no_grad()
def _fold_scale(module: Any, scale: LatentScale) -> None:
    """Let an AutoencoderKL's own latents be the scaled ones."""
    before, after = getattr(module, "quant_conv", None), getattr(module, "post_quant_conv", None)
    if before is None or after is None:
        raise ValueError(
            "DiTPipeline knows no scale per channel, and this autoencoder has no 1x1 convolution to take it up: found "
            "use_quant_conv or use_post_quant_conv off, expected both on. Export as official instead"
        )
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scale.mean, scale.std))
    kernel = after.weight.double()[:, :, 0, 0]
    after.bias.copy_(after.bias.double() + kernel @ mean)
    after.weight.copy_(after.weight.double() * std.view(1, -1, 1, 1))
    # Moments: means are scaled, log variances shifted.
    channels = len(mean)
    before.weight[:channels].copy_(before.weight[:channels].double() / std.view(-1, 1, 1, 1))
    before.bias[:channels].copy_((before.bias[:channels].double() - mean) / std)
    before.bias[channels:].sub_(2 * std.log())
