"""What every training worker is given: the model, the objective and the record of its checkpoints."""

from dataclasses import asdict

from pipelines.config.model import ModelConfig
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset


def worker_settings(config: Recipe, latents: LatentDataset) -> dict:
    """What every worker is told: the recipe, and what follows from it and the latents."""
    from dit.formats.record import describe_checkpoint

    model = model_config(config.model, config, latents)
    objective = {"kind": config.objective.kind, **config.objective.settings()}
    return {
        "config": config,
        "model": asdict(model),
        "objective": objective,
        "latents": str(latents.path),
        "folder": config.folder("checkpoints"),
        "checkpoint": describe_checkpoint(
            model=model,
            objective=objective,
            # As this recipe names it: latents that recipes share were made in another output.
            autoencoder=latents.manifest["autoencoder"] | {"id": autoencoder_of(config).id},
            preprocessing=latents.manifest["preprocessing"],
            class_names=latents.class_names,
            seed=config.seed,
            latents_fingerprint=latents.fingerprint,
            recipe=resolved(config),
        ),
    }


def model_config(model: ModelConfig, config: Recipe, latents: LatentDataset):
    """The model's configuration, with what follows from the latents. Raises ValueError if they do not fit."""
    channels, height, width = latents.latent_shape
    return model.resolve(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=len(latents.class_names),
        learn_sigma=config.objective.learn_sigma,
    )
