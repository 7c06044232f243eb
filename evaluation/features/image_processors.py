"""Image processors of transformers: what they do to an image by their parameters, and whether that is all they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from evaluation.features.image_preprocessing import Interpolation, Preprocessing
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

_INTERPOLATIONS: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of interpolations."""
_BILINEAR = 2
"""Interpolation of processors that name none."""
_CONVNEXT_WARPS = 384
"""Size from which ConvNeXT crops nothing; below it, it keeps the share crop_pct of a larger image."""
_MAX_GREY_LEVELS = 1.0
"""Largest mean difference from the processor: rounding to grey levels makes 0.4, and other steps make more than 3."""
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
"""Steps of image processors that are supported."""


def preprocessing_of(name: str, values: Mapping[str, Any]) -> Preprocessing:
    """Return what an image processor's parameters say. values: all of them, with those that its class implies.

    Raises InvalidInput for steps and sizes that are not supported.
    """
    other = sorted(key for key, value in values.items() if key.startswith("do_") and value and key not in _STEPS)
    size, crop = _plain(values.get("size")), _plain(values.get("crop_size"))
    resample = values.get("resample")
    interpolation = _INTERPOLATIONS.get(_BILINEAR if resample is None else int(resample))
    if other or (values.get("do_resize") and (interpolation is None or not (_is_square(size) or _is_exact(size)))):
        raise _unsupported(
            f"{name}: found an image processor with {', '.join(other) or f'size {size}, {interpolation}'}"
        )
    normalised = values.get("do_normalize")
    if normalised and None in (values.get("image_mean"), values.get("image_std")):
        raise _unsupported(f"{name}: found an image processor without image_mean or image_std")
    resize = (_pair(size) if _is_exact(size) else size["shortest_edge"]) if values.get("do_resize") else None
    kept = _pair(crop) if values.get("do_center_crop") else None
    if values.get("crop_pct") and isinstance(resize, int) and resize < _CONVNEXT_WARPS:
        resize, kept = int(resize / values["crop_pct"]), kept or (resize, resize)
    return Preprocessing(
        resize=resize,
        crop=kept,
        rounds_crop=False,
        interpolation=interpolation or "bilinear",
        scale=float(values.get("rescale_factor") or 1 / 255) if values.get("do_rescale") else 1.0,
        mean=_three(values["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=_three(values["image_std"]) if normalised else (1.0, 1.0, 1.0),
    )


def require_agreement(name: str, preprocessing: Preprocessing, process: Callable[[Image.Image], Any]) -> None:
    """Raise InvalidInput unless an image processor does the same to square images of noise, a small and a large one.

    The parameters of a processor do not tell all that its class does. process: it, which returns pixels (1, 3, h, w).
    """
    import numpy as np
    import torch
    from PIL import Image

    target = preprocessing.resize or preprocessing.crop or 224
    side = target if isinstance(target, int) else max(target)
    for probe in (side * 7 // 10 | 1, side * 13 // 10 | 1):
        if preprocessing.resize is None and preprocessing.crop is not None and probe < side:
            continue  # such images are refused where they are scored
        pixels = np.random.RandomState(0).randint(0, 256, (probe, probe, 3), dtype=np.uint8)
        ours = preprocessing(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        try:
            theirs = torch.as_tensor(process(Image.fromarray(pixels))).float()
        except Exception as error:  # of any kind: processors of documents and videos expect other inputs
            reason = " ".join(str(error).split())[:200]
            raise _unsupported(f"{name}: found an image processor that fails for an image ({reason})") from error
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} where its parameters give {tuple(ours.shape)}"
            raise _unsupported(f"{name}: found an image processor that makes {shapes}")
        std = ours.new_tensor(preprocessing.std)[:, None, None]
        levels = float(((ours - theirs).abs() * std).mean() / preprocessing.scale)
        if not levels < _MAX_GREY_LEVELS:
            raise _unsupported(
                f"{name}: found an image processor that differs from what its parameters say ({preprocessing}) by "
                f"{levels:.3g} grey levels on average"
            )


def _unsupported(found: str) -> InvalidInput:
    return InvalidInput(
        found,
        "resize to a height and width or a shortest edge, centre crop, rescale and normalise alone",
        "choose another model, or wrap it in a function of yours (MODULE:FUNCTION)",
    )


def _plain(size: Any) -> dict[str, int]:
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _is_square(size: dict[str, int]) -> bool:
    return size.keys() == {"shortest_edge"}


def _is_exact(size: dict[str, int]) -> bool:
    return size.keys() == {"height", "width"}


def _pair(size: dict[str, int]) -> tuple[int, int]:
    return size["height"], size["width"]


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if isinstance(values, list | tuple) else (float(values),) * 3
