"""Effects of evaluate.dtype, evaluate.decoder_dtype and evaluate.compile on samples, and what they leave unchanged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeContext
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.extractors import create_extractor
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.evaluate import evaluate
from pipelines.sample import sample_file
from pipelines.scoring.protocols.build_protocol import sampling_protocol
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.samples.precision import check_precision, faster_precisions
from pipelines.scoring.workers.actors import SampleActor, SampleSource, ScoringActor
from pipelines.scoring.workers.records import read_results
from pipelines.scoring.workers.shards import make_shards
from raydit.errors import InvalidInput

GUIDED = ("evaluate.cfg_scale=2.0", "evaluate.cfg_interval=[0.0, 0.5]", "evaluate.sampling_steps=4")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A recipe, and a checkpoint with random weights in its output."""
    config = tiny_output(tmp_path_factory.mktemp("precision"), *GUIDED)
    return config, open_checkpoint(write_checkpoint(config, 2).path)


@pytest.fixture
def sampler(output):
    config, opened = output

    def build(dtype="float32", compiled=False, **changes):
        protocol = replace(
            sampling_protocol(config.evaluate, config.seed, opened, config.random), dtype=dtype, **changes
        )
        return CheckpointSampler(opened.path, protocol, batch_size=4, compiled=compiled)

    return build


def with_settings(output, **changes):
    """The recipe with other fields of [evaluate], and the source of its samples."""
    config, opened = output
    config = replace(config, evaluate=replace(config.evaluate, **changes))
    return config, SampleSource(
        str(opened.path), sampling_protocol(config.evaluate, config.seed, opened, config.random)
    )


def images_of(sampler, indices=range(6)):
    return sampler.sample(indices, sampler.labels(indices))


def note_calls(module, inputs):
    """Record, for every call of a module, whether autocast is on, and the arguments."""
    module.register_forward_pre_hook(lambda _, given: inputs.append((torch.is_autocast_enabled("cpu"), *given)))


@pytest.mark.parametrize("changes", [{}, {"cfg_scale": 1.0, "cfg_interval": None}], ids=["guided", "unguided"])
def test_bfloat16_makes_nearly_the_images_of_float32(sampler, changes):
    exact, rounded = sampler(**changes), sampler("bfloat16", **changes)
    expected, images = images_of(exact).astype(int), images_of(rounded).astype(int)
    assert np.array_equal(exact.labels(range(6)), rounded.labels(range(6)))
    assert 0 < np.abs(images - expected).mean() < 2
    assert np.abs(expected[1:] - expected[:-1]).mean() > 20  # grey levels between images


def test_a_sample_does_not_depend_on_the_batch(sampler):
    rounded = sampler("bfloat16")
    images = images_of(rounded).astype(int)
    assert np.abs(images_of(rounded, [5]) - images[[5]]).max() <= 1


def test_only_the_network_is_under_autocast(sampler):
    """Noise, classes and the decoder stay float32."""
    networks: list[tuple] = []
    decoders: list[tuple] = []
    for built in (sampler(), sampler("bfloat16")):
        note_calls(built.model, networks)
        note_calls(built.autoencoder.module.decoder, decoders)
        images_of(built, range(4))
    exact, rounded = networks[:4], networks[4:]
    assert [on for on, *_ in networks] == [False] * 4 + [True] * 4
    assert [len(x) for _, x, *_ in rounded] == [8, 8, 8, 4]
    assert all(map(torch.equal, exact[0][1:3], rounded[0][1:3]))
    assert torch.equal(exact[0][3].labels, rounded[0][3].labels)
    assert all(x.dtype == torch.float32 for _, x, *_ in networks)
    assert [(on, x.dtype) for on, x in decoders] == [(False, torch.float32)] * 2


def note_tf32(module, seen):
    """Record, for every call of a module, whether TF32 and autocast are on."""
    module.register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")))
    )


@pytest.mark.parametrize(
    ("changes", "network", "decoder"),
    [
        ({"dtype": "tf32"}, (True, False), (False, False)),
        ({"decoder_dtype": "tf32"}, (False, False), (True, False)),
        ({"dtype": "tf32", "decoder_dtype": "bfloat16"}, (True, False), (False, True)),
    ],
)
def test_network_and_decoder_have_their_own_precision(sampler, monkeypatch, changes, network, decoder):
    monkeypatch.setattr("dit.precision.has_tf32", lambda device: True)
    built, networks, decoders, encoders = sampler(**changes), [], [], []
    note_tf32(built.model, networks)
    note_tf32(built.autoencoder.module.decoder, decoders)
    note_tf32(built.autoencoder.module.encoder, encoders)
    images = images_of(built, range(4))
    assert set(networks) == {network} and set(decoders) == {decoder}
    built.reconstruct(images)
    assert encoders == [(False, False)] and decoders[-1] == (False, False), "the baseline stays float32"


