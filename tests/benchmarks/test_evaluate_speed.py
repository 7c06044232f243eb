"""Compare the evaluate job at CIFAR-10's image size with a plain loop, and its extractor with torch-fidelity's; time
the planning, merging and scoring of 50,000 images. Every process has one thread. Asserts that both sides compute the
same.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from harness import Timing, alternate, exponent, send, take_turns
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster.session import LOCAL_ENVIRONMENT
from dit.config import DiTConfig
from evaluation.protocol import shard_ranges
from evaluation.reference import ReferenceStatistics
from pipelines.checkpoints.open import open_checkpoint
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import save_reference
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import SampleSource, ScoringActor
from pipelines.scoring.workers.shards import compute_shards, make_shards
from pipelines.stage import StageContext

pytestmark = pytest.mark.benchmark

SIZE, SHARD_ROWS, SHARDS_PER_WORKER, TURN_SECONDS = 32, 10, 80, 3
MODEL = DiTConfig(
    input_size=16, patch_size=2, hidden_size=128, depth=4, num_heads=4, in_channels=4, num_classes=3, learn_sigma=False
)
BASELINE_SCRIPT = """
import itertools, json, os, sys
import numpy as np
import torch
from evaluation.extractors import create_extractor
from evaluation.protocol import EvaluationProtocol
from pipelines.checkpoints.open import SharedCheckpoint
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler

settings = json.loads(sys.argv[1])
torch.set_num_threads(1)
protocol = EvaluationProtocol.from_dict(settings["protocol"])
checkpoint = SharedCheckpoint(settings["checkpoint"])
sampler = CheckpointSampler(checkpoint, protocol, batch_size=settings["rows"])
extractor = create_extractor("efficientnet-lite0")
for number in itertools.count():
    indices = range(number * settings["rows"], (number + 1) * settings["rows"])
    images = sampler.sample(indices, sampler.labels(indices))
    features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).features
    name = f"{settings['folder']}/shard-{number:05d}"
    np.save(f"{name}.npy", features)
    open(f"{name}.by-{os.getpid()}", "w").close()
"""


@pytest.fixture
def checkpoint(tmp_path):
    config = tiny_output(
        tmp_path,
        f"images.size={SIZE}",
        f"evaluate.num_samples={2 * SHARDS_PER_WORKER * SHARD_ROWS}",
        "evaluate.sampling_steps=10",
        f"evaluate.shard_rows={SHARD_ROWS}",
        f"evaluate.batch_size={SHARD_ROWS}",
        size=SIZE,
    )
    return open_checkpoint(write_checkpoint(config, 2, MODEL).path), config


@contextmanager
def plain_loops(opened, config, folders: list[Path]):
    """Run one baseline process per folder, with the workers' malloc settings."""
    settings = {
        "checkpoint": opened.shared.location,
        "protocol": evaluation_protocol(ScoringSettings.from_recipe(config), opened).to_dict(),
        "rows": SHARD_ROWS,
    }
    env = os.environ | LOCAL_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    processes = []
    with ExitStack() as cleanup:
        for folder in folders:
            folder.mkdir()
            command = [sys.executable, "-c", BASELINE_SCRIPT, json.dumps({**settings, "folder": str(folder)})]
            processes.append(cleanup.enter_context(subprocess.Popen(command, env=env)))
            cleanup.callback(processes[-1].kill)
        while not all(map(times_written, folders)):
            assert all(process.poll() is None for process in processes), "a loop ended, for the reason above"
            time.sleep(0.1)
        yield


def score_shards(context, opened, config, workers: int, num_shards: int, folder: Path) -> None:
    protocol = evaluation_protocol(ScoringSettings.from_recipe(config), opened)
    shards = make_shards(str(folder), shard_ranges(num_shards * SHARD_ROWS, SHARD_ROWS))
    sources = [SampleSource(opened.shared, protocol)]
    create_actor = partial(pid_recording_actor(), with_absolute_paths(config.images), config.evaluate, sources)
    compute_shards(context, "evaluate", shards, create_actor, replace(config.evaluate, num_workers=workers))


