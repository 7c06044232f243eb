"""The train job's worker, alone in this process: resuming, poisoned latents, where latents are read from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import ROWS, Training, assert_equal, training_recipe, write_latents

from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.autoencoder import OURS
from pipelines.training.messages import Report
from pipelines.training.nonfinite import RollbackRequested
from pipelines.training.order import EpochOrder


@pytest.fixture
def trained(tmp_path):
    """Train in a folder of its own; of the same name twice, go on."""

    def run(name="run", **settings):
        return Training(training_recipe(tmp_path / name, **settings)).run()

    return run


def newest_checkpoint(recipe):
    return CheckpointFolder(recipe.folder("checkpoints")).newest()


def poison(tmp_path, rows, name="run", **settings):
    recipe = training_recipe(tmp_path / name, **settings)
    write_latents(recipe, rows)
    return recipe


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_run_that_was_stopped_goes_on_to_the_bit(trained, stop):
    whole = trained("whole")
    first = trained("parts", steps=stop)
    rest = trained("parts")
    assert_equal(rest.weights, whole.weights)
    assert first.losses | rest.losses == whole.losses
    assert list(rest.losses) == list(range(stop + 1, 9))


def test_what_was_done_after_the_last_checkpoint_is_done_again_alike(trained, tmp_path):
    whole = trained("whole")
    cut = trained("cut", steps=5)
    shutil.rmtree(Path(cut.recipe.folder("checkpoints")) / "step_0000005")
    rest = trained("cut")
    assert list(rest.losses) == [4, 5, 6, 7, 8]
    assert rest.losses.items() <= whole.losses.items()
    assert_equal(rest.weights, whole.weights)


def test_losses_are_reported_alike_though_a_checkpoint_falls_between_reports(trained):
    whole = trained("whole", log_every=4)
    trained("parts", log_every=4, steps=3)
    rest = trained("parts", log_every=4)
    assert rest.losses.items() <= whole.losses.items()
    assert list(rest.losses) == [4, 6, 8]


def test_checkpoints_come_at_their_steps_and_at_the_end(trained):
    run = trained()
    assert run.saved == [3, 6, 8]
    cursor = newest_checkpoint(run.recipe).trainer_state
    assert [report["step"] for report in cursor.pop("reports")] == [7, 8]  # since the checkpoint before
    assert cursor == {"step": 8, "batches": 8, "seed": 3, "images_seen": 64, "order": {"kind": "global"}}


def test_every_report_says_how_it_goes(trained):
    run = trained(log_every=8, checkpoint_every=8)
    (report,) = [message for message in run.messages if isinstance(message, Report)]
    names = "loss mse lr grad_norm images_per_second data_wait checkpoint_wait mfu memory_gib".split()
    assert all(np.isfinite(report.metrics[name]) for name in names)
    # 64 samples; their mean loss is the quartiles' sums together.
    assert sum(report.metrics[f"count_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(1)
    assert sum(report.metrics[f"sum_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(report.metrics["loss"])
    assert 0 < report.metrics["mfu"] < 1 and 0 <= report.metrics["data_wait"] < 1


def test_a_poisoned_image_is_left_out_and_named(tmp_path):
    clean = Training(training_recipe(tmp_path / "clean")).run()
    recipe = poison(tmp_path, [17])
    run = Training(recipe).run()
    assert all(torch.isfinite(tensor).all() for tensor in run.weights.values())
    (notice, *others) = run.notices
    assert "image-17 (t = " in notice and "latents not finite" in notice and "learning rate 1.0e-03" in notice
    assert "1 in a row" in notice and "8 images include" in notice
    first = int(notice.split()[1].rstrip(":"))
    assert [run.losses[step] for step in range(1, first)] == [clean.losses[step] for step in range(1, first)]
    state = newest_checkpoint(recipe).trainer_state
    assert state["step"] == 8 and state["batches"] == 8 + 1 + len(others)


def test_a_run_with_a_poisoned_image_goes_on_to_the_bit(tmp_path):
    whole = Training(poison(tmp_path, [17], "whole")).run()
    Training(poison(tmp_path, [17], "parts", steps=3)).run()
    rest = Training(training_recipe(tmp_path / "parts")).run()
    assert_equal(rest.weights, whole.weights)
    assert rest.losses.items() <= whole.losses.items()


def test_training_stops_at_a_poisoned_image_if_told_so(tmp_path):
    recipe = poison(tmp_path, [17], on_nonfinite="stop")
    with pytest.raises(FloatingPointError, match=r"image-17 \(t = .*expected finite numbers.*on_nonfinite to 'skip'"):
        Training(recipe).run()


def test_several_in_a_row_lead_back_to_the_last_checkpoint_with_other_batches(tmp_path):
    of_step_5 = EpochOrder(ROWS, seed=3).rows(range(4 * 8, 5 * 8))
    run = Training(poison(tmp_path, of_step_5[:1], max_skipped=1)).run()
    assert run.notices[1] == "batches skipped in a row: 1; rolling back to step 3"
    fourth = [message.metrics["loss"] for message in run.messages if isinstance(message, Report) and message.step == 4]
    assert len(fourth) == len(set(fourth)) > 1
    checkpoint = newest_checkpoint(run.recipe)
    assert checkpoint.step == 8 and checkpoint.trainer_state["batches"] >= 10  # those of steps 4 and 5 gave nothing
    assert all(torch.isfinite(tensor).all() for tensor in run.weights.values())


def test_where_going_back_does_not_help_training_stops_and_says_so(tmp_path):
    training_recipe(tmp_path / "run", steps=3, max_skipped=2)
    Training(training_recipe(tmp_path / "run", steps=3, max_skipped=2)).run()
    recipe = poison(tmp_path, range(ROWS), max_skipped=2)
    run = Training(recipe)
    with pytest.raises(FloatingPointError, match="rolling back to step 3 did not help.*grad_clip") as stopped:
        run.run()
    assert not isinstance(stopped.value, RollbackRequested)
    assert len([notice for notice in run.notices if "skipped the batch" in notice]) == 2 * 4


def test_before_the_first_checkpoint_there_is_nowhere_to_go_back_to(tmp_path):
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet"):
        Training(poison(tmp_path, range(ROWS))).run()


def test_a_mapped_file_gives_the_training_of_memory(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory, mapped = trained("memory", loading="memory"), trained("mapped", loading="memmap")
    assert_equal(mapped.weights, memory.weights)
    (folder,) = [entry for entry in (tmp_path / "cache/raydit/latents").iterdir() if entry.is_dir()]
    assert np.load(folder / "moments.npy", mmap_mode="r").shape == (ROWS, 8, 4, 4)


@pytest.mark.slow
def test_a_stream_goes_on_to_the_bit_and_keeps_its_order(trained):
    whole = trained("whole", loading="stream", shuffle_rows=12)
    trained("parts", loading="stream", shuffle_rows=12, steps=4)
    rest = trained("parts", shuffle_rows=12)  # found again without being told
    assert_equal(rest.weights, whole.weights)
    with pytest.raises(ValueError, match="train.loading: found 'memory'.*Set train.loading"):
        trained("parts", loading="memory", shuffle_rows=12, steps=9)
    assert trained("memory").losses != whole.losses


def test_bfloat16_trains_close_to_float32(trained):
    exact, rounded = trained("exact"), trained("rounded", dtype="bfloat16")
    assert rounded.losses != exact.losses
    np.testing.assert_allclose(list(rounded.losses.values()), list(exact.losses.values()), rtol=0.02)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"accumulation_steps": 4}])
def test_what_saves_memory_changes_no_result(trained, settings):
    plain, other = trained("plain"), trained("other", **settings)
    np.testing.assert_allclose(list(other.losses.values()), list(plain.losses.values()), rtol=1e-4)


@pytest.mark.slow  # compiles for half a minute
def test_a_compiled_network_changes_no_result(trained):
    plain, other = trained("plain"), trained("other", compile=True)
    np.testing.assert_allclose(list(other.losses.values()), list(plain.losses.values()), rtol=1e-4)


def test_a_disk_without_room_for_a_checkpoint_stops_training_and_leaves_nothing_half_written(tmp_path, tiny_disk):
    run = Training(training_recipe(tmp_path, tiny_disk / "output"))
    with pytest.raises(OSError, match="No space left"):
        run.run()
    assert run.saved == []
    assert list(Path(run.recipe.folder("checkpoints")).iterdir()) == []


def test_latents_made_in_another_output_lead_to_the_autoencoder_of_this_recipe(tmp_path):
    """There the autoencoder was trained beside them, so that they know it by its folder in that output."""
    recipe = training_recipe(tmp_path, encode={"output": str(tmp_path / "shared")}, steps=2)
    manifest = Path(recipe.latents) / "manifest.json"
    told = json.loads(manifest.read_text())
    told["autoencoder"]["id"] = OURS
    manifest.write_text(json.dumps(told))
    Training(recipe).run()
    checkpoint = newest_checkpoint(recipe)
    assert checkpoint_autoencoder(checkpoint) == tmp_path / "autoencoder"
