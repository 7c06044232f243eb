"""The autoencoder that a checkpoint was trained with, verified against the checkpoint's record."""

from collections.abc import Iterator
from pathlib import Path

from cluster import storage
from dit.autoencoder import find_autoencoder, is_same_autoencoder
from pipelines.artifacts import superseded_folders
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER, AutoencoderHandle, explain_other
from raydit.errors import InvalidInput, NotFound


def checkpoint_autoencoder(checkpoint: LocatedCheckpoint) -> Path:
    """Return the local folder of the autoencoder that a checkpoint was trained with.

    Raises NotFound if there is none, and InvalidInput if the autoencoder there has another digest than the recorded
    one. An imported checkpoint may not record a digest: then the autoencoder of the recorded id is used without a
    check.
    """
    recorded = checkpoint.record.autoencoder
    try:
        # One trained by raydit lies next to the checkpoints: output/autoencoder and output/checkpoints/step_N.
        folder = AutoencoderHandle(recorded.id, checkpoint.output).folder()
    except NotFound:
        if (other := _find_other(checkpoint)) is None:
            raise
        return other
    if recorded.sha256 is None or is_same_autoencoder(folder, vars(recorded)):
        return folder
    if (other := _find_other(checkpoint)) is not None:
        return other
    name = "output/autoencoder" if recorded.id == TRAINED_AUTOENCODER else recorded.id
    raise InvalidInput(
        f"the autoencoder in {folder} has {explain_other(vars(recorded), folder)}",
        f"{recorded.sha256[:12]}: {checkpoint.origin} was trained on latents of that {name}, and its samples "
        "would decode to noise",
        "restore that autoencoder, or train again on latents of the one found",
    )


def absolute_autoencoder_id(checkpoint: LocatedCheckpoint) -> str:
    """Return the id of a checkpoint's autoencoder that is right outside of its output too: of a folder, its path."""
    id = checkpoint.record.autoencoder.id
    if id == TRAINED_AUTOENCODER:  # which is found beside the checkpoints of its output alone
        id = storage.join(checkpoint.output, TRAINED_AUTOENCODER)
    elif folder := folder_of_recipe(checkpoint) or (Path(id).absolute() if Path(id).is_dir() else None):
        id = str(folder)
    if checkpoint.is_registered_copy and not storage.exists(id) and find_autoencoder(id) is None:
        return str(_find_other(checkpoint) or id)
    return id


def _find_other(checkpoint: LocatedCheckpoint) -> Path | None:
    """Return the folder elsewhere that holds the recorded weights.

    It is where the recipe's relative path led to, in superseded/, or beside a registered copy.
    """
    recorded = checkpoint.record.autoencoder
    for folder in _other_folders(checkpoint):
        if recorded.sha256 is not None and is_same_autoencoder(folder, vars(recorded)):
            return folder
    return None


def _other_folders(checkpoint: LocatedCheckpoint) -> Iterator[Path]:
    if named := folder_of_recipe(checkpoint):
        yield named
    if checkpoint.record.autoencoder.id == TRAINED_AUTOENCODER:
        for folder in superseded_folders(checkpoint.output, TRAINED_AUTOENCODER):
            if storage.exists(storage.join(folder, "config.json")):
                yield Path(storage.fetch_folder(folder))
    beside = checkpoint.path.parent.parent / TRAINED_AUTOENCODER
    if (beside / "config.json").is_file():
        yield beside


def folder_of_recipe(checkpoint: LocatedCheckpoint) -> Path | None:
    """Return the folder that a relative autoencoder.id named in the working directory of the recipe; None if none did.

    That directory is known where the recipe's output is relative too, and where the checkpoint still lies in it.
    """
    id, output = checkpoint.record.autoencoder.id, (checkpoint.record.recipe or {}).get("output", "")
    if (
        id == TRAINED_AUTOENCODER
        or not output
        or not (storage.is_local(output) and storage.is_local(checkpoint.output))
    ):
        return None
    relative, location = Path(output), Path(storage.absolute(checkpoint.output))
    depth = len(relative.parts)
    if relative.is_absolute() or location.parts[-depth:] != relative.parts:
        return None
    folder = location.parents[depth - 1] / id
    return folder if folder.is_dir() else None
