"""What commands find of an autoencoder that is written: an incomplete run, an earlier start, averages of no use."""

import json
import shutil
from dataclasses import replace

import pytest
from fakes import FakeRun
from PIL import Image
from tiny import tiny_recipe
from tiny_encode import Context, autoencoder_folder

from pipelines.artifacts import Artifact
from pipelines.autoencoder import (
    autoencoder_artifact,
    find_autoencoder,
    refuse_unused_averages,
    train_autoencoder,
)
from pipelines.console import Progress
from pipelines.images.held_out import split_images
from pipelines.latents.recorded_images import list_images
from pipelines.training.autoencoder.autoencoder_monitor import AutoencoderMonitor, finish_run
from pipelines.training.autoencoder.autoencoder_result import AutoencoderRecord
from pipelines.training.group.messages import Report, Validated
from raydit.errors import InvalidInput, NotFound


@pytest.fixture
def interrupted(tmp_path):
    """A recipe whose autoencoder is finished, beside the files of its training."""
    config = tiny_recipe(tmp_path)
    _, images = list_images(config)
    artifact = autoencoder_artifact(config, config.autoencoder.train, split_images(config.images, images)[0])
    folder = tmp_path / "output" / "autoencoder"
    (folder / "training" / "images").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"identity": artifact.identity}))
    (folder / "report.json").write_text(json.dumps({"psnr": 21.5, "ssim": 0.75, "images": "12 held-out images"}))
    (folder / "raydit.json").write_text(json.dumps({"psnr": 21.5, "psnr_images": "12 held-out images"}))
    Image.new("RGB", (8, 8)).save(folder / "reconstructions.png")
    return config


def training_images(config):
    _, images = list_images(config)
    return split_images(config.images, images)[0]


def test_the_next_command_logs_the_figures_and_removes_the_files_of_the_training(interrupted, tmp_path):
    context, step = Context(), interrupted.autoencoder.train.steps
    train_autoencoder(interrupted, context=context)
    run = context.last_run
    assert run.values("autoencoder/psnr") == {step: 21.5} and run.values("autoencoder/ssim") == {step: 0.75}
    assert not (tmp_path / "output" / "autoencoder" / "training").exists()
    context.last_run = None
    train_autoencoder(interrupted, context=context)  # opens no run


def test_figures_that_are_logged_are_not_logged_again(interrupted, tmp_path):
    class Logged(FakeRun):
        def points(self, prefix):
            return {"psnr": {40: 21.5}}

    run, folder = Logged(), str(tmp_path / "output" / "autoencoder")
    finish_run(run, AutoencoderRecord.read(folder), folder, 40)
    assert not run.logged and not (tmp_path / "output" / "autoencoder" / "training").exists()


def test_metrics_of_a_step_that_is_computed_again_are_not_logged_again():
    """After a resume, those between the newest checkpoint and the interruption."""
    logged, run = [], FakeRun()
    run.points = lambda prefix: {"mse": {20: 0.5, 40: 0.25}, "validation/psnr": {40: 21.5}}
    run.metrics = lambda metrics, step: logged.append((metrics, step))
    monitor = AutoencoderMonitor(run, Progress("autoencoder", total=60, unit="steps"))
    for step in (40, 60, 60):
        monitor.on_message(Report(step, {"mse": 0.25}))
        monitor.on_message(Validated(step, {"psnr": 22.0}))
    assert logged == [({"autoencoder/mse": 0.25}, 60), ({"autoencoder/validation/psnr": 22.0}, 60)]


def test_averages_that_no_autoencoder_keeps_are_refused_unless_it_has_begun(interrupted, tmp_path):
    settings = replace(interrupted.autoencoder.train, ema_sigma_rels=(0.05,))
    found = Artifact("autoencoder", str(tmp_path / "output" / "autoencoder"), {"settings": "others"})
    with pytest.raises(InvalidInput, match=r"autoencoder.train.ema_sigma_rels: found \[0.05\]"):
        refuse_unused_averages(settings, found)
    refuse_unused_averages(settings, replace(found, identity=found.recorded()))
    unused = tiny_recipe(tmp_path, "output=" + str(tmp_path / "new"), "autoencoder.train.ema_sigma_rels=[0.05]")
    with pytest.raises(InvalidInput, match="ema_sigma_rels"):
        train_autoencoder(unused, context=Context())
    assert not (tmp_path / "new").exists()


def test_a_start_that_the_training_would_replace_is_refused_before_it_is_moved(interrupted, tmp_path, monkeypatch):
    own = tmp_path / "output" / "autoencoder"
    monkeypatch.chdir(tmp_path)
    for start in (str(own), "output/../output/autoencoder"):
        config = tiny_recipe(tmp_path, f"autoencoder.train.start={start}")
        with pytest.raises(InvalidInput, match="autoencoder.train.start: found .*, which this training would replace"):
            train_autoencoder(config, context=Context())
        with pytest.raises(InvalidInput, match="which this training would replace"):
            find_autoencoder(config, training_images(config))
    assert (own / "raydit.json").exists() and not (tmp_path / "output" / "superseded").exists()


@pytest.fixture
def finished(tmp_path):
    """A recipe whose autoencoder is finished, and whose start is gone since."""
    start = autoencoder_folder(tmp_path / "pretrained")
    config = tiny_recipe(tmp_path, f"autoencoder.train.start={start}")
    artifact = autoencoder_artifact(config, config.autoencoder.train, training_images(config))
    folder = tmp_path / "output" / "autoencoder"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"identity": artifact.identity}))
    (folder / "raydit.json").write_text(json.dumps({"psnr": 21.5, "psnr_images": "12 held-out images"}))
    shutil.rmtree(start)
    return config


def test_a_finished_autoencoder_needs_its_start_no_more(finished, tmp_path, capsys):
    train_autoencoder(finished, context=Context())
    assert "already finished: 21.5 dB" in capsys.readouterr().out
    output = tmp_path / "output"
    shutil.move(output / "autoencoder", output / "superseded" / "autoencoder-1")
    assert find_autoencoder(finished, training_images(finished)) == output / "superseded" / "autoencoder-1"


def test_other_settings_or_an_unfinished_training_need_the_start(finished, tmp_path):
    other = replace(finished, seed=finished.seed + 1)
    with pytest.raises(NotFound, match="no autoencoder at"):
        train_autoencoder(other, context=Context())
    (tmp_path / "output" / "autoencoder" / "raydit.json").unlink()
    with pytest.raises(NotFound, match="no autoencoder at"):
        train_autoencoder(finished, context=Context())


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"identity": 3}'])
def test_a_plan_that_records_no_identity_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"plan.json: found .*, expected a JSON object"):
        Artifact("autoencoder", str(tmp_path), {}).recorded()
