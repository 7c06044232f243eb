"""Overhead of the train job, measured against a bare torch loop with its tensors in memory. Job and loop alternate
every few steps, and the job resumes from its own checkpoint each time; its start-up is measured separately. Asserts
only that both take the steps.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from bare_loops import BareLoops, alternate_job_and_loops
from harness import Timing, alternate, exponent
from tiny_training import training_recipe

from dit.autoencoder import LatentScale
from dit.config import named_config
from dit.flow import FlowMatching
from dit.model import DiT
from pipelines.latents.dataset import LatentArrays, LatentDataset
from pipelines.stage import StageContext
from pipelines.training.data.batches import latent_batches
from pipelines.training.data.loading import ArrayLatents
from pipelines.training.data.order import EpochOrder, WorkerShare
from pipelines.training.group.run_workers import RAY_FOLDER
from pipelines.training.loop import train_worker
from pipelines.training.settings import train_worker_settings

pytestmark = pytest.mark.benchmark
ROUNDS = 3
ROWS = (1_000, 5_000, 25_000)
CASES = {
    "width 128, depth 4, batch 128": ({"patch_size": 2, "hidden_size": 128, "depth": 4, "num_heads": 4}, 8, 128, 40),
    "width 128, depth 4, batch 32": ({"patch_size": 2, "hidden_size": 128, "depth": 4, "num_heads": 4}, 8, 32, 120),
    "DiT-S/2 on 16x16 latents, batch 16": ({"name": "DiT-S/2"}, 16, 16, 8),
}
"""The recipe's [model], the latents' size, images per step, steps per round."""


def build_dit(model_config, batch_size):
    """Return a model, and the loss of its forward pass on one batch in memory."""
    process = FlowMatching()
    shape = (batch_size, model_config.in_channels, *model_config.latent_size)
    latents, noise, t = torch.randn(shape), torch.randn(shape), torch.rand(batch_size)
    labels = torch.randint(0, 3, (batch_size,))
    return DiT(model_config), lambda model: process.training_losses(model, latents, t, labels, noise)["loss"].mean()


@pytest.mark.parametrize(
    ("case", "num_workers", "threads"),
    [
        *itertools.product(["width 128, depth 4, batch 128", "DiT-S/2 on 16x16 latents, batch 16"], [1, 2], [1]),
        ("width 128, depth 4, batch 32", 1, 2),
    ],
)
def test_the_job_against_a_bare_loop(tmp_path, results, quick, case, num_workers, threads):
    model, side, batch_size, steps = CASES[case]
    if quick and (num_workers == 2 or side == 16):
        pytest.skip("takes minutes")
    num_rounds, steps = (1, steps // 2) if quick else (ROUNDS, steps)

    def recipe(rounds):
        return training_recipe(
            tmp_path,
            model=model,
            latent_side=side,
            steps=rounds * steps,
            global_batch_size=batch_size,
            num_workers=num_workers,
            cpus_per_worker=threads,
            log_every=steps // 2,
            checkpoint_every=steps,
        )

    latents = LatentDataset.open(recipe(1).latents)
    rounds = [train_worker_settings(recipe(number), latents) for number in range(1, num_rounds + 1)]
    build = partial(build_dit, rounds[0].model, batch_size // num_workers)
    loops = BareLoops(build, num_workers, tmp_path / "rendezvous", threads)
    with StageContext(recipe(1)) as context:
        folder = recipe(1).folder(RAY_FOLDER)
        listeners, bare = alternate_job_and_loops(context, "train", train_worker, rounds, loops, steps, folder)
    ours = [batch_size / listener.metric("images_per_second") for listener in listeners]
    starts = [
        listener.first_report_at - listener.started_at - steps // 2 * seconds
        for listener, seconds in zip(listeners, ours, strict=True)
    ]
    waits = [listener.metric("data_wait") for listener in listeners]
    measured = (
        f"{batch_size / Timing(ours).median:.1f} images/s, data wait {Timing(waits).median:.2%}, "
        f"start {Timing(starts).median:.1f} s"
    )
    name = f"{case}, {num_workers} worker{'s' if num_workers > 1 else ''}"
    if threads > 1:
        name += f" of {threads} threads"
    against = "bare torch loop" if num_workers == 1 else "bare torch loop with DDP"
    results.add_speedup("train job", name, measured, against, Timing(ours), Timing(bare))


def batches(rows: int, batch_size: int):
    """Yield batches of 4x32x32 latents, prepared in this thread."""
    moments = np.random.default_rng(0).normal(size=(rows, 8, 32, 32)).astype(np.float16)
    return latent_batches(
        ArrayLatents(LatentArrays(np.arange(rows) % 1000, moments, moments), EpochOrder(rows, 0)),
        FlowMatching(),
        scale=LatentScale((0.0,) * 4, (1.0,) * 4),
        null_class=1000,
        dropout=0.1,
        seed=0,
        share=WorkerShare(0, 1, batch_size),
        first_batch=0,
    )


def test_batches_against_what_training_consumes(results, quick):
    batch_size = 8
    stream = batches(4096, batch_size)
    batch = next(stream)
    network, process = DiT(named_config("DiT-S/2", learn_sigma=False)), FlowMatching()

    def step():
        process.training_losses(network, batch.latents, batch.t, batch.conditions, batch.noise)[
            "loss"
        ].mean().backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timings = alternate(
        {"batches": lambda: list(itertools.islice(stream, 4)), "step": step}, 1 if quick else 5, warmup=1
    )
    torch.set_num_threads(threads)
    made, used = 4 * batch_size / timings["batches"].median, batch_size / timings["step"].median
    measured = f"{made:,.0f} images/s"
    results.add("batches", "4x32x32 latents, one thread", measured, "what DiT-S/2 uses on one core", made / used)


def test_batches_as_the_data_set_grows(results, quick):
    """Measure the time per image of making batches, alternately from data sets of three sizes."""
    sizes = ROWS[:2] if quick else ROWS
    streams = {rows: batches(rows, 64) for rows in sizes}
    makers = {f"{rows:,}": lambda stream=stream: list(itertools.islice(stream, 4)) for rows, stream in streams.items()}
    costs = [timing.median / 256 for timing in alternate(makers, rounds=3 if quick else 10).values()]
    measured = ", ".join(f"{1e6 * cost:.0f}" for cost in costs) + " \u00b5s for an image"
    case = f"from {sizes[0]:,} to {sizes[-1]:,} rows"
    results.add("batches", case, measured, "growth exponent", exponent(sizes, costs))
