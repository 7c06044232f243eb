"""Merge reports that score the same samples with one extractor each into one report."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.ratios import average_over_extractors
from evaluation.report import BY_METRIC, EvaluationReport, FurtherScores


def merge_reports(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """Return one report of several extractors' reports of the same samples; the first one's protocol leads.

    Whatever describes the samples, such as pictures and timings, is taken from the first report. The mean of the
    extractors' ratios to real images is added.
    """
    first, *others = reports
    merged: dict[str, Any] = {
        name: {key: value for report in reports for key, value in getattr(report, name).items()} for name in BY_METRIC
    }
    further = [
        FurtherScores(
            protocol=other.protocol,
            curve=other.curve,
            per_class=other.per_class,
            warnings=other.warnings,
        )
        for other in others
    ]
    unreadable: dict[str, int] = {}
    for report in reports:
        for kind, count in report.unreadable.items():
            unreadable[kind] = max(count, unreadable.get(kind, 0))
    defect = next((report.disqualified for report in reports if report.disqualified), "")
    extractors = [report.protocol.extractor for report in reports]
    mean = average_over_extractors(extractors, merged["metrics"], merged["deviations"], merged["missing"])
    for name in ("metrics", "errors", "missing"):
        merged[name] |= getattr(mean, name)
    return replace(first, **merged, further=further, disqualified=defect, averaged=mean.averaged, unreadable=unreadable)
