"""A single training worker in this process: resuming, non-finite latents, backends, precision and memory."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeRun
from tiny_training import ROWS, Training, assert_equal, training_recipe, write_held_out, write_latents

from pipelines.artifacts import Artifact
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.follow import follow_checkpoints
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.train import start_monitor
from pipelines.training.data.order import EpochOrder
from pipelines.training.group.messages import InLoop, Report, Saved, Validated
from pipelines.training.nonfinite import RollbackRequested
from pipelines.training.starting.prepare_checkpoints import prepare_checkpoints


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains in a folder by name, and resumes if it is called again for the same folder."""

    def run(name="run", stop_after=None, **settings):
        return Training(training_recipe(tmp_path / name, **settings)).run(stop_after)

    return run


def newest_checkpoint(recipe):
    return CheckpointFolder(recipe.folder("checkpoints")).newest()


def poison(tmp_path, rows, name="run", **settings):
    recipe = training_recipe(tmp_path / name, **settings)
    write_latents(recipe, rows)
    return recipe


@pytest.mark.parametrize(
    ("stop", "random"), [(1, None), (3, None), (4, None), (7, None), (3, "counter"), (7, "counter")]
)
def test_a_stopped_run_resumes_to_the_bit(trained, stop, random):
    uninterrupted = trained("uninterrupted", random=random)
    first = trained("parts", steps=stop, random=random)
    rest = trained("parts", random=random)
    assert_equal(rest.weights, uninterrupted.weights)
    assert first.losses | rest.losses == uninterrupted.losses
    assert list(rest.losses) == list(range(stop + 1, 9))


def test_steps_after_the_last_checkpoint_are_repeated_to_the_bit(trained, tmp_path):
    uninterrupted = trained("uninterrupted")
    cut = trained("cut", steps=5)
    shutil.rmtree(Path(cut.recipe.folder("checkpoints")) / "step_0000005")
    rest = trained("cut")
    assert list(rest.losses) == [4, 5, 6, 7, 8]
    assert rest.losses.items() <= uninterrupted.losses.items()
    assert_equal(rest.weights, uninterrupted.weights)


def test_a_checkpoint_between_reports_does_not_change_the_reported_losses(trained):
    uninterrupted = trained("uninterrupted", log_every=4)
    trained("parts", log_every=4, steps=3)
    rest = trained("parts", log_every=4)
    assert rest.losses.items() <= uninterrupted.losses.items()
    assert list(rest.losses) == [4, 6, 8]


@pytest.mark.parametrize("stops", [[4], [1, 1, 5]])
def test_an_interrupted_run_resumes_to_the_bit(trained, stops):
    """Losses are means over three steps; those of an interrupted window are kept."""
    uninterrupted, losses = trained("uninterrupted", log_every=3, checkpoint_every=6), {}
    for number, steps in enumerate(stops):
        stopped = trained("parts", stop_after=steps, log_every=3, checkpoint_every=6)
        (step,) = stopped.interrupted
        assert step == sum(stops[: number + 1])
        losses |= stopped.losses
    rest = trained("parts", log_every=3, checkpoint_every=6)
    assert_equal(rest.weights, uninterrupted.weights)
    assert losses | rest.losses == uninterrupted.losses
    assert rest.saved == uninterrupted.saved[-len(rest.saved) :] and rest.interrupted == []
    cursors = [newest_checkpoint(run.recipe).trainer_state for run in (rest, uninterrupted)]
    assert [[report["step"] for report in cursor["reports"]] for cursor in cursors] == [[8]] * 2
    assert cursors[0].keys() == cursors[1].keys()


def test_an_interrupted_checkpoint_is_marked_and_goes_after_the_next_regular_one(trained):
    first = trained(stop_after=4)
    checkpoints = CheckpointFolder(first.recipe.folder("checkpoints"))
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([3], [4])
    assert checkpoints.newest().interrupted and checkpoints.newest().config["interrupted"] is True
    assert "interrupted" not in checkpoints.open(3).config
    trained(stop_after=1)
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([3], [5])
    trained()
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([3, 6, 8], [])
    assert list(next(follow_checkpoints(checkpoints.uri, 1, lambda opened: None)))[0].step == 3


def test_a_stop_at_a_regular_checkpoint_needs_no_other(trained):
    run = trained(stop_after=3)
    assert run.saved == [3] and run.interrupted == []


@pytest.mark.parametrize(("stop_after", "last"), [(2, Saved(2, interrupted=True)), (None, Saved(4))])
def test_workers_leave_the_loop_when_its_last_checkpoint_is_complete(trained, monkeypatch, stop_after, last):
    """A driver that was asked to stop ends the workers as soon as they have left the loop."""
    write = CheckpointFolder.write

    def write_slowly(checkpoints, step, save):
        time.sleep(0.2)
        write(checkpoints, step, save)

    monkeypatch.setattr(CheckpointFolder, "write", write_slowly)
    run = trained(stop_after=stop_after, steps=4, checkpoint_every=4)
    loop = [message for message in run.messages if isinstance(message, InLoop | Saved)]
    assert loop == [InLoop(True), last, InLoop(False)]
    assert newest_checkpoint(run.recipe).step == last.step


