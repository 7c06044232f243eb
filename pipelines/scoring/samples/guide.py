"""The checkpoint that guides another one's samples: autoguidance (https://arxiv.org/abs/2406.02507)."""

import re
from typing import Any

from cluster import storage
from dit.formats.completion import step_name
from dit.formats.record import AutoencoderRecord, CheckpointRecord
from evaluation.protocol import EvaluationProtocol
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint, SharedCheckpoint, open_checkpoint, recorded_store
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from raydit.errors import InvalidInput


def open_guide(evaluate: EvaluateConfig, opened: LocatedCheckpoint) -> LocatedCheckpoint | None:
    """Open the checkpoint that guides a checkpoint's samples; None if `evaluate` names none.

    One that is named by an MLflow run or model is looked up in the store of the checkpoint's recipe.
    Raises NotFound if it, or its weights, are missing, and InvalidInput if it is not a model of the same latents,
    process and classes.
    """
    if evaluate.autoguidance is None:
        return None
    overrides: tuple[str, ...] = ()
    if evaluate.autoguidance_model is not None:  # a file of weights, which records nothing
        autoencoder = opened.record.autoencoder.id
        if autoencoder == TRAINED_AUTOENCODER:
            autoencoder = str(checkpoint_autoencoder(opened))
        overrides = (f"objective.kind={opened.record.process_kind}", f'autoencoder.id="{autoencoder}"')
    guide = open_checkpoint(
        evaluate.autoguidance,
        model=evaluate.autoguidance_model,
        overrides=overrides,
        tracking_uri=recorded_store(opened),
    )
    _check_fit(guide.record, opened.record, f"evaluate.autoguidance: found {guide.origin}", opened.origin)
    guide.weights_files(evaluate.autoguidance_weights or evaluate.weights)
    return guide


def guide_location(
    protocol: EvaluationProtocol, evaluate: EvaluateConfig, opened: LocatedCheckpoint
) -> SharedCheckpoint | None:
    """Return what every worker opens the guide for samples by a protocol by; None for no guide.

    Raises the same errors as open_guide, and InvalidInput if the guide is not the one that the protocol records.
    """
    if protocol.autoguidance is None:
        return None
    guide = open_guide(evaluate, opened)
    if guide is None or guide.digest != protocol.autoguidance:
        raise InvalidInput(
            f"evaluate.autoguidance: found {guide.digest[:12] if guide else 'nothing'}",
            f"{protocol.autoguidance[:12]}, the digest of the checkpoint that guides in the protocol",
            "name that checkpoint",
        )
    return guide.shared


def require_guide(evaluate: EvaluateConfig, train: TrainConfig, checkpoints: str, store: str = "") -> None:
    """Raise NotFound or InvalidInput before a training if the guide of its samples cannot be opened.

    checkpoints: folder of the training, which may yet write the guide itself; InvalidInput if it never will. store:
    MLflow's URI, as in a recipe.
    """
    name = evaluate.autoguidance
    if name is None:
        return
    step = own_guide_step(evaluate, checkpoints)
    if step is None:
        open_checkpoint(name, model=evaluate.autoguidance_model, tracking_uri=store)
    elif not train.writes_checkpoint(step) and step not in CheckpointFolder(checkpoints).finished_steps():
        raise InvalidInput(
            f"evaluate.autoguidance: found {name}, of a step at which this training writes no checkpoint",
            f"a multiple of train.checkpoint_every = {train.checkpoint_every:,} up to train.steps = {train.steps:,}",
            "name the checkpoint of such a step, or one of another training",
        )


def own_guide_step(evaluate: EvaluateConfig, checkpoints: str) -> int | None:
    """Return the step of the guide if it is a checkpoint of the training itself; None if there is no such guide.

    checkpoints: absolute path or URI of the folder that the training writes its checkpoints to.
    """
    if evaluate.autoguidance is None:
        return None
    folder, name = storage.split(storage.absolute(evaluate.autoguidance))
    step = int(match[1]) if (match := re.fullmatch(r"step_(\d+)", name)) else None
    return step if step is not None and (folder, name) == (checkpoints, step_name(step)) else None


def _check_fit(guide: CheckpointRecord, guided: CheckpointRecord, found: str, name: str) -> None:
    """Raise InvalidInput if a guide's prediction is not of what the guided model predicts."""
    compared = {
        "latents of the shape": (_latent_shape(guide), _latent_shape(guided)),
        "the process": (_process(guide.objective), _process(guided.objective)),
        "classes, in number,": (guide.model_config.num_classes, guided.model_config.num_classes),
    }
    for what, (of_guide, of_guided) in compared.items():
        if of_guide != of_guided:
            raise InvalidInput(
                f"{found}, a model with {what} {of_guide}",
                f"{of_guided}, as of {name}",
                "choose a smaller or less trained model of the same latents",
            )
    names = _class_names(guide), _class_names(guided)
    if all(names) and names[0] != names[1]:
        raise InvalidInput(
            f"{found}, a model of other classes, or of another order of them, than {name}",
            "the same classes in the same order",
            "choose a model that was trained on the same data",
        )
    if not _have_one_space(guide.autoencoder, guided.autoencoder):
        raise InvalidInput(
            f"{found}, a model of the latents of {guide.autoencoder.id}, or of another scale of them, than {name}",
            f"latents of {guided.autoencoder.id} and the same scale",
            "choose a model that was trained on the same latents",
        )


def _class_names(record: CheckpointRecord) -> tuple[str, ...]:
    """Return the names of the classes; none if they are only numbers, as those of imported weights are."""
    numbers = tuple(str(label) for label in range(len(record.class_names)))
    return () if record.class_names == numbers else record.class_names


def _latent_shape(record: CheckpointRecord) -> tuple[int, ...]:
    return (record.model_config.in_channels, *record.model_config.latent_size)


def _process(objective: Any) -> str:
    """Return what a network predicts, in words that differ where predictions cannot be subtracted."""
    if objective["kind"] == "flow":
        return "flow"
    return f"diffusion ({objective.get('schedule', 'linear')}, {objective.get('prediction', 'eps')})"


def _have_one_space(first: AutoencoderRecord, second: AutoencoderRecord) -> bool:
    """Whether two autoencoders are known to encode alike, by their weights, or by their ids if a digest is lacking."""
    return first.scale == second.scale and first.encodes_like(second)
