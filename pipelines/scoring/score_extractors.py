"""From the records of every extractor to one report: each extractor is scored as if it were alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster import storage
from evaluation.extractors import Features
from evaluation.merge_reports import merge_reports
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.scoring.build_report import build_report
from pipelines.scoring.records import LoadedFeatures, load_features
from pipelines.scoring.references import RealImages, load_real_features
from pipelines.scoring.shards import ScoringShard


class ScoredImages(NamedTuple):
    """A report, and what its pictures are drawn from."""

    report: EvaluationReport
    first: LoadedFeatures
    """The first extractor's features of the scored images."""
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
) -> ScoredImages:
    """Score images by each extractor of `real`, in order; only one extractor's features are in memory at a time.

    protocols, shards: of each extractor. reconstructions: loads the reconstructions for one extractor. checkpoint,
    digest: what the images are of. Raises as load_features and load_real_features.
    """
    reports: list[EvaluationReport] = []
    timings: Counter[str] = Counter()
    kept = None
    for protocol, each, records in zip(protocols, real.each_extractor, shards, strict=True):
        reference, held_out = load_real_features(each)
        reconstructed, scored = reconstructions(each), load_features(records)
        kept = kept or (scored, reference)
        report = build_report(
            protocol,
            scored.features,
            reference,
            held_out,
            checkpoint=checkpoint,
            digest=digest,
            num_constant=kept[0].num_constant,
            reconstructed=reconstructed,
        )
        reports.append(report)
        timings.update(scored.timings)
    assert kept is not None, "there is at least one extractor"
    return ScoredImages(merge_reports(reports), *kept, {name: round(value, 3) for name, value in timings.items()})


def keep_other_extractors(report: EvaluationReport, earlier: EvaluationReport | None) -> EvaluationReport:
    """Return a report that also has the scores of the extractors that only an earlier report has.

    earlier: of the same images by the same first protocol.
    """
    scored = {protocol.extractor for protocol in report.protocols}
    others = [part for part in earlier.parts if part.protocol.extractor not in scored] if earlier else []
    return merge_reports([*report.parts, *others])


def holds_all(report: EvaluationReport, protocols: Sequence[EvaluationProtocol]) -> bool:
    """Return whether a report holds the scores by all of some protocols, among others perhaps."""
    return {each.protocol_id for each in protocols} <= {each.protocol_id for each in report.protocols}


def record_folders(folder: str, digest: str, shard_rows: int, protocols: Sequence[EvaluationProtocol]) -> list[str]:
    """Return paths or URIs in a report's folder for the records of the scored images, one for each protocol.

    Named after the digest of the checkpoint or images, so that records of others of the same name are not taken for
    them. The first protocol's has the same name whatever further extractors there are.
    """
    first = storage.join(folder, f"shards-{digest[:12]}-{shard_rows}")
    return [first, *(f"{first}-{protocol.protocol_id}" for protocol in protocols[1:])]


def remove_folders(folders: Sequence[str]) -> None:
    """Remove the folders of records."""
    for folder in folders:
        storage.remove_folder(folder)