def test_an_interrupted_checkpoint_is_no_model_but_its_reports_are_logged(trained):
    stopped = trained(stop_after=4)
    checkpoints = CheckpointFolder(stopped.recipe.folder("checkpoints"))
    heard, again = FakeRun(), FakeRun()
    monitor = start_monitor(stopped.recipe, FakeContext(), heard, checkpoints, 0)
    for message in stopped.messages:
        if isinstance(message, Report | Saved):
            monitor.on_message(message)
    assert list(heard.values("train/loss")) == [1, 2, 3, 4]
    assert [step for _, step, _ in heard.models.values()] == [3]
    start_monitor(stopped.recipe, FakeContext(), again, checkpoints, 4)
    assert not again.logged and not again.models  # nothing was lost, so nothing is logged again


def test_a_killed_drivers_reports_are_in_the_interrupted_checkpoint(trained):
    stopped = trained(stop_after=5)
    run = FakeRun()
    start_monitor(
        stopped.recipe, FakeContext(), run, CheckpointFolder(stopped.recipe.folder("checkpoints")), first_step=5
    )
    assert run.values("train/loss") == stopped.losses
    assert [step for _, step, _ in run.models.values()] == [3]


def test_an_interrupted_checkpoint_at_a_lowered_end_becomes_the_last_one(trained, tmp_path):
    settings = {"log_every": 4, "validate_every": 3}
    for name in ("lower", "parts"):
        write_held_out(training_recipe(tmp_path / name, **settings), 8)
    lower = trained("lower", steps=5, **settings)
    stopped = trained("parts", stop_after=5, **settings)
    checkpoints = CheckpointFolder(stopped.recipe.folder("checkpoints"))
    (Path(checkpoints.uri) / "plan.json").write_text('{"identity": {}}')
    prepare_checkpoints(Artifact("train", checkpoints.uri, {}), steps=5)
    last = trained("parts", steps=5, **settings)
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([3, 5], []) and last.saved == [5]
    assert not checkpoints.open(5).interrupted
    assert_equal(last.weights, lower.weights)
    assert stopped.losses | last.losses == lower.losses
    states = [newest_checkpoint(run.recipe).trainer_state for run in (last, lower)]
    assert [[each["step"] for each in state["reports"]] for state in states] == [[4, 5]] * 2
    assert states[0]["validations"] == states[1]["validations"] and states[0].keys() == states[1].keys()


def test_an_interrupted_checkpoint_beyond_a_lowered_end_is_kept(trained, capsys):
    stopped = trained(stop_after=5)
    checkpoints = CheckpointFolder(stopped.recipe.folder("checkpoints"))
    (Path(checkpoints.uri) / "plan.json").write_text('{"identity": {}}')
    digest, artifact = checkpoints.newest().digest, Artifact("train", checkpoints.uri, {})
    prepare_checkpoints(artifact, steps=4)
    assert checkpoints.last_step() == 3
    (kept,) = (Path(checkpoints.uri).parent / "superseded").iterdir()
    assert CheckpointFolder(str(kept)).newest().digest == digest
    said = capsys.readouterr().out
    assert "the checkpoint of step 5, beyond train.steps = 4, is kept in" in said
    assert str(kept) in said and artifact.find_superseded() is None


def test_checkpoints_are_written_at_their_steps_and_at_the_end(trained):
    run = trained()
    assert run.saved == [3, 6, 8]
    cursor = newest_checkpoint(run.recipe).trainer_state
    assert [report["step"] for report in cursor.pop("reports")] == [7, 8]  # since the checkpoint before
    assert cursor == {"step": 8, "batches": 8, "seed": 3, "images_seen": 64, "order": {"kind": "global"}}


def test_draws_by_a_counter_train_other_weights_and_are_recorded(trained):
    """The draws are the only difference. An older recipe records nothing."""
    older, counter = trained("older", steps=3), trained("counter", steps=3, random="counter")
    assert older.losses.keys() == counter.losses.keys()
    assert all(older.losses[step] != counter.losses[step] for step in older.losses)
    recorded = newest_checkpoint(counter.recipe).config
    assert recorded["random"] == recorded["recipe"]["random"] == "counter"
    unset = newest_checkpoint(older.recipe).config
    assert "random" not in unset.keys() | unset["recipe"].keys()


