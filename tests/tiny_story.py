"""What a pipeline run of the tiny recipe leaves in MLflow and on storage, written without computing anything."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlflow_server import wait_until
from tiny_checkpoint import tiny_output, write_checkpoint
from tiny_latents import make_record

from dit.autoencoder import describe_autoencoder
from dit.checkpoint import Checkpoint
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.images.open import open_source
from pipelines.latents import schema
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.latents.dataset import LatentDataset, write_manifest
from pipelines.latents.schema import LatentDescription
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.reports.log_report import log_report
from pipelines.scoring.reports.report_files import save_report
from pipelines.scoring.score_checkpoint import CheckpointEvaluation, run_tags
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext
from pipelines.tracking.logged_models import log_checkpoint

SCORES = {2: 30.0, 4: 20.0, 6: 20.4}
ERROR = 0.5


@dataclass
class Story:
    config: Recipe
    latents: LatentDataset
    checkpoints: dict[int, Checkpoint]
    reports: dict[int, EvaluationReport]

    @property
    def uri(self) -> str:
        return self.config.tracking.uri


def tell_story(folder: Path) -> Story:
    """Write encode, train and evaluate runs below one pipeline run, with checkpoints of steps 2, 4 and 6."""
    config = tiny_output(folder)
    latents = write_latents(config)
    checkpoints = {step: write_checkpoint(config, step, latents_fingerprint=latents.fingerprint) for step in SCORES}
    reports = {}
    with StageContext(config) as context:
        with context.pipeline({}):
            with context.run("encode", {}) as run:
                run.input(name="images", digest="images", source=config.images.path, context="encoding")
                run.tag("raydit.latents_fingerprint", latents.fingerprint)
                run.tag("raydit.latents", latents.path)
            with context.run("train", {}, {"raydit.latents_fingerprint": latents.fingerprint}) as run:
                run.params(resolved(config))
                run.input(name="latents", digest=latents.fingerprint, source=latents.path, context="training")
                run.metrics({"train/loss": 0.5, "train/images_per_second": 8.0}, 6)
                for checkpoint in checkpoints.values():
                    log_checkpoint(run, checkpoint)
            for step, checkpoint in checkpoints.items():
                reports[step] = tell_evaluation(context, config, checkpoint, SCORES[step])
        wait_until(lambda: not context.tracker._journal.undelivered)
    return Story(config, latents, checkpoints, reports)


def write_latents(config: Recipe) -> LatentDataset:
    """Write latents of noise instead of moments, described as encoded by the recipe's autoencoder."""
    described = describe_autoencoder(Path(config.folder(TRAINED_AUTOENCODER)))
    listing, _ = open_source(config.images).listing().split(config.images.held_out)
    description = LatentDescription(
        moments_shape=(8, 8, 8),
        flip=False,
        autoencoder={"id": TRAINED_AUTOENCODER, **described},
        preprocessing={"size": config.images.size, "crop": config.images.crop},
        class_names=listing.class_names,
    )
    moments = np.random.default_rng(0).normal(size=(len(listing), 8, 8, 8)).astype("<f2")
    table = schema.shard_table(schema.latent_schema(description), listing.keys, listing.labels, moments, None)
    data = schema.parquet_bytes(table)
    folder = Path(config.folder("latents"))
    folder.mkdir(parents=True)
    (folder / "part-00000.parquet").write_bytes(data)
    identity = {"images": {"path": config.images.path, "digest": listing.digest}}
    return write_manifest(str(folder), description, identity, [make_record(0, moments, data)], recipe=resolved(config))


def tell_evaluation(
    context: StageContext, config: Recipe, checkpoint: Checkpoint, value: float, disqualified: str = ""
) -> EvaluationReport:
    """Write a report with the given Frechet distance to storage and to MLflow."""
    opened = open_checkpoint(checkpoint.path)
    settings = ScoringSettings.from_recipe(config)
    protocol = evaluation_protocol(settings, opened)
    name = f"fd_efficientnet_lite0_{protocol.num_samples}"
    report = EvaluationReport(
        protocol=protocol,
        checkpoint=opened.origin,
        checkpoint_digest=opened.digest,
        metrics={name: value} | {name.replace("fd", kind): 1 / value for kind in ("precision", "recall")},
        errors={name: ERROR},
        disqualified=disqualified,
    )
    folder = CheckpointEvaluation(opened, protocol, settings).folder
    save_report(report, folder)
    identity = {"checkpoint": opened.digest, "protocol": protocol.protocol_id}
    with context.run("evaluate", identity, run_tags(opened, protocol)) as run:
        log_checkpoint(run, opened, opened.origin)
        log_report(run, report, folder, opened.step, opened.digest)
    return report
