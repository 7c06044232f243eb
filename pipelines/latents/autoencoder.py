"""The autoencoder of a recipe or an artifact: named by its id, fetched where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import storage
from dit.hub import pin_commit
from pipelines.config.recipe import Recipe
from raydit.errors import NotFound

AUTOENCODER_RECORD = "raydit.json"
"""Written last into the folder of an autoencoder trained by raydit: what it was trained on, and how good it is."""
TRAINED_AUTOENCODER = "autoencoder"
"""Id of the autoencoder that a recipe trains: its folder, relative to the output."""


@dataclass(frozen=True)
class AutoencoderHandle:
    """An autoencoder by name. It may not exist on this machine, and it may not be trained yet."""

    id: str
    """Hub id (OWNER/NAME or OWNER/NAME@REVISION) or folder as in the recipe; for one trained by raydit, its folder
    relative to the output."""
    output: str
    """Absolute path or URI of the recipe's output."""

    def folder(self, *, download: bool = True) -> Path:
        """Return a local folder with its weights, fetching them if necessary.

        Raises NotFound if it is not trained yet, cannot be found, or is not on this machine and `download` is False.
        """
        from dit.autoencoder import locate_autoencoder

        if self.id != TRAINED_AUTOENCODER:
            return locate_autoencoder(self.id, download=download).absolute()
        folder = storage.join(self.output, TRAINED_AUTOENCODER)
        if not storage.exists(storage.join(folder, AUTOENCODER_RECORD)):
            raise NotFound(
                f"output: found no finished autoencoder in {folder}",
                "the recipe's own autoencoder",
                "run `raydit autoencoder` with the recipe; for a checkpoint that was copied here, copy the folder "
                "autoencoder/ of its output as well",
            )
        return Path(storage.fetch_folder(folder))

    def with_absolute_paths(self) -> "AutoencoderHandle":
        """Return the same autoencoder for workers, which run in other working directories.

        One of the hub is pinned to the commit that this process has found, because others may push to it meanwhile.
        """
        if self.id == TRAINED_AUTOENCODER:
            return self
        if Path(self.id).is_dir():
            return replace(self, id=str(Path(self.id).absolute()))
        return replace(self, id=pin_commit(self.id, self.folder()))

    def explain_folder(self) -> str:
        """Return one line if the weights are in a folder of what the id names, as in a pipeline; else an empty text."""
        folder = self.folder()
        return f"uses the autoencoder {folder.name}/ of the pipeline {self.id}" if self._is_pipeline(folder) else ""

    def _is_pipeline(self, folder: Path) -> bool:
        return (
            self.id != TRAINED_AUTOENCODER
            and (folder.parent / "model_index.json").is_file()
            and (folder != Path(self.id).absolute())
        )

    def describe(self, *, download: bool = True) -> dict[str, Any]:
        """Return what latents and checkpoints record about it: id, class, sha256 of the weights, shape and scale."""
        from dit.autoencoder import describe_autoencoder

        return {"id": self.id, **describe_autoencoder(self.folder(download=download))}


def is_autoencoder_of(recorded: Mapping[str, Any], folder: Path) -> bool:
    """Return whether a local folder holds the autoencoder of a record; see `is_same_autoencoder`."""
    from dit.autoencoder import is_same_autoencoder

    return is_same_autoencoder(folder, recorded)


def explain_other(recorded: Mapping[str, Any], folder: Path) -> str:
    """Return in words what a folder's autoencoder has other than the one of a record: its weights, or its config."""
    from dit.autoencoder import describe_autoencoder

    found = describe_autoencoder(folder)["sha256"]
    return "another config.json" if found == recorded["sha256"] else f"sha256 {found[:12]}"


def autoencoder_of(config: Recipe) -> AutoencoderHandle:
    """Return the autoencoder that a recipe uses."""
    return AutoencoderHandle(config.autoencoder.id or TRAINED_AUTOENCODER, storage.absolute(config.output))
