"""Checkpoints by their step, in a folder or at a URI: found, opened, written and removed.

One on disk is used where it lies. One in an object store is fetched, once for all workers of a machine. A folder
without COMPLETE, its last file, is no checkpoint.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import storage
from dit.checkpoint import COMPLETE, Checkpoint, load_checkpoint, step_name
from dit.files import digest_of_files


@dataclass(frozen=True)
class StoredCheckpoint(Checkpoint):
    """A complete checkpoint on this machine's disk, and the place that it is the checkpoint of."""

    location: str
    """Absolute path or URI: its `path`, or where that was fetched from."""

    @property
    def trainer_state(self) -> dict:
        place = storage.join(self.location, "trainer", "state.json")
        return storage.read_json(place) if storage.exists(place) else {}


def checkpoint_location(location: str, step: int) -> str:
    """Where the checkpoint of a step lies in output/checkpoints, or any other folder of checkpoints."""
    return storage.join(storage.absolute(location), step_name(step))


def finished_steps(location: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; none where there is no folder."""
    files = storage.list_files(location, recursive=True)
    steps = (re.fullmatch(rf"step_(\d+)/{COMPLETE}", name) for name in files)
    return sorted(int(step[1]) for step in steps if step)


def newest(location: str) -> StoredCheckpoint | None:
    """The complete checkpoint with the highest step, or None."""
    steps = finished_steps(location)
    return open_checkpoint(checkpoint_location(location, steps[-1])) if steps else None


def open_checkpoint(location: str) -> StoredCheckpoint:
    """Open a checkpoint by its path or URI, without reading its weights.

    Raises FileNotFoundError or ValueError if it is not whole, as dit.checkpoint.load_checkpoint does.
    """
    location = storage.absolute(location)
    if not storage.is_local(location) and not storage.exists(storage.join(location, COMPLETE)):
        steps = ", ".join(step_name(step) for step in finished_steps(location)[-3:])
        advice = f"name one of those in it: {steps}" if steps else "choose a finished one, or train again"
        raise FileNotFoundError(
            f"no finished checkpoint at {location}: expected the file {COMPLETE} there, which is written last; {advice}"
        )
    return StoredCheckpoint(**vars(load_checkpoint(storage.fetch_folder(location))), location=location)


def describe_step(location: str, step: int) -> StoredCheckpoint:
    """The checkpoint of a step as it describes itself. Of one in an object store no weights are fetched to `path`."""
    place = checkpoint_location(location, step)
    if storage.is_local(place):
        return open_checkpoint(place)
    return StoredCheckpoint(
        path=Path(storage.local_folder_for(location)) / step_name(step),
        config=storage.read_json(storage.join(place, "config.json")),
        digest=digest_of_files(storage.read_json(storage.join(place, COMPLETE))),
        location=place,
    )


def write(location: str, step: int, save: Callable[[Path], object]) -> None:
    """Have `save` write the checkpoint of a step into a local folder, as dit.checkpoint.save_checkpoint does.

    Where `location` is on disk that is its place; else it is published and the local folder removed.
    """
    folder = Path(storage.local_folder_for(location)) / step_name(step)
    if storage.is_local(location):
        save(folder)
        return
    storage.remove_folder(str(folder))  # left by a killed process: it may be of another training
    save(folder)
    publish(str(folder), location, step)


def publish(local_folder: str, location: str, step: int) -> None:
    """Make a complete local folder the checkpoint of a step: on disk by a rename, else by an upload, COMPLETE last.

    A complete one that is there already is kept.
    """
    place = checkpoint_location(location, step)
    if storage.exists(storage.join(place, COMPLETE)):
        shutil.rmtree(local_folder)
        return
    storage.remove_folder(place)  # half of one, left by a killed process
    storage.publish_folder(local_folder, place, last=COMPLETE)


def remove(location: str, step: int) -> None:
    """Remove the checkpoint of a step, if it is there; COMPLETE first, so that no half of it counts."""
    place = checkpoint_location(location, step)
    storage.remove_file(storage.join(place, COMPLETE))
    storage.remove_folder(place)
