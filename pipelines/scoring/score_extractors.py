"""From the records of every extractor to one report: each extractor is scored as if it were alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cluster import storage
from evaluation.extractors import Features
from evaluation.merge_reports import merge_reports
from evaluation.metric_names import metric_name, parse_metric_name
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from evaluation.score import FURTHER_METRICS
from pipelines.config.evaluate import EvaluateConfig
from pipelines.scoring.class_distances import SampleClasses, with_class_distances
from pipelines.scoring.real_images.references import RealImages, load_real_features
from pipelines.scoring.reports.build_report import build_report, with_reconstructions
from pipelines.scoring.workers.records import load_features
from pipelines.scoring.workers.shards import ScoringShard


class ScoredImages(NamedTuple):
    """A report, and what its pictures are drawn from."""

    report: EvaluationReport
    features: np.ndarray
    """(M, D): the first extractor's features of the images that pictures show."""
    labels: np.ndarray | None
    """(N,) int64, of samples."""
    reference: ReferenceStatistics
    """The first extractor's reference."""
    timings: dict[str, float]
    """Seconds that the workers spent for all extractors, as LoadedFeatures has them."""


def score_extractors(
    protocols: Sequence[EvaluationProtocol],
    real: RealImages,
    shards: Sequence[Sequence[ScoringShard]],
    reconstructions: Callable[[RealImages], Features | None] = lambda real: None,
    *,
    checkpoint: str,
    digest: str,
    classes: SampleClasses,
    shown: np.ndarray | slice,
) -> ScoredImages:
    """Score images by each extractor of `real`, in order; only one extractor's features are in memory at a time.

    protocols, shards: of each extractor. reconstructions: loads the reconstructions for one extractor. checkpoint,
    digest: what the images are of. classes: theirs, where each is to have a distance of its own. shown: the images
    whose features pictures need. Raises the same errors as load_features and load_real_features.
    """
    reports: list[EvaluationReport] = []
    timings: Counter[str] = Counter()
    kept, num_constant = None, 0
    for protocol, each, records in zip(protocols, real.each_extractor, shards, strict=True):
        reference, held_out = load_real_features(each)
        scored = load_features(records)
        if kept is None:  # copies, which do not keep the arrays that they are part of
            num_constant = scored.num_constant
            kept = np.array(scored.features.features[shown]), scored.labels, reference
        report = build_report(
            protocol,
            scored.features,
            reference,
            held_out,
            checkpoint=checkpoint,
            digest=digest,
            num_constant=num_constant,
            metrics=each.settings.evaluate.metrics,
        )
        report = with_unreadable(report, count_unreadable(each, reference, held_out))
        if each.settings.evaluate.per_class:
            report = with_class_distances(report, scored, reference, each, classes)
        timings.update(scored.timings)
        del scored, held_out
        if (reconstructed := reconstructions(each)) is not None:
            report = with_reconstructions(report, reconstructed, reference)
        reports.append(report)
        del reference, reconstructed
    assert kept is not None, "there is at least one extractor"
    return ScoredImages(merge_reports(reports), *kept, {name: round(value, 3) for name, value in timings.items()})


def count_unreadable(
    real: RealImages, reference: ReferenceStatistics, held_out: Features | None
) -> dict[str, tuple[int, int]]:
    """Return how many real images lack features, and of how many, as "reference" and "held_out"; {} where all have.

    How many images a given reference lacks is unknown.
    """
    found = {}
    if not real.settings.reference and reference.n < len(real.training):
        found["reference"] = len(real.training) - reference.n, len(real.training)
    if held_out is not None and len(held_out.features) < len(real.baseline):
        found["held_out"] = len(real.baseline) - len(held_out.features), len(real.baseline)
    return found


def with_unreadable(report: EvaluationReport, unreadable: dict[str, tuple[int, int]]) -> EvaluationReport:
    """Return a report that says how many real images could not be read. unreadable: as count_unreadable gives it."""
    titles = {
        "reference": "The reference is without {} of {} images",
        "held_out": "{} of {} held-out images are missing",
    }
    warnings = [f"{titles[kind].format(*counts)}: they could not be read." for kind, counts in unreadable.items()]
    counts = {kind: count for kind, (count, _) in unreadable.items()}
    return replace(report, warnings=[*report.warnings, *warnings], unreadable=counts)


