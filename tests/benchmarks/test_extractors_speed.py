"""Three extractors of one sampling against three runs of one each, of which two sample for nothing.

One process without Ray, and one thread: only the actor's own work is measured.
"""

import pytest
from harness import Timing, alternate
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.checkpoints.open import open_checkpoint
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import SampleActor, SampleSource, ScoringActor
from pipelines.scoring.workers.shards import make_shards, share_images

pytestmark = pytest.mark.benchmark

EXTRACTORS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
SIZE, NUM_SAMPLES = 16, 16


def test_three_extractors_of_one_sampling(tmp_path, results, quick):
    """Their passes add up: neither their networks nor their records cost more in one process than in three."""
    config = tiny_output(
        tmp_path,
        f"images.size={SIZE}",
        f"evaluate.extractors={list(EXTRACTORS)}",
        f"evaluate.num_samples={NUM_SAMPLES}",
        f"evaluate.batch_size={NUM_SAMPLES}",
        size=SIZE,
    )
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    source = SampleSource(opened.shared, evaluation_protocol(ScoringSettings.from_recipe(config), opened))
    actor = ScoringActor(with_absolute_paths(config.images), config.evaluate, [source])
    sampler = SampleActor(config.evaluate, [source])
    shards = {
        position: make_shards(str(tmp_path / name), [range(NUM_SAMPLES)]) for position, name in enumerate(EXTRACTORS)
    }
    (together,) = share_images(shards)
    alone = [share_images({position: of_one})[0] for position, of_one in shards.items()]
    candidates = {
        "together": lambda: actor(together),
        **{name: lambda shard=shard: actor(shard) for name, shard in zip(EXTRACTORS, alone, strict=True)},
        "sampling": lambda: sampler.compute(together),
    }
    timings = alternate(candidates, rounds=3 if quick else 15)
    sampling = timings["sampling"].seconds
    passes = zip(*(timings[name].seconds for name in EXTRACTORS), strict=True)
    # Each run alone samples as well, and one sampling is needed.
    apart = [sum(runs) - (len(runs) - 1) * once for runs, once in zip(passes, sampling, strict=True)]
    measured = f"{NUM_SAMPLES / timings['together'].median:.1f} images/s"
    case = f"Lite0, Lite1 and Lite2, {SIZE} px, one thread"
    results.add_speedup("several extractors", case, measured, "one at a time", timings["together"], Timing(apart))
