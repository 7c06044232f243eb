"""What is promoted can be loaded, served and taken back, and stays when the training removes its checkpoint."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image
from tiny_checkpoint import tiny_output, write_checkpoint
from tiny_story import tell_evaluation

from dit.files import sha256_of
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.doctor_checks import check_aliases
from pipelines.registry.model_files import gather
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, sampling_protocol
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.stage import StageContext
from pipelines.tracking.lookup import dangling_aliases, model_id_of, protected_digests
from pipelines.training.monitoring.retention import ProtectedCheckpoints

pytestmark = pytest.mark.usefixtures("store")
NAME = "tiny-dit"


@pytest.fixture
def promote(raydit, story):
    def call(step, *flags, name=NAME):
        flags = ("--name", name, "--protocol", story.reports[step].protocol_id, *flags, "--json")
        code, out, err = raydit("promote", str(story.checkpoints[step].path), *flags)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return call


@pytest.fixture
def loaded(promote):
    """As somebody who only knows the store loads it."""
    promote(4)
    import mlflow

    return mlflow.pyfunc.load_model(f"models:/{NAME}@champion")


def recorded_protocol(opened):
    config = checkpoint_recipe(opened)
    return sampling_protocol(config.evaluate, config.seed, opened, config.random)


def images_of(table):
    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in table["png"]])


def test_a_champion_loads_in_three_lines_and_draws_the_samples_of_its_evaluations(story, loaded):
    answer = loaded.predict(pandas.DataFrame({"class": ["ring", "2", "blob"], "seed": [5, 0, 5]}))
    assert (list(answer["class"]), list(answer["seed"])) == (["ring", "stripe", "blob"], [5, 0, 5])
    opened = open_checkpoint(story.checkpoints[4].path)
    sampler = CheckpointSampler(opened.shared, recorded_protocol(opened), batch_size=3)
    assert (images_of(answer) == sampler.sample([5, 0, 5], np.array([1, 2, 0]))).all()


def test_the_checkpoint_that_guides_is_promoted_as_well(tmp_path):
    guide = write_checkpoint(tiny_output(tmp_path), 1)
    guided = (f"evaluate.autoguidance={guide.path}", "evaluate.autoguidance_weights=raw", "evaluate.cfg_scale=2.0")
    opened = open_checkpoint(write_checkpoint(tiny_output(tmp_path, *guided), 2).path)
    settings = gather(opened, tmp_path / "files")
    protocol, files = recorded_protocol(opened), tmp_path / "files"
    expected = CheckpointSampler(opened.shared, protocol, batch_size=2, guide=guide.path).sample(
        [0, 1], np.array([1, 2])
    )
    assert settings["protocol"] == protocol.to_dict() and settings["has_null_class"]
    shutil.rmtree(guide.path)
    copied = CheckpointSampler(
        files / "checkpoint", protocol, batch_size=2, autoencoder=files / "autoencoder", guide=files / "guide"
    )
    assert (copied.sample([0, 1], np.array([1, 2])) == expected).all()


def test_classes_are_names_or_numbers_and_seeds_may_be_left_out(loaded):
    expected = loaded.predict(pandas.DataFrame({"class": ["stripe", "stripe"], "seed": [0, 1]}))
    for classes in (["stripe", "stripe"], ["2", "2"], [2, 2], [2.0, 2.0]):
        answer = loaded.predict(pandas.DataFrame({"class": classes}))
        assert (images_of(answer) == images_of(expected)).all()
    assert (images_of(expected)[0] != images_of(expected)[1]).any()
    # MLflow's own class, because its server hides the messages of all others.
    with pytest.raises(MlflowException, match="class 'square', expected one of 'blob', 'ring', 'stripe', or a number"):
        loaded.predict(pandas.DataFrame({"class": ["square"]}))
    model = loaded.unwrap_python_model()
    with pytest.raises(MlflowException, match="columns: found seed, expected class, with one of blob, ring, stripe"):
        model.predict(None, pandas.DataFrame({"seed": [0]}))
    for random, seed, bits in (("counter", -1, 32), ("counter", 1 << 32, 32), (None, -1, 63)):
        model.sampler.protocol = replace(model.sampler.protocol, random=random)
        with pytest.raises(MlflowException, match=rf"seed: found {seed}, expected an integer in \[0, 2\^{bits}\)"):
            model.predict(None, pandas.DataFrame({"class": ["ring"], "seed": [seed]}))


def test_a_request_chooses_how_it_is_sampled(story, loaded):
    table = pandas.DataFrame({"class": ["ring"], "seed": [1]})
    answer = loaded.predict(table, params={"cfg_scale": 3.0, "sampling_steps": 4})
    opened = open_checkpoint(story.checkpoints[4].path)
    protocol = replace(recorded_protocol(opened), cfg_scale=3.0, sampling_steps=4)
    expected = CheckpointSampler(opened.shared, protocol, batch_size=1).sample([1], np.array([1]))
    assert (images_of(answer) == expected).all()
    assert (images_of(loaded.predict(table)) != expected).any()
    with pytest.raises(MlflowException, match="sampler: found 'ddpm', expected one of euler, heun"):
        loaded.predict(table, params={"sampler": "ddpm"})
    for scale in (0.5, 0.0, -5.0):
        with pytest.raises(MlflowException, match=f"cfg_scale: found {scale}, expected a number of at least 1"):
            loaded.predict(table, params={"cfg_scale": scale})
    with pytest.raises(MlflowException, match="sampling_steps: found 0, expected at least 1. Choose another"):
        loaded.predict(table, params={"sampling_steps": 0})


def test_the_model_says_what_it_takes_and_gives_an_example(loaded):
    assert loaded.metadata.get_input_schema().input_names() == ["class", "seed"]
    params = {param.name: param.default for param in loaded.metadata.get_params_schema().params}
    assert params == {"sampler": "euler", "sampling_steps": 2, "cfg_scale": 1.0}
    example = loaded.input_example
    assert images_of(loaded.predict(example)).shape == (2, 16, 16, 3)


def test_a_version_says_what_it_is_and_holds_the_weights_as_they_are(story, loaded, store):
    version = store.get_model_version_by_alias(NAME, "champion")
    report = story.reports[4]
    assert version.tags["raydit.protocol_id"] == report.protocol_id
    assert version.tags["raydit.latents_fingerprint"] == story.latents.fingerprint
    assert f"Step 4: {report.headline} 20 ± 0.5 by protocol `{report.protocol_id}`" in version.description
    model = store.get_logged_model(model_id_of(version))
    assert version.run_id == model.source_run_id
    assert {"name": NAME, "version": str(version.version)} in json.loads(model.tags["mlflow.modelVersions"])
    files = {
        file.path for file in store.list_logged_model_artifacts(model_id_of(version), "artifacts/files/checkpoint")
    }
    below = "artifacts/files/checkpoint"
    assert files == {f"{below}/COMPLETE", f"{below}/DIGESTS", f"{below}/config.json", f"{below}/ema.safetensors"}
    local = store.get_logged_model(model_id_of(version)).artifact_location.removeprefix("file://")
    kept = sha256_of(Path(local) / below / "ema.safetensors")
    assert kept == sha256_of(story.checkpoints[4].path / "ema.safetensors")


def test_a_model_is_a_copy_that_needs_nothing_of_the_output(story, loaded):
    """Neither the checkpoint, which the training may remove, nor the autoencoder, nor the images."""
    import mlflow

    table = pandas.DataFrame({"class": ["ring"], "seed": [1]})
    output = Path(story.config.output)
    away = output.rename(output.with_name("away"))
    try:
        alone = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
        assert (images_of(alone.predict(table)) == images_of(loaded.predict(table))).all()
    finally:
        away.rename(output)


def test_who_is_better_within_the_error_challenges_and_a_rollback_is_one_command(raydit, story, promote, store):
    def holders():
        numbers = store.get_registered_model("race").aliases
        return {alias: store.get_model_version("race", number).tags["raydit.step"] for alias, number in numbers.items()}

    assert promote(2, name="race")["given"]
    assert promote(6, name="race")["given"] and holders() == {"champion": "6"}
    found = promote(4, name="race")  # 20.0 against 20.4, with errors of 0.5 each
    assert not found["given"] and "models:/race@challenger is now version 3" in found["found"]
    assert holders() == {"champion": "6", "challenger": "4"}
    code, out, _ = raydit("promote", "--rollback", "race")
    assert code == 0 and "models:/race@champion is version 1 again, instead of 2" in out
    assert holders() == {"champion": "2", "challenger": "4"}
    code, _, err = raydit("promote", "--rollback", "race")
    assert code == 2 and "found no version that held the alias before it, expected one to roll back to" in err
    assert promote(4, name="race")["given"] and holders() == {"champion": "4"}


def test_another_protocols_score_is_refused(raydit, story, promote):
    promote(2, name="fair")
    other = replace(story.config, evaluate=replace(story.config.evaluate, cfg_scale=2.0))
    with StageContext(other) as context:
        report = tell_evaluation(context, other, story.checkpoints[6], 1.0)
    arguments = ("promote", str(story.checkpoints[6].path), "--name", "fair", "--protocol", report.protocol_id)
    code, _, err = raydit(*arguments)
    assert (
        code == 2
        and f"found a score of protocol_id {report.protocol.label}, expected {story.reports[2].protocol.label}" in err
        and "by which models:/fair@champion was chosen" in err
    )


@pytest.mark.parametrize(("name", "better"), [("a/b", "a-b"), ("v1:2", "v1-2"), ("it's", "it-s")])
def test_a_name_that_mlflow_refuses_is_refused_before_any_work(raydit, story, name, better):
    for arguments in (
        ("promote", str(story.checkpoints[4].path), "--name", name, "--protocol", story.reports[4].protocol_id),
        ("evaluate", str(story.checkpoints[4].path), "--promote", name, "--num-samples", "1000"),
    ):
        code, _, err = raydit(*arguments)
        assert code == 2 and f"name of a registered model: found {name!r}" in err
        assert f"Name it '{better}'" in err


def test_retention_is_told_of_every_checkpoint_that_an_alias_or_a_rollback_leads_to(story, promote, store, tmp_path):
    for model in store.search_registered_models():
        for alias in dict(store.get_registered_model(model.name).aliases):
            store.delete_registered_model_alias(model.name, alias)
    assert protected_digests(story.uri) == set()
    promote(2, name="kept")
    promote(4, name="kept")
    assert protected_digests(story.uri) == {story.checkpoints[step].digest for step in (2, 4)}
    assert protected_digests(f"sqlite:///{tmp_path}/none.db") == set() and not list(tmp_path.iterdir())
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 does not answer"):
        protected_digests("http://127.0.0.1:9")


def test_retention_removes_nothing_that_a_registered_model_leads_to(story, promote, monkeypatch):
    """What the training would remove: everything but its newest."""
    promote(4, name="stays")
    said, digests = [], {step: story.checkpoints[step].digest for step in (2, 4)}
    protected = protected_digests(story.uri)
    registered = ProtectedCheckpoints(story.uri, said.append)
    expected = {step: digest for step, digest in digests.items() if digest not in protected}
    for _ in range(2):
        found = registered.filter_removable(digests)
        assert found == expected and 4 not in found
    assert said.count("keeping the checkpoint of step 4: an alias of a registered model points to it") == 1


def test_while_the_registry_cannot_be_asked_all_checkpoints_stay_and_it_is_asked_once_a_minute(story, monkeypatch):
    said, asked = [], []

    def away(uri):
        asked.append(uri)
        raise ConnectionError("http://127.0.0.1:9 does not answer")

    registered = ProtectedCheckpoints(story.uri, said.append)
    with monkeypatch.context() as outage:
        outage.setattr("pipelines.tracking.lookup.protected_digests", away)
        assert (
            registered.filter_removable({})
            == {}
            == registered.filter_removable({2: "a"})
            == registered.filter_removable({2: "a"})
        )
        assert len(asked) == len(said) == 1 and "127.0.0.1:9 does not answer" in said[0]
        assert registered.filter_removable({2: "a"}, force_refresh=True) == {} and len(asked) == 2
    assert registered.filter_removable({2: "a"}, force_refresh=True) == {2: "a"}


def test_an_alias_that_leads_to_no_files_is_told_by_lineage_and_doctor(raydit, story, promote, store, request):
    promote(4, name="hollow")
    before, count = dangling_aliases(story.uri)
    assert before == [] and count >= 1
    model = model_id_of(store.get_model_version_by_alias("hollow", "champion"))
    files = Path(store.get_logged_model(model).artifact_location.removeprefix("file://"))
    away = files.rename(files.with_name(f"{files.name}-away"))
    request.addfinalizer(lambda: away.rename(files))
    dangling, _ = dangling_aliases(story.uri)
    assert "models:/hollow@champion" in dangling
    check = check_aliases()
    assert not check.ok and "models:/hollow@champion" in check.found and "raydit promote" in check.do
    code, out, _ = raydit("lineage", "models:/hollow@champion", "--quick")
    assert code == 1 and "BROKEN: its files are missing from the store" in out
    assert check_aliases("http://127.0.0.1:9").ok  # the line about tracking is red then


def test_an_upload_that_was_cut_off_is_no_model_and_is_repeated(raydit, promote, store, capsys):
    """Killed before MLmodel, which is uploaded last."""
    promote(4, name="cut")
    model = model_id_of(store.get_model_version_by_alias("cut", "champion"))
    recognised = Path(store.get_logged_model(model).artifact_location.removeprefix("file://")) / "MLmodel"
    recognised.unlink()
    assert "models:/cut@champion" in dangling_aliases(store.tracking_uri)[0]
    store.create_model_version("cut", "elsewhere", tags={"raydit.before": "1"})
    store.set_registered_model_alias("cut", "champion", "2")
    code, _, err = raydit("promote", "--rollback", "cut")
    assert code == 2 and "models:/cut/1: found no files in the store" in err
    store.delete_registered_model("cut")
    assert promote(4, name="cut")["given"] and recognised.is_file()
    store.delete_registered_model("cut")


def test_a_version_that_was_deleted_ends_what_a_rollback_leads_to(raydit, store):
    name = "shortened"
    store.create_registered_model(name)
    for number in (1, 2, 3):
        tags = {"raydit.digest": f"digest {number}", "raydit.before": str(number - 1 or "")}
        store.create_model_version(name, "elsewhere", tags=tags)
    store.set_registered_model_alias(name, "champion", "3")
    try:
        store.delete_model_version(name, "1")
        assert {"digest 2", "digest 3"} <= protected_digests(store.tracking_uri)
        store.delete_model_version(name, "2")
        assert "digest 3" in protected_digests(store.tracking_uri)
        code, _, err = raydit("promote", "--rollback", name)
        assert code == 2 and f"models:/{name}/2: found no files in the store" in err
    finally:
        store.delete_registered_model(name)


@pytest.mark.slow
def test_a_served_model_answers_over_http_with_an_image(story, loaded, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    with open(tmp_path / "server.log", "w") as log:
        # It runs `uvicorn` by its name, as an activated environment has it.
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        content = {"dataframe_records": [{"class": "ring", "seed": 5}], "params": {"sampling_steps": 2}}
        answer = post(f"http://127.0.0.1:{port}/invocations", content, server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    (row,) = answer["predictions"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"]))))
    assert (row["class"], row["seed"]) == ("ring", 5)
    assert (picture == images_of(loaded.predict(pandas.DataFrame({"class": ["ring"], "seed": [5]})))[0]).all()


def post(url, content, server, seconds=120):
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.URLError as error:
            assert not isinstance(error, urllib.error.HTTPError), error.read()
            assert server.poll() is None and time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.5)
