"""The autoencoder of a recipe or an artifact: found by its id, fetched where it is needed."""

from dataclasses import dataclass, replace
from pathlib import Path

from cluster import storage
from pipelines.config.recipe import Recipe

RECORD = "raydit.json"
"""Written last into the folder of an autoencoder trained here: what it is made from, and how good it is."""


OURS = "autoencoder"
"""Id of the autoencoder trained here: its folder, relative to the output."""


@dataclass(frozen=True)
class AutoencoderHandle:
    """An autoencoder that may not be loaded yet."""

    id: str
    """Hub id or folder as in the recipe; for one trained here, its folder relative to the output."""
    output: str
    """Absolute path or URI."""

    def folder(self, *, download: bool = True) -> Path:
        """Local folder with its weights, fetched if it is elsewhere. Raises FileNotFoundError, telling what to do."""
        from dit.autoencoder import locate_autoencoder

        if self.id != OURS:
            return locate_autoencoder(self.id, download=download).absolute()
        folder = storage.join(self.output, OURS)
        if not storage.exists(storage.join(folder, RECORD)):
            raise FileNotFoundError(f"no finished autoencoder in {folder}; run `raydit autoencoder` with the recipe")
        return Path(storage.fetch_folder(folder))

    def with_absolute_paths(self) -> "AutoencoderHandle":
        """The same for workers: those of a cluster run in other working directories."""
        return replace(self, id=str(Path(self.id).absolute())) if self.id != OURS and Path(self.id).is_dir() else self

    def describe(self, *, download: bool = True) -> dict:
        """What latents and checkpoints record of it."""
        from dit.autoencoder import describe_autoencoder

        return {"id": self.id, **describe_autoencoder(self.folder(download=download))}


def autoencoder_of(config: Recipe) -> AutoencoderHandle:
    """The autoencoder that a recipe uses."""
    return AutoencoderHandle(config.autoencoder.id or OURS, storage.absolute(config.output))
