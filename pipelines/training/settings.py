"""The settings of a training worker: what the recipe and its latents decide before any worker starts."""

from dataclasses import dataclass
from typing import Any

from dit.autoencoders.latent_scale import LatentScale, scale_of
from dit.config import DiTConfig, RandomKind, UViTConfig
from dit.float8 import require_float8_shapes
from dit.formats.record import describe_checkpoint
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.model import ModelConfig
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe, random_setting
from pipelines.config.training import TrainConfig
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.training.encoded_images import ImageEncoding, image_encoding


@dataclass(frozen=True, kw_only=True)
class TrainWorkerSettings:
    """What every worker of the train job is given."""

    train: TrainConfig
    seed: int
    random: RandomKind | None
    """How random numbers are drawn, as in the recipe."""
    model: DiTConfig | UViTConfig
    objective: dict[str, Any]
    """Arguments of `dit.objective.create_process`."""
    scale: LatentScale
    """Normalisation of the latents."""
    latents: str
    """Absolute path or URI of the latent data set."""
    encoding: ImageEncoding | None = None
    """How images are encoded while training; None where the data set holds their moments."""
    held_out: str
    """The same of held-out latents, for the validation loss; empty without train.validate_every."""
    checkpoints: CheckpointFolder
    record: dict[str, Any]
    """What config.json of every checkpoint says, as `dit.checkpoint.describe_checkpoint` returns it."""


def train_worker_settings(config: Recipe, latents: LatentDataset) -> TrainWorkerSettings:
    """Work out the workers' settings from a recipe and its latents. Raises InvalidInput if these do not fit."""
    model = resolve_model(config.model, latents, learn_sigma=config.objective.learn_sigma)
    if config.train.matmul == "float8":
        require_float8_shapes(model)
    objective = {"kind": config.objective.kind, **config.objective.settings(model)}
    # By this recipe's id: latents that several recipes share may have been encoded in another output folder.
    autoencoder = latents.autoencoder | {"id": autoencoder_of(config).id}
    return TrainWorkerSettings(
        train=config.train,
        seed=config.seed,
        random=config.random,
        model=model,
        objective=objective,
        scale=scale_of(autoencoder),
        latents=str(latents.path),
        encoding=None if latents.stores_moments else image_encoding(config, latents),
        held_out=config.latents_held_out if config.train.validate_every else "",
        checkpoints=CheckpointFolder(config.folder("checkpoints")),
        record=describe_checkpoint(
            model=model,
            objective=objective,
            autoencoder=autoencoder,
            preprocessing=latents.preprocessing,
            class_names=latents.class_names,
            seed=config.seed,
            latents_fingerprint=latents.fingerprint,
            recipe=resolved(config),
            **random_setting(config),
        ),
    )


def resolve_model(model: ModelConfig, latents: LatentDataset, *, learn_sigma: bool) -> DiTConfig | UViTConfig:
    """Return the full configuration of a recipe's model for given latents. Raises InvalidInput if they do not fit."""
    channels, height, width = latents.latent_shape
    return model.resolve(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=len(latents.class_names),
        learn_sigma=learn_sigma,
    )
