"""A checkpoint is opened by every one of its names."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pyarrow.fs import LocalFileSystem, copy_files
from tiny_checkpoint import random_network, tiny_output, write_checkpoint

from cluster import storage
from dit.autoencoder import describe_autoencoder
from dit.checkpoint import export_diffusers, load_checkpoint
from evaluation.protocol import EvaluationProtocol
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import SharedCheckpoint, open_checkpoint
from pipelines.registry.promotion import promote
from pipelines.registry.promotion_score import PromotionScore
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.tracking.tracker import Tracker
from raydit.errors import NotFound, RayditError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_output(tmp_path_factory.mktemp("located"))


@pytest.fixture(scope="module")
def checkpoints(config):
    """Return checkpoints of steps 2, 4 and 6, by step."""
    return {step: write_checkpoint(config, step) for step in (2, 4, 6)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "cache"


def samples(checkpoint):
    """Return the images of four samples."""
    protocol = EvaluationProtocol(
        num_samples=10,
        sampler="euler",
        sampling_steps=2,
        decoder="",
        extractor="",
        extractor_sha256="",
        reference_digest="",
    )
    sampler = CheckpointSampler(checkpoint.shared, protocol, batch_size=4)
    return sampler.sample(range(4), sampler.labels(range(4)))


def test_a_folder_is_opened_in_place_by_path_and_by_file_uri(config, checkpoints, monkeypatch):
    path = checkpoints[6].path
    monkeypatch.chdir(path.parent)
    for name in (path, str(path), "step_0000006", f"file://{path}"):
        found = open_checkpoint(name)
        assert (found.path, found.origin, found.digest) == (path, str(path), checkpoints[6].digest)
        assert (found.name, found.output) == ("step_0000006", config.output)
    assert open_checkpoint(found) is found
    assert checkpoint_recipe(found) == config


def test_a_uri_is_fetched_with_the_autoencoder_of_its_output(config, checkpoints, s3_bucket):
    """Workers fetch it too: they open the URI."""
    filesystem, inner = storage.resolve(s3_bucket)
    for folder in ("checkpoints/step_0000006", "autoencoder"):
        copy_files(str(Path(config.output) / folder), f"{inner}/out/{folder}", LocalFileSystem(), filesystem)
    uri = f"{s3_bucket}/out/checkpoints/step_0000006"
    found = open_checkpoint(uri)
    assert (found.digest, found.origin, found.shared.location) == (checkpoints[6].digest, uri, uri)
    assert (found.name, found.output) == ("step_0000006", f"{s3_bucket}/out")
    expected = describe_autoencoder(Path(config.folder("autoencoder")))
    assert describe_autoencoder(checkpoint_autoencoder(found)) == expected
    assert (samples(found) == samples(open_checkpoint(checkpoints[6].path))).all()
    with pytest.raises(FileNotFoundError, match="no checkpoint at s3://.*/step_0000008, expected a folder"):
        open_checkpoint(uri.replace("6", "8"))


# MLflow


@pytest.fixture(scope="module")
def logged_runs(config, checkpoints):
    """MLflow's id of a run that made checkpoints 2 and 4, and of a pipeline run that it is a child of."""
    from mlflow import MlflowClient

    tracker = Tracker.open(config)
    parent = tracker.start_run("pipeline", {})
    run = tracker.start_run("train", {}, parent=parent)
    for step in (2, 4):
        log_checkpoint(run, open_checkpoint(checkpoints[step].path))
    run.end("FINISHED")
    parent.end("FINISHED")
    tracker.close()
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    runs = {run.data.tags["raydit.stage"]: run.info.run_id for run in client.search_runs([experiment])}
    return runs["train"], runs["pipeline"]


@pytest.fixture
def store(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking.uri)
    return config.tracking.uri


def standing(checkpoint, value, error=0.5, **changes):
    fields = {"protocol_id": "p1", "metric": "fid_50k", "value": value, "error": error}
    return PromotionScore(checkpoint.digest, **{**fields, **changes})


