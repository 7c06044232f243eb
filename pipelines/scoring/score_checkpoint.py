"""Score one checkpoint: real images and samples -> features -> metrics -> report, by a pool of Ray actors.

The numbers are the same on any cluster: sample i depends on the seed and on i only.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from cluster import storage
from dit.formats.record import model_label
from evaluation.protocol import EvaluationProtocol, shard_ranges
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.checks import check_real_images, check_scoring_inputs
from pipelines.scoring.class_distances import SampleClasses, check_class_distances
from pipelines.scoring.protocols.build_protocol import evaluation_protocols, protocols_identity
from pipelines.scoring.real_images.held_out_digest import has_other_real_images, held_out_digest
from pipelines.scoring.real_images.reconstructions import Reconstructions
from pipelines.scoring.real_images.references import RealImages, extract_adm_images
from pipelines.scoring.reports.log_report import log_evaluation_settings, log_report
from pipelines.scoring.reports.report_curves import load_reports_by_step, save_curves
from pipelines.scoring.reports.report_files import (
    load_matching_report,
    report_folder,
    set_aside_other_report,
    take_back_report,
    write_report,
)
from pipelines.scoring.reports.report_pictures import Neighbours, report_pictures
from pipelines.scoring.reports.unlogged import is_unlogged, mark_logged
from pipelines.scoring.samples.guide import guide_location
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.score_extractors import (
    holds_all,
    record_folders,
    remove_all_records,
    remove_folders,
    score_extractors,
    with_earlier_scores,
)
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import SampleSource, ScoringActor
from pipelines.scoring.workers.records import load_preview_images, preview_shards
from pipelines.scoring.workers.shards import ScoringShard, compute_shards, find_unfinished, make_shards, share_images
from pipelines.stage import JobContext, StageContext
from pipelines.tracking import tags
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.tracking.run_log import RunLog
from raydit.errors import InvalidInput


@dataclass(frozen=True)
class CheckpointEvaluation:
    """One checkpoint, the protocols to score it by, and the folders that the evaluation works in."""

    opened: LocatedCheckpoint
    protocol: EvaluationProtocol
    """Protocol of the first extractor, by which samples are drawn."""
    settings: ScoringSettings
    saved: SavedSamples | None = None
    """Folder to which samples are also written; None if they are not."""

    @cached_property
    def protocols(self) -> list[EvaluationProtocol]:
        """The protocol of each extractor, in order."""
        return evaluation_protocols(self.settings, self.protocol)

    @property
    def folder(self) -> str:
        """Path or URI of the report's folder."""
        return report_folder(self.settings.evaluations, self.protocol.protocol_id, self.opened.name)

    def find_report(self) -> EvaluationReport | None:
        """Return the checkpoint's report if it holds the scores of all extractors, among others perhaps."""
        report = self.find_earlier_report()
        return report if report and holds_all(report, self.protocols, self.settings.evaluate) else None

    def find_earlier_report(self) -> EvaluationReport | None:
        """Return the checkpoint's report by the first protocol, of the same real images as far as it says."""
        report = load_matching_report(self.folder, self.opened.digest)
        return None if report and has_other_real_images(report, self.settings) else report

    @property
    def shard_folders(self) -> list[str]:
        """Paths or URIs of the folders for the records of samples, one for each extractor."""
        return record_folders(self.folder, self.opened.digest, self.settings.evaluate.shard_rows, self.protocols)

    def remove_shards(self) -> None:
        """Remove the records of samples."""
        remove_folders(self.shard_folders)

    @property
    def source(self) -> SampleSource:
        """What workers sample from."""
        guide = guide_location(self.protocol, self.settings.evaluate, self.opened)
        return SampleSource(self.opened.shared, self.protocol, self.saved, guide)

    def saved_source(self, saved: SavedSamples) -> dict[str, Any]:
        """Return what the files of saved samples depend on, as JSON values by name."""
        files = {"shard_rows": self.settings.evaluate.shard_rows, "save_format": saved.format}
        return {"checkpoint": self.opened.digest, **self.protocol.sampling_fields, **files}

    def lacks_saved_samples(self) -> bool:
        """Return whether samples are to be saved that are not in their folder yet."""
        if self.saved is None:
            return False
        num_shards = len(shard_ranges(self.protocol.num_samples, self.settings.evaluate.shard_rows))
        return not self.saved.holds_all(self.saved_source(self.saved), num_shards)

    def records(self, source: int = 0) -> list[list[ScoringShard]]:
        """Return the shards of samples of each extractor alone; source: as for `shards`."""
        parts = shard_ranges(self.protocol.num_samples, self.settings.evaluate.shard_rows)
        return [make_shards(folder, parts, source=source, saved=self.saved) for folder in self.shard_folders]

    def shards(self, source: int = 0) -> list[ScoringShard]:
        """Return the shards of samples. source: position of self.source in the list that the actors get."""
        return share_images(dict(enumerate(self.records(source))))

    def reconstructions(self, real: RealImages) -> Reconstructions:
        """Return the reconstructions that the samples are compared with, for the (first) extractor of `real`."""
        return Reconstructions(real, self.protocol.num_samples, self.protocol.decoder)


