"""The autoencoder that a checkpoint was trained with, checked against its record."""

from pathlib import Path

from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.latents.autoencoder import OURS, AutoencoderHandle


def checkpoint_autoencoder(checkpoint: LocatedCheckpoint) -> Path:
    """Folder of the autoencoder that a checkpoint was trained with. Raises ValueError if it is another one.

    An imported checkpoint may not know the digest of its autoencoder: then the one of that name is taken.
    """
    from dit.autoencoder import describe_autoencoder

    recorded = checkpoint.record.autoencoder
    # One trained by us lies beside the checkpoints: output/autoencoder and output/checkpoints/step_N.
    folder = AutoencoderHandle(recorded.id, checkpoint.output).folder()
    found = describe_autoencoder(folder)["sha256"]
    if recorded.sha256 not in (None, found):
        where = "output/autoencoder" if recorded.id == OURS else recorded.id
        raise ValueError(
            f"the autoencoder in {folder} has sha256 {found[:12]}, but {checkpoint.origin} was trained on latents of "
            f"{where} with {recorded.sha256[:12]}: its samples would decode to noise. Put that autoencoder back, "
            "or train again on latents of this one"
        )
    return folder
