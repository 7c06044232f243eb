"""The last files of a checkpoint's folder, and the marks by which a listing of it shows what the checkpoint is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit.files import sha256_of, sync, write_json

FORMAT = "raydit.checkpoint"
VERSION = 1
COMPLETE = "COMPLETE"
"""Name of the last file of a checkpoint, without which it is not finished."""
CONFIG = "config.json"
TRAINER = "trainer"
"""Folder in a checkpoint of what only resuming a training needs."""
TRAINER_STATE = f"{TRAINER}/state.json"
INTERRUPTED = "INTERRUPTED"
"""Name of the empty file that marks an interrupted checkpoint, as config.json does (see `Checkpoint.interrupted`)."""


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint at `step`; below ten million, names sort in the order of steps."""
    return f"step_{step:07d}"


def write_completion(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the last two files of a checkpoint: config.json, and COMPLETE with the digests of all other files."""
    write_json(folder / CONFIG, {"format": FORMAT, "version": VERSION, **config})
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = [name for name in files if name != COMPLETE]
    for name in files:
        sync(folder / name)
    write_json(folder / COMPLETE, {name: sha256_of(folder / name) for name in files})
    sync(folder / COMPLETE)  # last, so that after a power failure COMPLETE does not exist without the other files
