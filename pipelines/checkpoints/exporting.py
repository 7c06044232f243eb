"""Export checkpoints to the formats of other projects."""

from pathlib import Path
from typing import Literal

from cluster import storage
from dit.checkpoint import export_diffusers, export_official
from dit.formats.adapter import ADAPTER_CONFIG
from pipelines.checkpoints.adapters import export_adapter
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint

ExportFormat = Literal["official", "diffusers", "peft", "diffusers-lora"]


def export_checkpoint(
    checkpoint: str | Path | LocatedCheckpoint,
    out: str | Path,
    *,
    format: ExportFormat,
    weights: str = "ema",
    tracking_uri: str = "",
) -> Path:
    """Write a checkpoint as a weights file of the official code, or as a folder for diffusers' DiTPipeline.

    Of a checkpoint with an adapter these are the merged weights; "peft" and "diffusers-lora" write the adapter alone
    (`pipelines.checkpoints.adapters.export_adapter`). weights: "ema", "raw" (as trained) or another average's name.
    tracking_uri: MLflow's, where runs and models are looked up, as in a recipe.

    Returns the path that was written. Raises AlreadyExists, and InvalidInput if the format cannot express the model.
    """
    storage.refuse_unwritable(str(out))
    opened = open_checkpoint(checkpoint, tracking_uri=tracking_uri)
    if format == "official":
        return export_official(opened, out, weights=weights)
    if format == "peft" or format == "diffusers-lora":
        return export_adapter(opened, out, layout=format, weights=weights)
    return export_diffusers(opened, out, autoencoder=checkpoint_autoencoder(opened), weights=weights)


def describe_export(path: Path) -> str:
    """Say in one line how an exported file or folder is loaded, and what it then computes."""
    if path.is_file():
        return "a state dict for the official code; it holds neither configuration nor autoencoder"
    if (path / ADAPTER_CONFIG).is_file():
        return f'an adapter: peft.PeftModel.from_pretrained(model, "{path}"), with a model that has the base\'s weights'
    if not any((path / "transformer").glob("*.py")):
        return f'DiTPipeline.from_pretrained("{path}") computes the same'
    return (
        f'DiTPipeline.from_pretrained("{path}", trust_remote_code=True) computes the same, by a class in the folder '
        "with the official timestep frequencies; diffusers' own class has other frequencies and refuses these weights"
    )
