"""How a training starts from a checkpoint: its first checkpoint, of step 0, holds the weights that it starts from.

Workers then resume from step 0 as from any other. The checkpoint of the start is needed once, to write that one.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit.adaptation.comparison import require_adaptable, with_inherited_fields
from dit.adaptation.draft_weights import TrainedModel, part_names
from dit.autoencoders.latent_scale import LatentScale, record_scale, scale_of
from dit.checkpoint import save_checkpoint
from dit.config import DiTConfig, UViTConfig, recorded_fields
from dit.model import build_model, meta_state
from dit.schedule import power_ema_name
from dit.snapshot import Snapshot
from dit.start_weights import StartWeights, fates_by_kind, start_weights, summarize_fates
from dit.trained_parameters import count_trained, freeze, frozen_names, learning_rate_multipliers
from pipelines.checkpoints.adapters import base_record, require_all_weights
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import recorded_options
from pipelines.checkpoints.open_start import trained_model
from pipelines.config.start import StartConfig
from pipelines.config.training import TrainConfig
from pipelines.latents.dataset import LatentDataset
from pipelines.training.settings import TrainWorkerSettings
from pipelines.training.starting.adapter import (
    adapter_of,
    adapter_size,
    changed_names,
    describe_adapter,
    first_snapshot,
    recorded_changes,
    trained_names,
)
from pipelines.training.starting.find_start import TrainingStart
from raydit.errors import InvalidInput


def starting_from(settings: TrainWorkerSettings, start: TrainingStart, latents: LatentDataset) -> TrainWorkerSettings:
    """Return the workers' settings of a training that starts from a checkpoint, with the model and scale that follow.

    Raises InvalidInput, before any work, if the start does not fit the model, its classes or the latents.
    """
    model = started_model(settings.model, settings.record["recipe"]["model"], start, settings.checkpoints)
    scale = start.scale_for(latents)
    record = settings.record | {"model": recorded_fields(model)}
    if scale != settings.scale:
        record["autoencoder"] = record["autoencoder"] | record_scale(record["autoencoder"]["class"], scale)
    settings = replace(settings, model=model, scale=scale, record=record)
    require_start_fits(start, settings.train, target_model(settings))
    if not settings.checkpoints.has_any():
        refuse_frozen_anew(start.settings, model)
    return settings


def started_model(
    model: DiTConfig | UViTConfig, chosen: Mapping[str, Any], start: TrainingStart, checkpoints: CheckpointFolder
) -> DiTConfig | UViTConfig:
    """Return the configuration of the model that is trained: fields that a recipe leaves out are those of the start.

    model: of the recipe. chosen: the fields of [model] that the recipe sets. checkpoints: of the training.
    """
    return with_inherited_fields(model, start.record.model_config, _chosen_fields(chosen, start, checkpoints))


def _chosen_fields(chosen: Mapping[str, Any], start: TrainingStart, checkpoints: CheckpointFolder) -> list[str]:
    """Return the names of the fields of [model] that a recipe sets, and that are therefore not those of the start.

    Earlier commits took the start's value without a word where a U-ViT's recipe set another one. A training that began
    so has checkpoints that record both, and resumes as it began: the field counts as one that the recipe does not set.
    """
    # The start is the training's own checkpoint where new data were accepted.
    records = [start.record] if start.earlier is not None else []
    if checkpoints.has_any():
        newest = checkpoints.describe(checkpoints.last_step()).record
        records += [newest] if (newest.start or {}).get("sha256") == start.sha256 else []

    def was_replaced(name: str) -> bool:
        models = [(record.recipe["model"], record.model_config) for record in records if record.recipe]
        return any(
            recipe.get(name) == chosen[name] and getattr(model, name, chosen[name]) != chosen[name]
            for recipe, model in models
        )

    return [name for name in chosen if not was_replaced(name)]


def require_start_fits(start: TrainingStart, config: TrainConfig, model: TrainedModel) -> None:
    """Raise InvalidInput, naming a field, if a training cannot start from a checkpoint. model: that is trained."""
    if start.opened is not None:
        if config.lora is not None:
            require_all_weights(start.opened)
        require_adaptable(trained_model(start.record), model, start.settings.reset)
    check_trained_parameters(config, model.config, changed_by_start(start, config, model))


def refuse_frozen_anew(settings: StartConfig, config: DiTConfig | UViTConfig) -> None:
    """Raise InvalidInput if parameters that start anew are frozen: they would stay random, or zero, forever.

    config: of the model that is trained. A training that has begun so resumes: it is not asked.
    """
    parts = part_names(config)
    names = [*meta_state(config)]
    for pattern in settings.freeze:
        frozen = frozen_names([pattern], names)
        for part in settings.reset:
            anew = [name for name in sorted(frozen) if name.startswith(parts.get(part, ()))]
            if anew:
                raise InvalidInput(
                    f"train.start.freeze: found {pattern!r}, which freezes {anew[0]} and with it part of what starts "
                    f"anew (train.start.reset has {part!r})",
                    "patterns of parameters that are taken over from the start",
                    f"train {part!r}, or take it over",
                )


def changed_by_start(start: TrainingStart | None, config: TrainConfig, model: TrainedModel) -> list[str]:
    """Return the names of the weights that an adapter's checkpoints will hold, as they are not those of its base.

    They are found without reading any weights. Without an adapter there are none. model: that is trained. Raises
    InvalidInput if the start does not fit it.
    """
    if start is None or config.lora is None:
        return []
    if start.opened is None:
        return recorded_changes((start.record.start or {}).get("tensors", {}))
    base = trained_model(start.record)
    started = start_weights(
        _any_weights(base), base, model, reset=start.settings.reset, fresh=lambda: _any_weights(model)
    )
    return changed_names(started.fates)


def _any_weights(model: TrainedModel) -> dict[str, Tensor]:
    """Return a state dict of zeros that share their memory, which takes next to none."""
    return {name: torch.zeros(()).expand(like.shape) for name, like in meta_state(model.config).items()}


def target_model(settings: TrainWorkerSettings) -> TrainedModel:
    """Return the model that is trained, with the names of its classes."""
    return TrainedModel(config=settings.model, objective=settings.objective, class_names=settings.record["class_names"])


def with_recorded_start(settings: TrainWorkerSettings, checkpoints: CheckpointFolder) -> TrainWorkerSettings:
    """Return the workers' settings with what the training's checkpoints record about its start, if there are any."""
    if not checkpoints.has_any():
        return settings
    config = checkpoints.describe(checkpoints.last_step()).config
    recorded = {name: config[name] for name in ("start", "base") if config.get(name) is not None}
    return replace(settings, record=settings.record | recorded)


def write_first_checkpoint(
    start: TrainingStart, settings: TrainWorkerSettings
) -> tuple[TrainWorkerSettings, StartWeights]:
    """Write the checkpoint of step 0, which holds the weights to start from as weights and as all averages.

    Returns the workers' settings, whose record describes the start, and what became of every tensor. Raises NotFound or
    InvalidInput if the start is gone or damaged.
    """
    opened = start.require_opened()
    started = start_weights(
        opened.weights(start.settings.chosen_weights),
        trained_model(start.record),
        target_model(settings),
        reset=start.settings.reset,
        fresh=lambda: initial_weights(settings),
    )
    described = {
        "checkpoint": opened.origin,
        "digest": opened.digest,
        "step": opened.step,
        "weights": start.settings.chosen_weights,
        "sha256": start.sha256,
        "tensors": fates_by_kind(started.fates),
    }
    if start.imported:
        described["imported"] = recorded_options(start.imported)
    if start.earlier is not None:
        described["earlier"] = {name: value for name, value in start.earlier.items() if name != "tensors"}
    settings = replace(settings, record=settings.record | {"start": described})
    names = ("model", "ema", *map(power_ema_name, settings.train.ema_sigma_rels))
    snapshot = Snapshot(0, 0, dict.fromkeys(names, started.weights), optimizer={})
    if (lora := settings.train.lora) is not None:
        base = base_record(opened, start.settings.chosen_weights, **start.imported)
        settings = replace(settings, record=settings.record | {"base": base})
        adapter = adapter_of(lora, settings.model, changed_names(started.fates))
        snapshot = first_snapshot(started.weights, adapter, settings.model, settings.seed, names)
    # The order of the data is not chosen yet: the workers choose it when they open the latents.
    cursor = {"reports": [], "seed": settings.seed, "images_seen": 0}
    settings.checkpoints.write(0, lambda folder: save_checkpoint(snapshot, folder, settings.record, cursor))
    return settings, started


def initial_weights(settings: TrainWorkerSettings) -> dict[str, Tensor]:
    """Return the weights that the workers would initialise the model to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build_model(settings.model).state_dict()