def test_a_decoder_in_bfloat16_makes_nearly_the_same_images(sampler):
    expected, images = images_of(sampler()).astype(int), images_of(sampler(decoder_dtype="bfloat16")).astype(int)
    assert 0 < np.abs(images - expected).mean() < 2


@pytest.mark.parametrize("field", ["dtype", "decoder_dtype"])
def test_tf32_is_refused_where_there_is_none(output, sampler, tmp_path, field):
    """Before weights are read, by workers; before Ray starts and before records are removed, by the command."""
    config, opened = output
    message = f"evaluate.{field}: found 'tf32', and this CPU has no TF32, expected a GPU that has it"
    with pytest.raises(InvalidInput, match=message):
        sampler(**{field: "tf32"})
    changed, _ = with_settings(output, **{field: "tf32"})
    with pytest.raises(InvalidInput, match=message):
        evaluate(opened, config=changed, context=FakeContext(), force=True)
    with pytest.raises(InvalidInput, match=message):
        sample_file(opened, changed, str(tmp_path / "samples.npz"), num_samples=10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["run", "plan"])
def test_the_command_refuses_tf32_before_any_work(output, raydit, dry_run):
    config, opened = output
    before = sorted(Path(config.output).rglob("*"))
    code, _, err = raydit("evaluate", str(opened.path), "--set", "evaluate.dtype=tf32", *dry_run)
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "found 'tf32', and this CPU has no TF32" in err and 'evaluate.dtype = "float32"' in err
    assert [path for path in sorted(Path(config.output).rglob("*")) if path not in before and path.is_file()] == []


def test_what_another_precision_takes_is_said_for_gpus_only(output):
    _, source = with_settings(output)
    cpu, gpu = EvaluateConfig(), EvaluateConfig(gpus_per_worker=1)
    assert faster_precisions(cpu, source.protocol) == []
    assert faster_precisions(gpu, replace(source.protocol, dtype="tf32")) == []
    (line,) = faster_precisions(gpu, source.protocol)
    assert "'tf32' is about 4 times as fast, 'bfloat16' with evaluate.compile = true about 9 times (forward" in line
    check_precision(gpu, replace(source.protocol, dtype="tf32"))  # its workers have GPUs, and look for themselves


@pytest.mark.parametrize(("dtype", "lines"), [("float32", 1), ("tf32", 0)])
def test_an_evaluation_on_gpus_in_float32_begins_with_it(output, capsys, dtype, lines):
    config, _ = with_settings(output, gpus_per_worker=1, dtype=dtype)
    with pytest.raises(AssertionError, match="without Ray"):
        evaluate(output[1], config=config, context=FakeContext())
    assert capsys.readouterr().out.count("samples in float32, as published figures are") == lines


def test_features_are_computed_in_float32(output, tmp_path):
    config, source = with_settings(output, dtype="bfloat16")
    shards = make_shards(str(tmp_path), [range(5)])
    ScoringActor(config.images, config.evaluate, [source])(shards[0])
    (record,) = read_results(shards)
    images = torch.from_numpy(record.images).permute(0, 3, 1, 2)
    assert np.array_equal(record.features, create_extractor(config.evaluate.extractor)(images).features)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_blocks_of_the_network_are_compiled(output, compiled):
    config, source = with_settings(output, compile=compiled)
    built = SampleActor(config.evaluate, [source]).open_sampler(source)
    modules = [*built.model.modules(), *built.autoencoder.module.modules()]
    found = [module for module in modules if module._compiled_call_impl is not None]
    assert found == (list(built.model.blocks) if compiled else [])


def test_the_protocol_records_precision_but_not_compilation(output):
    usual = with_settings(output)[1].protocol
    assert with_settings(output, compile=True)[1].protocol == usual
    for field, dtype in (("dtype", "bfloat16"), ("dtype", "tf32"), ("decoder_dtype", "bfloat16")):
        assert with_settings(output, **{field: dtype})[1].protocol == replace(usual, **{field: dtype})
    assert with_settings(output, decoder_dtype="float32")[1].protocol == usual


@pytest.mark.slow  # compiles two graphs, for a minute
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("bfloat16", 1.0)])
def test_a_compiled_network_makes_the_same_images_and_no_graph_for_another_number_of_them(sampler, dtype, tolerance):
    compiled = sampler(dtype, compiled=True)
    images = images_of(compiled)
    assert np.abs(images.astype(int) - images_of(sampler(dtype))).mean() < tolerance
    with torch.compiler.set_stance("fail_on_recompile"):
        assert np.array_equal(images_of(compiled, range(3)), images[:3])
