"""The autoencoder that a checkpoint was trained with, verified against the checkpoint's record."""

from pathlib import Path

from dit.autoencoder import describe_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER, AutoencoderHandle
from raydit.errors import InvalidInput


def checkpoint_autoencoder(checkpoint: LocatedCheckpoint) -> Path:
    """Return the local folder of the autoencoder that a checkpoint was trained with.

    Raises InvalidInput if the autoencoder there has another digest than the recorded one. An imported checkpoint may
    not record a digest: then the autoencoder of the recorded id is used without a check.
    """
    recorded = checkpoint.record.autoencoder
    # One trained by raydit lies next to the checkpoints: output/autoencoder and output/checkpoints/step_N.
    folder = AutoencoderHandle(recorded.id, checkpoint.output).folder()
    found = describe_autoencoder(folder)["sha256"]
    if recorded.sha256 not in (None, found):
        name = "output/autoencoder" if recorded.id == TRAINED_AUTOENCODER else recorded.id
        raise InvalidInput(
            f"the autoencoder in {folder} has sha256 {found[:12]}",
            f"{recorded.sha256[:12]}: {checkpoint.origin} was trained on latents of that {name}, and its samples "
            "would decode to noise",
            "restore that autoencoder, or train again on latents of the one found",
        )
    return folder
