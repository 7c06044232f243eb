"""The served copy decodes by the weights that the checkpoint's evaluations decoded by, in whatever files these are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_output, write_checkpoint

from dit.autoencoder import Autoencoder, describe_autoencoder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry import model_files
from pipelines.registry.model_files import gather
from raydit.errors import InvalidInput

WEIGHTS = "diffusion_pytorch_model.safetensors"


def use_shards(folder: Path) -> None:
    """Divide the weights of an autoencoder into two shards with an index, as the hub has large ones."""
    tensors, weight_map = load_file(folder / WEIGHTS), {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        chosen = sorted(tensors)[number - 1 :: 2]
        save_file({each: tensors[each] for each in chosen}, folder / name)
        weight_map |= dict.fromkeys(chosen, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def add_half_precision(folder: Path) -> None:
    """Add variants, whose values are rounded, before and after the weights in the order of the names."""
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    for variant in ("fp16", "z16"):
        save_file(halves, folder / f"diffusion_pytorch_model.{variant}.safetensors")


@pytest.mark.parametrize("change", [use_shards, add_half_precision])
def test_the_served_copy_has_the_autoencoder_that_is_recorded(tmp_path, change):
    config = tiny_output(tmp_path)
    change(Path(config.folder("autoencoder")))
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    gather(opened, tmp_path / "files")
    copied = tmp_path / "files" / "autoencoder"
    assert describe_autoencoder(copied)["sha256"] == opened.record.autoencoder.sha256
    latents = torch.randn(1, 4, 8, 8)
    expected = Autoencoder.load(config.folder("autoencoder")).decode(latents)
    assert torch.equal(Autoencoder.load(copied).decode(latents), expected)


def test_an_autoencoder_that_changes_while_it_is_copied_is_not_promoted(tmp_path, monkeypatch):
    config = tiny_output(tmp_path)
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    found = model_files.checkpoint_autoencoder

    def find_then_change(opened):
        folder = found(opened)
        save_file({name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        return folder

    monkeypatch.setattr(model_files, "checkpoint_autoencoder", find_then_change)
    with pytest.raises(InvalidInput, match=r"found an autoencoder of sha256 \w+, expected that of .*step_0000002"):
        gather(opened, tmp_path / "files")