def pid_recording_actor() -> type:
    """Return a ScoringActor that marks each record with the id of the process that wrote it."""

    class PidRecordingActor(ScoringActor):  # in here it is pickled by value: workers cannot import this file
        def __call__(self, shard):
            super().__call__(shard)
            Path(f"{shard.file}.by-{os.getpid()}").touch()

    return PidRecordingActor


def times_written(folder: Path) -> dict[int, list[float]]:
    """Return the times at which each process wrote its shards, sorted."""
    times: dict[int, list[float]] = {}
    for file in folder.glob("*.by-*"):
        times.setdefault(int(file.suffix.removeprefix(".by-")), []).append(file.stat().st_mtime)
    return {process: sorted(shard_times) for process, shard_times in times.items()}


def seconds_per_image(folders: list[Path], turns: list[tuple[float, float]]) -> Timing:
    """Return the mean seconds per image of the processes in every turn, from the end of the turn's first shard, which
    an earlier turn began, to the end of its last."""
    processes = [times for folder in folders for times in times_written(folder).values()]
    seconds = []
    for begun, ended in turns:
        within = [[time for time in times if begun < time < ended] for times in processes]
        seconds.append(fmean((times[-1] - times[0]) / ((len(times) - 1) * SHARD_ROWS) for times in within))
    return Timing(seconds)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_against_a_plain_loop(checkpoint, tmp_path, results, quick, workers):
    """Both sides are stopped and continued alternately every few seconds, because the machine's speed changes within a
    minute.

    Two workers also against two loops at once, as a machine may do less on each of its cores when all are at work.
    """
    if quick and workers > 1:
        pytest.skip("takes most of a minute")
    opened, config = checkpoint
    sides = {"plain loop, per worker": [tmp_path / "alone"]}
    if workers > 1:
        sides[f"{workers} plain loops at once"] = [tmp_path / f"loop-{number}" for number in range(workers)]
    job, loops = tmp_path / "job", list(chain(*sides.values()))
    with StageContext(config) as context, ThreadPoolExecutor(1) as thread:
        context.start_ray(
            config.evaluate, "evaluate"
        )  # in this thread, because Ray ends with the thread that starts it
        with plain_loops(opened, config, loops):
            loop_processes = {folder: next(iter(times_written(folder))) for folder in loops}
            send(signal.SIGSTOP, loop_processes.values())
            num_shards = workers * (SHARDS_PER_WORKER // 4 if quick else SHARDS_PER_WORKER)
            done = thread.submit(score_shards, context, opened, config, workers, num_shards, job)
            while not done.done() and len(times_written(job)) < workers:
                time.sleep(0.1)
            assert len(times_written(job)) == workers, "a worker started too late to do anything"
            processes = {name: [loop_processes[folder] for folder in folders] for name, folders in sides.items()}
            turns = take_turns({"job": list(times_written(job)), **processes}, TURN_SECONDS, over=done.done)
            done.result()
    ours = seconds_per_image([job], turns["job"])
    measured = f"{1 / ours.median:.1f} images/s each"
    for against, folders in sides.items():
        theirs = seconds_per_image(folders, turns[against])
        case = f"{SIZE} px, {workers} worker{'s' if workers > 1 else ''}"
        results.add_speedup("sample and score", case, measured, against, ours, theirs)
    check_features(job, loops[0])


def check_features(folder: Path, plain: Path) -> None:
    """Check that both sides computed the same features."""
    names = sorted({file.stem for file in folder.glob("*.npz")} & {file.stem for file in plain.glob("*.npy")})
    assert len(names) > 4
    for name in names:
        np.testing.assert_array_equal(np.load(folder / f"{name}.npz")["features"], np.load(plain / f"{name}.npy"))


def test_extractor_against_torch_fidelity(tmp_path, results, quick):
    """Compare the FID Inception with random weights: our extractor and torch-fidelity's pass over the same images, in
    batches of 16."""
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    from evaluation.extractors import create_extractor

    weights = random_inception(tmp_path / "inception.pth")
    torch.set_num_threads(1)
    shape = (8 if quick else 32, 3, SIZE, SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = create_extractor("inception", weights)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights)).eval()

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index]

    def their_pass():
        return get_featuresdict_from_dataset(Images(), theirs, 16, False, True, False)

    np.testing.assert_allclose(ours(images).features, their_pass()["2048"].numpy(), rtol=1e-4, atol=1e-5)
    rounds = 2 if quick else 7
    timings = alternate({"ours": lambda: ours(images), "theirs": their_pass}, rounds=rounds, warmup=1)
    measured = f"{len(images) / timings['ours'].median:.1f} images/s"
    case = f"Inception, {SIZE} px, one thread"
    results.add_speedup("features", case, measured, "torch-fidelity", timings["ours"], timings["theirs"])


