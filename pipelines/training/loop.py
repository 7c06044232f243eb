"""What every worker of the train job does."""

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dit.autoencoder import LatentScale
from dit.checkpoint import Checkpoint, restore, save_checkpoint
from dit.config import config_from_dict
from dit.devices import peak_flops
from dit.macs import forward_macs
from dit.model import build_model
from dit.objective import create_process
from dit.train import create_state, train
from pipelines.checkpoints import stored as checkpoints
from pipelines.config.recipe import Recipe
from pipelines.latents.dataset import LatentDataset
from pipelines.training.batches import latent_batches, prefetched
from pipelines.training.loading import Backend, Latents, choose_backend, open_latents
from pipelines.training.messages import Report
from pipelines.training.metrics import memory_gib, quartile_sums
from pipelines.training.nonfinite import NonFiniteGuard, RollbackRequested
from pipelines.training.order import Share
from pipelines.training.worker import CheckpointWriter, Worker


def train_worker(settings: dict) -> None:
    """Train as this process of a Ray Train group."""
    train_as(Worker.of_group(settings["config"].train, settings["mailbox"]), settings)


def train_as(worker: Worker, settings: dict) -> None:
    """Open the latents, build the model, take up the newest checkpoint, train."""
    config: Recipe = settings["config"]
    if config.train.fewest_workers < config.train.most_workers:
        worker.notice(f"{worker.num_workers} of at most {config.train.most_workers} workers")
    newest = checkpoints.newest(settings["folder"])
    dataset = LatentDataset.open(settings["latents"])
    latents = open_for_training(dataset, config, worker, newest)
    process = create_process(**settings["objective"])
    state = create_training_state(settings, worker)
    if newest:
        restore(state, newest)
    reports: list[Report] = []
    writer = checkpoint_writer(settings, worker, latents, reports)
    report = reporter(settings, worker, reports)
    guard = NonFiniteGuard(config.train, worker, dataset)
    while True:
        batches = training_batches(settings, latents, process, worker, first_batch=state.batches)
        try:
            with closing(prefetched(batches)) as ahead:
                losses = latent_losses(config, process, worker)
                train(state, ahead, losses, config.train, report=report, save=writer.save, on_nonfinite=guard)
            break
        except RollbackRequested:
            writer.wait()
            worker.gather(None)  # all wait for the one that writes
            newest, batches_taken = checkpoints.newest(settings["folder"]), state.batches
            guard.on_rollback(newest.step if newest else None)
            assert newest is not None, "the guard has seen to it"
            restore(state, newest)
            state.batches = batches_taken  # the same batches would lead to the same place
    writer.wait()


def create_training_state(settings: dict, worker: Worker):
    """The model at its start, the same in every worker, with optimizer and averages."""
    config = settings["config"].train
    torch.manual_seed(settings["config"].seed)
    model_config = replace(config_from_dict(settings["model"]), gradient_checkpointing=config.gradient_checkpointing)
    network = build_model(model_config).to(worker.device)
    return create_state(
        network, config, lambda network: worker.wrap(network, strategy=config.strategy, compiled=config.compile)
    )


def open_for_training(dataset: LatentDataset, config: Recipe, worker: Worker, newest: Checkpoint | None) -> Latents:
    """The latents, from where the recipe says or where they fit, in the order that a checkpoint began with.

    Raises ValueError if the recipe asks for another order than the checkpoint's.
    """
    begun = newest.trainer_state.get("order", {"kind": "global"}) if newest else None
    place: Backend
    if config.train.loading != "auto":
        place = config.train.loading
    else:
        own = choose_backend(dataset)
        # All nodes must agree: the order of a stream is another one.
        streamed = "stream" in worker.gather(own) if begun is None else begun["kind"] == "windows"
        place = "stream" if streamed else "memmap" if own == "stream" else own
    latents = open_latents(dataset, place, seed=config.seed, shuffle_rows=config.train.shuffle_rows)
    if begun not in (None, order := latents.order.describe()):
        raise ValueError(
            f"train.loading: found {place!r}, whose order of images is {order}, but the newest checkpoint was trained "
            f"in the order {begun}; set train.loading, and train.shuffle_rows of a stream, as they were"
        )
    return latents


def training_batches(settings: dict, latents: Latents, process, worker: Worker, *, first_batch: int):
    """This worker's share of all batches from a number on."""
    config: Recipe = settings["config"]
    model, autoencoder = config_from_dict(settings["model"]), settings["checkpoint"]["autoencoder"]
    return latent_batches(
        latents,
        process,
        scale=LatentScale(autoencoder["latents_mean"], autoencoder["latents_std"]),
        null_class=model.null_class,
        dropout=model.class_dropout_prob,
        seed=config.seed,
        share=Share(worker.rank, worker.num_workers, config.train.global_batch_size),
        first_batch=first_batch,
        device=worker.device,
    )


def latent_losses(config: Recipe, process, worker: Worker):
    """The objective as the training loop wants it: a part's contribution to the mean over this worker's share."""
    # Not the share's own size: where the batch does not divide, all images must weigh the same.
    share = config.train.global_batch_size / worker.num_workers
    autocast = config.train.dtype == "bfloat16"
    end = process.num_timesteps if process.kind == "diffusion" else 1.0

    def losses(model, batch):
        def forward(x, t, y):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                output = model(x, t, y)
            return output.float()

        terms = process.training_losses(forward, batch.latents, batch.t, batch.labels, batch.noise)
        quartiles = quartile_sums(terms["loss"], batch.t, end)
        return {name: values.sum() / share for name, values in (terms | quartiles).items()}

    return losses


def reporter(settings: dict, worker: Worker, reports: list[Report]):
    """Sends the loop's metrics on, with how well the device was used and how much memory it took; keeps a copy."""
    config = settings["config"].train
    flops = 6 * forward_macs(config_from_dict(settings["model"]))
    peak = worker.num_workers * peak_flops(worker.device, getattr(torch, config.dtype))

    def report(step: int, metrics: dict[str, float]) -> None:
        mfu = metrics["images_per_second"] * flops / peak
        sent = worker.report(step, metrics | {"mfu": mfu, "memory_gib": memory_gib(worker.device)})
        if worker.rank == 0:  # the others write no checkpoint, and would keep them for ever
            reports.append(sent)

    return report


def checkpoint_writer(settings: dict, worker: Worker, latents: Latents, reports: list[Report]) -> CheckpointWriter:
    """Writes checkpoints with the reports since the one before: a driver that is killed may not have heard them."""
    config: Recipe = settings["config"]

    def write(snapshot) -> None:
        told = [report for report in reports if report.step <= snapshot.step]
        del reports[: len(told)]
        cursor = {
            "reports": [asdict(report) for report in told],
            "seed": config.seed,
            "images_seen": snapshot.batches * config.train.global_batch_size,
            "order": latents.order.describe(),
        }

        def save(folder: Path) -> None:
            save_checkpoint(snapshot, folder, settings["checkpoint"], cursor)

        checkpoints.write(settings["folder"], snapshot.step, save)

    return CheckpointWriter(worker, write)