def explain_scale(scale: LatentScale, latents: LatentDataset) -> str:
    """Return in words that a training scales latents as its start does; empty where their autoencoder does the same."""
    same = scale == scale_of(latents.autoencoder)
    return "" if same else "the latents are scaled as those of the start, not as their own autoencoder says"


def describe_start(start: TrainingStart, started: StartWeights, *, lora: bool = False) -> Iterator[str]:
    """Yield lines for the user: what the training starts from, and a line for each group of tensors.

    lora: whether an adapter is trained.
    """
    opened = start.require_opened()
    weights = f"{start.settings.chosen_weights!r} weights {start.sha256[:12]}"
    yield f"starts from {opened.origin}, step {opened.step:,}, {weights}"
    for line in summarize_fates(started.fates):
        yield f"  {line}"
    if lora and (changed := changed_names(started.fates)):
        yield f"  {len(changed)} tensors that are not the base's are kept with the adapter, and trained in full"


def check_trained_parameters(config: TrainConfig, model: DiTConfig | UViTConfig, changed: Collection[str] = ()) -> str:
    """Return in words how many parameters are trained; empty where all are.

    model: that is trained. changed: names of `changed_by_start`, which matter for an adapter. Raises InvalidInput if
    nothing is left to train, or if a pattern of train.start.freeze matches no parameter, or one of train.lr_multipliers
    none that is trained.
    """
    if config.lora is not None:
        adapter = adapter_of(config.lora, model, changed)
        trained, total = adapter_size(adapter, model)
        learning_rate_multipliers((), trained_names(adapter), config.lr_multipliers, None)
        return describe_adapter(adapter, trained, total)
    patterns = () if config.start is None else config.start.freeze
    if not (patterns or config.lr_multipliers):
        return ""
    with torch.device("meta"):
        network = build_model(model)
    prepare_parameters(network, config)
    trained, total = count_trained(network)
    return f"{trained:,} of {total:,} parameters are trained" if patterns else ""


def prepare_parameters(network: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Freeze what a recipe freezes, and return the factors of the learning rate by names of parameters."""
    if config.start is not None:
        freeze(network, config.start.freeze)
    parameters = dict(network.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    return learning_rate_multipliers([*parameters], trained, config.lr_multipliers, config.layer_decay)
