"""What `raydit evaluate` prints after several checkpoints."""

import json
from dataclasses import replace

from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.cli.commands.evaluate import _print_series
from pipelines.evaluate import FinishedEvaluation

CATS = EvaluationProtocol(decoder="d", extractor="inception", extractor_sha256="e", reference_digest="cats")
DOGS = replace(CATS, num_samples=1000, reference_digest="dogs")


def finished(checkpoint, protocol, fid):
    metrics = {f"fid_{protocol.num_samples // 1000}k": fid}
    report = EvaluationReport(protocol=protocol, checkpoint=checkpoint, checkpoint_digest="c", metrics=metrics)
    return FinishedEvaluation(report, f"/nowhere/{protocol.protocol_id}/a", "", False)


def printed_best(scored, capsys):
    """The line and the JSON value that name the best checkpoint."""
    _print_series(scored, as_json=True)
    *lines, result = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("best"))
    return line.removeprefix("best").strip(), json.loads(result)["best"]


def test_scores_of_different_protocols_name_no_best_checkpoint(capsys):
    scored = [finished("/a/step_1", CATS, 12.0), finished("/b/step_1", DOGS, 30.0)]
    assert printed_best(scored, capsys) == ("none: scores of different protocols do not rank checkpoints", None)


def test_scores_of_one_protocol_name_the_best_checkpoint(capsys):
    scored = [finished("/a/step_1", CATS, 12.0), finished("/a/step_2", CATS, 9.0)]
    assert printed_best(scored, capsys) == ("/a/step_2 by fid_50k", "/a/step_2")
