"""What an artifact was made from: recorded beside it, compared when it is asked for again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster import storage
from pipelines.console import say

PLAN = "plan.json"


def digest_of(content) -> str:
    """sha256 of canonical JSON: the identity of settings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def settings_identity(settings, irrelevant: tuple[str, ...]) -> dict:
    """Fields of a config dataclass that a result depends on, as JSON values.

    Empty tuples are left out: an optional extra that is not used must not make earlier artifacts outdated.
    """
    kept = {name: value for name, value in asdict(settings).items() if name not in irrelevant and value != ()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """What changed between two identities, as "train.learning_rate: 0.001 -> 0.002"."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value) -> str:
    text = json.dumps(value)
    # Digests are recognised by their length: twelve digits tell them apart.
    return text.strip('"')[:12] if isinstance(value, str) and len(value) == 64 else text


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage fills, and the identity of what it is made from."""

    stage: str
    folder: str
    """Path or URI."""
    identity: dict

    def recorded(self) -> dict | None:
        """Identity of what is in the folder now, or None."""
        plan = storage.join(self.folder, PLAN)
        return storage.read_json(plan)["identity"] if storage.exists(plan) else None

    def changes(self, free: tuple[str, ...] = ()) -> list[str]:
        """What differs from the recorded identity, but for the dotted fields in `free`; nothing if none is recorded."""
        recorded = self.recorded()
        if recorded is None:
            return []
        identity = json.loads(json.dumps(self.identity))  # tuples become lists, as in the record
        return [line for line in differences(recorded, identity) if line.partition(":")[0] not in free]

    def prepare(self, reasons: Sequence[str] = (), free: tuple[str, ...] = ()) -> None:
        """Make the folder this artifact's. One made from something else is moved aside, and why is said.

        reasons: further reasons to start anew. free: dotted fields that may change without. Raises ValueError if the
        folder holds something that is not ours.
        """
        names = storage.list_names(self.folder) if storage.exists(self.folder) else []
        if self.recorded() is None and names:
            found = ", ".join(names[:5])
            raise ValueError(
                f"{self.folder} is not empty and not ours: found {found}, expected nothing or {PLAN}. Move it away, "
                "or set output to another folder"
            )
        if changed := [*self.changes(free), *reasons]:
            aside = self._move_aside()
            say(self.stage, f"again, because {'; '.join(changed)}. The earlier one is kept in {aside}")
        if self.recorded() is None or self.changes():
            storage.write_json_atomically(storage.join(self.folder, PLAN), {"identity": self.identity})

    def _move_aside(self) -> str:
        output, name = storage.split(self.folder)
        number = 1
        while storage.exists(storage.join(aside := storage.join(output, "superseded", f"{name}-{number}"), PLAN)):
            number += 1
        storage.move_folder(self.folder, aside, last=PLAN)
        return aside
