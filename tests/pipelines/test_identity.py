import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from dit.schedule import TrainingConfig
from pipelines.artifacts import Artifact, differences, digest_of, settings_identity

OLD = {"seed": 0, "train": {"learning_rate": 0.001, "betas": [0.9, 0.99]}}
OTHER = {"seed": 1}
NEW = {"seed": 0, "train": {"learning_rate": 0.002, "betas": [0.9, 0.99]}}


def artifact(folder, identity=OLD):
    return Artifact("train", str(folder / "checkpoints"), identity)


def test_differences_are_named_by_their_dotted_key():
    assert differences(OLD, NEW) == ["train.learning_rate: 0.001 -> 0.002"]
    assert differences(OLD, OLD) == []
    assert differences({"b": 1, "a": {"x": None}}, {"a": {"x": "y"}, "c": True}) == [
        'a.x: null -> "y"',
        "b: 1 -> null",
        "c: null -> true",
    ]


def test_digests_are_shortened():
    assert differences({"sha256": "a" * 64}, {"sha256": "b" * 64}) == [f"sha256: {'a' * 12} -> {'b' * 12}"]


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


def test_an_extra_that_is_not_used_leaves_an_identity_as_it_was_before_there_was_one():
    plain = settings_identity(TrainingConfig(), ("steps",))
    assert "ema_sigma_rels" not in plain and "steps" not in plain and plain["betas"] == [0.9, 0.999]
    more = settings_identity(TrainingConfig(ema_sigma_rels=(0.05, 0.1)), ("steps",))
    assert differences(plain, more) == ["ema_sigma_rels: null -> [0.05, 0.1]"]
    assert json.loads(json.dumps(more)) == more


def test_a_new_folder_is_claimed_and_records_the_identity(tmp_path, capsys):
    assert artifact(tmp_path).recorded() is None
    artifact(tmp_path).prepare()
    assert artifact(tmp_path).recorded() == OLD
    assert capsys.readouterr().out == ""


def test_an_empty_folder_is_claimed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    artifact(tmp_path).prepare()
    assert artifact(tmp_path).recorded() == OLD


def test_the_same_artifact_is_left_as_it_is(tmp_path, capsys):
    artifact(tmp_path).prepare()
    (tmp_path / "checkpoints" / "work").write_text("kept")
    artifact(tmp_path).prepare()
    assert (tmp_path / "checkpoints" / "work").read_text() == "kept"
    assert not (tmp_path / "superseded").exists()
    assert capsys.readouterr().out == ""


def test_tuples_of_an_identity_equal_the_lists_they_are_recorded_as(tmp_path, capsys):
    artifact(tmp_path, {"interval": (0.1, 0.5)}).prepare()
    artifact(tmp_path, {"interval": (0.1, 0.5)}).prepare()
    assert capsys.readouterr().out == ""


def test_a_changed_artifact_is_moved_aside_and_why_is_said(tmp_path, capsys):
    artifact(tmp_path).prepare()
    (tmp_path / "checkpoints" / "work").write_text("first")
    artifact(tmp_path, NEW).prepare()
    assert artifact(tmp_path).recorded() == NEW
    assert (tmp_path / "superseded" / "checkpoints-1" / "work").read_text() == "first"
    said = capsys.readouterr().out
    assert "starts again, because train.learning_rate: 0.001 -> 0.002." in said and "superseded/checkpoints-1" in said
    artifact(tmp_path, OTHER).prepare()
    plans = [json.loads((tmp_path / "superseded" / f"checkpoints-{n}" / "plan.json").read_text()) for n in (1, 2)]
    assert [plan["identity"] for plan in plans] == [OLD, NEW]


