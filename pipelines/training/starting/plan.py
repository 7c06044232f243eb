"""The plan of a training: everything that is decided and checked before a folder changes or a worker starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipelines.artifacts import Artifact
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.recipe import Recipe
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.held_out import held_out_latents
from pipelines.latents.recipe_match import require_latents_of, require_training_images
from pipelines.latents.recorded_images import require_classes
from pipelines.latents.source_images import check_source_images, find_locations
from pipelines.latents.verify import check_digests
from pipelines.training.monitoring.retention import check_keep_best
from pipelines.training.settings import TrainWorkerSettings, train_worker_settings
from pipelines.training.starting.find_start import TrainingStart, find_start
from pipelines.training.starting.identity import training_artifact
from pipelines.training.starting.new_data import ACCEPTED, accepted_start, take_new_data
from pipelines.training.starting.training_start import (
    changed_by_start,
    check_trained_parameters,
    starting_from,
    target_model,
)

NUM_VERIFIED_SHARDS = 4
"""Shards of the latents whose digests are checked before each training: some 50 MB."""
NUM_VERIFIED_IMAGES = 4
"""Images that are read before each training, if it encodes them."""


@dataclass(frozen=True)
class TrainingPlan:
    """A training whose recipe, latents and start fit together."""

    config: Recipe
    """The recipe, with the classes in the order of the latents."""
    latents: LatentDataset
    held_out: LatentDataset | None
    """Latents of the validation loss; None without train.validate_every."""
    artifact: Artifact
    """The training's checkpoints."""
    start: TrainingStart | None
    """The checkpoint whose weights it starts from; None if it starts from random weights."""
    worker_settings: TrainWorkerSettings
    trained_parameters: str
    """How many parameters are trained, in words; empty where all are."""

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The folder of the training's checkpoints."""
        return self.worker_settings.checkpoints

    @property
    def recorded_start(self) -> dict[str, Any] | None:
        """What identifies the weights that the training starts from, wherever these lie; None for random ones."""
        identity = self.artifact.identity
        return identity.get(ACCEPTED) or identity.get("start")

    def require_usable_start(self) -> None:
        """Raise NotFound, InvalidInput or Unreachable if the training begins with weights that it cannot use."""
        if self.start is not None:
            self.start.require_usable(self.config.train)

    def check_data(self, *, verify: bool) -> "TrainingPlan":
        """Compare data with their digests, and return the plan with the locations of images that training encodes.

        verify: all data, instead of NUM_VERIFIED_SHARDS shards and NUM_VERIFIED_IMAGES images. Raises NotFound or
        InvalidInput for data that are missing or damaged.
        """
        check_digests(self.latents, None if verify else NUM_VERIFIED_SHARDS)
        encoding = self.worker_settings.encoding
        if encoding is None:
            return self
        encoding = replace(encoding, locations=find_locations(self.latents, encoding.images))
        count = len(self.latents) if verify else NUM_VERIFIED_IMAGES
        check_source_images(self.latents, encoding.images, encoding.locations, count)
        return replace(self, worker_settings=replace(self.worker_settings, encoding=encoding))


def plan_training(config: Recipe, say: Callable[[str], object], *, accept_new_data: bool = False) -> TrainingPlan:
    """Plan the training of a recipe; nothing is written.

    accept_new_data: whether latents that differ from those of the checkpoints start a training from the newest of
    these. Raises NotFound or InvalidInput if the latents or the start do not exist or do not fit, and Unreachable if
    the start cannot be asked for.
    """
    settings = config.train
    if settings.keep_best:
        check_keep_best(settings.keep_best)
    latents = LatentDataset.open(config.latents)
    config = with_recorded_class_order(config, latents.recipe)
    require_classes(config, latents.class_names, (), config.folder("checkpoints"))
    held_out = held_out_latents(config) if settings.validate_every else None
    for dataset in filter(None, (latents, held_out)):
        require_latents_of(config, dataset)
    require_training_images(config.images, latents)
    artifact = training_artifact(config, latents)
    if accept_new_data:
        artifact = take_new_data(artifact, say)
    worker_settings = train_worker_settings(config, latents, held_out)
    start = accepted_start(artifact.identity, worker_settings.checkpoints) or find_start(config)
    if start is not None:
        worker_settings = starting_from(worker_settings, start, latents)
    changed = changed_by_start(start, settings, target_model(worker_settings))
    trained = check_trained_parameters(settings, worker_settings.model, changed)
    return TrainingPlan(config, latents, held_out, artifact, start, worker_settings, trained)