def test_runs_and_models_lead_to_the_folder(checkpoints, logged_runs, store, config):
    run, pipeline = logged_runs
    steps = {name: open_checkpoint(name).step for name in (f"runs:/{run}", f"runs:/{pipeline}")}
    assert set(steps.values()) == {4}
    assert open_checkpoint(f"runs:/{run}/step_0000002").path == checkpoints[2].path
    message, given = promote(store, config.name, "leads", standing(checkpoints[2], 30.0))
    assert given and message == "models:/leads@champion is now version 1: 30"
    for name in ("models:/leads@champion", "models:/leads/1"):
        assert open_checkpoint(name).path == checkpoints[2].path
    from mlflow import MlflowClient

    source = MlflowClient(store).get_model_version("leads", "1").source
    assert open_checkpoint(source).path == checkpoints[2].path and source.startswith("models:/m-")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("export", "RUN", "OUT", "--format=official", "--store=STORE"), ""),
        (("merge", "RUN", "OUT", "--store=STORE"), "found no adapter"),
        (("import", "ADAPTER", "OUT", "--base=RUN", "--store=STORE"), "ADAPTER: found no adapter"),
        (("compare", "RUN", "--store=STORE"), "no report in"),
        (("publish", "RUN", "--set=tracking.uri=STORE"), "no report in"),
    ],
)
def test_commands_look_a_run_up_in_the_store_that_is_named(
    config, logged_runs, tmp_path, monkeypatch, command, message
):
    """Whether it was found shows in what is missing next."""
    from pipelines.cli.main import cli

    monkeypatch.chdir(tmp_path)
    values = {"RUN": f"runs:/{logged_runs[0]}", "STORE": config.tracking.uri}
    for name, value in values.items():
        command = tuple(part.replace(name, value) for part in command)
    done = CliRunner().invoke(cli, command)
    if message:
        assert isinstance(done.exception, RayditError) and message in str(done.exception)
    else:
        assert done.exit_code == 0 and Path("OUT").is_file()


def test_an_evaluation_leads_to_what_it_scored_and_a_runs_name_to_its_checkpoint(story):
    from mlflow import MlflowClient

    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name(story.config.name).experiment_id
    runs = client.search_runs([experiment])
    scored = {run.data.tags.get("raydit.checkpoint_digest"): run.info for run in runs}
    for step in (2, 4):
        info, expected = scored[story.checkpoints[step].digest], story.checkpoints[step].path
        for name in (info.run_id, info.run_name, f"{info.run_id}/step_{step:07d}", info.run_id[:10]):
            assert open_checkpoint(f"runs:/{name}", tracking_uri=story.uri).path == expected
    with pytest.raises(FileNotFoundError, match="found no checkpoint behind it"):
        open_checkpoint(f"runs:/{info.run_id}/step_0000006", tracking_uri=story.uri)
    (training,) = (run.info.run_name for run in runs if run.data.tags["raydit.stage"] == "train")
    assert open_checkpoint(f"runs:/{training}", tracking_uri=story.uri).step == 6
    assert open_checkpoint(f"runs:/{training}/step_0000002", tracking_uri=story.uri).step == 2
    again = client.create_run(experiment, run_name=training).info.run_id
    assert open_checkpoint(f"runs:/{training}", tracking_uri=story.uri).step == 6  # the other leads nowhere
    try:
        client.set_tag(again, "raydit.checkpoint", str(story.checkpoints[2].path))
        with pytest.raises(ValueError, match=f"found several runs .*{again}.*Give the id of one"):
            open_checkpoint(f"runs:/{training}", tracking_uri=story.uri)
    finally:
        client.delete_run(again)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("runs:/0123", FileNotFoundError, "found no run 0123 at sqlite:///.*expected an id or a name"),
        (
            "runs:/RUN/step_0000006",
            FileNotFoundError,
            "found no checkpoint behind it, expected a run or model that raydit has logged",
        ),
        ("models:/nobody@champion", FileNotFoundError, "found no models:/nobody@champion at sqlite"),
        (
            "models:/nobody/newest",
            ValueError,
            "models:/nobody/newest: found .*, expected models:/NAME@ALIAS, models:/NAME/VERS",
        ),
        ("models:/m-0123", FileNotFoundError, "found no models:/m-0123 at sqlite"),
    ],
)
def test_a_name_of_no_checkpoint_is_refused(logged_runs, store, name, error, message):
    with pytest.raises(error, match=message):
        open_checkpoint(name.replace("RUN", logged_runs[0]))


def test_an_unreachable_store_is_not_reported_as_a_missing_checkpoint():
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 does not answer, and runs:/0123 is looked up there"):
        open_checkpoint("runs:/0123", tracking_uri="http://127.0.0.1:9")


def test_an_overwritten_folder_is_not_the_checkpoint_that_mlflow_recorded(config, checkpoints, logged_runs, store):
    path = checkpoints[4].path
    kept = path.rename(path.with_name("kept"))
    try:
        shutil.copytree(checkpoints[2].path, path)
        with pytest.raises(
            ValueError, match=f"now has the digest .*, expected {checkpoints[4].digest[:12]}.*overwritten"
        ):
            open_checkpoint(f"runs:/{logged_runs[0]}")
    finally:
        shutil.rmtree(path)
        kept.rename(path)


