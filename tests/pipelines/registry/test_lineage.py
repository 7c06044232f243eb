"""`raydit lineage`: the chain from pixels to the registry is printed from any of its links, and breaks loudly."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

KINDS = ["images", "autoencoder", "latents", "checkpoint", "evaluation", "model", "version"]


@pytest.fixture
def chain(raydit, story, monkeypatch, tmp_path):
    """Ask for a lineage: exit code, its links by their kind, and what is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", story.uri)

    def call(target, *flags):
        code, out, err = raydit("lineage", str(target), *flags, "--json")
        assert code in (0, 1), err
        *lines, result = out.splitlines()
        links = {}
        for link in json.loads(result)["chain"]:
            links.setdefault(link["kind"], []).append(link)
        return code, links, "\n".join(lines)

    return call


@pytest.fixture
def registered(raydit, story):
    """Checkpoint 4 as champion of a model."""
    code, _, err = raydit(
        "promote", str(story.checkpoints[4].path), "--name", "lineage", "--protocol", story.reports[4].protocol_id
    )
    assert code == 0, err


@pytest.fixture
def changed(request):
    """Change a file for the length of a test."""

    def change(path, change_bytes):
        path = Path(path)
        before = path.read_bytes()
        request.addfinalizer(lambda: path.write_bytes(before))
        path.write_bytes(change_bytes(before))

    return change


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def test_the_whole_chain_is_found_from_a_checkpoint_its_model_and_its_alias(story, chain, registered):
    checkpoint = story.checkpoints[4]
    model = MlflowClient(story.uri).get_model_version_by_alias("lineage", "champion").source
    for name in (checkpoint.path, "models:/lineage@champion", "models:/lineage/1", model):
        code, links, shown = chain(name)
        assert code == 0 and list(links) == KINDS, shown
    assert links["images"][0]["name"] == story.config.images.path
    assert links["latents"][0]["digest"] == story.latents.fingerprint
    assert links["checkpoint"][0]["digest"] == checkpoint.digest
    assert links["version"][0]["name"] == "models:/lineage/1" and "alias champion" in links["version"][0]["facts"]
    assert story.reports[4].protocol_id in [link["digest"] for link in links["evaluation"]]
    assert "fd_efficientnet_lite0_16 20 +- 0.5" in shown and "unbroken" in shown


def test_a_run_leads_to_what_it_made_or_read(story, chain):
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for run in client.search_runs([experiment], order_by=["attributes.start_time"]):
        code, links, shown = chain(run.info.run_id)
        assert code == 0, shown
        found = [Path(link["name"]).name for link in links["checkpoint"]]
        expected = {
            "encode": ["step_0000002", "step_0000004", "step_0000006"],
            "train": ["step_0000006"],
            "pipeline": ["step_0000006"],
            "evaluate": [run.data.tags.get("raydit.checkpoint", "").rpartition("/")[2]],
        }
        assert found == expected[run.data.tags["raydit.stage"]]


def test_latents_lead_to_the_checkpoints_that_were_trained_on_them(story, chain):
    code, links, _ = chain(story.latents.path)
    assert code == 0
    digests = [checkpoint.digest for checkpoint in story.checkpoints.values()]
    assert [link["digest"] for link in links["checkpoint"]] == digests
    assert {link["digest"] for link in links["model"]} == set(digests)


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("latents", "latents/part-00000.parquet", "part-00000.parquet: found sha256 "),
        ("checkpoint", "checkpoints/step_0000004/ema.safetensors", "ema.safetensors: found sha256 "),
        ("autoencoder", "autoencoder/diffusion_pytorch_model.safetensors", "weights: found "),
    ],
)
def test_one_changed_bit_breaks_the_chain(story, chain, changed, kind, file, message):
    changed(Path(story.config.folder(file)), flipped)
    code, links, shown = chain(story.checkpoints[4].path)
    (link,) = links[kind]
    assert code == 1 and link["broken"] and link["broken"][0].startswith(message)
    assert "BROKEN: " + message in shown and shown.endswith("BROKEN: 1 mismatch")
    assert sum(len(link["broken"]) for links in links.values() for link in links) == 1


