"""What somebody else puts into a journal, or beside it, neither leaves the machine nor stops the tracking."""

import json
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import close_delivered
from PIL import Image

from pipelines.config.reader import load_recipe
from pipelines.tracking.journal_folder import find_sendable
from pipelines.tracking.relocation import relocate
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.undelivered import find_journals
from raydit.errors import InvalidInput

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


@pytest.fixture
def config(request, tmp_path, store):
    given = {"name": tmp_path.name, "output": tmp_path / "output", "tracking.uri": store}
    return load_recipe(
        request.config.rootpath / "tests/recipes/tiny.toml", [f"{key}={value}" for key, value in given.items()]
    )


def files_of_run(config, stage="train"):
    """Return the artifacts of the only run of a stage, and those in its images/."""
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    (run,) = client.search_runs([experiment], f"tags.`raydit.stage` = '{stage}'")
    paths = [file.path for file in client.list_artifacts(run.info.run_id)]
    return sorted(paths), client.list_artifacts(run.info.run_id, "images")


def test_only_files_of_the_output_are_sent(config, tmp_path, capsys):
    """A token beside the output, a link to it, a picture that Ghostscript would run, a path through .. and a folder."""
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "token.txt").write_text("secret")
    (output / "link.txt").symlink_to(tmp_path / "token.txt")
    (output / "figures").symlink_to(tmp_path)
    (output / "report.json").write_text("{}")
    (output / "eps.png").write_bytes(EPS)
    Image.new("RGB", (4, 4)).save(output / "grid.png")

    tracker = Tracker.open(config)
    run = tracker.start_run("train", {})
    for path in (tmp_path / "token.txt", output / "link.txt", output / "figures/token.txt", f"{output}/../token.txt"):
        run.artifact(path)
        run.image(path, "samples", 1)
    run.artifact(output)
    run.artifact("s3://bucket/private")
    run.artifact(output / "removed.json")
    run.image(output / "eps.png", "samples", 1)
    run.artifact(output / "report.json")
    run.image(output / "grid.png", "samples", 2)
    run.end("FINISHED")
    close_delivered(tracker)

    names, images = files_of_run(config)
    assert names == ["images", "report.json"] and len(images) == 2  # one picture, and MLflow's small copy of it
    refused = [json.loads(line) for line in tracker._journal.refused_path.read_bytes().splitlines()]
    assert [record["reason"].partition(", ")[0].partition(": ")[2] for record in refused] == [
        *["found a file outside of the output"] * 8,
        "found something else than a file",
        "found a file outside of the output",
        f"cannot identify image file <_io.BufferedReader name='{output}/eps.png'>",
    ]
    assert "token.txt: found a file outside of the output" in capsys.readouterr().out


def test_lines_that_are_no_entries_are_set_aside_and_the_rest_arrives(config, tmp_path):
    tracker = Tracker.open(config)
    run = tracker.start_run("train", {})
    close_delivered(tracker)
    lines = [b"[1]", b"not JSON", b"[" * 100_000, b'{"op": 1, "run": "r"}', b'{"op": "write", "run": "r"}', b"{}"]
    with open(tracker._journal.path, "ab") as file:
        file.write(b"\n".join(lines) + b"\n")
    tracker = Tracker.open(config)
    run = tracker.start_run("train", {})
    run.metrics({"train/loss": 0.5}, 1)
    run.end("FINISHED")
    close_delivered(tracker)
    refused = [json.loads(line)["reason"] for line in tracker._journal.refused_path.read_bytes().splitlines()]
    assert refused == ["ValueError: '' is no kind of entry"] * 4 + [
        "ValueError: 'write' is no kind of entry",
        "ValueError: '' is no kind of entry",
    ]
    client = MlflowClient(config.tracking.uri)
    (found,) = client.search_runs([client.get_experiment_by_name(config.name).experiment_id])
    assert found.data.metrics == {"train/loss": 0.5} and found.info.status == "FINISHED"


