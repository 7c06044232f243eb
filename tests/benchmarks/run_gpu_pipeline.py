"""Measure the whole pipeline on one GPU in under four minutes: when each stage starts working, and its speed relative
to bare loops.

    python tests/benchmarks/run_gpu_pipeline.py FOLDER_OF_PARQUET_FILES [--out FOLDER] [--limit SECONDS]
    python tests/benchmarks/run_gpu_pipeline.py FOLDER_OF_PARQUET_FILES --small     a rehearsal on CPUs in two minutes

The images are CIFAR-10's, in the layout of Hugging Face. `raydit run` runs all stages of gpu_cifar10.toml in an empty
folder; the bare loops follow and take about half a minute. Writes gpu_pipeline.json and gpu_pipeline.md.
"""

import argparse
import functools
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from gpu_report import Figure, GpuReport, Part, say
from gpu_training import batch_of, measure_training
from harness import alternate, matmul_peak
from study import ROOT, first_images, history, newest_run, settings

from dit.autoencoder import MEMORY_FORMATS, Autoencoder
from dit.compilation import compile_network
from dit.macs import forward_macs
from dit.model import build_model
from dit.objective import create_process
from dit.precision import weights_dtype
from pipelines.config.reader import load_recipe
from pipelines.config.recipe import Recipe
from pipelines.latents.dataset import LatentDataset
from pipelines.training.settings import train_worker_settings

RECIPE = Path(__file__).with_name("gpu_cifar10.toml")
NUM_IMAGES = 20_000
LIMIT_SECONDS = 240.0
STAGES = ("autoencoder", "encode", "train", "evaluate")
PROGRESS = re.compile(rf"({'|'.join(STAGES)}) +(?:([\d,]+)/[\d,]+ (?:steps|images))?")
"""Matches a line of the command's output: the stage, and the progress if the line has it."""
SMALL_IMAGES = 400
SMALL = """
    autoencoder.train.gpus_per_worker=0 encode.gpus_per_worker=0 train.gpus_per_worker=0 evaluate.gpus_per_worker=0
    autoencoder.train.steps=20 autoencoder.train.warmup_steps=5 autoencoder.train.log_every=5
    autoencoder.train.global_batch_size=16 autoencoder.train.width=16 encode.shard_rows=64 encode.batch_size=16
    model.patch_size=2 model.hidden_size=64 model.depth=2 model.num_heads=2
    train.steps=40 train.warmup_steps=10 train.global_batch_size=16 train.log_every=5 train.checkpoint_every=20
    train.dtype=float32 train.compile=false
    evaluate.num_samples=40 evaluate.shard_rows=20 evaluate.batch_size=20 evaluate.sampling_steps=4
    evaluate.dtype=float32
""".split()
"""Overrides for a rehearsal."""


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
class Pipeline:
    """A run of all stages: its recipe, store and observed times."""

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


def run_stages(arguments: list[str], limit: float) -> Watch:
    """Run `raydit run`, echo its output, and record when its stages worked. It is stopped at the limit."""
    watch = Watch(time.monotonic())
    command = [sys.executable, "-m", "pipelines.cli", "run", *arguments]
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


def starts(pipeline: Pipeline) -> Iterator[Figure]:
    """Measure the time from the command (for later stages: from their first line) to the first step or the first
    finished images."""
    watch, config = pipeline.watch, pipeline.config
    sizes = {"autoencoder": config.autoencoder.train.global_batch_size, "train": config.train.global_batch_size}
    for stage in STAGES:
        if stage not in watch.first:
            yield Figure(what=f"{stage}: start", value=None, note="not reached")
            continue
        seen, done = watch.first[stage]
        since = watch.started if stage == STAGES[0] else watch.begun[stage]
        # The first report covers several steps; all but the first took as long as later ones.
        rates = pipeline.rates(stage) if stage in sizes else []
        later = (done - 1) * sizes[stage] / statistics.median(rates) if rates else 0.0
        whence = "the command" if stage == STAGES[0] else "its first line"
        until = "the first step" if stage in sizes else f"{done:,} images"
        yield Figure(what=f"{stage}: from {whence} to {until}", value=seen - later - since, unit="s")
    note = "" if watch.exit_code == 0 else f"not finished: exit code {watch.exit_code}"
    yield Figure(what="all stages", value=watch.seconds, unit="s", aim=LIMIT_SECONDS, note=note)