def test_quick_reads_no_shard_but_sees_its_size_and_another_manifest(story, chain, changed):
    shard, manifest = (Path(story.config.folder("latents")) / name for name in ("part-00000.parquet", "manifest.json"))
    changed(shard, flipped)
    code, _, shown = chain(story.checkpoints[4].path, "--quick")
    assert code == 0 and "unbroken: sizes and records match; files were not read" in shown
    shard.write_bytes(shard.read_bytes() + b"x")
    _, links, _ = chain(story.checkpoints[4].path, "--quick")
    assert "bytes, expected" in links["latents"][0]["broken"][0]
    changed(manifest, lambda data: data.replace(story.latents.fingerprint.encode(), b"0" * 64))
    _, links, _ = chain(story.checkpoints[4].path, "--quick")
    assert f"found 000000000000, expected {story.latents.fingerprint[:12]}" in links["latents"][0]["broken"][0]


def test_images_that_came_later_break_the_chain_to_them_and_to_the_reference(story, chain, request):
    image = Path(story.config.images.path) / "blob" / "later.png"
    shutil.copy(next(image.parent.glob("00*.png")), image)
    request.addfinalizer(image.unlink)
    code, links, _ = chain(story.checkpoints[4].path)
    assert code == 1 and links["images"][0]["broken"][0].startswith("listing: found ")
    assert any(text.startswith("reference: found ") for text in links["evaluation"][0]["broken"])


def test_a_report_of_another_checkpoint_in_its_place_is_not_its_own(story, chain, changed):
    report = story.reports[4]
    file = Path(story.config.folder("evaluations")) / report.protocol_id / "step_0000004" / "report.json"
    changed(file, lambda data: data.replace(report.checkpoint_digest.encode(), b"f" * 64))
    code, links, _ = chain(story.checkpoints[4].path)
    broken = [text for link in links["evaluation"] for text in link["broken"]]
    assert code == 1 and broken == [f"checkpoint: found {story.checkpoints[4].digest[:12]}, expected ffffffffffff"]


def test_a_model_whose_checkpoint_is_gone_or_another_is_said_to_be_broken(story, chain, registered, request):
    folder = story.checkpoints[4].path
    away = folder.rename(folder.with_name("away"))
    request.addfinalizer(lambda: away.rename(folder))
    code, links, _ = chain("models:/lineage@champion")
    assert code == 1 and "MLflow has recorded it, and it is gone" in links["checkpoint"][0]["broken"][0]
    assert links["version"][0]["name"] == "models:/lineage/1"
    shutil.copytree(story.checkpoints[2].path, folder)
    request.addfinalizer(lambda: shutil.rmtree(folder))
    code, links, _ = chain("models:/lineage@champion")
    expected = story.checkpoints[4].digest[:12]
    assert code == 1 and links["checkpoint"][0]["broken"][0].endswith(f"expected {expected}")


def test_an_evaluation_leads_to_its_checkpoint_after_that_was_superseded(story, chain, request):
    folder = story.checkpoints[4].path
    moved = Path(story.config.output) / "superseded" / "checkpoints-1" / folder.name
    moved.parent.mkdir(parents=True)
    request.addfinalizer(lambda: shutil.rmtree(moved.parents[1]))
    folder.rename(moved)
    request.addfinalizer(lambda: moved.rename(folder))
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    query = f"tags.`raydit.checkpoint` = '{folder}' AND tags.`raydit.stage` = 'evaluate'"
    run = client.search_runs([experiment], query)[0]
    _, links, _ = chain(run.info.run_id, "--quick")
    assert links["checkpoint"][0]["name"] == str(moved) and links["checkpoint"][0]["broken"] == []
