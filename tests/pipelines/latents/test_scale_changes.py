"""A corrected scale of an autoencoder makes other latents; one that agrees changes nothing of theirs."""

import json

import pytest
from tiny_encode import Context, add_images, encode_here, recipe

from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset, fingerprint_of
from pipelines.latents.held_out import training_set
from pipelines.latents.recorded_autoencoder import scale_changes
from pipelines.latents.recorded_images import list_images
from pipelines.latents.verify import verify
from pipelines.planning.encode_plan import plan_set

REASON = "autoencoder.scale: mean 0 and standard deviation 1 -> mean 0 and standard deviation 2"


@pytest.fixture
def set_scale(tmp_path):
    def change(**fields):
        file = tmp_path / "pretrained" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def planned(config):
    """Return why latents do not count, and how many images are to be encoded."""
    plan = plan_set(training_set(*list_images(config)), config.encode, autoencoder_of(config).describe())
    return plan.changed, sum(len(shard.images) for shard in plan.pending)


def test_a_corrected_scale_makes_other_latents_and_the_former_scale_takes_them_back(
    tmp_path, monkeypatch, capsys, set_scale
):
    config = recipe(tmp_path)
    first = encode_here(config, monkeypatch)
    assert "scale" not in json.dumps(first.identity)
    set_scale(scaling_factor=0.5)
    assert planned(config) == ([REASON], 37)
    with pytest.raises(KeyboardInterrupt):
        encode_here(config, monkeypatch, Context(kill_after=1))
    second = encode_here(config, monkeypatch)
    assert f"because {REASON}. The previous results are kept in" in capsys.readouterr().out
    assert second.identity == first.identity and second.fingerprint != first.fingerprint
    assert second.manifest["autoencoder"]["latents_std"] == [2.0] * 4

    set_scale(scaling_factor=1.0 + 1e-9)  # a tool that rounds
    assert encode_here(config, monkeypatch).fingerprint == first.fingerprint
    assert "takes back the earlier results" in capsys.readouterr().out
    add_images(tmp_path)
    assert planned(config) == ([], 3)
    set_scale(latents_mean=[0.0, 1.0, 0.0, 0.0])
    assert planned(config)[1] == 40  # no images are added to latents of another scale


def test_shards_may_hold_another_scale_than_the_manifest(tmp_path, monkeypatch):
    """An earlier release left them so, which added images to them after their autoencoder's scale was corrected."""
    dataset = encode_here(recipe(tmp_path), monkeypatch)
    autoencoder = {**dataset.manifest["autoencoder"], "latents_std": [2.0] * 4}
    manifest = {**dataset.manifest, "autoencoder": autoencoder}
    fingerprint = fingerprint_of(LatentDataset(dataset.path, manifest).description, dataset.shards)
    corrected = LatentDataset(dataset.path, {**manifest, "fingerprint": fingerprint})
    assert [check for check in verify(corrected, sample=1) if not check.ok] == []

    other = {"scale": {"mean": [[[0.0]], [[0.0]]], "std": [[[1.0]], [[1.0]]]}}
    assert scale_changes(dataset.path, other) == ["autoencoder.scale: 4 -> 2 values"]
    assert scale_changes(dataset.path, {"id": "none"}) == scale_changes(str(tmp_path / "none"), other) == []
