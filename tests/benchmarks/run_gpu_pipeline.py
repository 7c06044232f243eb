"""Measure the whole pipeline on one GPU in under four minutes: when each stage starts working, and its speed relative
to bare loops.

    python tests/benchmarks/run_gpu_pipeline.py FOLDER_OF_PARQUET_FILES [--out FOLDER] [--limit SECONDS]
    python tests/benchmarks/run_gpu_pipeline.py FOLDER_OF_PARQUET_FILES --small     a rehearsal on CPUs in two minutes

The images are CIFAR-10's, in the layout of Hugging Face. `raydit run` runs all stages of gpu_cifar10.toml in an empty
folder; the bare loops follow and take about half a minute. Writes gpu_pipeline.json and gpu_pipeline.md.
"""

import functools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from gpu_jobs import (
    STAGES,
    JobRun,
    encode_job,
    open_report,
    parse_arguments,
    start_of,
    training_job,
    watch_command,
)
from gpu_report import Figure, Part, say
from study import first_images, history, newest_run, settings

from pipelines.config.reader import load_recipe

RECIPE = Path(__file__).with_name("gpu_cifar10.toml")
NUM_IMAGES = 20_000
LIMIT_SECONDS = 240.0
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


def starts(run: JobRun) -> Iterator[Figure]:
    """Measure the time from the command (for later stages: from their first line) to the first step or the first
    finished images."""
    watch = run.watch
    for stage in STAGES:
        yield start_of(run, stage, from_command=stage == STAGES[0])
    note = "" if watch.exit_code == 0 else f"not finished: exit code {watch.exit_code}"
    yield Figure(what="all stages", value=watch.seconds, unit="s", target=LIMIT_SECONDS, note=note)


def other_rates(run: JobRun) -> Iterator[Figure]:
    """Rates without a bare loop to compare with: the autoencoder's training, and the parts of the evaluation."""
    size = run.config.autoencoder.train.global_batch_size
    rate = statistics.median(run.rates("autoencoder"))
    yield Figure(what=f"autoencoder training, batch {size}", value=rate / size, unit="steps/s")
    evaluation = newest_run(run.store, run.config.name, "evaluate")
    names = ("features", "scoring", "pictures", "workers_sampling", "workers_extraction")
    for name in names:
        for _, seconds in history(run.store, evaluation, f"evaluate/{name}_seconds")[-1:]:
            yield Figure(what=f"evaluate: {name.replace('_', ' ')}", value=seconds, unit="s")


def main() -> int:
    description = "Run and measure the whole pipeline on one GPU."
    arguments = parse_arguments(description, LIMIT_SECONDS, "seconds after which the stages are stopped")
    device = torch.device("cpu" if arguments.small else "cuda")
    limit = arguments.limit if not arguments.small else max(arguments.limit, 600)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        images = first_images(arguments.images, SMALL_IMAGES if arguments.small else NUM_IMAGES, folder / "i.parquet")
        flags = settings(images__path=images, output=folder / "output", tracking__uri=store)
        flags += [flag for each in SMALL for flag in ("--set", each)] if arguments.small else []
        config = load_recipe(RECIPE, tuple(flags[1::2]))
        run = JobRun(config, store, watch_command("run", [str(RECIPE), *flags], limit), device)
        if arguments.small:
            torch.set_num_threads(1)  # as the job's workers
        report = open_report(arguments.out, "gpu_pipeline", small=arguments.small)
        parts = (starts, training_job, encode_job, other_rates)
        report.run({part.__name__: Part(0, functools.partial(part, run)) for part in parts}, float("inf"))
    say(f"{report.path}.md and .json")
    return int(report.failed or run.watch.exit_code != 0)


if __name__ == "__main__":
    sys.exit(main())
