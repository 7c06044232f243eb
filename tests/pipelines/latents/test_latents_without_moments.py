"""Latent data sets without moments (encode.store = false): what checks, plans and descriptions say of them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_recipe
from tiny_encode import add_images, autoencoder_folder, encode_here, recipe

from dit.autoencoder import Autoencoder
from pipelines.images import preprocess
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.held_out import is_held_out
from pipelines.latents.show import show
from pipelines.latents.verify import verify
from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.plan import Images, make_plan
from pipelines.registry.lineage import lineage
from raydit.errors import InvalidInput


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images, an autoencoder, and a data set without moments."""
    folder = tmp_path_factory.mktemp("unstored")
    with pytest.MonkeyPatch.context() as monkeypatch:
        encode_here(recipe(folder, "encode.flip=true", "encode.store=false"), monkeypatch)
    return folder


@pytest.fixture
def dataset(made):
    return LatentDataset.open(made / "output" / "latents")


def test_an_intact_data_set_passes(dataset):
    checks = {check.name: check for check in verify(dataset)}
    assert all(check.ok for check in checks.values())
    assert checks["images"].found == "36 images are those that were encoded"
    assert checks["statistics"].found == "not compared: no moments are stored"
    assert checks["counts"].found == "36 rows + 1 quarantined = images found"


def test_an_image_that_was_replaced_fails(dataset, made):
    image = made / "images" / "ring" / "003.png"
    before = image.read_bytes()
    try:
        Image.new("RGB", (20, 20)).save(image)
        (wrong,) = (check for check in verify(dataset) if not check.ok)
        assert wrong.name == "images" and "ring/003.png" in wrong.found and "restore" in wrong.do
    finally:
        image.write_bytes(before)


def test_images_that_are_gone_fail(dataset, made):
    """Training could read none of them."""
    (made / "images").rename(made / "moved")
    preprocess._open.cache_clear()  # as in a new process
    try:
        (wrong,) = (check for check in verify(dataset) if not check.ok)
        assert wrong.name == "images" and "found nothing at" in wrong.found
    finally:
        (made / "moved").rename(made / "images")


def test_rows_are_shown_by_encoding_them(dataset, tmp_path, monkeypatch):
    encoded = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: encoded.append(images) or encode(self, images))
    lines = dict(show(dataset, str(tmp_path / "grid.png")))
    assert lines["moments"] == "8 x 8 x 8, with horizontal flips; not stored, training encodes the images"
    assert (tmp_path / "grid.png").is_file() and sum(map(len, encoded)) == 24  # 8 of each class


def test_moments_of_another_precision_are_another_data_set(dataset, tmp_path, made, monkeypatch):
    """The shards hold no moments, by which they would differ."""
    for name in ("images", "pretrained"):
        shutil.copytree(made / name, tmp_path / name)
    other = encode_here(
        recipe(tmp_path, "encode.flip=true", "encode.store=false", "encode.dtype=bfloat16"), monkeypatch
    )
    assert other.manifest["encoding"] == {"dtype": "bfloat16"} and other.fingerprint != dataset.fingerprint


def test_images_are_added_to_it(tmp_path, monkeypatch):
    config = recipe(tmp_path, "encode.store=false")
    before = encode_here(config, monkeypatch)
    add_images(tmp_path)
    after = encode_here(config, monkeypatch)
    assert (len(after), after.revision) == (len(before) + 3, 2)
    assert all(check.ok for check in verify(after))


def test_held_out_images_keep_their_moments(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.planning.encode_plan.MEASURED_SECONDS", 0)
    config = recipe(tmp_path, "images.held_out=0.3", "train.validate_every=2", "encode.store=false")
    plan = make_encode_plan(config)
    training = encode_here(config, monkeypatch)
    held_out = LatentDataset.open(config.latents_held_out)
    assert not training.stores_moments and held_out.stores_moments and is_held_out(held_out)
    assert held_out.arrays.moments.shape == (len(held_out), *training.moments_shape)
    assert plan.bytes == 32 * plan.pending_images + 2 * 8 * 8 * 8 * plan.pending_held_out
    assert "without the moments of training images" in dict(encode_plan_lines(plan, config.encode))["bytes"]
    assert make_encode_plan(config).images_to_encode == 0


def test_its_lineage_says_so(made):
    links = {link.kind: link for link in lineage(str(made / "output" / "latents"))}
    assert "without moments: training encodes the images" in links["latents"].facts
    assert not any(link.broken for link in links.values())


def test_a_manifest_that_contradicts_itself_is_refused(dataset, tmp_path):
    copy = Path(shutil.copytree(dataset.path, tmp_path / "latents"))
    for change in ({"store": "no"}, {"encoding": None}):
        (copy / "manifest.json").write_text(json.dumps({**dataset.manifest, **change}))
        with pytest.raises(InvalidInput, match="found no manifest"):
            LatentDataset.open(copy).description  # noqa: B018


def test_a_plan_counts_the_encoder_in_training(tmp_path):
    images, cluster = Images(training=1000, held_out=0, classes=3, source="as told"), parse_cluster("2xH100")
    settings = ("train.num_workers=2", "encode.batch_size=4")
    stored, streamed = (
        make_plan(tiny_recipe(tmp_path, *settings, *more), cluster, images) for more in ((), ("encode.store=false",))
    )
    assert stored.latent_bytes == 1000 * 2 * 8 * 8 * 8 and streamed.latent_bytes == 0
    before, after = (next(stage for stage in plan.stages if stage.stage == "train") for plan in (stored, streamed))
    (encode,) = (stage for stage in stored.stages if stage.stage == "encode")
    assert after.flops - before.flops == pytest.approx(before.images * encode.flops / encode.images)
    assert after.seconds > before.seconds and after.memory.keys() - before.memory.keys() == {
        "autoencoder",
        "feature maps",
    }


def test_store_true_is_the_default(tmp_path):
    autoencoder_folder(tmp_path / "pretrained")
    explicit, default = recipe(tmp_path, "encode.store=true"), recipe(tmp_path)
    assert explicit == default and default.encode.stores_moments


def test_the_grid_goes_to_the_uri_that_was_given(raydit, monkeypatch):
    given = []
    monkeypatch.setattr(LatentDataset, "open", lambda path: path)
    monkeypatch.setattr("pipelines.latents.show.show", lambda dataset, out: given.append(out) or [])
    assert raydit("latents", "show", "outputs/latents", "--out", "s3://bucket/grid.png")[0] == 0
    assert given == ["s3://bucket/grid.png"]
