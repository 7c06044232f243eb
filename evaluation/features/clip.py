"""CLIP's vision transformers (Radford et al. 2021, arXiv 2103.00020) as extractors: L2-normalised image embeddings.

The network is torch-fidelity's, and weights are taken in OpenAI's names or in those of transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from evaluation.features.image_preprocessing import Preprocessing
from evaluation.features.networks import Network, Outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from evaluation.features.networks import StateDict

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_OF_TRANSFORMERS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # as transformers spells it
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of the names of weights in transformers, and OpenAI's."""


def build_clip(
    state_dict: StateDict, device: torch.device, *, size: int, patch: int, width: int, depth: int, dim: int
) -> Network:
    """Build a vision transformer of CLIP: `dim` features of length 1.

    Input: bicubic resize to size x size, antialiased and clamped, then CLIP's mean and standard deviation: of square
    images that is what CLIP and CMMD do. torch-fidelity resizes otherwise, so its distances by CLIP are others.
    """
    import torch
    import torch.nn.functional as F
    from torch_fidelity.feature_extractor_clip import VisionTransformer

    weights = vision_weights(state_dict)
    with torch.device("meta"):
        network = VisionTransformer(size, patch, width, depth, width // 64, dim)
    network.load_state_dict(weights, assign=True)
    network.float().eval().requires_grad_(False).to(device)
    prepare = Preprocessing(
        resize=(size, size), crop=None, interpolation="bicubic", scale=1 / 255, mean=_MEAN, std=_STD
    )

    def forward(images: Tensor) -> Outputs:
        return Outputs(F.normalize(network(prepare(images)), dim=1))

    return Network(forward, feature_dim=dim, num_logits=0)


def vision_weights(state_dict: StateDict) -> StateDict:
    """Return the weights of the vision transformer in OpenAI's names, whoever wrote the file."""
    if any(name.startswith("vision_model.") for name in state_dict):
        return _from_transformers(state_dict)
    visual = {name.removeprefix("visual."): value for name, value in state_dict.items() if name.startswith("visual.")}
    return visual or state_dict


def _from_transformers(state_dict: StateDict) -> StateDict:
    import torch

    weights, attention = {}, {}
    for name, value in state_dict.items():
        if name == "visual_projection.weight":
            weights["proj"] = value.T.contiguous()
        if not name.startswith("vision_model.") or name.endswith("position_ids"):
            continue
        for theirs, openai in _OF_TRANSFORMERS.items():
            name = name.replace(theirs, openai)
        name = name.removeprefix("vision_model.")
        if match := re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name):
            attention[f"{match[1]}in_proj_{match[3]}", match[2]] = value
        else:
            weights[name] = value
    for name in {name for name, _ in attention}:
        weights[name] = torch.cat([attention[name, part] for part in "qkv"])
    return weights


def clip_macs(*, size: int, patch: int, width: int, depth: int, dim: int) -> int:
    """Return the multiply-accumulates of a vision transformer's convolution and matrix products for one image."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return patches * 3 * patch**2 * width + depth * block + width * dim