@pytest.mark.parametrize("state", ["{}", "[]", '{"offset": -1, "known": {}}', '{"offset": 1e300, "known": {}}', "{"])
def test_a_cursor_that_cannot_be_is_told(config, state):
    tracker = Tracker.open(config)
    close_delivered(tracker)
    file = tracker._journal.path.with_suffix(".state.json")
    file.write_text(state)
    with pytest.raises(InvalidInput, match=rf"{file}.*[Rr]e(move|store)"):
        Tracker.open(config)


def test_files_in_an_object_store_are_sent_from_the_output_only(tmp_path):
    output = "s3://bucket/run?endpoint_override=localhost:1"
    for path in ("s3://bucket/run2/a.png", "s3://other/run/a.png", "s3://bucket/run/../private/a.png"):
        with pytest.raises(InvalidInput, match="outside of the output"):
            find_sendable(f"{path}?endpoint_override=localhost:1", output, tmp_path)
    with pytest.raises(InvalidInput, match="outside of the output"):
        find_sendable("s3://bucket/run/a.png?endpoint_override=elsewhere:1", output, tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    assert find_sendable(str(tmp_path / "recipe.toml"), output, tmp_path) == str(tmp_path / "recipe.toml")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files that belong to another user")


@needs_root
@pytest.mark.parametrize("ending", [".jsonl", ".state.json", ".refused.jsonl"])
def test_a_journal_that_another_user_planted_is_refused(config, ending):
    tracker = Tracker.open(config)
    close_delivered(tracker)
    planted = tracker._journal.path.with_suffix(ending)
    planted.touch()
    os.chown(planted, 12345, -1)
    for use in (lambda: Tracker.open(config), lambda: list(find_journals(config.output))):
        with pytest.raises(InvalidInput, match=f"{planted}: found a file of user 12345"):
            use()


@needs_root
def test_in_an_output_of_another_user_a_journal_of_ones_own_is_kept(config, tmp_path):
    theirs = Tracker.open(config)
    theirs.start_run("train", {}).artifact(tmp_path / "output" / "theirs.txt")
    close_delivered(theirs)
    (tmp_path / "output" / "theirs.txt").touch()
    lines = theirs._journal.path.read_bytes()
    for path in (tmp_path / "output" / ".tracking").rglob("*"):
        os.chown(path, 12345, -1)
    os.chown(tmp_path / "output" / ".tracking", 12345, -1)

    ours = Tracker.open(config)
    ours.start_run("evaluate", {}).end("FINISHED")
    close_delivered(ours)
    assert ours.folder == tmp_path / "output" / ".tracking" / "user-0"
    assert files_of_run(config, "evaluate") == ([], []) and theirs._journal.path.read_bytes() == lines
    assert [journal.path for journal in find_journals(config.output)] == [ours._journal.path]


@needs_root
def test_a_link_of_another_user_is_not_followed_as_the_folder_of_journals(config, tmp_path):
    (tmp_path / "output").mkdir()
    link = tmp_path / "output" / ".tracking"
    link.symlink_to(tmp_path)
    os.lchown(link, 12345, -1)
    with pytest.raises(InvalidInput, match=f"{link}: found a file of user 12345"):
        Tracker.open(config)


@needs_root
def test_mending_a_moved_database_takes_no_planted_journal_over(config, tmp_path, monkeypatch):
    """Merging would make the lines the user's own."""
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/old/mlflow.db"
    given = [f"output={tmp_path}/old/output", f"tracking.uri={uri}", f"name={tmp_path.name}"]
    moved = load_recipe(Path(__file__).parents[2] / "recipes/tiny.toml", given)
    tracker = Tracker.open(moved)
    tracker.start_run("train", {}).end("FINISHED")
    close_delivered(tracker)
    os.chown(tracker._journal.path, 12345, -1)
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    before = (tmp_path / "new/mlflow.db").read_bytes()
    with pytest.raises(InvalidInput, match="found a file of user 12345"):
        relocate(f"sqlite:///{tmp_path}/new/mlflow.db", [f"{tmp_path}/new/output"])
    assert (tmp_path / "new/mlflow.db").read_bytes() == before
