"""What `compute_features` says: before the work what samples are compared with, and nothing where none is left."""

import pytest
from fakes import FakeContext
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.checkpoints.open import open_checkpoint
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.score_checkpoint import CheckpointEvaluation, compute_features
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor


def test_what_samples_are_compared_with_is_said_before_the_work_and_not_where_none_is_left(tmp_path, capsys):
    """The pool computes records for all checkpoints and seeds, and each report then asks for its own once more."""
    config = tiny_output(tmp_path, "evaluate.num_samples=10", "evaluate.shard_rows=8")
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    settings = ScoringSettings.from_recipe(config)
    evaluation = CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)
    real = RealImages.of(settings, 10)
    with pytest.raises(AssertionError, match="without Ray"):
        compute_features(FakeContext(), real, [evaluation])
    assert capsys.readouterr().out.count("compares with") == 1
    actor = ScoringActor(with_absolute_paths(settings.images), settings.evaluate, [evaluation.source])
    for shard in (*real.missing_shards(), *evaluation.shards(), *evaluation.reconstructions(real).missing_shards()):
        actor(shard)
    compute_features(FakeContext(), real, [evaluation])
    assert capsys.readouterr().out == ""
