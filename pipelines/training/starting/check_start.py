"""Check a checkpoint to start from before the stages that come before the training work."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dit.adaptation.draft_weights import TrainedModel
from dit.config import DiTConfig, UViTConfig
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import IN_TRACKING, require_exists
from pipelines.checkpoints.open_start import require_same_latents
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.recorded_autoencoder import describe_recorded
from pipelines.training.starting.find_start import TrainingStart, find_start
from pipelines.training.starting.training_start import refuse_frozen_anew, require_start_fits, started_model
from raydit.errors import InvalidInput


def check_start(
    config: Recipe,
    model: DiTConfig | UViTConfig | None,
    class_names: Sequence[str],
    *,
    own_autoencoder: bool,
    verify: bool,
) -> None:
    """Refuse a checkpoint to start from that the latents, the model, its classes or its objective do not fit.

    model: of the recipe; None where the autoencoder, on which it depends, is not on this machine yet: then only the
    training compares it. class_names: of the training images. own_autoencoder: whether the recipe has yet to train its
    autoencoder, without which a file of weights is not opened. verify: compare the weights with their digests, which
    reads them. Raises NotFound, InvalidInput or Unreachable.
    """
    settings = config.train.start
    if settings is None:
        return
    checkpoints = CheckpointFolder(config.folder("checkpoints"))
    has_begun = checkpoints.has_any()
    if own_autoencoder and settings.model is not None:
        if not has_begun and not str(settings.checkpoint).startswith(IN_TRACKING):
            require_exists(str(settings.checkpoint))
        return
    start = find_start(config)
    assert start is not None, "the recipe names a start"
    if own_autoencoder:
        require_repeated_autoencoder(start, config)
    if model is None:
        return
    if start.opened is not None and not own_autoencoder:
        autoencoder = describe_recorded(autoencoder_of(config), config.latents)
        require_same_latents(start.opened, start.settings, autoencoder, config.latents)
    model = started_model(model, resolved(config)["model"], start, checkpoints)
    objective = {"kind": config.objective.kind, **config.objective.settings(model)}
    require_start_fits(start, config.train, TrainedModel(model, objective, class_names))
    if has_begun:
        return
    refuse_frozen_anew(settings, model)
    if verify and start.opened is not None:
        start.opened.require_intact(settings.chosen_weights)


def require_repeated_autoencoder(start: TrainingStart, config: Recipe) -> None:
    """Refuse a start whose autoencoder the recipe's training of one cannot give again, unless both ends are reset.

    Training with the same settings on the same machine gives the same autoencoder to the bit.
    """
    if start.opened is None or {"embedding", "final"} <= {*start.settings.reset}:
        return
    recorded = (start.record.recipe or {}).get("autoencoder") or {}
    if _trained_alike(recorded.get("train") or {}, resolved(config)["autoencoder"]["train"]):
        return
    base = start.record.autoencoder
    raise InvalidInput(
        f"train.start: found {start.opened.origin}, trained on latents of the autoencoder {base.id!r} "
        f"({(base.sha256 or 'unknown digest')[:14]}), with a recipe that trains another one",
        "the autoencoder of the start",
        "replace [autoencoder.train] by autoencoder.id, or set train.start.reset = "
        '["embedding", "final"], which learns both ends of the model anew',
    )


def _trained_alike(*settings: Mapping[str, Any]) -> bool:
    """Return whether two [autoencoder.train] give the same weights, as JSON values."""
    one, other = ({name: each[name] for name in each.keys() - {*NON_IDENTITY_FIELDS}} for each in settings)
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
