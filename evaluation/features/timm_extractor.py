"""Models of timm as extractors: timm:NAME, the pooled features before the classifier.

Weights are files on this machine: in the Hugging Face cache, where timm or `hf download` put them, or at the path that
is given. Sizes, crop, interpolation and normalisation are those of timm's own data configuration.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.features.extractor_names import TIMM
from evaluation.features.image_preprocessing import Preprocessing
from evaluation.features.networks import Network, Outputs
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FILES = ("model.safetensors", "pytorch_model.bin")


def timm_preprocessing(name: str) -> Preprocessing:
    """Return what timm does to an image before it evaluates a model. Raises InvalidInput for what is not supported."""
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=_config(name).to_dict())
    channels, height, width = data["input_size"]
    size = tuple(math.floor(side / data["crop_pct"]) for side in (height, width))
    squashed = data["crop_mode"] == "squash"
    known = data["crop_mode"] in ("center", "squash") and data["interpolation"] in ("nearest", "bilinear", "bicubic")
    if channels != 3 or not known or (size[0] != size[1] and not squashed):
        raise InvalidInput(
            f"{name}: found the data configuration {data}",
            "three channels, a square or squashed centre crop, and nearest, bilinear or bicubic interpolation",
            "choose another model, or wrap it in a function of yours (MODULE:FUNCTION)",
        )
    return Preprocessing(
        resize=(size[0], size[1]) if squashed else size[0],
        crop=(height, width),
        interpolation=data["interpolation"],
        scale=1 / 255,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def find_cached_file(name: str) -> Path:
    """Return the file of a model's published weights on this machine. Raises NotFound if it is not there."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    config = _config(name)
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        for file in (config.hf_hub_filename,) if config.hf_hub_filename else _FILES:
            found = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        source = f"`hf download {config.hf_hub_id}`"
    else:
        source = config.url or "the model's page"
        if (path := Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name).is_file():
            return path
    raise NotFound(
        f"no weights of {name} on this machine, neither in the Hugging Face cache nor in torch's",
        "the published weights",
        f"Get them with {source} on a machine with network and copy its cache here, or set "
        f'evaluate.extractor_weights to their path, such as extractor_weights = {{ "{name}" = "model.safetensors" }}',
    )


def build_timm(name: str, path: Path, device: torch.device) -> Network:
    """Build a model with the weights in a file. Raises InvalidInput if they are those of another network."""
    import timm
    import torch

    config, prepare = _config(name), timm_preprocessing(name)
    classes = _num_classes(config, path)
    try:
        model: Any = timm.create_model(
            name.removeprefix(TIMM),
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path), "num_classes": classes},
            num_classes=classes,
        )
    except (RuntimeError, KeyError) as error:
        details = " ".join(str(error).split())[:200]
        found = f"{path} holds weights of another network ({details}...)"
        raise InvalidInput(found, f"those of {name}", "correct the path") from error
    model.float().eval().requires_grad_(False).to(device)

    def forward(images: Tensor) -> Outputs:
        return Outputs(model.forward_head(model.forward_features(prepare(images)), pre_logits=True))

    height, width = prepare.crop or (1, 1)
    with torch.inference_mode():
        features = forward(torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device)).features
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise InvalidInput(f"{name}: found features of shape {shape}", "pooled ones (N, D)", "choose another model")
    return Network(forward, feature_dim=features.shape[1], num_logits=0)


def _num_classes(config: Any, path: Path) -> int:
    """Return the classes of the classifier in a file of weights, which is often that of a user's own training."""
    from timm.models import load_state_dict

    if config.label_offset or not isinstance(config.classifier, str) or path.suffix in (".npz", ".npy"):
        return config.num_classes
    weight = load_state_dict(str(path)).get(f"{config.classifier}.weight")
    return config.num_classes if weight is None else len(weight)


def _config(name: str) -> Any:
    """Return timm's record of a model and its weights. Raises NotFound without timm, InvalidInput for another name."""
    try:
        import timm
        from timm.models import get_pretrained_cfg, is_model
    except ImportError:
        raise NotFound(
            f"the package timm is not installed, and {name!r} needs it",
            "timm 1.0 or newer",
            "run `pip install 'raydit[extractors]'`",
        ) from None
    model = name.removeprefix(TIMM)
    config = get_pretrained_cfg(model) if is_model(model) else None
    if config is None:
        close = difflib.get_close_matches(model, timm.list_models(include_tags=True), n=1)
        hint = f"Did you mean {TIMM}{close[0]}?" if close else "see timm.list_models()"
        raise InvalidInput(f"the extractor {name!r}", f"a model of timm {timm.__version__}", hint)
    return config
