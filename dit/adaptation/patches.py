"""The two ends of a model at another patch size, and with or without learned sigma.

The embedding of patches is resampled as in FlexiViT: a patch that is enlarged bilinearly has the token that it had
before. For smaller patches, the tokens are the nearest ones in the least-squares sense. The final layer predicts what
it predicted before, resized in the same way: a larger patch is enlarged, a smaller one averaged.

Source: Beyer et al. 2023, section 3.4 (https://arxiv.org/abs/2212.08013), for the embedding.
Shapes: a patch of side p has channels C; D is the width of tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.adaptation.draft_weights import Draft, TrainedModel

EMBEDDINGS = ("x_embedder.proj.weight", "head.x_embedder.proj.weight", "patch_embed.proj.weight")
FINAL_LAYERS = ("final_layer.linear", "decoder_pred")


def adapt_sigma(draft: Draft, base: TrainedModel, target: TrainedModel) -> None:
    """Add or drop the channels of the learned variance.

    New ones predict zero, as in an untrained model: the variance in the middle of its range.
    """
    old, new = base.config.out_channels, target.config.out_channels
    if old == new:
        return
    note = "without the channels of learned sigma" if new < old else "channels of learned sigma start at zero"
    for name in _final_tensors(draft):
        patches = draft.weights[name].unflatten(0, (-1, old))  # (p * p, channels, ...)
        if new < old:
            patches = patches[:, :new]
        else:
            zeros = patches.new_zeros(len(patches), new - old, *patches.shape[2:])
            patches = torch.cat([patches, zeros], dim=1)
        draft.change(name, patches.flatten(0, 1).contiguous(), note)


def adapt_patch_size(draft: Draft, base: TrainedModel, target: TrainedModel) -> None:
    """Resample the embedding and the final layer for another patch size."""
    old, new = base.config.patch_size, target.config.patch_size
    if old == new:
        return
    note = f"patch size {old} -> {new}"
    for name in EMBEDDINGS:
        if name in draft.weights:
            draft.change(name, resample_embedding(draft.weights[name], new), note)
    for name in _final_tensors(draft):
        draft.change(name, resample_output(draft.weights[name], target.config.out_channels, new), note)


def _final_tensors(draft: Draft) -> list[str]:
    names = [f"{layer}.{kind}" for layer in FINAL_LAYERS for kind in ("weight", "bias")]
    # The final layer of a U-ViT is a convolution on latents, which has no patches.
    return [name for name in names if name in draft.weights]


def resize_matrix(old: int, new: int) -> Tensor:
    """Return the matrix (new², old²), float64, that resizes a patch of side `old` to side `new` bilinearly.

    A smaller patch is antialiased, so that it averages all pixels of the larger one.
    """
    pixels = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    resized = F.interpolate(pixels, size=(new, new), mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(1).T


def resample_embedding(weight: Tensor, patch_size: int) -> Tensor:
    """Resample a patch projection (D, C, p, p) to another patch size p', by the pseudo-inverse of the resizing.

    Source: Beyer et al. 2023, eq. 1: the w' for which <x, w> and <B x, w'> differ least over patches x.
    """
    matrix = resize_matrix(weight.shape[-1], patch_size)
    resampled = weight.double().flatten(2) @ torch.linalg.pinv(matrix)  # (D, C, p'^2)
    return resampled.unflatten(2, (patch_size, patch_size)).to(weight.dtype)


def resample_output(tensor: Tensor, channels: int, patch_size: int) -> Tensor:
    """Resample the weight (p * p * C, D) or the bias (p * p * C,) of the final linear layer to another patch size p'.

    Its output is then the patch that it was, resized. Within a patch, channels vary fastest.
    """
    pixels = tensor.double().unflatten(0, (-1, channels))  # (p * p, C, ...)
    matrix = resize_matrix(round(len(pixels) ** 0.5), patch_size)
    return torch.tensordot(matrix, pixels, 1).flatten(0, 1).to(tensor.dtype)