def test_a_training_and_its_evaluation_log_one_model(config, logged_runs):
    """Each has a journal of its own; who comes first makes the model, and the training is what put it out."""
    from mlflow import MlflowClient

    checkpoint = open_checkpoint(write_checkpoint(config, 8).path)
    for part, stage in (("evaluations", "evaluate"), ("", "train")):
        tracker = Tracker.open(config, part)
        run = tracker.start_run(stage, {"step": 8})
        log_checkpoint(run, checkpoint)
        if part:
            run.metrics({"eval/fid_50k": 5.0}, 8, model=checkpoint.digest, dataset=("reference", "d"))
        run.end("FINISHED")
        tracker.close()
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    same = f"tags.`raydit.checkpoint_digest` = '{checkpoint.digest}'"
    (model,) = client.search_logged_models([experiment], filter_string=same)
    assert [metric.value for metric in model.metrics] == [5.0]
    runs = client.search_runs([experiment], "tags.`raydit.stage` = 'train'")
    outputs = {output.model_id for run in runs for output in client.get_run(run.info.run_id).outputs.model_outputs}
    assert model.model_id in outputs


# Promotion


def test_a_checkpoint_is_promoted_only_if_it_is_better_by_more_than_the_error(
    checkpoints, logged_runs, store, config, monkeypatch
):
    def promote_as_best(checkpoint, *arguments, **changes):
        return promote(store, config.name, "best", standing(checkpoint, *arguments, **changes))

    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # another store is the usual one
    assert promote_as_best(checkpoints[2], 30.0) == ("models:/best@champion is now version 1: 30", True)
    assert promote_as_best(checkpoints[2], 30.0)[0] == "models:/best@champion is already this checkpoint"
    message, given = promote_as_best(checkpoints[4], 29.4)
    assert not given and "stays: 30 against 29.4, not better by more than the error of 0.71" in message
    assert message.endswith("models:/best@challenger is now version 2")
    message, given = promote_as_best(checkpoints[4], 20.0, float("inf"))
    assert not given and "the error of a score is unknown" in message
    assert message.startswith(
        "models:/best@challenger is now version 3, the same checkpoint, scored again: 20, before 29"
    )
    assert promote_as_best(checkpoints[4], 29.2) == ("models:/best@champion is now version 4: 29.2, before 30", True)
    assert open_checkpoint("models:/best@champion", tracking_uri=store).path == checkpoints[4].path
    for changes in ({"protocol_id": "p2"}, {"metric": "fid_10k"}):
        with pytest.raises(ValueError, match="--promote best: found a score of .*, expected .* was chosen"):
            promote_as_best(checkpoints[2], 10.0, **changes)
    with pytest.raises(ConnectionError, match="does not know the checkpoint .*, so best was not promoted"):
        promote_as_best(checkpoints[6], 10.0)
    assert open_checkpoint("models:/best@champion", tracking_uri=store).path == checkpoints[4].path


def test_a_promoted_checkpoint_is_found_in_superseded_and_then_in_the_registry(
    config, checkpoints, logged_runs, store, tmp_path, capsys
):
    """With its autoencoder: samples stay the same."""
    assert promote(store, config.name, "kept", standing(checkpoints[2], 30.0)).given
    expected, output = samples(open_checkpoint(checkpoints[2].path)), Path(config.output)
    superseded = output / "superseded"
    superseded.mkdir()
    for folder in ("checkpoints", "autoencoder"):
        (output / folder).rename(superseded / f"{folder}-1")
        (superseded / f"{folder}-1" / "plan.json").write_text("{}")
    try:
        for name in ("models:/kept@champion", f"runs:/{logged_runs[0]}/step_0000002"):
            found = open_checkpoint(name)
            assert found.path == superseded / "checkpoints-1" / "step_0000002"
            assert (found.digest, found.output) == (checkpoints[2].digest, str(output))
        assert "models:/kept@champion was superseded: it lies in" in capsys.readouterr().out
        assert (samples(found) == expected).all()
        superseded.rename(tmp_path / "gone")
        copy = open_checkpoint("models:/kept@champion")
        assert (copy.digest, copy.origin) == (checkpoints[2].digest, str(checkpoints[2].path))
        assert copy.output == str(output) and copy.path.is_relative_to(tmp_path / "cache")
        assert "using the copy in the model registry" in capsys.readouterr().out
        assert (samples(copy) == expected).all()
    finally:
        (tmp_path / "gone" if (tmp_path / "gone").exists() else superseded).rename(superseded)
        for folder in ("checkpoints", "autoencoder"):
            (superseded / f"{folder}-1").rename(output / folder)
            (output / folder / "plan.json").unlink()
        superseded.rmdir()