def test_a_superseded_artifact_that_fits_again_is_taken_back(tmp_path, capsys):
    artifact(tmp_path).prepare()
    (tmp_path / "checkpoints" / "work").write_text("first")
    artifact(tmp_path, NEW).prepare()
    (tmp_path / "checkpoints" / "work").write_text("second")
    capsys.readouterr()
    assert artifact(tmp_path).find() == str(tmp_path / "superseded" / "checkpoints-1")
    artifact(tmp_path).prepare(before_move=lambda: pytest.fail("nothing is made, so nothing needs to be checked"))
    assert (tmp_path / "checkpoints" / "work").read_text() == "first" and artifact(tmp_path).recorded() == OLD
    assert [path.name for path in (tmp_path / "superseded").iterdir()] == ["checkpoints-2"]
    (said,) = capsys.readouterr().out.splitlines()
    assert "takes back the earlier results from" in said and "superseded/checkpoints-2" in said
    # A process that was killed between the two moves left nothing in the artifact's place.
    (tmp_path / "checkpoints").rename(tmp_path / "superseded" / "checkpoints-7")
    artifact(tmp_path).prepare()
    assert (tmp_path / "checkpoints" / "work").read_text() == "first"
    assert "takes back" in capsys.readouterr().out


def test_a_stage_that_cannot_run_moves_nothing(tmp_path):
    artifact(tmp_path).prepare()

    def refuse():
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        artifact(tmp_path, NEW).prepare(before_move=refuse)
    assert artifact(tmp_path).recorded() == OLD and not (tmp_path / "superseded").exists()


def test_a_further_reason_starts_anew_though_the_identity_is_equal(tmp_path, capsys):
    artifact(tmp_path).prepare()
    artifact(tmp_path).prepare(["train.steps: 9 -> 5"])
    assert (tmp_path / "superseded" / "checkpoints-1").is_dir()
    assert "because train.steps: 9 -> 5." in capsys.readouterr().out
    assert artifact(tmp_path).recorded() == OLD


def test_a_folder_that_is_not_ours_is_refused_and_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"contains thesis.tex, which raydit did not write, expected an empty.*Move"):
        artifact(tmp_path).prepare()
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_what_a_killed_claim_left_half_written_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".tmp-host-123-0a1b2c3d").write_text("{")
    artifact(tmp_path).prepare()
    assert artifact(tmp_path).recorded() == OLD


def test_a_finished_one_of_several_superseded_artifacts_is_taken_back(tmp_path):
    """The move of the other was interrupted in an object store, where files are removed one by one."""
    artifact(tmp_path).prepare()
    for number in (1, 2):
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "superseded" / f"checkpoints-{number}")
    (tmp_path / "superseded" / "checkpoints-1" / "done").write_text("")
    artifact(tmp_path, NEW).prepare()
    artifact(tmp_path).prepare(is_finished=lambda folder: (Path(folder) / "done").exists())
    assert (tmp_path / "checkpoints" / "done").exists() and artifact(tmp_path).recorded() == OLD


def test_taking_back_in_a_bucket_is_repeated_after_a_kill(s3_bucket):
    """There a folder is moved file by file."""
    kept = Artifact("train", f"{s3_bucket}/superseded/checkpoints-1", OLD)
    kept.prepare()
    for name in ("a", "b"):
        storage.write_atomically(storage.join(kept.folder, name), b"content")
    taken = Artifact("train", f"{s3_bucket}/checkpoints", OLD)
    storage.write_atomically(storage.join(taken.folder, "a"), b"content")
    taken.prepare()
    assert taken.recorded() == OLD and set(storage.list_files(taken.folder)) == {"a", "b", "plan.json"}
    assert storage.list_files(kept.folder) == {}


def test_an_artifact_is_not_mixed_with_what_is_left_of_another_in_a_bucket(s3_bucket):
    own = Artifact("train", f"{s3_bucket}/checkpoints", OLD)
    own.prepare()
    storage.write_atomically(f"{s3_bucket}/superseded/checkpoints-1/left", b"over")
    replace(own, identity=NEW).prepare()
    assert set(storage.list_files(f"{s3_bucket}/superseded", recursive=True)) == {
        "checkpoints-1/left",
        "checkpoints-2/plan.json",
    }
