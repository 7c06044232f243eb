"""Settings of [encode] reach the autoencoder, and the identity of the latents if they change bytes."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe
from tiny_encode import Context, autoencoder_folder, encode_here, recipe
from tiny_latents import SHAPE, description, make_moments, make_record
from tiny_latents import shard as parquet_of
from torch._inductor.exc import CppCompileError, InductorError

from cluster.storage.lease import LEASE_FILE, LeaseOwner
from dit.autoencoder import MEMORY_FORMATS
from dit.formats.autoencoder_digests import further_digests
from pipelines.artifacts import Artifact, differences
from pipelines.config.encode import EncodeConfig
from pipelines.config.reader import resolved
from pipelines.encode import encode
from pipelines.images.listing import Listing
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.encoding import EncodeImages, WriteShard, device_without_tf32
from pipelines.latents.held_out import ImageSet
from pipelines.latents.identity import encode_defaults, encode_identity
from pipelines.latents.moments import MomentsEncoder
from pipelines.latents.quarantine import MOMENTS_ARE_NAN
from pipelines.latents.shards import RECORDS, plan_shards, read_shard_records, settings_digest, write_shard
from pipelines.stage import StageContext
from raydit.errors import Failed, InUse

LISTING = Listing(["a", "b"], np.zeros(2, np.int32), np.zeros(2, np.int64), ("one",))


def identity(folder, *overrides):
    config = tiny_recipe(folder, *overrides)
    return encode_identity(config.images, config.encode, LISTING, {"sha256": "ab"})


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("encode.memory_format=contiguous", ['encode.memory_format: null -> "contiguous"']),
        ("encode.dtype=bfloat16", ['encode.dtype: "float32" -> "bfloat16"']),
        ("encode.dtype=tf32", ['encode.dtype: "float32" -> "tf32"']),
        ("encode.memory_format=channels_last", []),
        ("encode.gpus_per_worker=1", []),
        ("encode.num_workers=2", []),
    ],
)
def test_the_identity_holds_what_changes_bytes_and_nothing_else(tmp_path, override, change):
    assert differences(identity(tmp_path), identity(tmp_path, override)) == change


def test_the_layout_is_the_faster_one_of_the_device_unless_it_is_set(tmp_path):
    layouts = {}
    for flags in ([], ["encode.gpus_per_worker=1"], ["encode.gpus_per_worker=1", "encode.memory_format=channels_last"]):
        config = tiny_recipe(tmp_path, *flags)
        layouts[len(flags)] = (config.encode.layout, resolved(config)["encode"].get("memory_format"))
    # A recorded recipe that is read again means the same on the same kind of device.
    assert layouts == {0: ("channels_last",) * 2, 1: ("contiguous", None), 2: ("channels_last",) * 2}


def test_the_layout_follows_the_device_that_encodes_unless_it_is_set(tmp_path, tiny_autoencoder):
    """Training encodes with the settings of [encode], on devices of its own."""
    handle = AutoencoderHandle(tiny_autoencoder, "")
    for flags, on_cpu, on_gpu in (
        ([], "channels_last", "contiguous"),
        (["encode.gpus_per_worker=1"], "channels_last", "contiguous"),
        (["encode.memory_format=channels_last"], "channels_last", "contiguous"),  # repeats the default of CPUs
        (["encode.gpus_per_worker=1", "encode.memory_format=channels_last"],) + ("channels_last",) * 2,
        (["encode.memory_format=contiguous"],) + ("contiguous",) * 2,
    ):
        settings = tiny_recipe(tmp_path, *flags).encode
        assert (settings.layout_on("cpu"), settings.layout_on("cuda")) == (on_cpu, on_gpu)
        encoder = MomentsEncoder(handle, settings, torch.device("cpu"))
        assert encoder.memory_format == MEMORY_FORMATS[on_cpu]
        # As the actors of `raydit autoencoders`, whose workers are those of [evaluate].
        assert replace(settings, gpus_per_worker=1).layout == on_gpu


def test_the_layout_of_gpus_is_no_other_identity_where_a_recipe_repeats_it(tmp_path):
    gpu = "encode.gpus_per_worker=1"
    same = identity(tmp_path, gpu)
    assert identity(tmp_path, gpu, "encode.memory_format=contiguous") == same
    recorded = same | {"encode": same["encode"] | {"memory_format": "contiguous"}}
    (tmp_path / "plan.json").write_text(json.dumps({"identity": recorded}))
    for flags, changes in (([gpu], []), ([], ['encode.memory_format: "contiguous" -> null'])):
        settings = tiny_recipe(tmp_path, *flags).encode
        assert Artifact("encode", str(tmp_path), same, encode_defaults(settings)).changes() == changes


def test_another_column_of_images_is_another_identity_where_the_digest_is_the_same(tmp_path):
    config = tiny_recipe(tmp_path)

    def latents(column):
        images = ImageSet("images", "m", str(tmp_path), config.images, replace(LISTING, image_column=column))
        return images.artifact(config.encode, {"sha256": "ab"})

    assert latents("").identity == identity(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"identity": latents("scan").identity}))
    assert latents("scan").changes() == []
    assert latents("thumb").changes() == ['images.image_column: "scan" -> "thumb"']
    (tmp_path / "plan.json").write_text(json.dumps({"identity": identity(tmp_path)}))
    assert latents("scan").changes() == []  # of an earlier release, which did not record it
    assert settings_digest(latents("scan")) == settings_digest(latents(""))


@pytest.fixture
def tiny_autoencoder(tmp_path):
    torch.manual_seed(0)
    widths, blocks = (8, 8), (1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def encoded(folder, images, **settings):
    """Return a worker, and the moments of images and of their flips."""
    config = EncodeConfig(batch_size=2, **settings)
    worker = EncodeImages(AutoencoderHandle(str(folder), ""), config)
    return worker, worker.encode_with_flip(images)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_memory_layout_and_precision_makes_the_same_latents(tiny_autoencoder, layout):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    _, plain = encoded(tiny_autoencoder, images)
    worker = EncodeImages(AutoencoderHandle(tiny_autoencoder, ""), EncodeConfig(dtype="bfloat16", memory_format=layout))
    convolution, seen = worker.autoencoder.module.encoder.layers[0], []
    convolution.register_forward_pre_hook(lambda module, inputs: seen.extend([inputs[0], module.weight]))
    other = worker.encode_with_flip(images)
    for tensor in seen:
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous(memory_format=MEMORY_FORMATS[layout])
    assert len(seen) == 4, "expected a batch of images and one of their flips"
    for expected, found in zip(plain, other, strict=True):
        assert expected.shape == (3, 8, 4, 4) and expected.dtype == found.dtype == np.float16
        assert expected.flags.c_contiguous and found.flags.c_contiguous
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected[:, :4]).max())


def test_tf32_encodes_in_float32_on_a_cpu_to_the_bit(tiny_autoencoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (_, exact), (_, other) = encoded(tiny_autoencoder, images), encoded(tiny_autoencoder, images, dtype="tf32")
    assert [moments.tobytes() for moments in exact] == [moments.tobytes() for moments in other]
    assert device_without_tf32(EncodeConfig(dtype="tf32")) == "this CPU"
    assert device_without_tf32(EncodeConfig()) is device_without_tf32(EncodeConfig(dtype="bfloat16")) is None


@pytest.mark.slow
def test_the_job_says_that_it_encodes_in_float32(tmp_path, local_ray, capsys):
    config = recipe(tmp_path, "encode.dtype=tf32")
    with StageContext(config) as context:
        dataset = encode(config, context=context)
    assert "encode.dtype = 'tf32': this CPU has no TF32, so encoding continues in float32" in capsys.readouterr().out
    assert dataset.identity["encode"]["dtype"] == "tf32"


def test_a_worker_whose_memory_is_full_says_which_setting_takes_less(tiny_autoencoder, monkeypatch):
    def fill(images):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    worker = EncodeImages(AutoencoderHandle(tiny_autoencoder, ""), EncodeConfig())
    monkeypatch.setattr(worker, "encode_with_flip", fill)
    with pytest.raises(Failed, match="Tried to allocate 2 GiB. Lower encode.batch_size"):
        worker({"images": np.zeros((1, 8, 8, 3), np.uint8)})


def test_an_error_of_torchs_compiler_says_what_to_look_at(tiny_autoencoder, monkeypatch):
    def fail(images):
        raise InductorError(
            CppCompileError(["g++", "main.cpp"], "main.cpp:3:10: fatal error: Python.h: not found"), None
        )

    worker = EncodeImages(AutoencoderHandle(tiny_autoencoder, ""), EncodeConfig())
    monkeypatch.setattr(worker, "encode_with_flip", fail)
    with pytest.raises(Failed, match="fatal error: Python.h: not found. See whether .*, or set compile = false"):
        worker({"images": np.zeros((1, 8, 8, 3), np.uint8)})


def test_only_the_autoencoder_sees_tf32(tiny_autoencoder, monkeypatch):
    monkeypatch.setattr("dit.precision.has_tf32", lambda device: True)
    worker = EncodeImages(AutoencoderHandle(tiny_autoencoder, ""), EncodeConfig(dtype="tf32", batch_size=2))
    seen = []
    worker.autoencoder.module.encoder.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32)
    )
    worker.encode(np.zeros((3, 8, 8, 3), np.uint8))
    assert seen == [True, True] and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_moments_do_not_depend_on_the_number_of_images_in_a_shard(tiny_autoencoder, length):
    """Bit for bit: the last batch of a shard is padded."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    (_, whole), (_, part) = encoded(tiny_autoencoder, images), encoded(tiny_autoencoder, images[:length])
    for found, expected in zip(part, whole, strict=True):
        assert found.tobytes() == expected[:length].tobytes()