# Formats of others


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    model = random_network(0)
    path = tmp_path_factory.mktemp("official") / "tiny.pt"
    torch.save(dict(model.state_dict()) | {"pos_embed": model.pos_embed.data}, path)
    return path


def test_official_weights_are_imported_once(config, official, cache):
    overrides = ("model.num_heads=2", f"autoencoder.id={config.folder('autoencoder')}", "objective.kind=flow")
    found = open_checkpoint(official, overrides=overrides)
    assert (found.origin, found.name, found.output) == (str(official), "tiny.pt", str(official.parent))
    assert found.config["objective"]["kind"] == "flow" and found.path.is_relative_to(cache)
    written = (found.path / "COMPLETE").stat().st_mtime_ns
    assert open_checkpoint(official, overrides=(*overrides, "evaluate.num_samples=20")).path == found.path
    assert (found.path / "COMPLETE").stat().st_mtime_ns == written
    recipe = checkpoint_recipe(found, ("evaluate.num_samples=20",))
    assert (recipe.output, recipe.images.size, recipe.evaluate.sampler) == (str(official.parent), 16, "euler")
    assert samples(found).shape == (4, 16, 16, 3)


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    """other_machine(): from now on, the cache is an empty one, as that of a worker on another machine."""
    return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))


@pytest.mark.parametrize("remote", [False, True])
def test_workers_on_other_machines_import_official_weights_themselves(
    config, official, other_machine, s3_bucket, remote
):
    name = str(official)
    if remote:
        name = f"{s3_bucket}/weights/tiny.pt"
        storage.upload_file(str(official), name)
    overrides = ("model.num_heads=2", f"autoencoder.id={config.folder('autoencoder')}", "objective.kind=flow")
    found = open_checkpoint(name, overrides=overrides)
    expected = samples(found)
    assert found.origin == found.shared.location == name
    other_machine()
    again = open_checkpoint(pickle.loads(pickle.dumps(found.shared)))
    assert (again.origin, again.digest) == (name, found.digest) and again.path != found.path
    assert (samples(found) == expected).all()


def test_workers_decode_by_the_autoencoder_that_was_given_for_a_pipeline(tmp_path, config, official, other_machine):
    own = tmp_path / "own"
    shutil.copytree(config.folder("autoencoder"), own)
    imported = open_checkpoint(official, overrides=("model.num_heads=2", f"autoencoder.id={own}"))
    export_diffusers(load_checkpoint(imported.path), tmp_path / "pipeline", autoencoder=own)
    found = open_checkpoint(tmp_path / "pipeline", overrides=(f"autoencoder.id={own}",))
    other_machine()
    assert open_checkpoint(found.shared).record.autoencoder.id == found.record.autoencoder.id == str(own)


def test_a_worker_says_that_its_machine_lacks_the_checkpoint(config, official):
    shared = SharedCheckpoint(str(official.with_name("gone.pt")), {"model": "DiT-S/2", "overrides": []})
    with pytest.raises(NotFound, match=r"no checkpoint at .*/gone.pt on .*, expected a URI, or a path that .* share"):
        open_checkpoint(shared)


def test_official_weights_need_a_model_name_or_dimensions(official):
    with pytest.raises(ValueError, match="tiny.pt is a file, expected .*--model DiT-XL/2"):
        open_checkpoint(official)
    with pytest.raises(ValueError, match="of another model; .* entries differ"):
        open_checkpoint(official, model="DiT-S/2")


def test_a_diffusers_pipeline_samples_as_its_source_does(tmp_path, config, official, cache):
    imported = open_checkpoint(
        official, overrides=("model.num_heads=2", f"autoencoder.id={config.folder('autoencoder')}")
    )
    folder = tmp_path / "pipeline"
    export_diffusers(load_checkpoint(imported.path), folder, autoencoder=config.folder("autoencoder"))
    found = open_checkpoint(folder)
    assert (found.origin, found.name, found.output) == (str(folder), "pipeline", str(tmp_path))
    assert all(torch.equal(value, imported.weights()[name]) for name, value in found.weights().items())
    with pytest.raises(ValueError, match="--model: found with"):
        open_checkpoint(folder, model="DiT-S/2")


def test_a_model_name_is_refused_for_a_checkpoint(checkpoints):
    with pytest.raises(ValueError, match="--model DiT-XL/2: found with .*Omit --model"):
        open_checkpoint(checkpoints[2].path, model="DiT-XL/2")