def prepare_saved_folders(evaluations: Iterable[CheckpointEvaluation]) -> None:
    """Record in the folders for saved samples what these are drawn from, before any work.

    Raises InvalidInput if two evaluations would write into one folder, AlreadyExists for a folder with other content.
    """
    origins: dict[str, str] = {}
    sources = []
    for evaluation in evaluations:
        if (saved := evaluation.saved) is None:
            continue
        if other := origins.get(saved.folder):
            raise InvalidInput(
                f"--save-images: found two checkpoints named {evaluation.opened.name}, {other} and "
                f"{evaluation.opened.origin}, whose samples would be mixed in {saved.folder}",
                "checkpoints of different names",
                "evaluate them one by one, with a folder for each",
            )
        origins[saved.folder] = evaluation.opened.origin
        sources.append((saved, evaluation.saved_source(saved)))
        saved.refuse_other_samples(sources[-1][1])
    for saved, source in sources:
        saved.write_source(source)


def compute_features(context: JobContext, real: RealImages, evaluations: Sequence[CheckpointEvaluation]) -> None:
    """Compute the missing records of real images and of samples by one pool of actors.

    evaluations: any number with the images and [evaluate] of `real`. If a record is missing, says first what samples
    are compared with and which metrics cannot be computed; raises InvalidInput if there are too few real images for
    any.
    """
    settings, shards = real.settings, real.missing_shards()
    for number, evaluation in enumerate(evaluations):
        shards += evaluation.shards(source=number)
    for evaluation in evaluations[:1]:
        missing = (evaluation.reconstructions(each).missing_shards() for each in real.each_extractor)
        shards += share_images(dict(enumerate(missing)))
    is_unfinished = bool(find_unfinished(shards))
    if is_unfinished and len(real.training):
        context.say("evaluate", f"compares with {real.training.summary()}")
    if is_unfinished and evaluations:
        lines = check_real_images(settings, len(real.training), evaluations[0].protocol.num_samples)
        if evaluations[0].opened.record.class_names == real.training.class_names:
            lines += real.training.describe_classes()
        for line in lines:
            context.say("evaluate", line)
    sources = [evaluation.source for evaluation in evaluations]
    create_actor = partial(
        ScoringActor,
        with_absolute_paths(settings.images),
        settings.evaluate,
        sources,
        settings.extractor_digests,
    )
    compute_shards(context, "evaluate", shards, create_actor, settings.evaluate)


def group_by_settings(evaluations: Iterable[CheckpointEvaluation]) -> list[list[CheckpointEvaluation]]:
    """Group evaluations whose settings are equal but for the seed, in order."""
    groups: list[tuple[ScoringSettings, list[CheckpointEvaluation]]] = []
    for evaluation in evaluations:
        settings = replace(evaluation.settings, seed=0)
        # Compared, not hashed: settings may hold a dict of node labels.
        group = next((group for known, group in groups if known == settings), None)
        if group is None:
            groups.append((settings, [evaluation]))
        else:
            group.append(evaluation)
    return [group for _, group in groups]


