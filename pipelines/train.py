"""The train job: latents -> checkpoints, by Ray Train."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.images.listing import summarize_images
from pipelines.latents.dataset import LatentDataset
from pipelines.scoring.samples.guide import own_guide_step
from pipelines.scoring.settings import EVALUATIONS
from pipelines.stage import JobContext, job
from pipelines.tracking import tags
from pipelines.tracking.run_log import FIGURES, RunLog
from pipelines.training.group.run_workers import RAY_FOLDER, run_workers
from pipelines.training.loop import train_worker
from pipelines.training.monitoring.figures import TrainFigures
from pipelines.training.monitoring.log_settings import log_latents, log_start, log_train_settings
from pipelines.training.monitoring.monitor import TrainingMonitor, is_completed, last_logged_step, logged_run
from pipelines.training.monitoring.previews import Previews
from pipelines.training.monitoring.retention import ProtectedCheckpoints, Retention, explain_retention
from pipelines.training.starting.adapter import require_base
from pipelines.training.starting.damage import set_aside_damaged
from pipelines.training.starting.extension import has_same_rates
from pipelines.training.starting.identity import training_artifact
from pipelines.training.starting.new_data import accepted_start
from pipelines.training.starting.plan import TrainingPlan, plan_training
from pipelines.training.starting.prepare_checkpoints import (
    describe_schedule_change,
    last_regular_step,
    prepare_checkpoints,
)
from pipelines.training.starting.training_start import (
    describe_start,
    explain_scale,
    with_recorded_start,
    write_first_checkpoint,
)
from raydit.errors import RayditError


@job
def train(
    config: Recipe, *, verify: bool = False, accept_new_data: bool = False, context: JobContext
) -> LocatedCheckpoint:
    """Train the recipe's model on its latents, or resume where an earlier run stopped, and return the last checkpoint.

    verify: compare all latents with their digests first, instead of a few shards; where training encodes images,
    compare all of them. accept_new_data: if the latents differ from those the checkpoints were trained on, start from
    the newest checkpoint instead of from the recipe's start. Raises NotFound or InvalidInput before any work if the
    latents do not exist, do not fit or are damaged.
    """
    say = partial(context.say, "train")
    plan = plan_training(config, say, accept_new_data=accept_new_data)
    config, settings, checkpoints = plan.config, plan.config.train, plan.checkpoints
    is_trained = settle_checkpoints(plan, context)
    plan = replace(plan, worker_settings=with_recorded_start(plan.worker_settings, checkpoints))
    first, begun = checkpoints.last_step(), checkpoints.has_any()
    change = describe_schedule_change(config, checkpoints, first)
    if first == settings.steps == last_logged_step(checkpoints) and is_completed(checkpoints):
        newest = checkpoints.open(first)
        context.skipped("train", f"{first:,} steps, checkpoint {newest.origin}")
        return newest

    if begun and settings.lora is not None:
        require_base(checkpoints.open(first))
    plan = plan.check_data(verify=verify)
    say(summarize_images(len(plan.latents), len(plan.latents.class_names)))
    if not is_trained:
        context.prepare_work(settings, "train")
        for line in explain_retention(settings, config.evaluate):
            say(line)
    run_tags = {tags.LATENTS_FINGERPRINT: plan.latents.fingerprint}
    resumes = logged_run(checkpoints) if begun else ""
    with context.run("train", plan.artifact.identity, run_tags, resumes=resumes) as run:
        log_train_settings(run, config, plan.latents, plan.recorded_start)
        log_latents(run, plan.latents, plan.held_out)
        if plan.start is not None:
            if not begun:
                plan = write_start(plan, context)
            if scaling := explain_scale(plan.worker_settings.scale, plan.latents):
                say(scaling)
            record = plan.worker_settings.record
            log_start(run, record["start"], record.get("base"))
        for line in describe_beginning(plan, first, change, is_trained=is_trained):
            say(line)
        monitor = start_monitor(config, context, run, checkpoints, first)
        if is_trained:
            draw_missed_samples(monitor, config, context)
        else:
            run_workers(
                context,
                "train",
                settings,
                train_worker,
                plan.worker_settings,
                monitor.on_message,
                ray_folder=config.folder(RAY_FOLDER),
            )
        newest = checkpoints.open(checkpoints.last_step())
        monitor.finish(newest.origin)
    return newest


def find_trained(config: Recipe, latents: LatentDataset) -> LocatedCheckpoint | None:
    """Return the last checkpoint of the recipe's finished training, which may have been superseded; None if unfinished.

    latents: those of the recipe, wherever they lie.
    """
    steps = config.train.steps
    found = training_artifact(config, latents).find(lambda folder: last_regular_step(folder) == steps)
    return None if found is None else CheckpointFolder(found).open(steps)


def settle_checkpoints(plan: TrainingPlan, context: JobContext) -> bool:
    """Reserve the folder of checkpoints for a training, and return whether all its steps are done.

    Checkpoints of another training, beyond the last step, or damaged are moved away.
    """
    settings, checkpoints = plan.config.train, plan.checkpoints

    def before_move() -> None:
        plan.require_usable_start()
        context.prepare_work(settings, "train")

    def same_rates(step: int) -> bool:
        recorded = (checkpoints.describe(step).record.recipe or {}).get("train")
        return recorded is not None and has_same_rates(settings, recorded, step)

    prepare_checkpoints(plan.artifact, settings.steps, before_move, same_rates)
    is_trained = last_regular_step(checkpoints.uri) == settings.steps
    if not is_trained:
        set_aside_damaged(checkpoints, partial(context.say, "train"))
    return is_trained


def write_start(plan: TrainingPlan, context: JobContext) -> TrainingPlan:
    """Write the checkpoint of step 0, which holds the weights of the start; return the plan that records them."""
    assert plan.start is not None, "a training from random weights has no checkpoint of step 0"
    # New data were accepted: the checkpoints that it starts from were moved to superseded/ just now.
    start = accepted_start(plan.artifact.identity, plan.checkpoints) or plan.start
    worker_settings, started = write_first_checkpoint(start, plan.worker_settings)
    for line in describe_start(start, started, lora=plan.config.train.lora is not None):
        context.say("train", line)
    return replace(plan, worker_settings=worker_settings)


def describe_beginning(plan: TrainingPlan, first: int, change: str, *, is_trained: bool) -> Iterator[str]:
    """Yield lines for the user: what is trained, and from which step on.

    first: the step of the newest checkpoint. change: how the learning rate changes there, in words. is_trained: whether
    all steps are done.
    """
    if plan.start is not None and plan.start.moved:
        yield f"{plan.start.moved}, and continues from it"
    if plan.trained_parameters:
        yield plan.trained_parameters
    if first == plan.config.train.steps and not is_trained:
        yield f"training was stopped after step {first:,}, which is now its last step"
    elif first:
        yield f"resumes from step {first:,}"
    if change:
        yield change


def start_monitor(
    config: Recipe, context: JobContext, run: RunLog, checkpoints: CheckpointFolder, first_step: int
) -> TrainingMonitor:
    """Assemble what follows the training in this process. first_step: where the training resumes."""

    def say(text: str) -> None:
        context.say("train", text)

    protected = ProtectedCheckpoints(config.tracking.uri, say)
    guide_step = own_guide_step(config.evaluate, config.folder("checkpoints"))
    return TrainingMonitor(
        config.train,
        checkpoints,
        run,
        say=say,
        progress=context.progress("train", total=config.train.steps, unit="steps", start=first_step),
        figures=TrainFigures(run, config.folder(FIGURES), config.train.global_batch_size),
        previews=Previews(config, run, say),
        retention=Retention(config.train, checkpoints, config.folder(EVALUATIONS), protected, guide_step=guide_step),
    )


def draw_missed_samples(monitor: TrainingMonitor, config: Recipe, context: JobContext) -> None:
    """Start the grids of samples that an interrupted driver has not drawn, or say why they cannot be drawn."""
    if not monitor.missed_samples:
        return
    try:
        context.start_ray(config.evaluate, "evaluate")
        monitor.draw_missed_samples()
    except RayditError as error:
        steps = ", ".join(f"{step:,}" for step in sorted(monitor.missed_samples))
        context.say("train", f"no samples of step {steps}: {error}")
