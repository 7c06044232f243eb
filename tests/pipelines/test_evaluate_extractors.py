"""Users' functions as extractors of a whole evaluation by Ray: the same numbers on any number of workers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster.session import ray_session
from evaluation.report import REPORT_FILE, EvaluationReport
from pipelines.evaluate import evaluate
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput

SOURCE = """
import torch

def layout(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

def colour(images):
    return images.float().mean(dim=(2, 3))
"""
CHOSEN = ("layout_features:layout", "layout_features:colour")


@pytest.mark.slow
def test_functions_and_further_metrics_are_the_same_on_any_number_of_workers(tmp_path, monkeypatch):
    """Also that a report that lacks what is asked for is made anew, and that workers refuse another source."""
    (tmp_path / "layout_features.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    settings = (
        "evaluate.num_samples=24",
        "evaluate.shard_rows=5",
        "evaluate.batch_size=5",
        "images.held_out=0.5",
        f"evaluate.extractor={CHOSEN[0]}",
        f"evaluate.extractors={json.dumps(CHOSEN)}",
    )
    config = tiny_output(tmp_path, *settings)
    write_checkpoint(config, 2)
    checkpoint = Path(config.folder("checkpoints")) / "step_0000002"
    asked = replace(config.evaluate, metrics=("cmmd", "mind", "rbf_mmd"), per_class=True)
    with ray_session("local", num_cpus=4):
        plain = evaluate(checkpoint, config=config)
        reports = []
        for workers in (1, 2, 3):
            chosen = replace(config, evaluate=replace(asked, num_workers=workers))
            reports.append(evaluate(checkpoint, config=chosen, force=workers > 1))
        chosen = replace(config, evaluate=replace(config.evaluate, extractor=CHOSEN[1], extractors=CHOSEN[1:]))
        monkeypatch.setattr(ScoringSettings, "extractor_digests", {CHOSEN[1]: "0" * 64})
        with pytest.raises(InvalidInput, match="has sha256 .*expected 0000.*as on the machine that planned the work"):
            evaluate(checkpoint, config=chosen)
    first, *others = reports
    assert not plain.per_class and plain.metrics.items() <= first.metrics.items()
    for other in others:
        assert (other.metrics, other.errors, other.missing) == (first.metrics, first.errors, first.missing)
        assert [part.per_class for part in other.parts] == [part.per_class for part in first.parts]
        assert other.protocols == first.protocols == plain.protocols
    for part in ("layout_features_layout", "layout_features_colour"):
        assert {f"{kind}_{part}_24" for kind in ("fd", "kid", "cmmd", "mind", "rbf_mmd")} <= first.metrics.keys()
        assert f"precision_{part}_24" in first.errors
    text = (Path(config.output) / "evaluations" / first.protocol_id / "step_0000002" / REPORT_FILE).read_text()
    assert [each["name"] for each in json.loads(text)["per_class"]] == ["blob", "ring", "stripe"]
    assert EvaluationReport.from_json(text).parts[1].per_class == first.parts[1].per_class
