"""The evaluate job: checkpoint -> samples -> features -> metrics, by Ray Data; the same numbers on any cluster."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.page import render_page
from evaluation.protocol import EvaluationProtocol, shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.report import REPORT_FILE, EvaluationReport
from evaluation.score import Score, score
from pipelines.config import Recipe
from pipelines.features import Shard, compute_features, make_shards, read_records
from pipelines.grids import class_grid, save_png
from pipelines.logged_models import log_checkpoint
from pipelines.reference import RealImages, load_real, reference_digest
from pipelines.stage import StageContext, located

GRID_FILE = "samples.png"
PAGE_FILE = "report.html"


def evaluate(
    checkpoint: str | Path,
    protocol: EvaluationProtocol | None = None,
    *,
    config: Recipe | None = None,
    context: StageContext | None = None,
    force: bool = False,
) -> EvaluationReport:
    """Score a checkpoint, or read the report of an earlier evaluation by the same protocol.

    protocol: left out, that of `config`'s [evaluate]. config: left out, the recipe that the checkpoint records.
    force: do it again. Raises FileNotFoundError or ValueError before any work if something does not fit.
    """
    from dit.checkpoint import load_checkpoint

    opened = load_checkpoint(checkpoint)
    config = config or checkpoint_recipe(opened)
    if context is None:
        with StageContext(config) as own:
            return evaluate(checkpoint, protocol, config=config, context=own, force=force)
    protocol = protocol or evaluation_protocol(config, opened)
    folder = Path(config.folder("evaluations")) / protocol.protocol_id / opened.path.name
    report = earlier_report(folder, opened.digest)
    if report is not None and not force:
        context.skipped("evaluate", f"protocol {protocol.protocol_id}, report in {folder}")
        return report
    if force:
        storage.remove_folder(str(shard_folder(config, opened, folder)))
    return _evaluate(config, context, opened, protocol, folder)


def _evaluate(config: Recipe, context: StageContext, opened, protocol: EvaluationProtocol, folder: Path):
    """The graph: reference and floor from real images; samples from the checkpoint; scores of both; the report."""
    tags = {"raydit.checkpoint": str(opened.path), "raydit.protocol_id": protocol.protocol_id}
    identity = {"checkpoint": opened.digest, "protocol": protocol.protocol_id}
    clock = Clock()
    with context.run("evaluate", identity, tags) as run:
        run.params({"evaluate": asdict(config.evaluate), "protocol": protocol.to_dict()})
        check_reference(config, protocol)
        images = RealImages.of(config)
        shards = sample_shards(config, opened, protocol, folder)
        arguments = (located(config.images), config.evaluate, str(opened.path), protocol)
        compute_features(context, "evaluate", [*images.missing_shards(), *shards], arguments, config.evaluate)
        clock.lap("features_seconds")
        reference, real = load_real(images)
        samples = load_samples(shards, protocol)
        generated = score_features(samples, reference, protocol, protocol.num_samples)
        floors, metrics = {}, dict(generated.metrics)
        if real:
            count = len(real["features"])
            floors = score_features(real, reference, protocol, count, errors=False).metrics
            if count < protocol.num_samples:
                # Frechet distance is biased in N: the floor is to be read against as many samples.
                fewer = score_features(_first(samples, count), reference, protocol, count, errors=False)
                metrics |= fewer.metrics
        clock.lap("scoring_seconds")
        grid = class_grid(samples["images"], samples["labels"], opened.config["class_names"])
        save_png(grid, folder / GRID_FILE)
        report = EvaluationReport(
            protocol=protocol,
            checkpoint=str(opened.path),
            checkpoint_digest=opened.digest,
            metrics=metrics,
            errors=generated.errors,
            floor=floors,
            curve=generated.curve,
            warnings=generated.warnings,
            timings=clock.laps,
            artifacts={"samples": GRID_FILE, "page": PAGE_FILE},
        )
        page = render_page(report, {"samples": (folder / GRID_FILE).read_bytes()})
        storage.write_atomically(str(folder / PAGE_FILE), page.encode())
        report.save(folder)
        track(run, opened, report, folder)
        context.say("evaluate", f"{protocol.num_samples:,} samples scored, report in {folder} ({clock.total:.0f} s)")
    return report


def check_reference(config: Recipe, protocol: EvaluationProtocol) -> None:
    """Refuse a given reference of another extractor, size or crop before anything is computed."""
    if config.evaluate.reference:
        ReferenceStatistics.load(config.evaluate.reference).check_compatible(
            protocol.extractor, protocol.extractor_sha256, config.images.size, config.images.crop
        )


def sample_shards(config: Recipe, opened, protocol: EvaluationProtocol, folder: Path) -> list[Shard]:
    return make_shards(
        shard_folder(config, opened, folder), shard_ranges(protocol.num_samples, config.evaluate.shard_rows)
    )


def load_samples(shards: list[Shard], protocol: EvaluationProtocol) -> dict[str, np.ndarray]:
    """Samples, labels, features and logits of all indices, in their order; every index exactly once."""
    records = list(read_records(shards))
    samples = {name: np.concatenate([record[name] for record in records]) for name in records[0]}
    if not np.array_equal(samples["indices"], np.arange(protocol.num_samples)):
        raise ValueError(f"{shards[0].file.parent} does not hold every sample once. Delete it and run again")
    return samples


def shard_folder(config: Recipe, opened, folder: Path) -> Path:
    """Where finished shards of samples lie; those of another checkpoint under the same step must not be taken."""
    return folder / f"shards-{opened.digest[:12]}-{config.evaluate.shard_rows}"


def score_features(
    features: dict, reference: ReferenceStatistics, protocol: EvaluationProtocol, num_samples: int, errors: bool = True
) -> Score:
    return score(
        features["features"],
        features.get("logits"),
        reference,
        extractor=protocol.extractor,
        num_samples=num_samples,
        spatial=features.get("spatial"),
        errors=errors,
    )


def _first(features: dict, count: int) -> dict[str, np.ndarray]:
    return {name: value[:count] for name, value in features.items()}


def evaluation_protocol(config: Recipe, opened) -> EvaluationProtocol:
    """The protocol that a recipe's [evaluate] means for a checkpoint."""
    chosen = config.evaluate
    weights = extractor_sha256(chosen.extractor, chosen.extractor_weights)
    return EvaluationProtocol(
        num_samples=chosen.num_samples,
        extractor=extractor_name(chosen.extractor, weights),
        extractor_sha256=weights,
        reference_digest=reference_digest(config),
        **sampling_settings(config, opened),
    )


