"""Reference files: ours and ADM's."""

import dataclasses
import io

import numpy as np
import pytest

from evaluation.extractors import extractor_sha256
from evaluation.reference import ReferenceStatistics


def reference(**changes):
    rng = np.random.RandomState(0)
    values = {
        "n": 20,
        "mu": rng.randn(4),
        "sigma": np.eye(4),
        "features": rng.randn(20, 4).astype(np.float32),
        "extractor": "efficientnet-lite0",
        "extractor_sha256": "ab",
        "size": 32,
        "crop": "adm",
        "source": "data/digits",
    }
    return ReferenceStatistics(**{**values, **changes})


KEYS = np.array([f"class/é{index}.png" for index in range(20)])


def assert_equal(a, b):
    for field in dataclasses.fields(ReferenceStatistics):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize(
    "changes", [{}, {"features": None, "size": None}, {"mu_s": np.ones(3), "sigma_s": np.eye(3)}, {"keys": KEYS}]
)
def test_a_reference_survives_storage(changes):
    original, file = reference(**changes), io.BytesIO()
    original.save(file)
    loaded = ReferenceStatistics.load(io.BytesIO(file.getvalue()), "reference.npz")
    assert_equal(loaded, original)
    assert loaded.digest == original.digest


def test_digest_is_of_content_not_of_origin():
    assert reference(source="elsewhere").digest == reference().digest
    changed = [{"n": 21}, {"mu": np.zeros(4)}, {"features": None}, {"size": 64}, {"extractor_sha256": "cd"}]
    assert len({reference(**change).digest for change in changed} | {reference().digest}) == 6


def write_foreign(path, **arrays):
    """Write statistics without meta and return how they are loaded."""
    np.savez(path, **arrays)
    with open(path, "rb") as file:
        return ReferenceStatistics.load(file, path.name)


MOMENTS = {"mu": np.ones(4), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": np.eye(3)}


def test_adm_files_are_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.reference.ADM_DIMENSIONS", {"mu": 4, "mu_s": 3})
    images = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    loaded = write_foreign(tmp_path / "adm.npz", arr_0=images, **MOMENTS)
    for name, array in MOMENTS.items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
    assert (loaded.n, loaded.extractor, loaded.features, loaded.source) == (0, "inception", None, "adm.npz")
    loaded.check_compatible("inception", extractor_sha256("inception"), size=8, crop="adm")
    with pytest.raises(ValueError, match=r"adm.npz\) with size 8, expected 256"):
        loaded.check_compatible("inception", extractor_sha256("inception"), size=256, crop="adm")


@pytest.mark.parametrize("arrays", [{}, {"arr_0": np.zeros(3)}, {"arr_0": np.zeros((2, 4, 6, 3))}, {"arr_0": 3}])
def test_statistics_without_square_images_are_of_any_size(tmp_path, arrays):
    assert write_foreign(tmp_path / "fid.npz", **MOMENTS, **arrays).size is None


@pytest.mark.parametrize(("key", "dim"), [("mu", 768), ("mu_s", 7)])
def test_statistics_of_other_features_than_inceptions_are_refused(tmp_path, key, dim):
    """pytorch-fid writes them of 64, 192 and 768 features as well, and clean-fid of CLIP's 512."""
    dims = {"mu": 2048, "mu_s": 2023, key: dim}
    moments = {name: np.zeros(size) for name, size in dims.items()}
    moments |= {name.replace("mu", "sigma"): np.zeros((size, size), np.float32) for name, size in dims.items()}
    loaded = write_foreign(tmp_path / "x.npz", **moments)
    with pytest.raises(ValueError, match=rf"x.npz: found {key} of shape \({dim},\) and no meta .*reference build"):
        loaded.check_compatible("inception", extractor_sha256("inception"), size=256, crop="adm")


@pytest.mark.parametrize("value", [np.nan, np.inf, "text", 1j])
@pytest.mark.parametrize("key", [*MOMENTS, "features"])
def test_what_is_no_finite_number_is_refused_before_any_work(tmp_path, key, value):
    file = io.BytesIO()
    reference(mu_s=np.ones(3), sigma_s=np.eye(3)).save(file)
    with np.load(io.BytesIO(file.getvalue())) as content:
        ours = dict(content)
    for arrays in (ours, MOMENTS):
        if key in arrays:
            wrong = np.array(arrays[key], dtype=np.result_type(type(value), np.float64) if value != "text" else "<U32")
            wrong.flat[-1] = value
            found = "NaN or infinity" if isinstance(value, float) else "an array of "
            with pytest.raises(ValueError, match=f"x.npz: {key}: found {found}.*, expected finite numbers"):
                write_foreign(tmp_path / "x.npz", **{**arrays, key: wrong})


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("extractor", "inception"), ("extractor_sha256", "cd"), ("size", 64), ("crop", "resize")],
)
def test_an_incompatible_reference_is_refused_by_name(key, wrong):
    run = {"extractor": "efficientnet-lite0", "extractor_sha256": "ab", "size": 32, "crop": "adm"}
    reference().check_compatible(**run)
    with pytest.raises(ValueError, match=rf"data/digits\) with {key} .*, expected {wrong!r}.*reference build"):
        reference().check_compatible(**{**run, key: wrong})


def test_wrong_files_say_what_they_hold(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with open(tmp_path / "other.npz", "rb") as file:
        with pytest.raises(ValueError, match="other.npz holds weights, expected mu and sigma.*reference build"):
            ReferenceStatistics.load(file, "other.npz")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"mean of shape \(4,\) and a covariance of \(3, 3\), expected"):
        reference(sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"mean of shape \(\) and a covariance of \(3, 3\), expected"):
        reference(sigma_s=np.eye(3))
    with pytest.raises(ValueError, match=r"features of shape \(20, 5\), expected \(M, 4\)"):
        reference(features=np.zeros((20, 5)))
    with pytest.raises(ValueError, match="19 keys for 20 features, expected one key for each"):
        reference(keys=KEYS[:19])
