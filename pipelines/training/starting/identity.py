"""The identity of a training: what its weights depend on, recorded in its folder of checkpoints."""

from typing import Any

from pipelines.artifacts import Artifact, settings_identity
from pipelines.config.model import MODEL_DEFAULTS, OBJECTIVE_DEFAULTS
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe, random_setting
from pipelines.config.training import LENGTH_FIELDS, NON_IDENTITY_FIELDS
from pipelines.latents.dataset import LatentDataset
from pipelines.training.starting.find_start import TrainingStart, find_start
from pipelines.training.starting.new_data import keep_accepted


def train_identity(config: Recipe, latents: LatentDataset, start: TrainingStart | None = None) -> dict[str, Any]:
    """Return what the weights depend on: neither the number of workers, nor the length, since training can continue.

    start: the weights that it starts from, by their digest.
    """
    # The default dtype is left out, so that checkpoints that are older than the field keep their identity.
    default = ("dtype",) if config.train.dtype == "float32" else ()
    recorded = resolved(config)
    return {
        "seed": config.seed,
        **random_setting(config),
        "latents": {"fingerprint": latents.fingerprint},
        "model": recorded["model"],
        "objective": recorded["objective"],
        "train": settings_identity(config.train, (*LENGTH_FIELDS, *NON_IDENTITY_FIELDS, *default, "start")),
        **({} if start is None else {"start": start.identity(latents, config.objective.kind)}),
    }


def training_artifact(config: Recipe, latents: LatentDataset) -> Artifact:
    """Return the checkpoints of the recipe's training, with the new data that the one in the folder has accepted."""
    identity = train_identity(config, latents, find_start(config))
    defaults = {"model": MODEL_DEFAULTS, "objective": OBJECTIVE_DEFAULTS, "train": config.train.defaults}
    unordered = ("start.reset", "start.freeze")
    return keep_accepted(Artifact("train", config.folder("checkpoints"), identity, defaults, unordered=unordered))