def sampling_protocol(config: Recipe, opened) -> EvaluationProtocol:
    """The same samples, to be looked at or kept: nothing is scored, so neither images nor an extractor are needed."""
    settings = sampling_settings(config, opened)
    return EvaluationProtocol(extractor="none", extractor_sha256="none", reference_digest="none", **settings)


def sampling_settings(config: Recipe, opened) -> dict[str, Any]:
    """What samples depend on beside the checkpoint. Raises ValueError if the autoencoder is not the checkpoint's."""
    from dit.autoencoder import describe_autoencoder
    from pipelines.sampling import checkpoint_autoencoder

    decoder = describe_autoencoder(checkpoint_autoencoder(opened))["sha256"]
    chosen = config.evaluate
    return {
        "seed": config.seed,
        "labels": chosen.labels,
        "sampler": chosen.sampler,
        "sampling_steps": chosen.sampling_steps,
        "cfg_scale": chosen.cfg_scale,
        "cfg_channels": chosen.cfg_channels,
        "cfg_interval": chosen.cfg_interval,
        "weights": chosen.weights,
        "decoder": decoder,
    }


def checkpoint_recipe(opened, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a checkpoint records, with its output where the checkpoint lies now.

    An imported one records none: its recipe says what its config does, and its output is the folder it lies in.
    """
    from pipelines.interchange import imported_recipe
    from pipelines.recipe_file import apply_override, validate_recipe

    folder, recorded = opened.path.absolute().parent, opened.config["recipe"]
    if recorded is None:
        content = {**imported_recipe(opened.config), "output": str(folder)}
    else:
        content = {**recorded, "output": str(folder.parent)}
    for override in overrides:
        apply_override(content, override)
    return validate_recipe(content)


def report_folder(config: Recipe, report: EvaluationReport) -> Path:
    """Where a report lies: output/evaluations/<protocol_id>/<checkpoint's name>."""
    return Path(config.folder("evaluations")) / report.protocol_id / Path(report.checkpoint).name


def earlier_report(folder: Path, checkpoint_digest: str) -> EvaluationReport | None:
    """The report in `folder`, if it is of this checkpoint; another one is kept under another name."""
    if not (folder / REPORT_FILE).is_file():
        return None
    report = EvaluationReport.load(folder)
    if report.checkpoint_digest == checkpoint_digest:
        return report
    (folder / REPORT_FILE).rename(folder / f"report-{report.checkpoint_digest[:12]}.json")
    return None


def track(run, opened, report: EvaluationReport, folder: Path) -> None:
    """The numbers on the checkpoint's LoggedModel, and the report and the pictures with the run."""
    log_checkpoint(run, opened)
    dataset = ("reference", report.protocol.reference_digest)
    run.input(name="reference", digest=dataset[1], source="reference", context="evaluation")
    named = {f"eval/{name}": value for name, value in report.metrics.items()}
    run.metrics(named, opened.step, model=opened.digest, dataset=dataset)
    run.metrics({f"floor/{name}": value for name, value in report.floor.items()}, opened.step)
    run.artifact(folder / REPORT_FILE)
    run.image(folder / GRID_FILE, "samples", opened.step)
    run.artifact(folder / GRID_FILE)
    run.artifact(folder / PAGE_FILE)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now

    @property
    def total(self) -> float:
        return sum(self.laps.values())
