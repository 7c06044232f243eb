"""The encode job on CIFAR-10 at 64 pixels, against its autoencoder alone and against a plain DataLoader loop.

In all of them one thread computes the autoencoder while the other cores read and write, as CPUs do next to a GPU.
Without horizontal flips, so that every pass of the autoencoder reads an image.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import SIZE, cifar_images, cifar_recipe
from diffusers import AutoencoderKL
from harness import alternate, bandwidth, exponent, in_turn
from memory import MIB, measure_peak_memory
from tiny_encode import autoencoder_folder
from tiny_latents import write_dataset

from cluster.session import LOCAL_ENVIRONMENT, ray_session
from pipelines.config.recipe import Recipe
from pipelines.encode import SHARDS_IN_FLIGHT, encode
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.encoding import bytes_in_flight
from pipelines.stage import StageContext

pytestmark = pytest.mark.benchmark

SIZES = (2_000, 7_000, 25_000)
"""Sizes of the data sets on which the cost per image and the job's memory are measured."""
READ_IMAGES, READ_SHARD_ROWS = 5_000, 500


def stable_diffusion_sized(folder: Path) -> Path:
    """An untrained autoencoder of Stable Diffusion's size: 34 million parameters in its encoder."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """An autoencoder, with work for some tens of seconds on one core."""

    autoencoder: Callable[[Path], Path]
    num_images: int
    shard_rows: int
    batch_size: int
    rounds: int = 3


CASES = {
    "tiny autoencoder": Case(autoencoder_folder, num_images=4_096, shard_rows=256, batch_size=32),
    "autoencoder of Stable Diffusion's size": Case(stable_diffusion_sized, num_images=64, shard_rows=8, batch_size=4),
}


@dataclass(frozen=True)
class Run:
    """A finished encode job."""

    config: Recipe
    dataset: LatentDataset
    started: float
    ended: float

    @property
    def seconds_per_image(self) -> float:
        """Seconds per image at steady state, from the end of the first shard to the end of the last."""
        shards = sorted((self._written(shard.file), shard.rows) for shard in self.dataset.shards)
        return (shards[-1][0] - shards[0][0]) / sum(rows for _, rows in shards[1:])

    @property
    def seconds_to_start(self) -> float:
        """Seconds until the first image: listing, loading the autoencoder, and starting Ray if needed."""
        first = self.dataset.shards[0]
        return self._written(first.file) - self.started - first.rows * self.seconds_per_image

    def _written(self, file: str) -> float:
        return (Path(self.dataset.path) / file).stat().st_mtime


def run_job(folder: Path, images: Path, autoencoder: Path, **settings) -> Run:
    """Run the whole job in an emptied folder, on a running Ray or on its own."""
    shutil.rmtree(folder, ignore_errors=True)
    config = cifar_recipe(folder, images, autoencoder, **settings)
    started = time.time()
    with StageContext(config) as context:
        dataset = encode(config, context=context)
    return Run(config, dataset, started, time.time())


def run_plain(kind: str, images: Path, autoencoder: Path, out: Path, case: Case) -> float:
    """Return a baseline's seconds per image, in the environment of raydit's own processes, so that malloc behaves the
    same."""
    command = [sys.executable, str(Path(__file__).with_name("plain_encode.py")), kind, str(images), str(autoencoder)]
    numbers = (SIZE, case.batch_size, case.num_images)
    shutil.rmtree(out, ignore_errors=True)
    command += [str(out), *map(str, numbers)]
    environment = os.environ | LOCAL_ENVIRONMENT
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return float(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_images_per_second(tmp_path, results, quick, name):
    case = CASES[name]
    if quick and case.autoencoder is stable_diffusion_sized:
        pytest.skip("takes most of a minute")
    if quick:
        case = replace(case, num_images=case.num_images // 2, rounds=1)
    images = cifar_images(tmp_path / "images.parquet", case.num_images)
    autoencoder = case.autoencoder(tmp_path / "autoencoder")

    def ours(**settings) -> float:
        shards = {"flip": False, "shard_rows": case.shard_rows, "batch_size": case.batch_size}
        run = run_job(tmp_path / "job", images, autoencoder, **shards, **settings)
        assert len(run.dataset) == case.num_images
        return run.seconds_per_image

    def theirs(kind: str) -> float:
        return run_plain(kind, images, autoencoder, tmp_path / kind, case)

    candidates = {"raydit": ours, "plain loop": lambda: theirs("loop")}
    if not quick:
        candidates["autoencoder alone"] = lambda: theirs("alone")
        candidates["bfloat16"] = lambda: ours(dtype="bfloat16", memory_format="channels_last")
    with ray_session(num_cpus=3):  # as many as a job requests when it starts Ray itself
        timings = in_turn(candidates, case.rounds)
    check_equal(LatentDataset.open(tmp_path / "job" / "output" / "latents"), tmp_path / "loop")
    raydit, bfloat16 = timings.pop("raydit"), timings.pop("bfloat16", None)
    name = f"{name}, {SIZE} px, one thread"
    for against, timing in timings.items():
        results.add_speedup("encode job", name, f"{1 / raydit.median:.1f} images/s", against, raydit, timing)
    if bfloat16:
        half, loop = f"{1 / bfloat16.median:.1f} images/s", timings["plain loop"]
        results.add_speedup(
            "encode job", f"{name}, bfloat16, channels last", half, "plain loop in float32", bfloat16, loop
        )


def check_equal(dataset: LatentDataset, folder: Path) -> None:
    """Check that both sides computed the same moments; ours may be in bfloat16."""
    plain = np.stack([np.load(file) for file in sorted(folder.glob("*.npy"))])
    ours = dataset.arrays.moments
    assert ours.shape == plain.shape
    difference = (ours.astype(np.float32) - plain).std() / plain.astype(np.float32).std()
    assert difference < 0.02, difference


def test_cost_and_memory_as_the_data_set_grows(tmp_path, results, quick):
    sizes = SIZES[:1] if quick else SIZES
    autoencoder = autoencoder_folder(tmp_path / "autoencoder")
    costs, peaks = [], []
    for size in sizes:
        images = cifar_images(tmp_path / "images.parquet", size)
        begun = time.time()
        with ray_session(num_cpus=3), measure_peak_memory() as peak:  # the watcher must end before Ray does
            run = run_job(tmp_path / "job", images, autoencoder, flip=False)
        assert len(run.dataset) == size
        costs.append(run.seconds_per_image)
        peaks.append(peak)
        start = run.started - begun + run.seconds_to_start
        measured = (
            f"{1e3 * costs[-1]:.2f} ms for an image after a start of {start:.0f} s, "
            f"{run.ended - begun:.0f} s in all; driver {peak.driver / MIB:.0f} MiB more, "
            f"object store {peak.object_store / MIB:.0f} MiB"
        )
        results.add("encode job", f"tiny autoencoder, {size:,} images", measured)
    assert peaks[0].object_store > 0, "nothing was measured"
    assert all(peak.spilled == 0 for peak in peaks)
    in_flight = (SHARDS_IN_FLIGHT + 1) * bytes_in_flight(run.dataset.description, run.config.encode.shard_rows)
    assert max(peak.object_store for peak in peaks) <= in_flight, f"expected at most {in_flight} bytes"
    if len(sizes) > 1:
        case, measured = f"time of {sizes[0]:,} to {sizes[-1]:,} images", f"{1e3 * costs[-1]:.2f} ms for an image"
        results.add("encode job", case, measured, "growth exponent", exponent(sizes, costs))


def test_reading_the_latents_back(tmp_path, results):
    """Load all rows into memory, from shards and from one file per image."""
    rng, shape = np.random.default_rng(0), (READ_SHARD_ROWS, 8, SIZE // 2, SIZE // 2)
    shards = [rng.standard_normal(shape, np.float32).astype("<f2") for _ in range(0, READ_IMAGES, READ_SHARD_ROWS)]
    dataset = write_dataset(tmp_path / "latents", shards, flip=True)
    for index, row in enumerate(dataset.arrays.moments):
        np.save(tmp_path / f"{index:06d}.npy", row)

    def from_files() -> np.ndarray:
        return np.stack([np.load(file) for file in sorted(tmp_path.glob("*.npy"))])

    def from_shards() -> np.ndarray:
        return LatentDataset.open(dataset.path).arrays.moments

    np.testing.assert_array_equal(from_files(), from_shards())
    timings = alternate({"shards": from_shards, "files": from_files}, rounds=10)
    seconds = timings["shards"].median
    measured = f"{READ_IMAGES / seconds:,.0f} rows/s, {dataset.num_bytes / MIB / seconds:,.0f} MiB/s"
    results.add_speedup(
        "latents into memory", f"{READ_IMAGES:,} rows", measured, "a file for each", timings["shards"], timings["files"]
    )
    share = dataset.num_bytes / seconds / bandwidth()
    results.add("latents into memory", f"{READ_IMAGES:,} rows", measured, "copying memory", share)