def score_checkpoint(
    context: JobContext, evaluation: CheckpointEvaluation, *, images_per_step: int
) -> EvaluationReport:
    """Sample from a checkpoint, score the samples and write the report; records of an interrupted run are reused.

    images_per_step: the training's global batch size, for the curve over its checkpoints.
    """
    opened, protocol, settings = evaluation.opened, evaluation.protocol, evaluation.settings
    check_scoring_inputs(settings, protocol)
    check_class_distances(settings, opened.record.class_names, opened.origin)
    real, timer = RealImages.of(settings, protocol.num_samples), LapTimer()
    shards, folder = evaluation.shards(), evaluation.folder
    earlier = evaluation.find_earlier_report()
    set_aside_other_report(folder, opened.digest)
    if find_unfinished(shards):
        context.prepare_work(settings.evaluate, "evaluate")
    with open_run(context, evaluation) as run:
        compute_features(context, real, [evaluation])
        extract_adm_images(real, context)
        timer.lap("features_seconds")
        scored = score_extractors(
            evaluation.protocols,
            real,
            evaluation.records(),
            lambda each: evaluation.reconstructions(each).load(),
            checkpoint=opened.origin,
            digest=opened.digest,
            classes=SampleClasses(tuple(opened.record.class_names)),
            shown=slice(sum(len(shard.images) for shard in preview_shards(shards))),
        )
        report = replace(
            with_earlier_scores(scored.report, earlier),
            held_out_digest=held_out_digest(real),
            image_column=real.training.image_column,
            latents=opened.record.latents_fingerprint or "",
            model=f"{model_label(opened.record.model, opened.record.recipe)}, {opened.record.process_kind}",
        )
        timer.lap("scoring_seconds")
        assert scored.labels is not None, "samples have labels"
        pictures = report_pictures(
            load_preview_images(shards),
            scored.labels,
            scored.features,
            opened.record.class_names,
            Neighbours(scored.reference, settings.images),
        )
        timer.lap("pictures_seconds")
        report = write_report(report, folder, pictures, timer.laps | scored.timings)
        log_written_report(run, evaluation, report, images_per_step)
        context.say("evaluate", f"{protocol.num_samples:,} samples scored, report in {folder} ({timer.total:.0f} s)")
    return report


def say_finished(
    context: StageContext, evaluation: CheckpointEvaluation, report: EvaluationReport, images_per_step: int
) -> None:
    """Say that an evaluation is finished, after doing what an interrupted one has left if the output is writable."""
    if context.is_writable:
        take_back_report(evaluation.folder, evaluation.opened.digest)
        deliver_report(context, evaluation, report, images_per_step=images_per_step)
    context.skipped("evaluate", f"protocol {evaluation.protocol.label}, report in {evaluation.folder}")


def deliver_report(
    context: JobContext, evaluation: CheckpointEvaluation, report: EvaluationReport, *, images_per_step: int
) -> None:
    """Log a finished report if its evaluation was interrupted after writing and before logging it; see
    score_checkpoint."""
    if not is_unlogged(evaluation.folder, report.checkpoint_digest):
        return
    context.say("evaluate", "logging the report of an earlier evaluation that was interrupted before it was logged")
    with open_run(context, evaluation) as run:
        log_written_report(run, evaluation, report, images_per_step)


@contextmanager
def open_run(context: JobContext, evaluation: CheckpointEvaluation) -> Iterator[RunLog]:
    """Open the run of an evaluation, or that of an interrupted one with the same checkpoint and protocols."""
    opened, protocol = evaluation.opened, evaluation.protocol
    identity = {"checkpoint": opened.digest, **protocols_identity(evaluation.protocols)}
    with context.run("evaluate", identity, run_tags(opened, protocol)) as run:
        log_evaluation_settings(run, evaluation.settings.evaluate, protocol)
        yield run


def log_written_report(
    run: RunLog, evaluation: CheckpointEvaluation, report: EvaluationReport, images_per_step: int
) -> None:
    """Log a checkpoint, its report, and the curves over all reports of the protocol, which are drawn again.

    The records that the report was made of are removed then.
    """
    opened, folder = evaluation.opened, evaluation.folder
    log_checkpoint(run, opened, opened.origin)
    log_report(run, report, folder, opened.step, opened.digest)
    protocol_folder = storage.split(folder)[0]
    for figure in save_curves(load_reports_by_step(protocol_folder), protocol_folder, images_per_step):
        run.artifact(figure)
    mark_logged(folder, report.checkpoint_digest)
    remove_all_records(folder, report)


def run_tags(opened: LocatedCheckpoint, protocol: EvaluationProtocol) -> dict[str, str]:
    """Return the tags by which the MLflow run of an evaluation names its checkpoint and protocol."""
    return {
        tags.CHECKPOINT: opened.origin,
        tags.CHECKPOINT_DIGEST: opened.digest,
        **protocol_tags(protocol),
    }


def protocol_tags(protocol: EvaluationProtocol) -> dict[str, str]:
    """Return the tags by which an MLflow run names its (first) protocol."""
    return {tags.PROTOCOL_ID: protocol.protocol_id, tags.PROTOCOL: protocol.summary}


class LapTimer:
    """Durations of consecutive laps in seconds, by name."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a lap and begin the next."""
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now

    @property
    def total(self) -> float:
        """Seconds of all laps."""
        return sum(self.laps.values())