def training_job(pipeline: Pipeline) -> Iterator[Figure]:
    """The train job's images per second against the same loop on one batch that lies on the device."""
    config, device = pipeline.config, pipeline.device
    worker = train_worker_settings(config, LatentDataset.open(config.latents))
    process, network = create_process(**worker.objective), build_model(worker.model).to(device)
    if config.train.compile:
        compile_network(network)
    size = config.train.global_batch_size
    batches, product = itertools.repeat(batch_of(worker.model, size, process).to(device)), pipeline.product()
    window = max(5, config.train.steps // 20)
    bare = measure_training(
        network, batches, process, device, size=size, window=window, seconds=40, dtype=config.train.dtype
    ).images_per_second
    job = statistics.median(pipeline.rates("train"))
    what = f"training width {worker.model.hidden_size}, depth {worker.model.depth}, {worker.model.num_tokens} tokens"
    for kind, rate in (("train job", job), ("bare loop", bare)):
        share = 6 * forward_macs(worker.model) * rate / product
        yield Figure(what=f"{what}: {kind}", value=rate, unit="images/s", product=product, share=share)
    yield Figure(what="train job against the bare loop", value=job / bare, aim=0.97)


def encode_job(pipeline: Pipeline) -> Iterator[Figure]:
    """The encode job's images per second, flips counted, against its autoencoder on one batch on the device."""
    config, device, encode = pipeline.config, pipeline.device, pipeline.config.encode
    dataset = LatentDataset.open(config.latents)
    written = sorted(((Path(dataset.path) / shard.file).stat().st_mtime, shard.rows) for shard in dataset.shards)
    seconds = written[-1][0] - written[0][0]
    job = (1 + encode.flip) * sum(rows for _, rows in written[1:]) / seconds
    memory_format = MEMORY_FORMATS[encode.layout]
    ours = Autoencoder.load(Path(config.folder("autoencoder")), str(device), weights_dtype(encode.dtype), memory_format)
    side = config.images.size
    images = torch.rand(encode.batch_size, 3, side, side, device=device).contiguous(memory_format=memory_format)
    timing = alternate({"encode": functools.partial(ours.encode, images)}, rounds=20)["encode"]
    bare = encode.batch_size / timing.median
    details = {"job": job, "bare autoencoder": bare, "seconds": seconds}
    yield Figure(what="encode job against the bare autoencoder", value=job / bare, aim=0.95, details=details)


def other_rates(pipeline: Pipeline) -> Iterator[Figure]:
    """Rates without a bare loop to compare with: the autoencoder's training, and the parts of the evaluation."""
    size = pipeline.config.autoencoder.train.global_batch_size
    rate = statistics.median(pipeline.rates("autoencoder"))
    yield Figure(what=f"autoencoder training, batch {size}", value=rate / size, unit="steps/s")
    run = newest_run(pipeline.store, pipeline.config.name, "evaluate")
    names = ("features", "scoring", "pictures", "workers_sampling", "workers_extraction")
    for name in names:
        for _, seconds in history(pipeline.store, run, f"evaluate/{name}_seconds")[-1:]:
            yield Figure(what=f"evaluate: {name.replace('_', ' ')}", value=seconds, unit="s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run and measure the whole pipeline on one GPU.")
    parser.add_argument("images", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--small", action="store_true", help="rehearse with tiny sizes on CPUs")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which the stages are stopped")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the results")
    arguments = parser.parse_args()
    if not any(arguments.images.glob("*.parquet")):
        parser.error(f"no Parquet files in {arguments.images}")
    device = torch.device("cpu" if arguments.small else "cuda")
    if not arguments.small and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --small rehearses on the CPU")
    limit = arguments.limit if not arguments.small else max(arguments.limit, 600)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        images = first_images(arguments.images, SMALL_IMAGES if arguments.small else NUM_IMAGES, folder / "i.parquet")
        flags = settings(images__path=images, output=folder / "output", tracking__uri=store)
        flags += [flag for each in SMALL for flag in ("--set", each)] if arguments.small else []
        config = load_recipe(RECIPE, tuple(flags[1::2]))
        pipeline = Pipeline(config, store, run_stages([str(RECIPE), *flags], limit), device)
        if arguments.small:
            torch.set_num_threads(1)  # as the job's workers
        name = "CPU" if arguments.small else torch.cuda.get_device_name()
        machine = {"device": name, "torch": torch.__version__, "rehearsal": arguments.small}
        report = GpuReport(arguments.out, "gpu_pipeline", machine)
        parts = (starts, training_job, encode_job, other_rates)
        report.run({part.__name__: Part(0, functools.partial(part, pipeline)) for part in parts}, float("inf"))
    say(f"{report.path}.md and .json")
    return int(report.failed or pipeline.watch.exit_code != 0)


if __name__ == "__main__":
    sys.exit(main())
