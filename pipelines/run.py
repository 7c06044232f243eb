"""The pipeline: autoencoder, encode, train and evaluate in this order, each skipped if its artifact is up to date."""

from collections.abc import Iterator
from typing import Any

from dit.config import DiTConfig, UViTConfig
from evaluation.report import EvaluationReport
from pipelines.autoencoder import find_autoencoder, train_autoencoder
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.encode import encode, find_latents
from pipelines.evaluate import evaluate, find_report
from pipelines.images.held_out import split_images
from pipelines.images.listing import Listing
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.latents.held_out import held_out_set, require_held_out, require_training, training_set
from pipelines.latents.recorded_images import KEPT_READING, list_images, require_classes
from pipelines.planning.networks import check_networks, resolve_networks
from pipelines.scoring.checks import check_num_samples, check_real_images, check_sampling_steps, check_scoring_settings
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.samples.guide import require_guide
from pipelines.scoring.samples.precision import check_precision
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext, job
from pipelines.train import find_trained, train
from pipelines.training.monitoring.retention import check_keep_best
from pipelines.training.starting.check_start import check_start
from raydit.errors import InvalidInput, NotFound


@job
def run_pipeline(config: Recipe, *, verify: bool = False, context: StageContext) -> EvaluationReport:
    """Run all stages of a recipe and return the report of the newest checkpoint.

    After an interruption, running it again resumes. verify: as in `train`. Raises what a later stage would refuse
    before the first one works.
    """
    given = config.images.reading
    config, images = list_images(config)
    if config.images.reading != given:
        context.say("encode", KEPT_READING)
    check_stages(config, images, context)
    with context.pipeline(resolved(config)):
        train_autoencoder(config, context=context)
        encode(config, context=context)
        checkpoint = train(config, verify=verify, context=context)
        return evaluate(checkpoint, config=config, context=context)


@listed_once()
def check_stages(config: Recipe, images: Listing, context: StageContext) -> None:
    """Check what every stage that has work to do needs, before any of them works or moves an earlier artifact away.

    Raises InvalidInput or NotFound if the images, the autoencoder, the model, the evaluation's settings or the workers'
    resources do not fit. Starts Ray if there is work. images: all images of the recipe.
    """
    check_networks(config)
    listing, held_out = split_images(config.images, images)
    require_training(config, listing)
    require_held_out(config, held_out)
    finished = set(_finished_stages(config, listing, held_out))
    workers: dict[str, Any] = {
        "autoencoder": config.autoencoder.train,
        "encode": config.encode,
        "train": config.train,
        "evaluate": config.evaluate,
    }
    pending = [stage for stage, settings in workers.items() if settings and stage not in finished]
    _check_classes(config, listing, pending)
    if "train" in pending and config.train.keep_best:
        check_keep_best(config.train.keep_best)
    if "train" in pending:
        check_start(
            config,
            _find_model(config, listing),
            listing.class_names,
            own_autoencoder="autoencoder" in pending,
            verify="encode" in pending,
        )
    if "evaluate" in pending:
        _check_guidance(config, listing)
        check_num_samples(config.evaluate)
        check_sampling_steps(config.evaluate, config.objective.kind)
        settings = ScoringSettings.from_recipe(config)
        check_scoring_settings(settings)
        check_precision(config.evaluate, config.evaluate)
        require_guide(config.evaluate, config.train, config.folder("checkpoints"), config.tracking.uri)
        for line in check_real_images(settings, len(listing), settings.evaluate.num_samples):
            context.say("evaluate", line)
    for stage in pending:
        context.prepare_work(workers[stage], stage)


def _finished_stages(config: Recipe, listing: Listing, held_out: Listing) -> Iterator[str]:
    """Yield the stages from the first on whose artifacts are finished. listing: the training images."""
    autoencoder = find_autoencoder(config, listing)
    check_networks(config)  # again, because a pretrained autoencoder is on this machine now
    if autoencoder is None:
        return
    yield "autoencoder"
    latents = find_latents(config, training_set(config, listing), autoencoder)
    if latents is None:
        return
    if config.encodes_held_out and find_latents(config, held_out_set(config, held_out), autoencoder) is None:
        return
    yield "encode"
    checkpoint = find_trained(config, latents)
    if checkpoint is None:
        return
    yield "train"
    if find_report(checkpoint, config) is not None:
        yield "evaluate"


def _check_classes(config: Recipe, listing: Listing, pending: list[str]) -> None:
    """Refuse images without classes where a stage that has work to do would, for a recipe that asks for classes."""
    folders = {
        "autoencoder": config.folder(TRAINED_AUTOENCODER),
        "encode": config.latents,
        "train": config.folder("checkpoints"),
    }
    for stage, folder in folders.items():
        if stage in pending:
            require_classes(config, listing.class_names, listing.columns, folder)


def _find_model(config: Recipe, listing: Listing) -> DiTConfig | UViTConfig | None:
    """Return the model of a recipe; None if its autoencoder is not on this machine yet."""
    try:
        return resolve_networks(config, len(listing.class_names)).model
    except NotFound:
        return None


def _check_guidance(config: Recipe, listing: Listing) -> None:
    if config.evaluate.needs_null_class and not listing.class_names:
        raise InvalidInput(
            f"evaluate.cfg_scale: found {config.evaluate.cfg_scale} with images without classes, which guidance needs",
            "",
            "set evaluate.cfg_scale = 1.0, or give the images labels",
        )
