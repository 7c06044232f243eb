"""What the train job costs beside its arithmetic: against a bare torch loop, with the tensors in memory.

    pytest -m benchmark tests/benchmarks/test_train_speed.py -s

The job and the loop run in turn, some steps each, and the job goes on from its own checkpoint every time; its start
is counted apart. Asserts only that both do the steps.
"""

import itertools
import multiprocessing
import time

import numpy as np
import pytest
import torch
from harness import Timing, alternate, ratio, say
from tiny_training import training_recipe

from dit.autoencoder import LatentScale
from dit.config import config_from_dict, named_config
from dit.flow import FlowMatching
from dit.model import DiT
from pipelines.batches import latent_batches
from pipelines.latents import LatentArrays, LatentDataset
from pipelines.loading import ArrayLatents
from pipelines.messages import Report
from pipelines.order import EpochOrder, Share
from pipelines.stage import StageContext
from pipelines.train import worker_settings
from pipelines.train_worker import train_worker
from pipelines.workers import run_workers

pytestmark = pytest.mark.benchmark
ROUNDS = 4
CASES = {
    "width 128, depth 4, batch 128": ({"patch_size": 2, "hidden_size": 128, "depth": 4, "num_heads": 4}, 8, 128, 30),
    "DiT-S/2 on 16x16 latents, batch 16": ({"name": "DiT-S/2"}, 16, 16, 16),
}
"""The recipe's [model], the latents' size, images per step, steps per round."""


def bare_loop(pipe, model_config, batch_size, threads):
    """The steps of a careful script: fused AdamW, an average, one batch in memory; does as many as it is told."""
    torch.set_num_threads(threads)
    network, process = DiT(model_config), FlowMatching()
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    shape = (batch_size, model_config.in_channels, *model_config.latent_size)
    latents, noise, t = torch.randn(shape), torch.randn(shape), torch.rand(batch_size)
    labels = torch.randint(0, 3, (batch_size,))
    for steps in iter(pipe.recv, 0):
        for step in range(steps + 2):
            if step == 2:  # the first ones fill caches
                started = time.perf_counter()
            loss = process.training_losses(network, latents, t, labels, noise)["loss"].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, [parameter.detach() for parameter in network.parameters()], 0.1)
        pipe.send((time.perf_counter() - started) / steps)


class BareLoops:
    """One process for each worker, all at once, without a word between them."""

    def __init__(self, model_config, batch_size, num_workers):
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(num_workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=bare_loop, args=(theirs, model_config, batch_size // num_workers, 1))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def seconds(self, steps: int) -> float:
        """Seconds per step of the slowest."""
        for pipe in self.pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self.pipes)

    def end(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(0)
            process.join()


class Listener:
    """Reports of one round, and when the first of them came."""

    def __init__(self):
        self.begun, self.first, self.reports = time.perf_counter(), 0.0, []

    def hear(self, message):
        if isinstance(message, Report):
            self.first = self.first or time.perf_counter()
            self.reports.append(message)

    def metric(self, name):
        """Of the last window: the steps before it fill caches."""
        return self.reports[-1].metrics[name]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_job_against_a_bare_loop(tmp_path, case, num_workers):
    model, side, batch_size, steps = CASES[case]

    def recipe(rounds):
        return training_recipe(
            tmp_path,
            model=model,
            latent_side=side,
            steps=rounds * steps,
            global_batch_size=batch_size,
            num_workers=num_workers,
            log_every=steps // 2,
            checkpoint_every=steps,
        )

    latents = LatentDataset.open(recipe(1).latents)
    rounds = [worker_settings(recipe(number), latents) for number in range(1, ROUNDS + 1)]
    loops = BareLoops(config_from_dict(rounds[0]["model"]), batch_size, num_workers)
    listeners, bare = [], []
    with StageContext(recipe(1)) as context:
        for number, settings in enumerate(rounds, start=1):
            listeners.append(Listener())
            run_workers(context, "train", settings["config"].train, train_worker, settings, listeners[-1].hear)
            assert listeners[-1].reports[-1].step == number * steps
            bare.append(loops.seconds(steps))
    loops.end()
    ours = [batch_size / listener.metric("images_per_second") for listener in listeners]
    starts = [
        listener.first - listener.begun - steps // 2 * seconds
        for listener, seconds in zip(listeners, ours, strict=True)
    ]
    waits = [listener.metric("data_wait") for listener in listeners]
    say(
        f"\ntrain job, {case}, {num_workers} worker(s): {ratio(Timing(bare), Timing(ours))} of the bare loop's images "
        f"per second; {batch_size / Timing(ours).median:.1f} images/s, data wait {Timing(waits).median:.2%}, start "
        f"{Timing(starts).median:.1f} s"
    )


def test_batches_against_what_training_consumes():
    """Batches of 4x32x32 latents, made by one thread, against the steps of DiT-S/2 that use them."""
    rows, batch_size = 4096, 32
    moments = np.random.default_rng(0).normal(size=(rows, 8, 32, 32)).astype(np.float16)
    stream = latent_batches(
        ArrayLatents(LatentArrays(np.arange(rows) % 1000, moments, moments), EpochOrder(rows, 0)),
        process := FlowMatching(),
        scale=LatentScale((0.0,) * 4, (1.0,) * 4),
        null_class=1000,
        dropout=0.1,
        seed=0,
        share=Share(0, 1, batch_size),
        first_batch=0,
    )
    batch = next(stream)
    network = DiT(named_config("DiT-S/2", learn_sigma=False))

    def step():
        process.training_losses(network, batch.latents, batch.t, batch.labels, batch.noise)["loss"].mean().backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timings = alternate({"batches": lambda: list(itertools.islice(stream, 4)), "step": step}, rounds=5)
    torch.set_num_threads(threads)
    made, used = 4 * batch_size / timings["batches"].median, batch_size / timings["step"].median
    say(f"\nbatches of 4x32x32 latents: {made:,.0f} images/s, {made / used:.0f} times what DiT-S/2 uses on one core")
