"""The driver's memory while 50,000 samples are scored by four extractors: below 4 GB."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_recipe

from evaluation import score
from evaluation.protocol import shard_ranges
from evaluation.reference import ReferenceStatistics
from pipelines.config.evaluate import EvaluateConfig
from pipelines.images.listing import Listing
from pipelines.scoring.class_distances import SampleClasses
from pipelines.scoring.protocols.build_protocol import images_protocol
from pipelines.scoring.real_images.references import RealImages, save_features_file, save_reference
from pipelines.scoring.score_extractors import score_extractors
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import ShardResult
from pipelines.scoring.workers.shards import make_shards

WIDTHS = {"a": 2048, "b": 2048, "c": 1024, "d": 1024}
"""Features of each extractor; the first has logits and spatial features as well, as Inception has."""
LIMIT = 4 * 2**30


@pytest.mark.slow
def test_four_extractors_of_50_000_samples_fit_into_4_gb(tmp_path):
    """Their features alone, of samples and held-out images, would take 4.6 GB together."""
    script = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "50000"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["metrics"] >= 4 * 3 and found["peak"] < LIMIT


def measure(folder: Path, count: int, blocks: int = 10) -> None:
    """Score synthetic records, and print the process's peak memory in bytes."""
    score.BLOCKS = blocks
    (folder / "memory_features.py").write_text("")
    sys.path.insert(0, str(folder))
    names = tuple(f"memory_features:{name}" for name in WIDTHS)
    evaluate = EvaluateConfig(extractors=names, num_samples=count, sampler="euler")
    config = replace(tiny_recipe(folder), evaluate=evaluate)
    settings = ScoringSettings.from_recipe(config)
    training, held_out = (listing_of(name, size) for name, size in (("t", 20), ("h", count)))
    real = RealImages(settings, training, held_out)
    protocols, shards = [], []
    for number, (name, each) in enumerate(zip(WIDTHS, real.each_extractor, strict=True)):
        width = WIDTHS[name]
        identity = {"extractor": each.settings.extractor.name, "extractor_sha256": each.settings.extractor.sha256}
        moments = {"mu": np.zeros(width), "sigma": np.eye(width)}
        if not number:
            moments |= {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
        save_reference(ReferenceStatistics(n=count, **moments, **identity), each.path(training))
        save_features_file((synthetic(part, width, number) for part in shard_ranges(count, 1000)), each.path(held_out))
        made = make_shards(str(folder / name), shard_ranges(count, 1000))
        for shard in made:
            synthetic(shard.images, width, number).write(shard.file)
        shards.append(made)
        fields = {"num_samples": count, "reference_digest": "x", "decoder": "none", **identity}
        protocols.append(replace(images_protocol(replace(settings, evaluate=each.settings.evaluate), count), **fields))
    written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    scored = score_extractors(
        protocols, real, shards, checkpoint="c", digest="d", classes=SampleClasses(), shown=slice(1000)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "while_writing": written, "metrics": len(scored.report.metrics)}))


def listing_of(prefix: str, count: int) -> Listing:
    zeros = np.zeros(count, np.int32)
    return Listing([f"{prefix}{index}" for index in range(count)], zeros, zeros.astype(np.int64), ())


def synthetic(images: range, width: int, number: int) -> ShardResult:
    rng = np.random.default_rng((number, images.start))

    def draw(columns: int) -> np.ndarray:
        return rng.standard_normal((len(images), columns), dtype=np.float32)

    more = {} if number else {"logits": draw(1008), "spatial": draw(2023)}
    indices = np.array(images)
    return ShardResult(indices=indices, labels=indices % 10, features=draw(width), **more)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))
