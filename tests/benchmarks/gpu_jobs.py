"""Jobs of raydit, run as commands and watched from outside, and their rates beside those of bare loops."""

import argparse
import functools
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_report import Figure, GpuReport
from gpu_training import batch_of, measure_training, training_figure
from harness import alternate, matmul_peak
from study import ROOT, history, newest_run

from dit.autoencoder import MEMORY_FORMATS, Autoencoder
from dit.compilation import compile_network
from dit.model import build_model
from dit.objective import create_process
from dit.precision import weights_dtype
from pipelines.config.recipe import Recipe
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.training.settings import train_worker_settings

STAGES = ("autoencoder", "encode", "train", "evaluate")
START_SECONDS = 20.0
"""Target for the time from a command to the first step of its training."""
PROGRESS = re.compile(rf"({'|'.join(STAGES)}) +(?:([\d,]+)/[\d,]+ (?:steps|images))?")
"""Matches a line of the command's output: the stage, and the progress if the line has it."""


@dataclass
class Watch:
    """When each stage of a command started, and when it showed its first progress, by time.monotonic()."""

    started: float
    begun: dict[str, float] = field(default_factory=dict)
    first: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Time of each stage's first progress, and the number of steps or images at that time."""
    seconds: float = 0.0
    """Duration of the command."""
    exit_code: int | None = None

    def read(self, line: str) -> None:
        if match := PROGRESS.match(line):
            stage, done = match[1], int((match[2] or "0").replace(",", ""))
            self.begun.setdefault(stage, time.monotonic())
            if done:
                self.first.setdefault(stage, (time.monotonic(), done))


@dataclass(frozen=True)
class JobRun:
    """A command that ran one stage or all of them: its recipe, store and observed times."""

    config: Recipe
    store: str
    watch: Watch
    device: torch.device

    def rates(self, stage: str) -> list[float]:
        """Return the images per second of a training's reports, without the first, which includes compilation."""
        run = newest_run(self.store, self.config.name, stage)
        return [value for _, value in history(self.store, run, f"{stage}/images_per_second")][1:]

    def product(self) -> float:
        return matmul_peak(torch.bfloat16, str(self.device))


def watch_command(name: str, arguments: list[str], limit: float) -> Watch:
    """Run a command of raydit, echo its output, and record when its stages worked. It is stopped at the limit."""
    watch = Watch(time.monotonic())
    command = [sys.executable, "-m", "pipelines.cli", name, *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}  # Ray's workers find this repository too
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it was asked for"
        signal.signal(signal.SIGALRM, lambda *_: process.terminate())  # stages then end with a checkpoint
        signal.alarm(int(limit))
        for line in process.stdout:
            print(line, end="", flush=True)
            watch.read(line)
    signal.alarm(0)
    watch.seconds, watch.exit_code = time.monotonic() - watch.started, process.returncode
    return watch


def start_of(run: JobRun, stage: str, *, from_command: bool) -> Figure:
    """Return the time from the command, or from the stage's first line, to its first step or first finished images."""
    config, watch = run.config, run.watch
    if stage not in watch.first:
        return Figure(what=f"{stage}: start", value=None, note="not reached")
    trainings = {"autoencoder": config.autoencoder.train, "train": config.train}
    size = trainings[stage].global_batch_size if stage in trainings else None
    seen, done = watch.first[stage]
    # The first report covers several steps; all but the first took as long as later ones.
    rates = run.rates(stage) if size else []
    later = (done - 1) * size / statistics.median(rates) if rates else 0.0
    since, whence = (watch.started, "the command") if from_command else (watch.begun[stage], "its first line")
    until = "the first step" if size else f"{done:,} images"
    target = START_SECONDS if size and from_command else None
    return Figure(what=f"{stage}: from {whence} to {until}", value=seen - later - since, unit="s", target=target)


def parse_arguments(description: str, limit: float, limit_help: str) -> argparse.Namespace:
    """Parse the command line of a benchmark of jobs. Ends with an error without images, or without the GPU it needs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--small", action="store_true", help="rehearse with tiny sizes on CPUs")
    parser.add_argument("--limit", type=float, default=limit, help=limit_help)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the results")
    arguments = parser.parse_args()
    if not any(arguments.images.glob("*.parquet")):
        parser.error(f"no Parquet files in {arguments.images}")
    if not arguments.small and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --small rehearses on the CPU")
    return arguments


def open_report(folder: Path, name: str, *, small: bool) -> GpuReport:
    """Return a benchmark's report, which names the device. small: whether it is a rehearsal on CPUs."""
    device = "CPU" if small else torch.cuda.get_device_name()
    return GpuReport(folder, name, {"device": device, "torch": torch.__version__, "rehearsal": small})


def training_job(run: JobRun) -> Iterator[Figure]:
    """The train job's images per second against the same loop on one batch that lies on the device."""
    config, device = run.config, run.device
    worker = train_worker_settings(config, LatentDataset.open(config.latents))
    process, network = create_process(**worker.objective), build_model(worker.model).to(device)
    if config.train.compile:
        compile_network(network)
    size = config.train.global_batch_size
    batches, product = itertools.repeat(batch_of(worker.model, size, process).to(device)), run.product()
    window = max(5, config.train.steps // 20)
    bare = measure_training(
        network, batches, process, device, size=size, window=window, seconds=40, dtype=config.train.dtype
    ).images_per_second
    job = statistics.median(run.rates("train"))
    what = f"training width {worker.model.hidden_size}, depth {worker.model.depth}, {worker.model.num_tokens} tokens"
    for kind, rate in (("train job", job), ("bare loop", bare)):
        yield training_figure(f"{what}: {kind}", worker.model, rate, product)
    yield Figure(what="train job against the bare loop", value=job / bare, target=0.97)


def encode_job(run: JobRun) -> Iterator[Figure]:
    """The encode job's images per second, flips counted, against its autoencoder on one batch on the device."""
    config, device, encode = run.config, run.device, run.config.encode
    dataset = LatentDataset.open(config.latents)
    written = sorted(((Path(dataset.path) / shard.file).stat().st_mtime, shard.rows) for shard in dataset.shards)
    seconds = written[-1][0] - written[0][0]
    job = (1 + encode.flip) * sum(rows for _, rows in written[1:]) / seconds
    memory_format = MEMORY_FORMATS[encode.layout]
    ours = Autoencoder.load(autoencoder_of(config).folder(), device, weights_dtype(encode.dtype), memory_format)
    side = config.images.size
    images = torch.rand(encode.batch_size, 3, side, side, device=device).contiguous(memory_format=memory_format)
    timing = alternate({"encode": functools.partial(ours.encode, images)}, rounds=20)["encode"]
    bare = encode.batch_size / timing.median
    details = {"job": job, "bare autoencoder": bare, "seconds": seconds}
    yield Figure(what="encode job against the bare autoencoder", value=job / bare, target=0.95, details=details)
