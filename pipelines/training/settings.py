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
from pipelines.training.data.encoded_images import ImageEncoding, image_encoding
from raydit.errors import InvalidInput


@dataclass(frozen=True)
class LatentsReference:
    """The latent data set that a training was planned with, which every worker opens again by its path."""

    path: str
    """Absolute path or URI of the folder."""
    fingerprint: str

    @classmethod
    def of(cls, dataset: LatentDataset) -> "LatentsReference":
        """Return a reference to a data set that is open."""
        return cls(str(dataset.path), dataset.fingerprint)

    def open(self) -> LatentDataset:
        """Open the data set. Raises InvalidInput if another one lies at the path, and NotFound if none does.

        Several recipes may share a folder of latents. Images that another one adds change the order of all images, and
        a worker that starts later, as after another worker's death, would not continue as the training began.
        """
        dataset = LatentDataset.open(self.path)
        if dataset.fingerprint != self.fingerprint:
            raise InvalidInput(
                f"latents at {self.path} have changed since this command began: found the fingerprint "
                f"{dataset.fingerprint[:12]}",
                self.fingerprint[:12],
                "put the earlier latents back to resume, or run the command again to train on those that are there now "
                "(with --accept-new-data from the newest checkpoint)",
            )
        return dataset


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
    latents: LatentsReference
    encoding: ImageEncoding | None = None
    """How images are encoded while training; None where the data set holds their moments."""
    held_out: LatentsReference | None
    """Held-out latents, for the validation loss; None without train.validate_every."""
    checkpoints: CheckpointFolder
    record: dict[str, Any]
    """What config.json of every checkpoint says, as `dit.checkpoint.describe_checkpoint` returns it."""


def train_worker_settings(
    config: Recipe, latents: LatentDataset, held_out: LatentDataset | None = None
) -> TrainWorkerSettings:
    """Work out the workers' settings from a recipe and its latents. Raises InvalidInput if these do not fit.

    held_out: the held-out latents, if the recipe validates.
    """
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
        latents=LatentsReference.of(latents),
        encoding=None if latents.stores_moments else image_encoding(config, latents),
        held_out=None if held_out is None else LatentsReference.of(held_out),
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
