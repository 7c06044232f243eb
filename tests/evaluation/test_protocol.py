"""Protocol ids, seeds, labels and shards."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.protocol import EvaluationProtocol, sample_label, sample_seed, shard_ranges

PROTOCOL = EvaluationProtocol(
    num_samples=1000,
    labels="balanced",
    sampler="euler",
    sampling_steps=50,
    cfg_scale=2.0,
    cfg_interval=(0.0, 0.5),
    decoder="sha256:aa",
    extractor="efficientnet-lite0",
    extractor_sha256="bb",
    reference_digest="cc",
)


def test_protocol_id_is_stable():
    assert PROTOCOL.protocol_id == "8748930f7df4"


def test_a_protocol_without_a_precision_keeps_its_text_and_id_and_means_float32():
    """As reports made before there was a choice have it, and programs that compute ids themselves."""
    older = (
        '{"cfg_channels":null,"cfg_interval":null,"cfg_scale":1.0,"decoder":"aa","extractor":"inception",'
        '"extractor_sha256":"bb","labels":"random","num_samples":50000,"reference_digest":"cc","sampler":"ddpm",'
        '"sampling_steps":250,"seed":0,"uint8_rule":"floor(clamp(127.5 x + 128, 0, 255))","weights":"ema"}'
    )
    protocol = EvaluationProtocol.from_dict(json.loads(older))
    assert (protocol.dtype, protocol.protocol_id) == ("float32", "a30aafa8015a")
    assert json.dumps(protocol.to_dict(), sort_keys=True, separators=(",", ":")) == older
    assert EvaluationProtocol.from_dict({**json.loads(older), "dtype": "float32"}) == protocol
    assert "dtype" in replace(protocol, dtype="bfloat16").to_dict()


def test_ids_of_other_precisions_are_stable():
    """Those of float32 and bfloat16 were recorded before there was TF32, or a precision of the decoder."""
    changes = [{}, {"dtype": "bfloat16"}, {"dtype": "tf32"}, {"decoder_dtype": "tf32"}, {"decoder_dtype": "bfloat16"}]
    ids = [replace(PROTOCOL, **change).protocol_id for change in changes]
    assert ids == ["8748930f7df4", "5805286e8a43", "df30c9f9f882", "a9433357ee60", "c45a9b013679"]


def test_a_decoder_in_float32_is_not_recorded():
    explicit = replace(PROTOCOL, decoder_dtype="float32")
    assert explicit == PROTOCOL and "decoder_dtype" not in explicit.to_dict()


def test_the_summary_names_unusual_precisions():
    assert "float32" not in PROTOCOL.summary
    assert ", tf32, decoder bfloat16, " in replace(PROTOCOL, dtype="tf32", decoder_dtype="bfloat16").summary


def test_every_field_moves_the_protocol_id():
    other = {
        "labels": "random",
        "weights": "raw",
        "cfg_channels": 3,
        "cfg_interval": None,
        "num_samples": 999,
        "seed": 1,
        "sampling_steps": 49,
        "cfg_scale": 1.5,
        "dtype": "bfloat16",
        "decoder_dtype": "bfloat16",
        "random": "counter",
        "time_shift": 3.0,
        "sde_norm": 0.5,
    }
    values = asdict(PROTOCOL)
    ids = {EvaluationProtocol.from_dict({**values, name: other.get(name, "other")}).protocol_id for name in values}
    assert len(ids | {PROTOCOL.protocol_id}) == len(values) + 1


@pytest.mark.parametrize("decoder_dtype", [None, "tf32"])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_protocol_survives_json(dtype, decoder_dtype):
    protocol = replace(PROTOCOL, dtype=dtype, decoder_dtype=decoder_dtype)
    assert EvaluationProtocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol


def test_integer_guidance_has_the_id_of_the_float():
    assert EvaluationProtocol.from_dict({**PROTOCOL.to_dict(), "cfg_scale": 2}).protocol_id == PROTOCOL.protocol_id


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="'cfg_scal'.*Did you mean 'cfg_scale'"):
        EvaluationProtocol.from_dict({**PROTOCOL.to_dict(), "cfg_scal": 1.0})
    with pytest.raises(ValueError, match="lacks seed"):
        EvaluationProtocol.from_dict({k: v for k, v in PROTOCOL.to_dict().items() if k != "seed"})


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "sorted"},
        {"weights": "swa"},
        {"weights": "ema_"},
        {"dtype": "float16"},
        {"decoder_dtype": "float16"},
        {"num_samples": 1},
        {"sampling_steps": 0},
        {"cfg_scale": float("inf")},
        {"cfg_interval": [0.2, float("nan")]},
    ],
)
def test_impossible_values_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*expected"):
        EvaluationProtocol.from_dict({**PROTOCOL.to_dict(), **change})


def test_a_further_average_is_another_protocol():
    names = ("ema", "raw", "ema_0.05", "ema_0.1")
    ids = {EvaluationProtocol.from_dict({**PROTOCOL.to_dict(), "weights": name}).protocol_id for name in names}
    assert len(ids) == 4


def test_seeds_are_literal_constants():
    assert [sample_seed(0, i) for i in range(3)] == [3757552657, 2117021122, 476489587]
    assert [sample_label(0, i, 1000, "random") for i in range(3)] == [654, 327, 124]


def test_no_two_samples_of_a_run_share_a_seed():
    seeds = {sample_seed(7, index) for index in range(20_000)}
    assert len(seeds) == 20_000
    assert min(seeds) >= 0 and max(seeds) < 2**32


def test_streams_and_runs_have_other_seeds():
    assert len({sample_seed(seed, 0, stream) for seed in range(20) for stream in range(20)}) == 400


@given(st.integers(0, 500), st.integers(1, 50))
def test_any_prefix_of_balanced_labels_is_balanced_to_within_one(n, num_classes):
    labels = [sample_label(0, index, num_classes, "balanced") for index in range(n)]
    counts = [labels.count(label) for label in range(num_classes)]
    assert max(counts) - min(counts) <= 1


def test_random_labels_cover_the_classes_evenly():
    labels = [sample_label(3, index, 10, "random") for index in range(5000)]
    assert all(400 < labels.count(label) < 600 for label in range(10))


def test_without_classes_every_label_is_zero():
    assert sample_label(0, 5, 0, "random") == sample_label(0, 5, 0, "balanced") == 0


@given(st.integers(0, 200), st.integers(1, 50))
def test_shards_hold_every_sample_once_in_order(num_samples, shard_rows):
    shards = shard_ranges(num_samples, shard_rows)
    assert [index for shard in shards for index in shard] == list(range(num_samples))
    assert all(len(shard) == shard_rows for shard in shards[:-1])


def test_planning_imports_no_torch():
    code = "import evaluation.protocol, evaluation.report, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("fields", "summary"),
    [
        ({}, "N=200, euler 25, cfg 2, inception"),
        ({"labels": "balanced", "seed": 3}, "N=200, euler 25, cfg 2, balanced labels, seed 3, inception"),
        (
            {"cfg_interval": (0.1, 0.8), "cfg_channels": 3, "weights": "raw", "dtype": "bfloat16"},
            "N=200, euler 25, cfg 2, guided from 0.1 to 0.8, 3 channels guided, raw weights, bfloat16, inception",
        ),
        (
            {"sampler": "sde", "sde_diffusion": "constant", "sde_norm": 0.5, "time_shift": 3.0},
            "N=200, sde 25, diffusion constant, diffusion norm 0.5, time shift 3, cfg 2, inception",
        ),
        (
            {"autoguidance": "0123456789abcdef", "autoguidance_weights": "raw"},
            "N=200, euler 25, cfg 2, autoguidance by 01234567, its raw weights, inception",
        ),
        ({"sampler": "unknown"}, "N=200, given images, inception"),
    ],
)
def test_a_summary_says_what_tells_protocols_apart(fields, summary):
    known = {"num_samples": 200, "sampler": "euler", "sampling_steps": 25, "cfg_scale": 2.0, "decoder": "d"}
    known |= {"extractor": "inception", "extractor_sha256": "e", "reference_digest": "r"}
    protocol = EvaluationProtocol(**known | fields)
    assert protocol.summary == summary and protocol.label == f"{protocol.protocol_id} ({summary})"


@pytest.mark.parametrize(
    "implied",
    [
        {"decoder_dtype": "float32"},
        {"time_shift": 1.0},
        {"sde_diffusion": "sigma"},
        {"sde_norm": 1},
        {"autoguidance_weights": "ema"},
    ],
)
def test_what_a_field_means_when_it_is_left_out_may_be_said(implied):
    assert replace(PROTOCOL, **implied) == PROTOCOL


def test_integers_and_floats_give_one_id():
    assert replace(PROTOCOL, time_shift=3).protocol_id == replace(PROTOCOL, time_shift=3.0).protocol_id
    assert replace(PROTOCOL, sde_norm=2).protocol_id == replace(PROTOCOL, sde_norm=2.0).protocol_id


def test_settings_of_samplers_are_part_of_the_protocol():
    changes = [{"time_shift": 3.0}, {"sde_diffusion": "constant"}, {"sde_norm": 0.5}, {"autoguidance": "a"}]
    protocols = [replace(PROTOCOL, **change) for change in changes]
    assert len({PROTOCOL.protocol_id, *(protocol.protocol_id for protocol in protocols)}) == 5
    assert [EvaluationProtocol.from_dict(protocol.to_dict()) for protocol in protocols] == protocols
