"""Samples that another checkpoint guides, and those by the samplers of flows with settings of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeRun
from PIL import Image
from tiny_checkpoint import MODEL, tiny_output, write_checkpoint

from dit.conditions import Conditions
from dit.files import write_json
from dit.flow import FlowMatching
from dit.samplers import guided, sample_euler
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.evaluate import evaluate
from pipelines.scoring.protocols.build_protocol import sampling_protocol
from pipelines.scoring.sample_grid import sample_grid
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.samples.guide import guide_location, open_guide, require_guide
from pipelines.scoring.samples.noise import sample_noise
from pipelines.scoring.workers.actors import SampleActor, SampleSource
from pipelines.scoring.workers.shards import ScoringShard
from pipelines.train import start_monitor

SMALLER = replace(MODEL, hidden_size=16)


@pytest.fixture
def story(tmp_path):
    """A recipe, its checkpoint, and that of a smaller model of the same latents."""
    config = tiny_output(tmp_path, "evaluate.cfg_scale=2.5", "evaluate.sampling_steps=3", "evaluate.batch_size=4")
    checkpoint, smaller = write_checkpoint(config, 2), write_checkpoint(config, 1, SMALLER)
    return config, open_checkpoint(checkpoint.path), open_checkpoint(smaller.path)


def with_guide(config, guide, **changes):
    return replace(config.evaluate, autoguidance=str(guide.path), **changes)


def test_a_guide_takes_the_place_of_the_null_class(story):
    config, opened, guide = story
    evaluate = with_guide(config, guide)
    protocol = sampling_protocol(evaluate, 0, opened)
    assert protocol.autoguidance == guide.digest
    sampler = CheckpointSampler(opened.shared, protocol, batch_size=4, guide=guide_location(protocol, evaluate, opened))
    labels = np.array([0, 1, 2, 0])
    alone = replace(protocol, autoguidance=None)
    main, weak = sampler.model, CheckpointSampler(guide.shared, alone, batch_size=4).model

    def velocity(x, t, y):
        return weak(x, t, y) + 2.5 * (main(x, t, y) - weak(x, t, y))

    noise = sample_noise(protocol, np.arange(4), sampler.latent_shape, "cpu").start()
    latents = sample_euler(velocity, noise, Conditions(torch.tensor(labels)), process=FlowMatching(), steps=3)
    expected = sampler.autoencoder.decode(latents).numpy()
    ours = sampler.sample(range(4), labels)
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    assert (ours != CheckpointSampler(opened.shared, alone, batch_size=4).sample(range(4), labels)).any()


def test_guidance_by_another_model_keeps_its_interval_and_channels(story):
    config, opened, guide = story
    main = CheckpointSampler(opened.shared, sampling_protocol(config.evaluate, 0, opened), batch_size=2).model
    weak = CheckpointSampler(guide.shared, sampling_protocol(config.evaluate, 0, guide), batch_size=2).model
    model = guided(main, 2.0, channels=1, interval=(0.4, 0.8), guide=weak)
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        ours, alone = model(x, torch.tensor([0.2, 0.5, 0.9]), y), main(x, torch.tensor([0.2, 0.5, 0.9]), y)
        other = weak(x, torch.tensor([0.2, 0.5, 0.9]), y)
    torch.testing.assert_close(ours[[0, 2]], alone[[0, 2]])
    torch.testing.assert_close(ours[1, 1:], alone[1, 1:])
    torch.testing.assert_close(ours[1, :1], (2 * alone - other)[1, :1])


def test_actors_sample_with_the_guide(story, tmp_path):
    config, opened, guide = story
    evaluate = with_guide(config, guide, autoguidance_weights="raw")
    protocol = sampling_protocol(evaluate, 0, opened)
    source = SampleSource(opened.shared, protocol, guide=guide_location(protocol, evaluate, opened))
    record = SampleActor(evaluate, [source]).compute(ScoringShard("", range(3)))
    sampler = CheckpointSampler(opened.shared, protocol, batch_size=4, guide=guide.path)
    assert (record.images == sampler.sample(range(3), record.labels)).all()


def test_a_grid_of_samples_has_the_guide(story, tmp_path):
    config, opened, guide = story
    grids = [
        sample_grid(opened, evaluate, 0, str(tmp_path / f"{number}.png"), classes=None, columns=2)
        for number, evaluate in enumerate((config.evaluate, with_guide(config, guide)))
    ]
    plain, guided_grid = (Image.open(grid) for grid in grids)
    assert plain.size == guided_grid.size and plain.tobytes() != guided_grid.tobytes()


def test_the_protocol_records_the_guide_and_which_weights_of_it(story):
    config, opened, guide = story
    other = open_checkpoint(write_checkpoint(config, 3, SMALLER).path)
    settings = [
        config.evaluate,
        with_guide(config, guide),
        with_guide(config, other),
        with_guide(config, guide, autoguidance_weights="raw"),
    ]
    assert len({sampling_protocol(evaluate, 0, opened).protocol_id for evaluate in settings}) == 4
    protocol = sampling_protocol(settings[1], 0, opened)
    with pytest.raises(ValueError, match=f"found {other.digest[:12]}, expected {guide.digest[:12]}"):
        guide_location(protocol, settings[2], opened)
    with pytest.raises(ValueError, match="found nothing"):
        guide_location(protocol, config.evaluate, opened)
    with pytest.raises(ValueError, match="no checkpoint for the autoguidance"):
        CheckpointSampler(opened.shared, protocol, batch_size=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(MODEL, input_size=4), r"latents of the shape \(4, 4, 4\), expected \(4, 8, 8\)"),
        (replace(MODEL, in_channels=8), r"latents of the shape \(8, 8, 8\)"),
        (replace(MODEL, num_classes=2), "classes, in number, 2, expected 3"),
    ],
)
def test_a_model_of_other_latents_or_classes_cannot_guide(story, model, message):
    config, opened, _ = story
    other = write_checkpoint(config, 5, model)
    with pytest.raises(ValueError, match=message):
        open_guide(with_guide(config, other), opened)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"kind": "diffusion"}}, r"the process diffusion \(linear, eps\), expected flow"),
        ({"class_names": ["ring", "blob", "stripe"]}, "a model of other classes"),
        ({"autoencoder": {"latents_std": [2.0] * 4}}, "another scale"),
        ({"autoencoder": {"sha256": "0" * 64, "tensors_sha256": "1" * 64}}, "a model of the latents of autoencoder"),
    ],
)
def test_a_model_of_another_process_or_scale_cannot_guide(story, change, message):
    config, opened, guide = story
    record_otherwise(guide, change)
    with pytest.raises(ValueError, match=message):
        open_guide(with_guide(config, guide), opened)


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["0", "1", "2"]},  # as of imported weights, which know no names
        {"autoencoder": {"sha256": None}},
    ],
)
def test_what_a_record_does_not_know_is_no_reason_to_refuse_it(story, change):
    config, opened, guide = story
    record_otherwise(guide, change)
    assert open_guide(with_guide(config, guide), opened) is not None


def record_otherwise(checkpoint, change):
    """Change what a checkpoint records, with the digests of it."""
    content = dict(checkpoint.config)
    for name, value in change.items():
        content[name] = {**content[name], **value} if name == "autoencoder" else value
    (checkpoint.path / "COMPLETE").unlink()
    write_json(checkpoint.path / "config.json", content)
    write_json(checkpoint.path / "COMPLETE", _digests(checkpoint.path))


def _digests(folder):
    from dit.files import sha256_of

    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def test_weights_that_the_guide_lacks_are_named(story):
    config, opened, guide = story
    with pytest.raises(FileNotFoundError, match="no weights 'ema_0.05'"):
        open_guide(with_guide(config, guide, autoguidance_weights="ema_0.05"), opened)


def test_a_guide_is_looked_for_before_a_training_unless_the_training_writes_it(story):
    config, _, guide = story
    checkpoints = config.folder("checkpoints")
    for folder in ("elsewhere", checkpoints):  # step 1, which is there although no such training writes it
        require_guide(with_guide(config, guide), config.train, folder)
    later = replace(config.evaluate, autoguidance=f"{checkpoints}/step_0000004")
    require_guide(later, config.train, checkpoints)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        require_guide(later, config.train, "elsewhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        require_guide(replace(later, autoguidance=f"{checkpoints}/step_4"), config.train, checkpoints)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_guide_that_the_training_will_never_write_is_refused(story, step):
    config, checkpoints = story[0], story[0].folder("checkpoints")
    never = replace(config.evaluate, autoguidance=f"{checkpoints}/step_{step:07d}")
    with pytest.raises(ValueError, match="a multiple of train.checkpoint_every = 2 up to train.steps = 6"):
        require_guide(never, config.train, checkpoints)


def test_a_training_keeps_its_checkpoint_that_guides(story):
    config, _, guide = story
    write_checkpoint(config, 3)
    checkpoints = CheckpointFolder(config.folder("checkpoints"))
    train = replace(config.train, keep_last=1)
    config = replace(config, train=train, evaluate=with_guide(config, guide))
    start_monitor(config, FakeContext(), FakeRun(), checkpoints, 3).finish("the newest")
    assert checkpoints.finished_steps() == [1, 3]


@pytest.mark.parametrize("random", [None, "counter"])
@pytest.mark.parametrize("sampler", ["sde", "dpmpp_2m"])
def test_samples_depend_on_seed_and_index_only(story, sampler, random):
    config, opened, _ = story
    evaluate = replace(config.evaluate, sampler=sampler, sampling_steps=4, cfg_scale=1.0, time_shift="sd3")
    protocol = sampling_protocol(evaluate, 0, opened, random)
    drawn = CheckpointSampler(opened.shared, protocol, batch_size=4)
    labels = np.array([0, 1, 2, 0, 1, 2])
    together = drawn.sample(range(6), labels)
    apart = CheckpointSampler(opened.shared, protocol, batch_size=2).sample([5, 2], labels[[5, 2]])
    assert np.abs(together[[5, 2]].astype(int) - apart.astype(int)).max() <= 1
    other_seed = CheckpointSampler(opened.shared, replace(protocol, seed=1), batch_size=4)
    assert (other_seed.sample([5], labels[[5]]) != together[5]).any()


def test_settings_of_the_recipe_reach_the_sampler(story):
    config, opened, _ = story
    evaluate = replace(config.evaluate, sampler="sde", sampling_steps=4, cfg_scale=1.0)
    changes = [{}, {"sde_diffusion": "constant"}, {"sde_norm": 0.25}, {"time_shift": "flux"}, {"time_shift": 2.0}]
    protocols = [sampling_protocol(replace(evaluate, **change), 0, opened) for change in changes]
    images = [CheckpointSampler(opened.shared, each, batch_size=3).sample(range(3), np.arange(3)) for each in protocols]
    assert len({image.tobytes() for image in images}) == len({each.protocol_id for each in protocols}) == 5
    assert protocols[3].time_shift == pytest.approx(np.exp(0.5 + 0.65 * (16 - 256) / 3840))


@pytest.mark.parametrize(("rule", "factor"), [("sd3", 3.0), ("dimension", (4 * 8 * 8 / 4096) ** 0.5), (1.0, None)])
def test_a_rule_of_the_time_shift_is_recorded_as_its_number(story, rule, factor):
    config, opened, _ = story
    assert sampling_protocol(replace(config.evaluate, time_shift=rule), 0, opened).time_shift == factor


def test_names_in_mlflow_are_looked_up_in_the_recipes_store(tmp_path, monkeypatch):
    """The guide of a checkpoint, before a training and after it, and the checkpoint that a notebook scores."""
    config = tiny_output(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/runs.db")
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    asked = []

    def find(name, **options):
        asked.append((name, options["tracking_uri"]))
        raise InterruptedError

    monkeypatch.setattr("pipelines.scoring.samples.guide.open_checkpoint", find)
    monkeypatch.setattr("pipelines.evaluate.open_checkpoint", find)
    guided = replace(config.evaluate, autoguidance="models:/weak@champion", cfg_scale=2.0)
    for look_up in (
        lambda: open_guide(guided, opened),
        lambda: require_guide(guided, config.train, "checkpoints", config.tracking.uri),
        lambda: evaluate("models:/weak@champion", config=config),
    ):
        with pytest.raises(InterruptedError):
            look_up()
    assert asked == 3 * [("models:/weak@champion", f"sqlite:///{tmp_path}/runs.db")]
