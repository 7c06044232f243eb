"""Training that encodes its images (encode.store = false) equals training from stored moments of the same images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import encoded, square, write_tar
from PIL import Image
from tiny_encode import encode_here, recipe
from tiny_training import Training, assert_equal

from pipelines.latents.dataset import LatentDataset
from pipelines.latents.source_images import SourceImages, check_source_images, find_locations
from pipelines.latents.verify import verify
from pipelines.training.data import encoded_images, order
from pipelines.training.data.encoded_images import EncodedImages, explain_padding, image_encoding
from pipelines.training.data.loading import open_latent_source
from pipelines.training.data.order import WorkerShare, batch_rows
from raydit.errors import InvalidInput

SETTINGS = ("encode.flip=true", "encode.batch_size=4", "train.steps=6", "train.checkpoint_every=3", "train.log_every=1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The recipes of two outputs of the same images, one with stored moments and one without, both encoded."""
    folder = tmp_path_factory.mktemp("encoded")
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        for name, store in (("stored", "true"), ("streamed", "false")):
            config = recipe(folder, *SETTINGS, f"encode.store={store}", f"output={folder / name}")
            encode_here(config, patched)
            found[name] = config
    return found


def source_of(config, share=None, seed=0):
    dataset = LatentDataset.open(config.latents)
    share = share or WorkerShare(0, 1, 8)
    return EncodedImages(dataset, image_encoding(config, dataset), share, CPU, seed=seed, threads=2)


def read(source, rows, flip):
    moments = np.empty((len(rows), *source.moments_shape), np.float16)
    labels = source.read(rows, flip, moments)
    return labels, moments


