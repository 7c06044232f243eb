"""The export job: files for others from checkpoints of ours."""

from pathlib import Path

from dit.checkpoint import export_diffusers, export_official
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint


def export_checkpoint(
    checkpoint: str | Path | LocatedCheckpoint, out: str | Path, *, format: str, weights: str = "ema"
) -> Path:
    """Write a checkpoint as a file of the official code, or as a folder of diffusers' DiTPipeline.

    Raises FileExistsError, and ValueError where that format cannot say what the checkpoint is.
    """
    opened = open_checkpoint(checkpoint)
    if format == "official":
        return export_official(opened, out, weights=weights)
    return export_diffusers(opened, out, autoencoder=checkpoint_autoencoder(opened), weights=weights)


def how_to_load(path: Path) -> str:
    """How an exported file or folder is used, and what it then computes."""
    if path.is_file():
        return "a state dict for the official code; it holds neither configuration nor autoencoder"
    if not any((path / "transformer").glob("*.py")):
        return f'DiTPipeline.from_pretrained("{path}") computes the same'
    return (
        f'DiTPipeline.from_pretrained("{path}", trust_remote_code=True) computes the same, by a class in the folder '
        "with the official timestep frequencies; diffusers' own has others and refuses"
    )
