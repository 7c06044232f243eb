"""Checkpoints are restored bit for bit, resuming equals never having stopped, and damaged folders are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dit.checkpoint import (
    finished_steps,
    load_checkpoint,
    restore,
    save_checkpoint,
    verify_checkpoint,
)
from dit.config import DiTConfig
from dit.flow import FlowMatching
from dit.formats.completion import step_name
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.train import create_state, train
from raydit.errors import InvalidInput

CONFIG = {"class_names": ["a", "b"], "seed": 3}


def settings(**changes):
    values = {"steps": 6, "global_batch_size": 4, "learning_rate": 1e-2, "ema_warmup": True, "weight_decay": 0.1}
    values["ema_sigma_rels"] = (0.05, 0.1)
    return TrainingConfig(**{**values, "lr_schedule": "linear", "warmup_steps": 2, "grad_clip": 1.0, **changes})


def new_state(seed=0, **changes):
    torch.manual_seed(seed)
    network = DiT(DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2, learn_sigma=False))
    return create_state(network, settings(**changes))


def batch_at(step):
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, 4, 4, 4, 4, generator=generator)
    return latents, torch.rand(4, generator=generator), torch.tensor([0, 1, 2, 0]), noise


def losses(model, batch):
    return {name: values.mean() for name, values in FlowMatching().training_losses(model, *batch).items()}


def advance(state, *, to):
    batches = map(batch_at, range(state.step, to))
    return train(state, batches, losses, settings(), report=lambda *_: None, save=lambda _: None)


def optimizer_of(state):
    names = {parameter: name for name, parameter in state.network.named_parameters()}
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, entries in state.optimizer.state.items()
        for kind, value in entries.items()
    }


def assert_equal(first, second):
    assert first.step == second.step
    assert first.averages.keys() == second.averages.keys()
    pairs = [(first.network, second.network)]
    pairs += [(average, second.averages[name]) for name, average in first.averages.items()]
    for one, other in ((one.state_dict(), other.state_dict()) for one, other in pairs):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = optimizer_of(first), optimizer_of(second)
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


@pytest.fixture
def saved(tmp_path):
    """A state after three steps, and its checkpoint."""
    state = advance(new_state(), to=3)
    return state, save_checkpoint(state, tmp_path / step_name(3), CONFIG, {"seed": 3, "images_seen": 12})


def test_a_checkpoint_is_restored_bit_for_bit(saved):
    state, checkpoint = saved
    other = restore(new_state(seed=9), load_checkpoint(checkpoint.path))
    assert_equal(state, other)
    assert state.averages.keys() == {"ema", "ema_0.05", "ema_0.1"}
    for which, module in (("model", state.network), ("raw", state.network), *state.averages.items()):
        weights = checkpoint.weights(which)
        assert weights.keys() == module.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(checkpoint.weights()[name], checkpoint.weights("model")[name])


def test_a_missing_average_is_refused_with_those_that_exist(saved):
    state, checkpoint = saved
    with pytest.raises(FileNotFoundError, match="no weights 'ema_0.2': found ema, ema_0.05, ema_0.1, model. Choose"):
        restore(new_state(ema_sigma_rels=(0.2,)), checkpoint)
    fewer = restore(new_state(ema_sigma_rels=(0.1,)), checkpoint)
    one, other = (of.averages["ema_0.1"].state_dict() for of in (fewer, state))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopping_and_resuming_equals_never_having_stopped(tmp_path, stop):
    whole = advance(new_state(), to=6)
    checkpoint = save_checkpoint(advance(new_state(), to=stop), tmp_path / step_name(stop), CONFIG, {})
    assert_equal(whole, advance(restore(new_state(seed=9), checkpoint), to=6))


def test_equal_states_give_equal_digests_and_another_step_a_different_one(tmp_path, saved):
    _, checkpoint = saved
    cursor = {"seed": 3, "images_seen": 12}
    same = save_checkpoint(advance(new_state(), to=3), tmp_path / "other" / step_name(3), CONFIG, cursor)
    further = save_checkpoint(advance(new_state(), to=4), tmp_path / step_name(4), CONFIG, cursor)
    assert same.digest == checkpoint.digest != further.digest


def test_the_folder_contains_the_documented_files_and_no_pickles(saved):
    _, checkpoint = saved
    files = {file.relative_to(checkpoint.path).as_posix() for file in checkpoint.path.rglob("*") if file.is_file()}
    trainer = {"trainer/optimizer.safetensors", "trainer/state.json"}
    averages = {"ema.safetensors", "ema_0.05.safetensors", "ema_0.1.safetensors"}
    assert files == {"config.json", "model.safetensors", "COMPLETE"} | averages | trainer
    assert json.loads((checkpoint.path / "COMPLETE").read_text()).keys() == files - {"COMPLETE"}
    for name in files:
        if name.endswith(".safetensors"):
            load_file(checkpoint.path / name)
        else:
            json.loads((checkpoint.path / name).read_text())


def test_the_config_describes_the_checkpoint(saved):
    _, checkpoint = saved
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config == {"format": "raydit.checkpoint", "version": 1, "step": 3, **CONFIG}
    assert checkpoint.step == 3
    cursor = json.loads((checkpoint.path / "trainer" / "state.json").read_text())
    assert cursor == {"step": 3, "batches": 3, "seed": 3, "images_seen": 12}


def test_a_folder_without_its_last_file_is_refused_with_its_content(saved):
    _, checkpoint = saved
    (checkpoint.path / "COMPLETE").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a finished checkpoint: it contains config.json, ema.safet"):
        load_checkpoint(checkpoint.path)
    assert finished_steps(checkpoint.path.parent) == []


def test_a_folder_of_checkpoints_is_refused_with_their_names(saved):
    _, checkpoint = saved
    with pytest.raises(FileNotFoundError, match="Name a checkpoint in it: step_0000003"):
        load_checkpoint(checkpoint.path.parent)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none, expected a folder"):
        load_checkpoint(tmp_path / "none")
    assert finished_steps(tmp_path / "none") == []


def test_a_missing_file_is_named(saved):
    _, checkpoint = saved
    (checkpoint.path / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ema.safetensors, expected all files .*Copy the folder again"):
        load_checkpoint(checkpoint.path)


def test_another_version_is_refused(saved):
    _, checkpoint = saved
    config = checkpoint.path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "version": 2}))
    with pytest.raises(ValueError, match=r"found format 'raydit.checkpoint' version 2, expected .* version 1"):
        load_checkpoint(checkpoint.path)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer/optimizer.safetensors"])
def test_one_flipped_bit_is_found_before_anything_is_restored(saved, name):
    state, checkpoint = saved
    verify_checkpoint(checkpoint)
    file = checkpoint.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: the file changed .* found sha256 \w{{12}}, expected \w{{12}}"):
        verify_checkpoint(checkpoint)
    fresh = new_state(seed=9)
    with pytest.raises(ValueError, match="the file changed"):
        restore(fresh, checkpoint)
    assert fresh.step == 0
    assert not torch.equal(fresh.network.t_embedder.mlp[0].weight, state.network.t_embedder.mlp[0].weight)


def test_only_finished_checkpoints_count(saved, tmp_path):
    _, checkpoint = saved
    shutil.copytree(checkpoint.path, tmp_path / ".tmp-step_0000009-12345")
    shutil.copytree(checkpoint.path, tmp_path / "step_0000008", ignore=shutil.ignore_patterns("COMPLETE"))
    shutil.copytree(checkpoint.path, tmp_path / "best")
    shutil.copytree(checkpoint.path, tmp_path / "step_0000002")
    assert finished_steps(tmp_path) == [2, 3]


def test_an_unfinished_folder_is_replaced_and_a_finished_one_kept(saved, tmp_path):
    state, checkpoint = saved
    (checkpoint.path / "COMPLETE").unlink()
    (checkpoint.path / "model.safetensors").write_bytes(b"half")
    again = save_checkpoint(state, checkpoint.path, CONFIG, {"seed": 3, "images_seen": 12})
    assert again.digest == checkpoint.digest
    verify_checkpoint(again)
    kept = save_checkpoint(new_state(seed=5), checkpoint.path, CONFIG, {})
    assert kept.digest == checkpoint.digest
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.path.name]


def test_a_save_that_fails_leaves_nothing_behind(saved, tmp_path):
    state, checkpoint = saved
    with pytest.raises(TypeError):
        save_checkpoint(state, tmp_path / step_name(4), {"class_names": {object()}}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.path.name]


def test_a_checkpoint_of_another_model_is_not_restored(saved):
    _, checkpoint = saved
    torch.manual_seed(0)
    other = create_state(DiT(DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=2)), settings())
    with pytest.raises(ValueError, match="these weights are of another model; .* entries differ"):
        restore(other, checkpoint)


def test_names_of_checkpoints_sort_in_the_order_of_their_steps():
    steps = [0, 9, 10, 400_000, 9_999_999]
    assert sorted(map(step_name, steps)) == list(map(step_name, steps))
    assert step_name(1000) == "step_0001000"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_resumes(tmp_path: Path):
    def on_gpu(seed):
        torch.manual_seed(seed)
        return create_state(nn.Linear(3, 2).cuda(), settings())

    def go(state, to):
        batches = (torch.ones(4, 3, device="cuda") for _ in range(state.step, to))
        error = lambda model, batch: {"loss": model(batch).square().mean()}  # noqa: E731
        return train(state, batches, error, settings(), report=lambda *_: None, save=lambda _: None)

    checkpoint = save_checkpoint(go(on_gpu(0), 3), tmp_path / step_name(3), CONFIG, {})
    assert_equal(go(on_gpu(0), 6), go(restore(on_gpu(1), checkpoint), 6))


@pytest.mark.parametrize("name", ["COMPLETE", "config.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "endless"])
def test_a_checkpoint_with_a_file_without_end_is_refused(tmp_path, name, kind):
    (tmp_path / "COMPLETE").write_text("{}")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(InvalidInput, match=rf"{name}( is a (device|named pipe)|: found 1,099)"):
        load_checkpoint(tmp_path)