def test_moments_are_those_that_would_be_stored_to_the_bit(outputs):
    stored = open_latent_source(LatentDataset.open(outputs["stored"].latents), "memory", seed=0, shuffle_rows=8)
    streamed = source_of(outputs["streamed"])
    assert (streamed.latent_shape, streamed.moments_shape) == (stored.latent_shape, stored.moments_shape)
    for number in range(6):  # more than an epoch of 36 images
        rows = batch_rows(streamed.order, WorkerShare(0, 1, 8), number)
        assert (rows == batch_rows(stored.order, WorkerShare(0, 1, 8), number)).all()
        flip = np.arange(len(rows)) % 3 == number % 3
        streamed.prefetch(8 * number)
        found, expected = read(streamed, rows, flip), read(stored, rows, flip)
        assert (found[0] == expected[0]).all()
        assert found[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("share", [WorkerShare(0, 2, 8), WorkerShare(2, 3, 8)], ids=str)
def test_moments_do_not_depend_on_the_number_of_workers(outputs, share):
    alone, together = source_of(outputs["streamed"]), source_of(outputs["streamed"], share)
    rows = batch_rows(alone.order, WorkerShare(0, 1, 8), 0)
    part = batch_rows(together.order, share, 0)
    positions = share.positions()
    assert (rows[positions.start : positions.stop] == part).all()
    flip = np.arange(8) % 2 == 0
    whole = read(alone, rows, flip)[1][positions.start : positions.stop]
    assert read(together, part, flip[positions.start : positions.stop])[1].tobytes() == whole.tobytes()


@pytest.mark.parametrize("random", ["counter", None])
def test_trainings_are_equal_to_the_bit_also_when_one_is_stopped_and_resumed(outputs, tmp_path, random):
    trained = {}
    for name, config in outputs.items():
        config = replace(
            config, output=str(tmp_path / name), random=random, encode=replace(config.encode, output=config.latents)
        )
        if name == "streamed":
            stopped = Training(config).run(stop_after=2)
            assert stopped.interrupted
        training = Training(config).run()
        trained[name] = training.weights
    assert_equal(trained["streamed"], trained["stored"])


def test_the_data_set_names_images_in_place_of_moments(outputs):
    stored, streamed = (LatentDataset.open(outputs[name].latents) for name in ("stored", "streamed"))
    assert (len(streamed), streamed.num_quarantined) == (len(stored), stored.num_quarantined) == (36, 1)
    assert streamed.statistics == stored.statistics and streamed.autoencoder == stored.autoencoder
    assert streamed.manifest["store"] is False and streamed.manifest["encoding"] == {"dtype": "float32"}
    assert "store" not in stored.manifest and "store" not in stored.identity["encode"]
    assert streamed.fingerprint != stored.fingerprint
    table = next(streamed.tables())
    assert table.column_names == ["key", "label", "image_digest", "location"]
    assert np.frombuffer(table.column("location")[0].as_py(), "<i8").tolist() == [-1, -1]


def copied_images(config, folder):
    """The recipe with a copy of its images, which a test may change."""
    import shutil

    shutil.copytree(config.images.path, folder)
    return replace(config, images=replace(config.images, path=str(folder)))


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_an_image_that_is_gone_or_changed_is_named(outputs, tmp_path, change):
    config = copied_images(outputs["streamed"], tmp_path / "images")
    image = tmp_path / "images" / "ring" / "004.png"
    if change == "gone":
        image.unlink()
    else:
        pixels = np.asarray(Image.open(image)).copy()
        pixels[10, 10] ^= 1
        Image.fromarray(pixels).save(image)
    source = source_of(config)
    row = source._source.keys(np.arange(36)).index("ring/004.png")
    read(source, np.array([row - 1]), np.zeros(1, bool))
    with pytest.raises(InvalidInput, match="ring/004.png") as error:
        read(source, np.array([row - 1, row]), np.zeros(2, bool))
    assert error.value.found.startswith("images.path: 1 images")


def test_images_are_found_where_a_tar_that_is_written_again_has_them(tmp_path, monkeypatch):
    def write(names):
        files = ((f"{name}.{kind}", content) for name in names for kind, content in samples[name].items())
        write_tar(tmp_path / "shards" / "0.tar", dict(files))

    samples = {f"{value:02d}": {"png": encoded(square(value, 16)), "cls": b"0"} for value in (10, 20, 30, 40)}
    write(["20", "30", "40"])
    config = recipe(tmp_path, "encode.store=false", "encode.batch_size=4", f"images.path={tmp_path / 'shards'}")
    encode_here(config, monkeypatch)
    write(["10", "20", "30", "40"])
    latents = encode_here(config, monkeypatch)
    assert [row["key"][-2:] for table in latents.tables() for row in table.to_pylist()] == ["20", "30", "40", "10"]
    source = SourceImages(latents, config.images, find_locations(latents, config.images))
    assert source.read(np.arange(4))[:, 0, 0, 0].tolist() == [20, 30, 40, 10]
    assert all(check.ok for check in verify(latents))
    write(["10", "20", "40"])
    with pytest.raises(InvalidInput, match=r"1 images in .* are gone, such as .*30") as error:
        check_source_images(latents, config.images, find_locations(latents, config.images), 4)
    assert f"delete {latents.path} and run `raydit encode`" in error.value.do


def test_moments_beyond_float16_name_the_image(outputs, monkeypatch):
    source = source_of(outputs["streamed"])
    monkeypatch.setattr(
        source._encoder, "encode", lambda images: np.full((2, *source.moments_shape), np.inf, np.float16)
    )
    with pytest.raises(InvalidInput, match="blob/000.png: the autoencoder on cpu"):
        read(source, np.array([0, 1]), np.zeros(2, bool))


def test_images_are_read_ahead_and_what_is_not_needed_is_dropped(outputs, monkeypatch):
    source = source_of(outputs["streamed"])
    source.prefetch(0)
    needed = [batch_rows(source.order, WorkerShare(0, 1, 8), number).tobytes() for number in range(6)]
    assert list(source._ahead) == needed[: encoded_images.BATCHES_AHEAD]
    first = dict(source._ahead)
    source.prefetch(16)
    assert list(source._ahead) == needed[2:5] and source._ahead[needed[2]] is first[needed[2]]


def test_padding_is_explained_where_it_is_much(outputs):
    dataset = LatentDataset.open(outputs["streamed"].latents)
    encoding = image_encoding(outputs["streamed"], dataset)
    assert explain_padding(encoding, WorkerShare(0, 1, 8)) == ""
    assert "encode.batch_size=2 50% of" in explain_padding(encoding, WorkerShare(0, 2, 4))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.loading=memmap", "train.loading"),
        ("train.loading=stream", "train.loading"),
        ("train.dtype=tf32", "train.dtype"),
        ("encode.dtype=tf32", "encode.dtype"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, override, field):
    with pytest.raises(InvalidInput, match=f"{field}: found"):
        recipe(tmp_path, "encode.store=false", override)


def test_latents_of_another_recipe_are_refused_as_well(outputs):
    """That recipe may share an output with one that stores no moments."""
    config, latents = outputs["stored"], LatentDataset.open(outputs["streamed"].latents)
    assert image_encoding(config, latents).encode.dtype == "float32"
    mapped = replace(config, train=replace(config.train, loading="memmap"))
    with pytest.raises(InvalidInput, match="train.loading: found 'memmap'"):
        image_encoding(mapped, latents)


def test_the_order_is_that_of_memory(outputs):
    assert source_of(outputs["streamed"]).order.describe() == order.EpochOrder(36, 0).describe()
