"""Lineage of the weights that a checkpoint was made from: a start, the base of an adapter, the parts of a merge."""

import json
import re
import shutil

import pytest
import torch
from tiny_adapter import write_factors
from tiny_checkpoint import random_network, tiny_output, write_checkpoint

from dit.formats.completion import write_completion
from pipelines.checkpoints.adapters import import_adapter, merge_checkpoints
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry.lineage import lineage


@pytest.fixture
def links(tmp_path):
    """links(checkpoint, kind): what is broken and unknown in each link of a kind."""

    def find(checkpoint, kind):
        chain = lineage(str(checkpoint.path), store=f"sqlite:///{tmp_path / 'mlflow.db'}")
        return [(link.broken, link.unknown) for link in chain if link.kind == kind]

    return find


def replace_folder(folder, other):
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def adapter_of(base, folder, seed=0, **options):
    factors = write_factors(folder / f"factors-{seed}", seed)
    return open_checkpoint(import_adapter(factors, folder / f"adapted-{seed}", base, **options).path)


def test_an_adapter_has_its_base(links, tmp_path):
    base = write_checkpoint(tiny_output(tmp_path), 2)
    opened = adapter_of(base.path, tmp_path)
    assert links(opened, "base") == [([], [])]
    replace_folder(base.path, write_checkpoint(tiny_output(tmp_path / "other"), 3).path)
    ((broken, unknown),) = links(opened, "base")
    assert re.match("weights: found .*, expected", *broken) and not unknown
    shutil.rmtree(base.path)
    ((broken, unknown),) = links(opened, "base")
    assert re.match("not available: no checkpoint at", *unknown) and not broken


def test_a_merged_checkpoint_has_its_parts(links, tmp_path):
    base = write_checkpoint(tiny_output(tmp_path), 2)
    one, other = (adapter_of(base.path, tmp_path, seed) for seed in (0, 1))
    merged = merge_checkpoints([(one, 0.5), (other, 0.5)], tmp_path / "merged")
    assert links(merged, "part") == [([], []), ([], [])]
    assert links(merged, "latents") == [([], ["the checkpoint is merged: no images or latents are recorded"])]
    content = json.loads((merged.path / "config.json").read_text())
    write_completion(merged.path, content | {"latents_fingerprint": "f" * 64})
    ((_, unknown),) = links(merged, "latents")
    assert unknown == ["the checkpoint is merged: only the fingerprint of its latents is recorded"]
    replace_folder(other.path, one.path)
    (kept, replaced) = links(merged, "part")
    assert kept == ([], []) and re.match("digest: found .*, expected", *replaced[0])


def test_a_base_that_is_a_file_of_weights_is_opened_as_it_was(links, tmp_path):
    config = tiny_output(tmp_path)
    network = random_network(0)
    torch.save(network.state_dict() | {"pos_embed": network.pos_embed.data}, tmp_path / "tiny.pt")
    overrides = ("model.num_heads=2", f"autoencoder.id={config.folder('autoencoder')}", "objective.kind=flow")
    opened = adapter_of(tmp_path / "tiny.pt", tmp_path, overrides=overrides)
    assert links(opened, "base") == [([], [])]
    network = random_network(1)
    torch.save(network.state_dict() | {"pos_embed": network.pos_embed.data}, tmp_path / "tiny.pt")
    ((broken, unknown),) = links(opened, "base")
    assert re.match("weights: found .*, expected", *broken) and not unknown