def with_earlier_scores(report: EvaluationReport, earlier: EvaluationReport | None) -> EvaluationReport:
    """Return a report that also has what only an earlier report of the same images has.

    That is the scores of other extractors, and by equal protocols further metrics, the distances of classes,
    reconstructions, and repeats of the same samples. earlier: by the same first protocol.
    """
    if earlier is None:
        return merge_reports(report.parts)
    scored = {protocol.extractor for protocol in report.protocols}
    known = {part.protocol_id: part for part in earlier.parts}
    parts = [_with_earlier_part(part, known.get(part.protocol_id)) for part in report.parts]
    merged = merge_reports([*parts, *(part for part in earlier.parts if part.protocol.extractor not in scored)])
    means = {name: earlier.repeats.get(name, []) for name in merged.averaged if averages_alike(merged, earlier, name)}
    same = {name: values for name, values in means.items() if values[:1] == [merged.metrics[name]]}
    return replace(merged, repeats=merged.repeats | same)


def _with_earlier_part(part: EvaluationReport, earlier: EvaluationReport | None) -> EvaluationReport:
    """Return the report of one extractor with what only an earlier one by the same protocol has."""
    if earlier is None:
        return part
    lacking = {
        name
        for name in {*earlier.metrics, *earlier.missing} - {*part.metrics, *part.missing}
        if parse_metric_name(name).kind.name in FURTHER_METRICS
    }
    added = {
        field: getattr(part, field)
        | {name: value for name, value in getattr(earlier, field).items() if name in lacking}
        for field in ("metrics", "errors", "real_baseline", "missing")
    }
    repeats = {name: values for name, values in earlier.repeats.items() if values[:1] == [added["metrics"].get(name)]}
    return replace(
        part,
        **added,
        repeats=(repeats if part.headline in repeats else {}) | part.repeats,
        per_class=part.per_class or earlier.per_class,
        reconstructions=part.reconstructions or earlier.reconstructions,
    )


def averages_alike(report: EvaluationReport, other: EvaluationReport, name: str) -> bool:
    """Return whether a metric of two reports is a mean over the same extractors, or no mean at all."""
    return {*report.averaged.get(name, [])} == {*other.averaged.get(name, [])}


def holds_all(report: EvaluationReport, protocols: Sequence[EvaluationProtocol], evaluate: EvaluateConfig) -> bool:
    """Return whether a report holds all that a recipe asks for by some protocols, among others perhaps."""
    parts = {part.protocol.protocol_id: part for part in report.parts}
    known = {*report.metrics, *report.missing}
    for protocol in protocols:
        part = parts.get(protocol.protocol_id)
        asked = {metric_name(kind, protocol.extractor, protocol.num_samples) for kind in evaluate.metrics}
        if part is None or not asked <= known or (evaluate.per_class and not part.per_class):
            return False
    return True


def record_folders(folder: str, digest: str, shard_rows: int, protocols: Sequence[EvaluationProtocol]) -> list[str]:
    """Return paths or URIs in a report's folder for the records of the scored images, one for each protocol.

    Named after the digest of the checkpoint or images, so that records of others of the same name are not taken for
    them. The first protocol's has the same name whatever further extractors there are.
    """
    first = storage.join(folder, f"shards-{digest[:12]}-{shard_rows}")
    return [first, *(f"{first}-{protocol.protocol_id}" for protocol in protocols[1:])]


def remove_all_records(folder: str, report: EvaluationReport) -> None:
    """Remove the records beside a finished report of which it holds the scores, whatever the size of their shards.

    Those of an extractor that the report lacks are of another evaluation, which may resume.
    """
    prefix = f"shards-{report.checkpoint_digest[:12]}-"
    names = storage.list_names(folder) if storage.exists(folder) else []
    found = {name: name.removeprefix(prefix).partition("-")[2] for name in names if name.startswith(prefix)}
    scored = {"", *(protocol.protocol_id for protocol in report.protocols)}
    remove_folders([storage.join(folder, name) for name, protocol_id in found.items() if protocol_id in scored])


def remove_folders(folders: Sequence[str]) -> None:
    """Remove the folders of records."""
    for folder in folders:
        storage.remove_folder(folder)