def random_inception(path: Path) -> Path:
    """Write seeded random weights, scaled so that activations neither vanish nor explode."""
    from unittest import mock

    from torch_fidelity import FeatureExtractorInceptionV3

    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], "unused")
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5, generator=generator)
    torch.save(network.state_dict(), path)
    return path


SAMPLE_COUNTS = (5_000, 20_000, 50_000)
SCORE = """
import json, re, sys, time
from pathlib import Path

started = time.perf_counter()
from evaluation.metric_names import metric_name
from evaluation.protocol import shard_ranges
from evaluation.score import score
from pipelines.scoring.workers.records import load_features
from pipelines.scoring.real_images.references import load_given_reference
from pipelines.scoring.workers.shards import find_unfinished, make_shards

reference, folder, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
imported = time.perf_counter()
shards = make_shards(str(folder), shard_ranges(size, 1))
assert not find_unfinished(shards)
planned = time.perf_counter()
features = load_features(shards).features
merged = time.perf_counter()
statistics = load_given_reference(str(reference / "reference.npz"))
found = score(features.features, features.logits, statistics, extractor="inception", num_samples=size)
fid = found.metrics[metric_name("fd", "inception", size)]
scored = time.perf_counter()
# Not getrusage: its peak begins with that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({
    "plan": planned - imported, "merge": merged - planned, "score": scored - merged, "all": scored - started,
    "gib": peak / 2**20, "fid": fid,
}))
"""


def test_planning_merging_and_scoring_as_samples_grow(tmp_path, results, quick):
    """Score 2,048 features and 1,008 logits, read from one file per image, against a mean and covariance, as in ADM's
    references."""
    sizes = SAMPLE_COUNTS[:1] if quick else SAMPLE_COUNTS
    reference = ReferenceStatistics(
        n=50_000, mu=np.zeros(2048), sigma=np.eye(2048), extractor="inception", extractor_sha256="none"
    )
    save_reference(reference, str(tmp_path / "reference.npz"))
    found = []
    for size in sizes:
        folder = tmp_path / str(size)
        write_features(folder, size)
        command = [sys.executable, "-c", SCORE, str(tmp_path), str(folder), str(size)]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        # Of a standard Gaussian's samples: the bias alone, to first order D (D + 1) / (4 N).
        assert 0.8 < found[-1]["fid"] / (2048 * 2049 / (4 * size)) < 2
        measured = (
            f"planned in {found[-1]['plan']:.1f} s, merged in {found[-1]['merge']:.1f} s, scored in "
            f"{found[-1]['score']:.1f} s, {found[-1]['all']:.1f} s in all, {found[-1]['gib']:.2f} GiB"
        )
        results.add("score from files", f"{size:,} images in as many shards", measured)
    if len(sizes) > 1:
        costs = [one["plan"] + one["merge"] for one in found]
        case = f"plan and merge, {sizes[0]:,} to {sizes[-1]:,} images"
        results.add("score from files", case, f"{costs[-1]:.1f} s", "growth exponent", exponent(sizes, costs))


def write_features(folder: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in make_shards(str(folder), shard_ranges(size, 1)):
        features, logits = (rng.standard_normal((1, dim), dtype=np.float32) for dim in (2048, 1008))
        np.savez(shard.file, indices=np.array(shard.images), features=features, logits=logits)
