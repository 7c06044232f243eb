"""The pretrained autoencoder that the training of another starts from."""

from pathlib import Path
from typing import Any

from cluster import storage
from dit.autoencoder import describe_autoencoder, locate_autoencoder
from dit.hub import pin_commit
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from raydit.errors import InvalidInput


def find_start(settings: AutoencoderTrainConfig) -> str | None:
    """Return `start` as every worker finds it, whatever its working directory: absolute, or pinned to a commit."""
    if settings.start is None:
        return None
    if Path(settings.start).is_dir():
        return str(Path(settings.start).absolute())
    return pin_commit(settings.start, locate_autoencoder(settings.start))


def refuse_own_start(start: str, folder: str) -> None:
    """Raise InvalidInput if a training starts from an autoencoder in the folder that it would move away.

    start: path or hub id. folder: path or URI of the autoencoder that is trained.
    """
    if not storage.is_local(folder):
        return
    if Path(start).resolve().is_relative_to(Path(storage.absolute(folder)).resolve()):
        raise InvalidInput(
            f"autoencoder.train.start: found {start}, which this training would replace",
            f"an autoencoder outside of {folder}",
            "set another output, or copy that autoencoder elsewhere and name the copy",
        )


def require_start(settings: AutoencoderTrainConfig) -> dict[str, Any]:
    """Return the description of the autoencoder to start from (`dit.autoencoder.describe_autoencoder`).

    Raises NotFound if there is none, and InvalidInput if it is of another class, or of another shape than the recipe's,
    which the later stages are planned by.
    """
    assert settings.start is not None, "the caller has looked"
    found = describe_autoencoder(locate_autoencoder(settings.start))
    if found["class"] != "AutoencoderKL":
        raise InvalidInput(
            f"autoencoder.train.start: found class {found['class']}", "AutoencoderKL", "choose another one"
        )
    shape = ("latent_channels", "downsample")
    if wrong := [name for name in shape if getattr(settings, name) != found[name]]:
        raise InvalidInput(
            f"autoencoder.train.{wrong[0]}: found {getattr(settings, wrong[0])}",
            f"{found[wrong[0]]}, that of {settings.start}",
            " and ".join(f"set autoencoder.train.{name} = {found[name]}" for name in wrong),
        )
    return found
