"""The checkpoint that a training starts from: found, and compared with the latents that it is trained on."""

from typing import Any

from cluster import storage
from dit.adaptation.draft_weights import TrainedModel
from dit.formats.completion import COMPLETE
from dit.formats.record import AutoencoderRecord, CheckpointRecord
from dit.imagenet import imported_names
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.start import StartConfig
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER, AutoencoderHandle
from raydit.errors import InvalidInput


def open_start(settings: StartConfig, autoencoder: AutoencoderHandle, tracking_uri: str = "") -> LocatedCheckpoint:
    """Open the checkpoint that a training starts from.

    autoencoder: the recipe's, which a file of weights does not record. tracking_uri: MLflow's, as in a recipe. Raises
    NotFound if the checkpoint or its weights are missing, InvalidInput if it cannot be used, and Unreachable if MLflow
    does not answer.
    """
    refuse_misdescribed(settings)
    opened = open_checkpoint(
        str(settings.checkpoint), **import_options(settings, autoencoder), tracking_uri=tracking_uri
    )
    opened.weights_files(settings.chosen_weights)  # raises, and names the weights that the checkpoint has
    return opened


def refuse_misdescribed(settings: StartConfig) -> None:
    """Raise InvalidInput if a recipe says too little of a file of weights, or what only describes a file."""
    name = str(settings.checkpoint)
    if settings.model is None and storage.is_file(name):
        raise InvalidInput(
            f"train.start.checkpoint: found {name}, a file, which does not record its model",
            "a checkpoint folder, or the published size of the weights",
            'set train.start.model, such as "DiT-XL/2"; for a size that has no name, use `raydit import` first',
        )
    if settings.model is not None and storage.exists(storage.join(name, COMPLETE)):
        raise InvalidInput(
            f"train.start.model: found {settings.model!r} with {name}, which records its model",
            "a file of weights, which does not",
            "remove train.start.model",
        )
    if settings.objective is not None and settings.model is None:
        raise InvalidInput(
            f"train.start.objective: found {settings.objective!r} without train.start.model",
            "a file of weights, which does not record its objective",
            "remove train.start.objective",
        )


def import_options(settings: StartConfig, autoencoder: AutoencoderHandle) -> dict[str, Any]:
    """Return what `open_checkpoint` needs to know about a file of weights; nothing for other checkpoints."""
    return {} if settings.model is None else {"model": settings.model, "overrides": _overrides(settings, autoencoder)}


def _overrides(settings: StartConfig, autoencoder: AutoencoderHandle) -> tuple[str, ...]:
    """Return what a file of weights does not record, as overrides of a recipe."""
    id = str(autoencoder.folder()) if autoencoder.id == TRAINED_AUTOENCODER else autoencoder.id
    return (f"objective.kind={settings.objective or 'diffusion'}", f'autoencoder.id="{id}"')


def is_weights_file(opened: LocatedCheckpoint) -> bool:
    """Return whether a checkpoint was opened from a file of weights, which does not record its autoencoder."""
    source = opened.record.source
    return (
        source is not None and source.format == "official" and not storage.exists(storage.join(opened.origin, COMPLETE))
    )


def trained_model(record: CheckpointRecord) -> TrainedModel:
    """Return the model of a checkpoint, with the names of its classes.

    Weights of other projects that older imports named by their numbers get the names of `dit.imagenet`.
    """
    config = record.model_config
    numbers = tuple(str(label) for label in range(config.num_classes))
    is_unnamed = record.source is not None and record.class_names in ((), numbers)
    names = imported_names(config.num_classes) if is_unnamed else record.class_names or numbers
    return TrainedModel(config=config, objective=record.objective, class_names=tuple(names))


def require_same_latents(opened: LocatedCheckpoint, settings: StartConfig, latents: dict[str, Any], where: str) -> bool:
    """Return whether a start was trained on latents of the autoencoder of some latents, whose scale is then its own.

    latents: record of the latents' autoencoder. where: path or URI of the latents, for messages. A file of weights
    records no autoencoder, and is taken to fit. Raises InvalidInput for another autoencoder, unless both ends of the
    model are reset.
    """
    if is_weights_file(opened):
        return False
    base, found = opened.record.autoencoder, AutoencoderRecord.from_dict(latents)
    if base.encodes_like(found):
        return True
    if {"embedding", "final"} <= {*settings.reset}:
        return False
    raise InvalidInput(
        f"train.start: found {opened.origin}, trained on latents of the autoencoder {base.id!r} "
        f"({(base.sha256 or 'unknown digest')[:14]})",
        f"that of the latents at {where}, {found.id!r} ({(found.sha256 or 'unknown digest')[:14]})",
        "encode with the autoencoder of the start (autoencoder.id), or set train.start.reset = "
        '["embedding", "final"], which learns both ends of the model anew',
    )
