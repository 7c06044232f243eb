"""Users' functions as extractors: found by name, identified by their source, and tried before any work."""

import hashlib
import os

import numpy as np
import pytest
import torch

from evaluation.extractors import create_extractor, fetch_weights, identify_extractor
from evaluation.features.function_extractor import MODULES_VARIABLE
from raydit.errors import InvalidInput, NotFound

GOOD = """
import torch

def means(images):
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    return images.float().mean(dim=(2, 3))

def arrays(images):
    return images.float().mean(dim=(2, 3)).numpy().astype("float64")

def large(images):
    assert images.shape[2] == 96
    return images.float().mean(dim=(2, 3))

def noisy(images):
    return images.float().mean(dim=(2, 3)) + 1e-2 * torch.rand(len(images), 3)

def normalised(images):
    features = images.float().mean(dim=(2, 3))
    return features - features.mean(dim=0)

def flat(images):
    return images.float().mean(dim=(1, 2, 3))

def divided(images):
    return images.float().mean(dim=(2, 3)) / 0

def failing(images):
    return {}["scale"] * images

def listed(images):
    return ["one"] * len(images)

threshold = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The name of a module in the working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"features_{os.getpid()}_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(GOOD)
    return name


def images(n=5, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("function", ["means", "arrays"])
def test_a_function_extracts_features_in_float32(module, tmp_path, function):
    name, x = f"{module}:{function}", images()
    extractor = create_extractor(name)
    found = extractor(x)
    np.testing.assert_allclose(found.features, x.float().mean(dim=(2, 3)), rtol=1e-6)
    assert found.features.dtype == np.float32 and (found.logits, found.spatial) == (None, None)
    sha256 = hashlib.sha256((tmp_path / f"{module}.py").read_bytes()).hexdigest()
    assert (extractor.name, extractor.weights_sha256, extractor.feature_dim) == (name, sha256, 3)
    assert identify_extractor(name) == (name, sha256, None)


def test_it_is_tried_on_images_of_the_size_that_it_will_get(module):
    assert create_extractor(f"{module}:large", image_size=96).feature_dim == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("noisy", "other features at a second call on the same images, expected a deterministic function.*eval"),
        ("normalised", "features of an image that depend on the other images of its batch"),
        ("flat", r"an output of shape \(4,\) for 4 images, expected \(N, D\)"),
        ("divided", "features with NaN or infinity, expected finite numbers"),
        ("failing", r"a function that fails on 4 uint8 images of \d+ px \(KeyError: 'scale'\), expected features"),
        ("listed", r"a function that fails on 4 uint8 images of \d+ px \(.*Error: .*\), expected features \(N, D\)"),
        ("meens", r"no function 'meens' in .*expected one of its means, arrays"),
        ("threshold", "no function 'threshold'"),
    ],
)
def test_functions_that_would_give_wrong_scores_are_refused_before_the_work(module, function, message):
    with pytest.raises(InvalidInput, match=f"the extractor '{module}:{function}': found {message}"):
        create_extractor(f"{module}:{function}")


def test_a_changed_source_is_another_extractor(module, tmp_path):
    name = f"{module}:means"
    before, x = create_extractor(name), images()
    path = tmp_path / f"{module}.py"
    path.write_text(GOOD.replace("return images.float().mean(dim=(2, 3))\n", "return images.float().amax((2, 3))\n", 1))
    after = create_extractor(name)
    assert after.weights_sha256 != before.weights_sha256
    np.testing.assert_array_equal(after(x).features, x.float().amax(dim=(2, 3)))
    with pytest.raises(InvalidInput, match=f"has sha256 {after.weights_sha256} .*expected {before.weights_sha256}, as"):
        create_extractor(name, sha256=before.weights_sha256)


def test_modules_are_found_in_a_package_and_where_a_job_was_submitted(module, tmp_path, monkeypatch):
    package = tmp_path / f"{module}_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(GOOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    name = f"{module}_package.inner:means"
    with pytest.raises(NotFound, match=f"no module '{module}_package.inner' for the extractor.*raydit submit"):
        fetch_weights(name)
    monkeypatch.setenv(MODULES_VARIABLE, str(tmp_path))
    assert fetch_weights(name) == package / "inner.py" and create_extractor(name).feature_dim == 3


def test_what_cannot_be_imported_is_named(tmp_path, monkeypatch, module):
    (tmp_path / f"{module}_broken.py").write_text("raise RuntimeError('no licence')")
    with pytest.raises(InvalidInput, match=r"found a module that fails \(RuntimeError: no licence\)"):
        create_extractor(f"{module}_broken:f")
    with pytest.raises(InvalidInput, match="extractor_weights: found 'w.pth' for the function"):
        create_extractor(f"{module}:means", "w.pth")
    with pytest.raises(InvalidInput, match="a module with Python source"):
        fetch_weights("_socket:socket")