def test_every_report_has_all_metrics(trained):
    run = trained(log_every=8, checkpoint_every=8)
    (report,) = [message for message in run.messages if isinstance(message, Report)]
    names = "loss mse lr grad_norm images_per_second data_wait checkpoint_wait mfu memory_gib".split()
    assert all(np.isfinite(report.metrics[name]) for name in names)
    # 64 samples; their mean loss is the quartiles' sums together.
    assert sum(report.metrics[f"count_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(1)
    assert sum(report.metrics[f"sum_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(report.metrics["loss"])
    assert 0 < report.metrics["mfu"] < 1 and 0 <= report.metrics["data_wait"] < 1


def test_a_batch_with_a_poisoned_image_is_skipped_and_the_image_named(tmp_path):
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


def test_a_run_with_a_poisoned_image_resumes_to_the_bit(tmp_path):
    uninterrupted = Training(poison(tmp_path, [17], "uninterrupted")).run()
    Training(poison(tmp_path, [17], "parts", steps=3)).run()
    rest = Training(training_recipe(tmp_path / "parts")).run()
    assert_equal(rest.weights, uninterrupted.weights)
    assert rest.losses.items() <= uninterrupted.losses.items()


def test_training_stops_at_a_poisoned_image_if_on_nonfinite_is_stop(tmp_path):
    recipe = poison(tmp_path, [17], on_nonfinite="stop")
    with pytest.raises(FloatingPointError, match=r"image-17 \(t = .*expected finite numbers.*on_nonfinite to 'skip'"):
        Training(recipe).run()


def test_skipped_batches_in_a_row_cause_a_rollback_that_uses_later_batches(tmp_path):
    of_step_5 = EpochOrder(ROWS, seed=3).rows(range(4 * 8, 5 * 8))
    run = Training(poison(tmp_path, of_step_5[:1], max_skipped=1)).run()
    assert run.notices[1] == "batches skipped in a row: 1; rolling back to step 3"
    fourth = [message.metrics["loss"] for message in run.messages if isinstance(message, Report) and message.step == 4]
    assert len(fourth) == len(set(fourth)) > 1
    checkpoint = newest_checkpoint(run.recipe)
    assert checkpoint.step == 8 and checkpoint.trainer_state["batches"] >= 10  # batches 4 and 5 gave no step
    assert all(torch.isfinite(tensor).all() for tensor in run.weights.values())


@pytest.mark.parametrize("settings", [{}, {"max_skipped": 1}, {"validate_every": 3, "accumulation_steps": 2}])
def test_a_gpus_lag_changes_no_weight_report_or_notice(tmp_path, monkeypatch, settings):
    """The steps of a GPU run ahead of the verdict on their gradients, also when batches are skipped or rolled back."""

    def run(name, lag):
        monkeypatch.setattr("dit.train.default_verdict_lag", lambda device: lag)
        recipe = poison(tmp_path, EpochOrder(ROWS, seed=3).rows(range(32, 40))[:1], name, **settings)
        if "validate_every" in settings:
            write_held_out(recipe, 8)
        return Training(recipe).run()

    at_once, later = run("at once", 0), run("later", 1)
    assert later.losses == at_once.losses and later.saved == at_once.saved
    assert later.notices == at_once.notices and any("skipped the batch" in notice for notice in later.notices)
    assert any("rolling back" in notice for notice in later.notices) == ("max_skipped" in settings)
    validations = [[each for each in run.messages if isinstance(each, Validated)] for run in (at_once, later)]
    assert validations[0] == validations[1] and bool(validations[0]) == ("validate_every" in settings)
    assert_equal(later.weights, at_once.weights)


def test_training_stops_if_rollbacks_do_not_help(tmp_path):
    training_recipe(tmp_path / "run", steps=3, max_skipped=2)
    Training(training_recipe(tmp_path / "run", steps=3, max_skipped=2)).run()
    recipe = poison(tmp_path, range(ROWS), max_skipped=2)
    run = Training(recipe)
    with pytest.raises(FloatingPointError, match="rolling back to step 3 did not help.*grad_clip") as stopped:
        run.run()
    assert not isinstance(stopped.value, RollbackRequested)
    assert len([notice for notice in run.notices if "skipped the batch" in notice]) == 2 * 4


def test_training_stops_if_there_is_no_checkpoint_to_roll_back_to(tmp_path):
    with pytest.raises(FloatingPointError, match="there is no regular checkpoint yet"):
        Training(poison(tmp_path, range(ROWS))).run()


def test_an_interrupted_checkpoint_stays_if_there_is_no_regular_one_to_roll_back_to(tmp_path):
    """With more skipped batches allowed, training goes on from it."""
    of_step_4 = EpochOrder(ROWS, seed=3).rows(range(3 * 8, 4 * 8))
    recipe = poison(tmp_path, of_step_4[:1], max_skipped=1, checkpoint_every=8)
    Training(recipe).run(stop_after=2)
    with pytest.raises(FloatingPointError, match="no regular checkpoint yet.*raise train.max_skipped"):
        Training(recipe).run()
    assert CheckpointFolder(recipe.folder("checkpoints")).interrupted_steps() == [2]
    rest = Training(training_recipe(tmp_path / "run", max_skipped=2, checkpoint_every=8)).run()
    assert list(rest.losses) == [3, 4, 5, 6, 7, 8]


def test_a_memory_mapped_file_trains_as_memory_does(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory, mapped = trained("memory", loading="memory"), trained("mapped", loading="memmap")
    assert_equal(mapped.weights, memory.weights)
    (folder,) = [entry for entry in (tmp_path / "cache/raydit/latents").iterdir() if entry.is_dir()]
    assert np.load(folder / "moments.npy", mmap_mode="r").shape == (ROWS, 8, 4, 4)


@pytest.mark.slow
def test_a_stream_resumes_to_the_bit_and_keeps_its_order(trained):
    uninterrupted = trained("uninterrupted", loading="stream", shuffle_rows=12)
    trained("parts", loading="stream", shuffle_rows=12, steps=4)
    rest = trained("parts", shuffle_rows=12)  # "auto" takes the backend from the checkpoint
    assert_equal(rest.weights, uninterrupted.weights)
    with pytest.raises(ValueError, match="train.loading: found 'memory'.*Set train.loading"):
        trained("parts", loading="memory", shuffle_rows=12, steps=9)
    assert trained("memory").losses != uninterrupted.losses


def test_bfloat16_trains_close_to_float32(trained):
    exact, rounded = trained("exact"), trained("rounded", dtype="bfloat16")
    assert rounded.losses != exact.losses
    np.testing.assert_allclose(list(rounded.losses.values()), list(exact.losses.values()), rtol=0.02)


def test_tf32_trains_in_float32_on_a_cpu_to_the_bit_and_says_so(trained):
    exact, other = trained("exact"), trained("other", dtype="tf32")
    assert other.losses == exact.losses
    assert_equal(other.weights, exact.weights)
    said = "train.dtype = 'tf32': this CPU has no TF32, so training continues in float32"
    assert said in other.notices and said not in exact.notices


def test_only_passes_of_the_network_see_tf32(trained, monkeypatch):
    """Not the optimizer, the reports or the checkpoints, which run in between."""
    import dit.train
    import pipelines.training.losses

    monkeypatch.setattr("dit.precision.has_tf32", lambda device: True)
    switched: dict[str, set[bool]] = {}

    def note(module, name):
        original = getattr(module, name)

        def noted(*arguments, **further):
            switched.setdefault(name, set()).add(torch.backends.cuda.matmul.allow_tf32)
            return original(*arguments, **further)

        monkeypatch.setattr(module, name, noted)

    note(torch.nn.functional, "linear")
    note(torch.autograd, "backward")
    note(torch.optim.AdamW, "step")
    note(dit.train, "learning_rate")
    note(pipelines.training.losses, "quartile_sums")
    run = trained("switched", dtype="tf32")
    assert len(run.losses) == 8
    assert switched == {
        "linear": {True},
        "backward": {True},
        "step": {False},
        "learning_rate": {False},
        "quartile_sums": {False},
    }
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"accumulation_steps": 4}])
def test_saving_memory_does_not_change_results(trained, settings):
    plain, other = trained("plain"), trained("other", **settings)
    np.testing.assert_allclose(list(other.losses.values()), list(plain.losses.values()), rtol=1e-4)


@pytest.mark.slow  # compiles for half a minute
def test_compiling_the_network_does_not_change_results(trained):
    plain, other = trained("plain"), trained("other", compile=True)
    np.testing.assert_allclose(list(other.losses.values()), list(plain.losses.values()), rtol=1e-4)


def test_a_full_disk_stops_training_and_leaves_no_partial_checkpoint(tmp_path, tiny_disk, monkeypatch):
    monkeypatch.setattr("pipelines.training.group.worker.RETRY_SECONDS", (0.0, 0.0))
    run = Training(training_recipe(tmp_path, tiny_disk / "output"))
    with pytest.raises(OSError, match="No space left"):
        run.run()
    assert run.saved == []
    assert list(Path(run.recipe.folder("checkpoints")).iterdir()) == []


def test_latents_from_another_output_use_the_autoencoder_of_this_recipe(tmp_path):
    """In that output the autoencoder was trained too, so that the latents record it by its folder there."""
    recipe = training_recipe(tmp_path, encode={"output": str(tmp_path / "shared")}, steps=2)
    manifest = Path(recipe.latents) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["autoencoder"]["id"] = TRAINED_AUTOENCODER
    manifest.write_text(json.dumps(content))
    Training(recipe).run()
    checkpoint = newest_checkpoint(recipe)
    assert checkpoint_autoencoder(checkpoint) == tmp_path / "autoencoder"
