"""Functions as extractors, further metrics and class distances, from shards to the report, without Ray."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.metrics import cmmd
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.scoring.class_distances import SampleClasses
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.score_extractors import holds_all, score_extractors
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.records import load_features
from raydit.errors import InvalidInput

SOURCE = """
import torch

def layout(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

def colour(images):
    return images.float().mean(dim=(2, 3))
"""


def test_two_functions_of_a_module_score_with_all_that_is_asked_for(tmp_path, monkeypatch):
    module = f"scored_{os.getpid()}"
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    names = [f"{module}:layout", f"{module}:colour"]
    config = tiny_output(
        tmp_path,
        "evaluate.num_samples=24",
        "evaluate.shard_rows=24",
        "evaluate.batch_size=24",
        "images.held_out=0.5",
        f"evaluate.extractor={names[0]}",
        f"evaluate.extractors={json.dumps(names)}",
    )
    write_checkpoint(config, 2)
    opened = open_checkpoint(Path(config.folder("checkpoints")) / "step_0000002")
    asked = replace(config, evaluate=replace(config.evaluate, metrics=("cmmd", "mind", "rbf_mmd"), per_class=True))
    settings = ScoringSettings.from_recipe(asked)
    evaluation = CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)
    real, shards = RealImages.of(settings), evaluation.records()
    assert len({each.path(each.training) for each in real.each_extractor}) == 2  # although their source is one file
    actor = ScoringActor(asked.images, asked.evaluate, [evaluation.source], settings.extractor_digests)
    for shard in [*real.missing_shards(), *evaluation.shards()]:
        actor(shard)
    classes = SampleClasses(tuple(opened.record.class_names))
    report = score_extractors(
        evaluation.protocols, real, shards, checkpoint="c", digest="d", classes=classes, shown=slice(5)
    ).report
    assert [each.extractor for each in report.protocols] == names
    assert EvaluationReport.from_json(report.to_json()) == report
    samples = load_features(shards[1]).features.features
    with np.load(real.each_extractor[1].path(real.training)) as reference:
        assert report.metrics[f"cmmd_{module}_colour_24"] == cmmd(samples, reference["features"])
    for part in report.parts:
        assert [each.name for each in part.per_class] == ["blob", "ring", "stripe"]
    assert f"recall_{module}_layout_24" in report.errors
    assert holds_all(report, evaluation.protocols, asked.evaluate)
    plain = replace(report, metrics={name: value for name, value in report.metrics.items() if "mind" not in name})
    assert not holds_all(plain, evaluation.protocols, asked.evaluate)
    assert holds_all(plain, evaluation.protocols, config.evaluate)
    with pytest.raises(InvalidInput, match="as on the machine that planned the work"):
        ScoringActor(asked.images, asked.evaluate, [], {names[0]: "0" * 64})