@pytest.mark.slow
def test_a_compiled_encoder_makes_the_same_latents(tiny_autoencoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    _, plain = encoded(tiny_autoencoder, images)
    worker, compiled = encoded(tiny_autoencoder, images, compile=True)
    assert worker.autoencoder.module.encoder._compiled_call_impl is not None
    np.testing.assert_allclose(compiled[0], plain[0], atol=2e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_images_with_moments_beyond_float16_are_quarantined(tmp_path, flip):
    """So are images whose horizontal flip has such moments."""
    moments, flipped = make_moments(5), make_moments(5, seed=1)
    moments[1, 0, 0, 0], moments[3, 3, 2, 4], flipped[4, 1, 1, 1] = np.inf, np.nan, -np.inf
    row = {
        "shard": 0,
        "listing": "ab",
        "keys": [f"k{index}" for index in range(5)],
        "labels": np.arange(5, dtype=np.int32),
        "errors": json.dumps({"k9": "broken"}),
        "moments": moments,
        "moments_flip": flipped if flip else moments[:0],
    }
    record = json.loads(WriteShard(str(tmp_path), description(flip))(row)["record"])
    bad = ["k1", "k3", "k4"] if flip else ["k1", "k3"]
    assert record["quarantined"] == [
        {"key": "k9", "error": "broken"},
        *({"key": key, "error": "moments do not fit float16" if key != "k3" else MOMENTS_ARE_NAN} for key in bad),
    ]
    table = pq.read_table(tmp_path / "part-00000.parquet")
    kept = [index for index in range(5) if f"k{index}" not in bad]
    assert table["key"].to_pylist() == [f"k{index}" for index in kept] and table["label"].to_pylist() == kept
    for index, data in zip(kept, table["moments"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.frombuffer(data, "<f2").reshape(SHAPE), moments[index])
    assert record["rows"] == len(kept) and record["channels"]["count"] == len(kept) * 15


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"autoencoder.*the tensor encoder.conv_in.weight is NaN or infinite in 1 of its 216 values"),
        (3e38, r"autoencoder: it makes NaN of 1\d of the 37 images, such as .*the images themselves can be read"),
    ],
)
def test_an_autoencoder_that_makes_nan_is_blamed_and_not_the_images(tmp_path, monkeypatch, value, message):
    """Whether its weights are NaN, or are finite and overflow."""
    config = recipe(tmp_path)
    file = autoencoder_folder(tmp_path / "pretrained") / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"].view(-1)[: 1 if value != value else 216] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match=message):
        encode_here(config, monkeypatch)


