"""Measure the encode and the train job on one GPU, at the sizes of a published model, and how long commands take to
start; in under four minutes.

    python tests/benchmarks/run_gpu_jobs.py FOLDER_OF_PARQUET_FILES [--out FOLDER] [--limit SECONDS]
    python tests/benchmarks/run_gpu_jobs.py FOLDER_OF_PARQUET_FILES --small     a rehearsal on CPUs in two minutes

The images are CIFAR-10's (in the layout of Hugging Face), enlarged, with noise, as JPEG files. `raydit doctor`, `raydit
encode` with an autoencoder of Stable Diffusion's size, and `raydit train` with DiT-S/2 on those latents run one after
the other, each followed by its bare loop. Writes gpu_jobs.json and gpu_jobs.md.
"""

import functools
import io
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from gpu_autoencoder import create_stable_diffusion_autoencoder, stable_diffusion_settings
from gpu_jobs import JobRun, encode_job, open_report, parse_arguments, start_of, training_job, watch_command
from gpu_report import Figure, Part, say
from PIL import Image
from study import first_images, settings

from pipelines.config.reader import load_recipe

RECIPE = Path(__file__).with_name("gpu_jobs.toml")
LIMIT_SECONDS = 240.0
NUM_IMAGES, SMALL_IMAGES = 6_000, 200
NOISE, JPEG_QUALITY = 12.0, 90
"""Standard deviation of the noise in units of a pixel's value, and the quality that files are written with: a file has
about as many bytes per pixel as a photograph's."""
SMALL = """
    images.size=32 encode.gpus_per_worker=0 encode.shard_rows=32 encode.batch_size=8 encode.dtype=float32
    model.hidden_size=64 model.depth=2 model.num_heads=2
    train.gpus_per_worker=0 train.steps=40 train.global_batch_size=16 train.log_every=5 train.checkpoint_every=40
    train.dtype=float32 train.compile=false
""".split()
"""Overrides for a rehearsal."""


@dataclass(frozen=True)
class Setting:
    """What the parts share."""

    folder: Path
    """An empty folder for all files."""
    parquet: Path
    """CIFAR-10's folder."""
    device: torch.device
    small: bool

    @property
    def flags(self) -> list[str]:
        """The --set flags of every command."""
        flags = settings(
            images__path=self.folder / "images",
            autoencoder__id=str(self.folder / "autoencoder"),
            output=self.folder / "output",
            tracking__uri=self.store,
        )
        return flags + [flag for each in SMALL if self.small for flag in ("--set", each)]

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def run(self, stage: str, seconds: float) -> JobRun:
        """Run a stage's command, which is stopped after the seconds. Raises RuntimeError if it does not succeed."""
        watch = watch_command(stage, [str(RECIPE), *self.flags], 600 if self.small else seconds)
        if watch.exit_code != 0:
            raise RuntimeError(f"raydit {stage} ended with exit code {watch.exit_code} after {watch.seconds:.0f} s")
        return JobRun(load_recipe(RECIPE, tuple(self.flags[1::2])), self.store, watch, self.device)


def doctor(setting: Setting, seconds: float) -> Iterator[Figure]:
    """Measure how long `raydit doctor` takes, whatever it finds."""
    watch = watch_command("doctor", [], seconds)
    yield Figure(what="raydit doctor", value=watch.seconds, unit="s", target=8, note=f"exit code {watch.exit_code}")


def encode(setting: Setting, seconds: float) -> Iterator[Figure]:
    """Encode JPEG files and their flips, against the autoencoder on one batch on the device."""
    count = SMALL_IMAGES if setting.small else NUM_IMAGES
    side = 32 if setting.small else 256
    write_jpegs(first_images(setting.parquet, count, setting.folder / "i.parquet"), setting.folder / "images", side)
    module = create_stable_diffusion_autoencoder(stable_diffusion_settings(setting.small))
    module.save_pretrained(setting.folder / "autoencoder")
    run = setting.run("encode", seconds)
    yield start_of(run, "encode", from_command=True)
    yield from encode_job(run)


def train(setting: Setting, seconds: float) -> Iterator[Figure]:
    """Train on these latents, against the loop on one batch on the device."""
    run = setting.run("train", seconds)
    yield start_of(run, "train", from_command=True)
    yield from training_job(run)


def write_jpegs(parquet: Path, folder: Path, side: int) -> None:
    """Write the images of a Parquet file as square JPEG files, one folder for each class."""
    import pyarrow.parquet as pq

    rows = pq.read_table(parquet).to_pylist()
    for label in {row["label"] for row in rows}:
        (folder / str(label)).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(functools.partial(write_jpeg, folder, side), range(len(rows)), rows))


def write_jpeg(folder: Path, side: int, index: int, row: dict[str, Any]) -> None:
    """Write one image enlarged and with noise; the seed of the noise is the image's index."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(index).normal(0, NOISE, (side, side, 3))
    noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    noisy.save(folder / str(row["label"]) / f"{index:06d}.jpg", quality=JPEG_QUALITY)


PARTS = {"doctor": (doctor, 30), "encode": (encode, 90), "train": (train, 110)}
"""Each part with the seconds that it takes at most on a GPU of the kind of an H200."""


def main() -> int:
    description = "Measure the encode and the train job on one GPU."
    arguments = parse_arguments(description, LIMIT_SECONDS, "seconds within which parts must end")
    device = torch.device("cpu" if arguments.small else "cuda")
    report = open_report(arguments.out, "gpu_jobs", small=arguments.small)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        setting = Setting(Path(folder), arguments.images, device, arguments.small)
        if arguments.small:
            torch.set_num_threads(1)  # as the jobs' workers
        parts = {
            name: Part(0 if arguments.small else seconds, functools.partial(measure, setting, seconds))
            for name, (measure, seconds) in PARTS.items()
        }
        report.run(parts, float("inf") if arguments.small else arguments.limit)
    say(f"{report.path}.md and .json")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
