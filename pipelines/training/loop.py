"""What every worker of the train job does, around the training loop of `dit.train`."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dit.checkpoint import Checkpoint, restore, save_checkpoint
from dit.float8 import require_float8, use_float8
from dit.hardware.measured_speeds import transformer_speedups
from dit.metrics_window import WindowTotals
from dit.model import build_model
from dit.objective import create_process
from dit.precision import backward_in, missing_tf32
from dit.snapshot import Snapshot
from dit.train import TrainState, create_state, train
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.latents.dataset import LatentDataset
from pipelines.training.cursor import DataCursor
from pipelines.training.data.batches import LatentBatch, Process, latent_batches, prefetch
from pipelines.training.data.encoded_images import EncodedImages, explain_padding
from pipelines.training.data.loading import Backend, LatentSource, choose_backend, explain_stream, open_latent_source
from pipelines.training.data.order import WorkerShare
from pipelines.training.faster_dtype import explain_faster_dtype
from pipelines.training.group.stop import StopExchange
from pipelines.training.group.worker import CheckpointWriter, Worker
from pipelines.training.losses import latent_losses
from pipelines.training.nonfinite import NonFiniteGuard, describe_latents, go_on_after_rollbacks
from pipelines.training.reporter import Reporter
from pipelines.training.settings import TrainWorkerSettings
from pipelines.training.starting.adapter import adapted_network
from pipelines.training.starting.training_start import prepare_parameters
from pipelines.training.validation import Validation
from raydit.errors import InvalidInput


def train_worker(worker: Worker, settings: TrainWorkerSettings) -> None:
    """Train as one worker: open the latents, build the model, restore the newest checkpoint, run the loop."""
    config, checkpoints = settings.train, settings.checkpoints
    if config.fewest_workers < config.most_workers:
        worker.notice(f"{worker.num_workers} of at most {config.most_workers} workers")
    if device_name := missing_tf32(config.dtype, worker.device):
        worker.notice(f"train.dtype = 'tf32': {device_name} has no TF32, so training continues in float32")
    if config.matmul == "float8":
        require_float8(worker.device)
        if not config.compile:
            worker.notice(
                "train.matmul = 'float8' without train.compile: rounding is not fused with other work, so that "
                "training can be slower than in bfloat16"
            )
    newest = checkpoints.newest()
    explain_faster_dtype(
        worker, config.dtype, transformer_speedups("train"), is_begun=newest is not None and newest.step > 0
    )
    dataset = settings.latents.open()
    source = open_for_training(dataset, settings, worker, newest)
    process = create_process(**settings.objective)
    state = create_training_state(settings, worker, newest)
    if newest:
        restore_for(worker, state, newest)
    reporter = Reporter(settings, worker, DataCursor.of(newest) if newest and newest.interrupted else None)
    writer = create_writer(settings, worker, source, reporter)
    guard = NonFiniteGuard(
        worker,
        section="train",
        on_nonfinite=config.on_nonfinite,
        max_skipped=config.max_skipped,
        describe_images=describe_latents(worker, dataset),
    )
    losses = latent_losses(settings, process, worker.num_workers)
    validate = Validation(settings, process, worker, reporter.validated) if config.validate_every else None

    def run() -> None:
        batches = training_batches(settings, source, process, worker, first_batch=state.batches)
        threads = config.cpus_per_worker if isinstance(source, EncodedImages) else 1
        with closing(prefetch(batches, threads=threads)) as prefetched, worker.in_loop():
            train(
                state,
                prefetched,
                losses,
                config,
                report=reporter.report,
                validate=validate,
                validate_every=config.validate_every or 1,
                save=writer.save,
                on_nonfinite=guard,
                backward=partial(backward_in, worker.device, config.dtype),
                stop=StopExchange(worker, writer),
            )
            writer.wait()  # inside, because a driver that was asked to stop waits only for workers in the loop

    go_on_after_rollbacks(run, guard, state, checkpoints, writer, worker)


def restore_for(worker: Worker, state: TrainState, newest: Checkpoint) -> None:
    """Restore the state of a checkpoint, and what this worker had measured if training was interrupted there."""
    restore(state, newest)
    state.open_window = DataCursor.of(newest).window_of(worker.rank, worker.num_workers)


def create_training_state(
    settings: TrainWorkerSettings, worker: Worker, newest: LocatedCheckpoint | None = None
) -> TrainState:
    """Build the model with the same initial weights in every worker, its optimizer and its averages.

    newest: the checkpoint that training resumes from, which says where the base of an adapter is.
    """
    config = settings.train
    torch.manual_seed(settings.seed)
    model = replace(settings.model, gradient_checkpointing=config.gradient_checkpointing)
    network, adapter = build_model(model), None
    if config.lora is not None:
        assert newest is not None, "the checkpoint of step 0 is written before there are workers"
        adapter = adapted_network(network, config.lora, settings.model, newest)
    network = network.to(worker.device)
    if config.matmul == "float8":
        use_float8(network)  # first, because compilation and sharding must meet the layers that will compute
    multipliers = prepare_parameters(network, config)
    return create_state(
        network,
        config,
        lambda network: worker.wrap(network, strategy=config.strategy, compiled=config.compile),
        lr_multipliers=multipliers,
        adapter=adapter,
    )


def open_for_training(
    dataset: LatentDataset, settings: TrainWorkerSettings, worker: Worker, newest: Checkpoint | None
) -> LatentSource:
    """Open the latents with the recipe's backend, or the one that fits, in the order of the newest checkpoint.

    Collective. Raises InvalidInput if the recipe asks for another order than the checkpoint's.
    """
    config = settings.train
    if settings.encoding is not None:
        share = WorkerShare(worker.rank, worker.num_workers, config.global_batch_size)
        if notice := explain_padding(settings.encoding, share):
            worker.notice(notice)
        threads = config.cpus_per_worker
        return EncodedImages(dataset, settings.encoding, share, worker.device, seed=settings.seed, threads=threads)
    # At step 0, from which a training starts that has a start, nothing has been read in any order.
    trained_order = DataCursor.of(newest).order if newest and newest.step else None
    backend: Backend
    if config.loading != "auto":
        backend = config.loading
    else:
        fitting = choose_backend(dataset)
        # All nodes must agree, because a stream has another order than the other backends.
        if trained_order is None:
            streamed = "stream" in worker.gather(fitting)
            if streamed:
                worker.notice(explain_stream(dataset, config.shuffle_rows))
        else:
            streamed = trained_order["kind"] == "windows"
        backend = "stream" if streamed else "memmap" if fitting == "stream" else fitting
    source = open_latent_source(dataset, backend, seed=settings.seed, shuffle_rows=config.shuffle_rows)
    if trained_order not in (None, order := source.order.describe()):
        raise InvalidInput(
            f"train.loading: found {backend!r}, which reads images in the order {order}",
            f"the order {trained_order} of the newest checkpoint",
            "set train.loading, and for a stream train.shuffle_rows, to what it was trained with",
        )
    return source


def training_batches(
    settings: TrainWorkerSettings, source: LatentSource, process: Process, worker: Worker, *, first_batch: int
) -> Iterator[LatentBatch]:
    """Return this worker's share of all batches from number `first_batch` on."""
    return latent_batches(
        source,
        process,
        scale=settings.scale,
        null_class=settings.model.null_class,
        dropout=settings.model.condition_dropout_prob,
        seed=settings.seed,
        share=WorkerShare(worker.rank, worker.num_workers, settings.train.global_batch_size),
        first_batch=first_batch,
        random=settings.random,
        device=worker.device,
    )


def create_writer(
    settings: TrainWorkerSettings, worker: Worker, source: LatentSource, reporter: Reporter
) -> CheckpointWriter:
    """Return a writer of checkpoints that hold the reports since the previous one, in case the driver is killed."""

    def write(snapshot: Snapshot, windows: list[WindowTotals]) -> None:
        reports, validations = reporter.kept_until(snapshot.step)
        cursor = DataCursor(
            reports=reports,
            seed=settings.seed,
            images_seen=snapshot.batches * settings.train.global_batch_size,
            order=source.order.describe(),
            windows=windows,
            validations=validations,
        )

        def save(folder: Path) -> None:
            save_checkpoint(snapshot, folder, settings.record, cursor.to_dict())

        settings.checkpoints.write(snapshot.step, save)
        reporter.forget_until(snapshot.step)

    return CheckpointWriter(worker, write)
