"""Export checkpoints to the formats of other projects."""

from pathlib import Path
from typing import Literal

from cluster import storage
from dit.checkpoint import export_diffusers, export_official
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint

ExportFormat = Literal["official", "diffusers"]


def export_checkpoint(
    checkpoint: str | Path | LocatedCheckpoint, out: str | Path, *, format: ExportFormat, weights: str = "ema"
) -> Path:
    """Write a checkpoint as a weights file of the official code, or as a folder for diffusers' DiTPipeline.

    weights: "ema", "raw" (as trained) or another average's name. Returns the path that was written. Raises
    AlreadyExists, and InvalidInput if the format cannot express the model.
    """
    storage.refuse_unwritable(str(out))
    opened = open_checkpoint(checkpoint)
    if format == "official":
        return export_official(opened, out, weights=weights)
    return export_diffusers(opened, out, autoencoder=checkpoint_autoencoder(opened), weights=weights)


def describe_export(path: Path) -> str:
    """Say in one line how an exported file or folder is loaded, and what it then computes."""
    if path.is_file():
        return "a state dict for the official code; it holds neither configuration nor autoencoder"
    if not any((path / "transformer").glob("*.py")):
        return f'DiTPipeline.from_pretrained("{path}") computes the same'
    return (
        f'DiTPipeline.from_pretrained("{path}", trust_remote_code=True) computes the same, by a class in the folder '
        "with the official timestep frequencies; diffusers' own class has other frequencies and refuses these weights"
    )
