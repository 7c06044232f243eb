"""Image processors of transformers: read from their parameters, and compared with the processors themselves."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.features.image_processors import preprocessing_of, require_agreement
from raydit.errors import InvalidInput

VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 48, "width": 48},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}
EDGE = VIT | {"size": {"shortest_edge": 48}}
CONVNEXT = EDGE | {"crop_pct": 0.875, "resample": 3}


def processor(resize, crop=None, resample=2, again=False, offset=0.0):
    """Return what a library does to a square image, with PIL. again: std divides twice. offset: added at the end."""

    def process(image):
        image = image.resize((resize, resize), resample)
        low = 0 if crop is None else (resize - crop) // 2
        pixels = np.asarray(image)[low : low + (crop or resize), low : low + (crop or resize)].astype(np.float32)
        std = np.float32(VIT["image_std"])
        normalised = (pixels / 255 - np.float32(VIT["image_mean"])) / std
        return torch.from_numpy((normalised / std if again else normalised) + offset).permute(2, 0, 1)[None]

    return process


@pytest.mark.parametrize(
    ("values", "steps", "library"),
    [
        (VIT, "resize to 48 x 48, bilinear, antialiased", processor(48)),
        (VIT | {"resample": None}, "resize to 48 x 48, bilinear, antialiased", processor(48)),
        (VIT | {"resample": 0}, "resize to 48 x 48, nearest", processor(48, resample=0)),
        (EDGE | {"resample": 3}, "resize to shorter side 48, bicubic, antialiased", processor(48, resample=3)),
        (
            EDGE | {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            "resize to shorter side 48, bilinear, antialiased; centre crop 32 x 32, truncated",
            processor(48, 32),
        ),
        (
            CONVNEXT,  # int(48 / 0.875) = 54
            "resize to shorter side 54, bicubic, antialiased; centre crop 48 x 48, truncated",
            processor(54, 48, resample=3),
        ),
        (
            CONVNEXT | {"size": {"shortest_edge": 384}},
            "resize to shorter side 384, bicubic, antialiased",
            processor(384, resample=3),
        ),
    ],
)
def test_parameters_give_what_the_processor_does(values, steps, library):
    found = preprocessing_of("transformers:x", values)
    assert str(found) == f"{steps}; scale 0.00392156863, mean 0.5 0.4 0.3, std 0.5 0.25 0.2"
    require_agreement("transformers:x", found, library)


def fails(image):
    raise RuntimeError("expected\n boxes")


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (processor(55, 48), "differs from what its parameters say .resize to .* grey levels on average"),
        (processor(48, resample=3), "differs from what its parameters say"),
        (processor(48, again=True), "differs from what its parameters say"),
        (processor(48, offset=-1.0), "differs from what its parameters say"),
        (processor(48, offset=np.nan), "differs from .* by nan grey levels"),
        (processor(49), r"makes \(1, 3, 49, 49\) where its parameters give \(1, 3, 48, 48\)"),
        (fails, "fails for an image .expected boxes"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(library, message):
    with pytest.raises(InvalidInput, match=f"^transformers:x: found an image processor that {message}.*MODULE:FUNC"):
        require_agreement("transformers:x", preprocessing_of("transformers:x", VIT), library)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": True}, "with do_pad"),
        ({"resample": 1}, "with size .*, None"),
        ({"size": {"longest_edge": 48}}, "with size {'longest_edge': 48}"),
        ({"image_mean": None}, "without image_mean or image_std"),
    ],
)
def test_parameters_that_are_not_supported_are_refused(changes, message):
    with pytest.raises(InvalidInput, match=f"transformers:x: found an image processor {message}"):
        preprocessing_of("transformers:x", VIT | changes)


def test_a_processor_that_only_crops_is_compared_on_images_that_are_large_enough():
    values = EDGE | {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
    sizes = []

    def library(image):
        sizes.append(image.size)
        margin = (image.width - 48) // 2
        return processor(48)(image.crop((margin, margin, margin + 48, margin + 48)))

    require_agreement("transformers:x", preprocessing_of("transformers:x", values), library)
    assert sizes == [(63, 63)]


# The library itself


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ViT", {"resample": 0}, None),
        ("CLIP", {}, None),
        ("Siglip", {}, None),
        ("ConvNext", {"size": {"shortest_edge": 224}}, None),
        ("ConvNext", {}, None),
        ("Levit", {}, "differs from what its parameters say"),
        ("EfficientNet", {}, "differs from what its parameters say"),
        ("VideoMAE", {}, r"makes \(1, 1, 3, 224, 224\)"),
    ],
)
def test_processors_of_the_library(tmp_path, kind, options, message):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from evaluation.features.transformers_extractor import read_preprocessing

    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    processor.save_pretrained(tmp_path)
    if message is not None:
        with pytest.raises(InvalidInput, match=message):
            read_preprocessing("transformers:x", tmp_path)
        return
    prepare = read_preprocessing("transformers:x", tmp_path)
    pixels = np.random.RandomState(1).randint(0, 256, (256, 256, 3), dtype=np.uint8)
    theirs = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    ours = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() < 0.01