def test_another_config_with_the_same_weights_makes_other_latents(tmp_path, monkeypatch, capsys):
    """It is noticed where the latents record the config, and only then belongs to their identity."""
    config = recipe(tmp_path)
    first = encode_here(config, monkeypatch)
    file = autoencoder_folder(tmp_path / "pretrained") / "config.json"
    before = file.read_text()
    file.write_text(before.replace('"norm_num_groups": 8', '"norm_num_groups": 4'))
    with pytest.raises(KeyboardInterrupt):
        encode_here(config, monkeypatch, Context(kill_after=1))
    second = encode_here(config, monkeypatch)
    assert "autoencoder.config_sha256: null -> " in capsys.readouterr().out
    assert first.shards[0].sha256 != second.shards[0].sha256 and first.fingerprint != second.fingerprint
    assert "config_sha256" not in first.identity["autoencoder"] and "config_sha256" in second.identity["autoencoder"]
    assert encode_here(config, monkeypatch).shards == second.shards and "superseded" not in capsys.readouterr().out
    file.write_text(before)
    third = encode_here(config, monkeypatch)
    assert [shard.sha256 for shard in third.shards] == [shard.sha256 for shard in first.shards]
    assert third.fingerprint == first.fingerprint


def test_a_worker_that_finds_another_autoencoder_encodes_nothing(tiny_autoencoder):
    handle = AutoencoderHandle(tiny_autoencoder, "")
    recorded = {**handle.describe(), **further_digests(handle.folder())}
    assert EncodeImages(handle, EncodeConfig(), recorded).autoencoder
    for name in ("sha256", "config_sha256"):
        other = {**recorded, "tensors_sha256": None, name: "0" * 64}
        with pytest.raises(ValueError, match="found another autoencoder in .* Copy the same files to all machines"):
            EncodeImages(handle, EncodeConfig(), other)


