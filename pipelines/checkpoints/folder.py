"""A folder of checkpoints, one for each step, on disk or in an object store: listed, opened, written and removed.

A checkpoint on disk is used where it lies. One in an object store is fetched once for all workers of a machine. A step
whose COMPLETE file, which is written last, is missing does not count as a checkpoint.
"""

import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import storage
from dit.checkpoint import load_checkpoint
from dit.files import digest_of_files
from dit.formats.completion import COMPLETE, CONFIG, INTERRUPTED, TRAINER, step_name
from dit.formats.digests import parse_digests, parse_recorded, require_recorded
from pipelines.artifacts import PLAN, SUPERSEDED
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.console import first_line
from raydit.errors import InvalidInput, NotFound


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder that a training writes its checkpoints to, such as output/checkpoints."""

    uri: str
    """Path or URI. The folder need not exist yet."""
    superseded: str | None = None
    """Folder that checkpoints are set aside in; None: superseded/ beside this folder, in the output."""

    def uri_of(self, step: int) -> str:
        """Return the absolute path or URI of the checkpoint of a step, whether or not it exists."""
        return storage.join(storage.absolute(self.uri), step_name(step))

    def finished_steps(self) -> list[int]:
        """Return the steps of the complete regular checkpoints, ascending; empty if the folder does not exist."""
        return self._steps()[0]

    def interrupted_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints at which training was stopped, ascending."""
        return self._steps()[1]

    def all_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, regular and interrupted, ascending, from one listing."""
        regular, interrupted = self._steps()
        return sorted(regular + interrupted)

    def last_step(self) -> int:
        """Return the step from which training resumes, that of `newest`, or 0."""
        return max(self.all_steps(), default=0)

    def has_any(self) -> bool:
        """Return whether there is a complete checkpoint, regular or interrupted; a start has step 0."""
        return bool(self.all_steps())

    def newest(self) -> LocatedCheckpoint | None:
        """Open the complete checkpoint with the highest step, regular or interrupted; None if there is none."""
        steps = self.all_steps()
        return self.open(steps[-1], resumable=True) if steps else None

    def _steps(self) -> tuple[list[int], list[int]]:
        """Return the steps of regular and of interrupted checkpoints, ascending, from one listing."""
        files = set(storage.list_files(self.uri, recursive=True))
        complete = (re.fullmatch(rf"(step_(\d+))/{COMPLETE}", name) for name in files)
        found = {int(match[2]): f"{match[1]}/{INTERRUPTED}" in files for match in complete if match}
        regular = sorted(step for step, interrupted in found.items() if not interrupted)
        return regular, sorted(found.keys() - set(regular))

    def open(self, step: int, *, resumable: bool = False) -> LocatedCheckpoint:
        """Open the checkpoint of a step without reading its weights; one in an object store is fetched first.

        resumable: whether trainer/ is fetched too, which is about half of it. Raises NotFound if it is incomplete, and
        InvalidInput if another version of raydit wrote it.
        """
        uri = self.uri_of(step)
        if not storage.is_local(uri) and not storage.exists(storage.join(uri, COMPLETE)):
            raise NotFound(
                f"no finished checkpoint at {uri}",
                f"the file {COMPLETE} there, which is written last",
                "choose a finished one, or train again",
            )
        folder = storage.fetch_folder(uri, without="" if resumable else TRAINER)
        return LocatedCheckpoint.at(uri, load_checkpoint(folder, resumable=resumable or storage.is_local(uri)))

    def describe(self, step: int) -> LocatedCheckpoint:
        """Open the checkpoint of a step for its config, digest and trainer state only.

        Unlike `open`, it fetches no weights from an object store: `path` is then where they would be.
        """
        uri = self.uri_of(step)
        if storage.is_local(uri):
            return self.open(step)
        complete, config = storage.join(uri, COMPLETE), storage.join(uri, CONFIG)
        digests = parse_digests(storage.read_bytes(complete), complete)
        return LocatedCheckpoint(
            path=Path(storage.local_folder_for(self.uri)) / step_name(step),
            config=parse_recorded(storage.read_bytes(config), config, digests.get(CONFIG)),
            digest=digest_of_files(digests),
            files=digests,
            origin=uri,
        )

    def write(self, step: int, save: Callable[[Path], object]) -> None:
        """Write the checkpoint of a step by calling `save(folder)`, such as `dit.checkpoint.save_checkpoint`.

        On disk `save` writes to the final folder. For an object store it writes to a local one, which is then uploaded
        and removed. Interrupted checkpoints of earlier steps are removed then: training resumes from this one.
        """
        local_folder = Path(storage.local_folder_for(self.uri)) / step_name(step)
        if storage.is_local(self.uri):
            save(local_folder)
        else:
            storage.remove_folder(str(local_folder))  # a killed process left it, possibly of another training
            save(local_folder)
            self.publish(str(local_folder), step)
        self.remove_interrupted(before=step)

    def publish(self, local_folder: str, step: int) -> None:
        """Move a complete local folder here as the checkpoint of a step.

        On disk it is renamed; to an object store it is uploaded, COMPLETE last. A complete checkpoint of that step is
        kept unless it is an interrupted one, and the local folder is removed in either case.
        """
        uri = self.uri_of(step)
        if storage.exists(storage.join(uri, COMPLETE)) and not storage.exists(storage.join(uri, INTERRUPTED)):
            shutil.rmtree(local_folder)
            return
        self.remove(step)  # training was stopped there, or a killed process left it incomplete
        storage.publish_folder(local_folder, uri, last=COMPLETE)

    def remove_interrupted(self, *, before: int | None = None) -> None:
        """Remove the interrupted checkpoints of the steps before `before`; None: all of them."""
        for step in self.interrupted_steps():
            if before is None or step < before:
                self.remove(step)

    def find_damage(self, step: int) -> str:
        """Return in words how the files of a checkpoint differ from those that COMPLETE lists; empty if they do not.

        In an object store, which detects damage itself, weights are not read.
        """
        uri, damage = self.uri_of(step), ""
        complete, config = storage.join(uri, COMPLETE), storage.join(uri, CONFIG)
        try:
            digests = parse_digests(storage.read_bytes(complete), complete)
            if missing := sorted(digests.keys() - storage.list_files(uri, recursive=True).keys()):
                damage = f"{uri} lacks {', '.join(missing)}"
            elif storage.is_local(uri):
                for name in digests:
                    require_recorded(Path(storage.local_path(uri)), name, digests)
            else:
                parse_recorded(storage.read_bytes(config), config, digests.get(CONFIG))
        except InvalidInput as error:
            damage = error.found
        except FileNotFoundError as error:
            damage = first_line(error)
        # Workers, which outlive a killed command by some seconds, may just have removed it; COMPLETE goes first.
        return damage if storage.exists(complete) else ""

    def set_aside(self, step: int) -> str:
        """Move the checkpoint of a step to `superseded`, and return its new path or URI.

        The folder there is named as those of superseded trainings are; without a plan.json, it is none of them.
        """
        return self._move_to_superseded(step, step_name(step))

    def set_aside_damaged(self, step: int) -> str:
        """Move a damaged checkpoint to `superseded`, under a name by which it is no checkpoint; return its new path."""
        return self._move_to_superseded(step, f"damaged_{step_name(step)}")

    def _move_to_superseded(self, step: int, new_name: str) -> str:
        uri, (output, name) = self.uri_of(step), storage.split(self.uri)
        # Not COMPLETE: where files are moved one by one, it must be gone from here before INTERRUPTED is.
        last = CONFIG if storage.exists(storage.join(uri, CONFIG)) else COMPLETE
        superseded = self.superseded or storage.join(output, SUPERSEDED)
        folders = (storage.join(superseded, f"{name}-{number}") for number in itertools.count(1))
        own = (folder for folder in folders if not storage.exists(storage.join(folder, PLAN)))
        targets = (storage.join(folder, new_name) for folder in own)
        target = next(each for each in targets if not storage.exists(storage.join(each, last)))
        storage.move_folder(uri, target, last=last)
        return target

    def remove(self, step: int) -> None:
        """Remove the checkpoint of a step if it exists; COMPLETE goes first, so that no partial one counts."""
        uri = self.uri_of(step)
        storage.remove_file(storage.join(uri, COMPLETE))
        storage.remove_folder(uri)
