"""Data-parallel training with DDP and FSDP2, as it is and compiled block by block, compared with one process."""

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing
from compile_counter import CompileCounter

from dit.checkpoint import load_checkpoint, restore, save_checkpoint
from dit.conditions import Conditions
from dit.config import DiTConfig
from dit.diffusion import GaussianDiffusion
from dit.distributed import replicate_network, shard_network
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.snapshot import take_snapshot
from dit.train import create_state, train

MODEL = DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=24, depth=2, num_heads=2, num_classes=3)
BATCH, STEPS, SAVED_AT = 8, 4, 2
POISONED = 3
"""The batch, of five, in which rank 0 has an image that is not finite."""
WAYS = {
    "ddp": {},
    "ddp in parts": {"parts": 2},
    "ddp later": {"lag": 1},
    "fsdp": {"saved": "step"},
    "fsdp in parts": {"parts": 2},
    "fsdp later": {"lag": 1},
    "fsdp resumed": {"first": "step"},
}
COMPILED = {"ddp compiled": {}, "ddp compiled in parts": {"parts": 2}, "fsdp compiled in parts": {"parts": 2}}
WAYS |= COMPILED


class Batch:
    def __init__(self, *tensors):
        self.tensors = tensors

    def chunk(self, count):
        return [Batch(*parts) for parts in zip(*(tensor.chunk(count) for tensor in self.tensors), strict=True)]


def share(step, rank, num_workers):
    """Return one worker's share of a global batch, of which one image is poisoned."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = (torch.randn(BATCH, 2, 4, 4, generator=generator) for _ in range(2))
    if step == POISONED:
        latents[0] = torch.nan
    t = torch.randint(0, 1000, (BATCH,), generator=generator)
    conditions = Conditions(torch.randint(0, 3, (BATCH,), generator=generator))
    return Batch(*(tensor.chunk(num_workers)[rank] for tensor in (latents, t, conditions, noise)))


def held_gradients(network):
    """Return the numbers of all gradients that this process holds in full of a network sharded by FSDP2."""
    states = [module._get_fsdp_state() for module in network.modules() if hasattr(module, "_get_fsdp_state")]
    parameters = [each for state in states for group in state._fsdp_param_groups for each in group.fsdp_params]
    gradients = [each.unsharded_accumulated_grad for each in parameters]
    return sum(gradient.numel() for gradient in gradients if gradient is not None)


def learn(wrap, rank, num_workers, *, first=None, saved=None, parts=1, lag=0, held=None):
    """Train a small DiT, from a checkpoint or from the start, and return the state.

    held: is given the numbers of full gradients before every micro-batch, if the network is sharded.
    """
    config = TrainingConfig(
        steps=STEPS,
        global_batch_size=BATCH,
        accumulation_steps=parts,
        learning_rate=1e-3,
        grad_clip=1.0,
        ema_decay=0.5,
        ema_sigma_rels=(0.1,),
        checkpoint_every=SAVED_AT,
    )
    torch.manual_seed(3)
    state = create_state(DiT(MODEL), config, wrap)
    if first:
        restore(state, load_checkpoint(first))
    process = GaussianDiffusion()

    def losses(model, batch):
        if held is not None:
            held.append(held_gradients(model))
        terms = process.training_losses(model, *batch.tensors)
        return {"loss": terms["loss"].sum() * num_workers / BATCH}

    def save(state):
        snapshot = take_snapshot(state, keep=rank == 0)
        if snapshot and saved and snapshot.step == SAVED_AT:
            save_checkpoint(snapshot, saved, {}, {})

    given = (share(step, rank, num_workers) for step in range(state.batches, STEPS + 1))
    skipped = []
    train(
        state,
        given,
        losses,
        config,
        report=lambda step, metrics: None,
        save=save,
        on_nonfinite=lambda error, batch: skipped.append(error.step),
        verdict_lag=lag,
    )
    assert skipped == [POISONED]
    return state


def compiled_before(wrap, counter):
    return lambda network: wrap(counter.compile(network))


def run_worker(rank, num_workers, folder):
    """Train in all tested ways in the same processes, because starting processes takes most of the time."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers)
    wraps = {"ddp": lambda network: replicate_network(network, torch.device("cpu")), "fsdp": shard_network}
    for name, options in WAYS.items():
        paths = {key: folder / options[key] for key in ("saved", "first") if key in options}
        wrap, counter = wraps[name.split()[0]], CompileCounter()
        torch.compiler.reset()
        if name in COMPILED:
            wrap = compiled_before(wrap, counter)
        held = [] if name in ("fsdp", "fsdp in parts") else None
        state = learn(wrap, rank, num_workers, **(options | paths), held=held)
        if held is not None:
            full = sum(each.numel() for each in state.network.parameters() if each.requires_grad)
            assert held == [0, full][: options.get("parts", 1)] * (STEPS + 1)  # a batch is skipped
        assert counter.forward == counter.backward == (name in COMPILED)
        snapshot = take_snapshot(state, keep=rank == 0)
        if rank == 0:
            torch.save(snapshot, folder / f"{name}.pt")
    distributed.destroy_process_group()


pytestmark = pytest.mark.slow  # starts two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    torch.multiprocessing.spawn(run_worker, args=(2, folder), nprocs=2)
    return folder


def assert_agree(found, expected):
    assert (found.step, found.batches) == (expected.step, expected.batches)
    for name, state_dict in expected.weights.items():
        torch.testing.assert_close(found.weights[name], state_dict, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(found.optimizer, expected.optimizer, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def alone():
    return take_snapshot(learn(lambda network: network, 0, 1))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_agree_with_one(alone, trained, way):
    assert_agree(torch.load(trained / f"{way}.pt", weights_only=False), alone)  # pickled by this test itself


def test_a_checkpoint_of_sharded_weights_equals_one_of_full_weights(alone, trained):
    assert_agree(take_snapshot(learn(lambda network: network, 0, 1, first=trained / "step")), alone)