def test_two_processes_do_not_encode_into_a_folder_that_recipes_share(tmp_path, monkeypatch):
    config = recipe(tmp_path, f"encode.output={tmp_path}/shared/latents")
    context = Context()
    context.holding_folder = StageContext(config).holding_folder
    lease = tmp_path / "shared" / ".latents.lease" / LEASE_FILE
    lease.parent.mkdir(parents=True)
    owner = replace(LeaseOwner.this_process(), machine="another", host="node-7")
    lease.write_text(json.dumps(asdict(owner)))
    monkeypatch.setattr("pipelines.stage.WAIT_SECONDS", 0.0)
    monkeypatch.setattr("cluster.storage.lease.SILENCE_SECONDS", 0.0)
    with pytest.raises(InUse, match="latents at .*/shared/latents: .* on node-7.* set encode.output to another folder"):
        encode_here(config, monkeypatch, context)
    lease.write_text(json.dumps(asdict(replace(owner, expires=1.0))))
    dataset = encode_here(config, monkeypatch, context)
    assert not lease.exists()
    lease.write_text(json.dumps(asdict(owner)))
    assert encode_here(config, monkeypatch, context).fingerprint == dataset.fingerprint  # it has nothing to write


def test_a_record_counts_for_its_own_settings_only(tmp_path):
    def shards(*overrides):
        artifact = Artifact("encode", str(tmp_path), identity(tmp_path, *overrides))
        return plan_shards(str(tmp_path), LISTING, None, 512, settings_digest(artifact))

    data = parquet_of(moments := make_moments(2))
    (shard,) = shards()
    record = replace(make_record(0, moments, data), listing=LISTING.digest, settings=shard.settings)
    write_shard(str(tmp_path), 0, data, record)
    assert read_shard_records(shards()) == read_shard_records(shards("encode.num_workers=2")) == [record]
    assert read_shard_records(shards("encode.dtype=bfloat16")) == [None]
    file = tmp_path / RECORDS / "part-00000.json"
    content = json.loads(file.read_text())
    del content["settings"]  # as earlier releases wrote it
    file.write_text(json.dumps(content))
    assert read_shard_records(shards("encode.dtype=bfloat16")) == [replace(record, settings=None)]


def test_a_record_never_stands_for_a_file_that_was_written_after_it(tmp_path, monkeypatch):
    """Repaired images may give a file of the same length."""
    record = make_record(0, make_moments(2), b"data")
    write_shard(str(tmp_path), 0, b"data", record)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.storage.write_json_atomically", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(str(tmp_path), 0, b"DATA", record)
    assert (tmp_path / "part-00000.parquet").read_bytes() == b"DATA" and not list((tmp_path / RECORDS).iterdir())


def test_the_settings_of_records_do_not_depend_on_images_that_were_added(tmp_path):
    found = identity(tmp_path)
    artifact = Artifact("encode", str(tmp_path), found)
    grown = replace(artifact, identity={**found, "images": {**found["images"], "digest": "other", "count": 3}})
    assert settings_digest(artifact) == settings_digest(grown)
