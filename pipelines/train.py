"""The train job: latents -> checkpoints, by Ray Train."""

import re
from dataclasses import asdict
from pathlib import Path

from pipelines.autoencoder import autoencoder_of
from pipelines.config import Recipe
from pipelines.config_model import ModelConfig
from pipelines.identity import Artifact, settings_identity
from pipelines.latents import LatentDataset
from pipelines.recipe_file import resolved
from pipelines.stage import StageContext, job
from pipelines.workers import Report, Worker, run_workers


@job
def train(config: Recipe, *, context: StageContext):
    """Train the recipe's model on its latents, or go on where an earlier run stopped.

    Returns the last `dit.checkpoint.Checkpoint`. Raises FileNotFoundError or ValueError before any work if the
    latents are not there or do not fit.
    """
    from dit.checkpoint import newest_checkpoint

    folder = config.folder("checkpoints")
    latents = LatentDataset.open(config.folder("latents"))
    check_latents(config, latents)
    identity = train_identity(config, latents)
    newest = newest_checkpoint(folder)
    too_far = newest is not None and newest.step > config.train.steps
    Artifact("train", folder, identity).claim(
        [f"train.steps: {newest.step} -> {config.train.steps}"] if newest and too_far else []
    )
    newest = newest_checkpoint(folder)
    if newest is not None and newest.step == config.train.steps:
        context.skipped("train", f"{newest.step:,} steps, checkpoint {newest.path}")
        return newest

    with context.run("train", identity, {"raydit.latents_fingerprint": latents.fingerprint}) as run:
        run.params(resolved(config))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        first = newest.step if newest else 0
        if first:
            context.say("train", f"goes on from step {first:,}")
        progress = context.progress("train", total=config.train.steps, unit="steps", start=first)

        def on_report(report: Report) -> None:
            progress.to(report.step, loss=report.metrics["loss"], lr=report.metrics["lr"])
            run.metrics({f"train/{name}": value for name, value in report.metrics.items()}, report.step)

        run_workers(context, "train", config.train, train_worker, worker_settings(config, latents), on_report)
        newest = newest_checkpoint(folder)
        assert newest is not None, "training ends with a checkpoint"
        log_checkpoints(run, config, folder)
        progress.done(f"{newest.step:,} steps, checkpoint {newest.path}")
    return newest


def train_worker(settings: dict) -> None:
    """What every worker does: open the latents, build the model, take up the newest checkpoint, train."""
    import torch

    from dit.autoencoder import LatentScale
    from dit.checkpoint import newest_checkpoint, restore, save_checkpoint, step_name
    from dit.config import config_from_dict
    from dit.model import build_model
    from dit.objective import create_process
    from dit.train import create_state, train
    from pipelines.batches import Share, latent_batches

    config: Recipe = settings["config"]
    model_config = config_from_dict(settings["model"])
    worker = Worker(settings, config.train)
    torch.manual_seed(config.seed)
    network = build_model(model_config).to(worker.device)
    process = create_process(**settings["objective"])
    state = create_state(network, config.train, worker.wrap)
    if newest := newest_checkpoint(settings["folder"]):
        restore(state, newest)
    autoencoder = settings["checkpoint"]["autoencoder"]
    batches = latent_batches(
        LatentDataset.open(settings["latents"]).arrays,
        process,
        scale=LatentScale(autoencoder["latents_mean"], autoencoder["latents_std"]),
        null_class=model_config.null_class,
        dropout=model_config.class_dropout_prob,
        seed=config.seed,
        share=Share(worker.rank, worker.num_workers, config.train.global_batch_size),
        first_step=state.step,
        device=worker.device,
    )

    def losses(model, batch):
        terms = process.training_losses(model, batch.latents, batch.t, batch.labels, batch.noise)
        return {name: values.mean() for name, values in terms.items()}

    def save(state) -> None:
        if worker.rank == 0:
            cursor = {"seed": config.seed, "images_seen": state.step * config.train.global_batch_size}
            save_checkpoint(state, Path(settings["folder"]) / step_name(state.step), settings["checkpoint"], cursor)

    train(state, batches, losses, config.train, report=worker.report, save=save)


def worker_settings(config: Recipe, latents: LatentDataset) -> dict:
    from dit.checkpoint import describe_checkpoint

    model = model_config(config.model, config, latents)
    objective = {"kind": config.objective.kind, **config.objective.settings()}
    return {
        "config": config,
        "model": asdict(model),
        "objective": objective,
        "latents": str(latents.path),
        "folder": str(config.folder("checkpoints")),
        "checkpoint": describe_checkpoint(
            model=model,
            objective=objective,
            autoencoder=latents.manifest["autoencoder"],
            preprocessing=latents.manifest["preprocessing"],
            class_names=latents.class_names,
            seed=config.seed,
            latents_fingerprint=latents.fingerprint,
            recipe=resolved(config),
        ),
    }


def model_config(model: ModelConfig, config: Recipe, latents: LatentDataset):
    """The model's configuration, with what follows from the latents. Raises ValueError if they do not fit."""
    channels, height, width = latents.latent_shape
    return model.resolve(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=len(latents.class_names),
        learn_sigma=config.objective.learn_sigma,
    )


def check_latents(config: Recipe, latents: LatentDataset) -> None:
    """Refuse latents that the recipe's autoencoder did not make, and a data set without images."""
    expected = autoencoder_of(config).describe()["sha256"]
    found = latents.manifest["autoencoder"]
    if found["sha256"] != expected:
        raise ValueError(
            f"latents at {latents.path} were made by the autoencoder {found['id']!r} ({found['sha256'][:12]}), but the "
            f"recipe's is {autoencoder_of(config).id!r} ({expected[:12]}). Run `raydit encode` again, or set "
            "autoencoder.id to the one that made them"
        )
    if len(latents) == 0:
        raise ValueError(
            f"latents at {latents.path}: found 0 usable images, expected some; see quarantine.parquet there"
        )


def train_identity(config: Recipe, latents: LatentDataset) -> dict:
    """What the weights depend on. Not the number of workers, and not `steps`: more steps go on from the last."""
    irrelevant = (
        "steps",
        "checkpoint_every",
        "log_every",
        "num_workers",
        "cpus_per_worker",
        "gpus_per_worker",
    )
    return {
        "seed": config.seed,
        "latents": {"fingerprint": latents.fingerprint},
        "model": asdict(config.model),
        "objective": asdict(config.objective),
        "train": settings_identity(config.train, irrelevant),
    }


def log_checkpoints(run, config: Recipe, folder: Path) -> None:
    """Every checkpoint becomes a LoggedModel."""
    from dit.checkpoint import finished_steps, load_checkpoint, step_name

    for step in finished_steps(folder):
        log_checkpoint(run, load_checkpoint(folder / step_name(step)))


def log_checkpoint(run, checkpoint) -> None:
    """Tell tracking of a checkpoint; the same one twice is one LoggedModel."""
    recipe = checkpoint.config["recipe"]
    run.model(
        checkpoint.digest,
        # Of an imported one the folder's name, without what MLflow does not take.
        name=f"{recipe['name']}-{checkpoint.path.name}" if recipe else re.sub(r"[^\w-]", "-", checkpoint.path.name),
        step=checkpoint.step,
        params={"model": checkpoint.config["model"], "objective": checkpoint.config["objective"]},
        tags={
            "raydit.checkpoint": str(checkpoint.path),
            "raydit.checkpoint_digest": checkpoint.digest,
            "raydit.latents_fingerprint": checkpoint.config["latents_fingerprint"] or "unknown",
        },
    )
