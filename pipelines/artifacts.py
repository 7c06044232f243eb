"""The identity of an artifact: what it was made from, recorded in its folder and compared when a stage runs again.

The rule of new fields: an optional setting that is added to a config, an identity or the protocol defaults to None or
(), and is recorded only where it is set. Its absence means what raydit did before the setting existed, so earlier
artifacts, their digests and protocol ids stay valid.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster import storage
from pipelines.console import say
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PLAN = "plan.json"
SUPERSEDED = "superseded"
"""Folder of an output that holds earlier artifacts of other identities."""


def digest_of(content: object) -> str:
    """Return the sha256 of a JSON value in canonical form, which does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def settings_identity(settings: "DataclassInstance", irrelevant: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a config that a result depends on, as JSON values.

    Leaves out the irrelevant fields and, by the rule of new fields, those that are None or ().
    """
    kept = {name: value for name, value in asdict(settings).items() if name not in irrelevant}
    kept = {name: value for name, value in kept.items() if value is not None and value != ()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the differences between two identities as "train.learning_rate: 0.001 -> 0.002".

    A missing field equals null, because fields that are not set are recorded either way.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_shorten(before)} -> {_shorten(after)}")
    return lines


def without_defaults(identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the values that are null, empty or their default.

    defaults: nested as the identity is.
    """
    kept = {}
    for name, value in identity.items():
        default = defaults.get(name)
        if value and isinstance(value, dict) and isinstance(default, Mapping):
            kept[name] = without_defaults(value, default)
        elif value not in (None, [], {}, default):
            kept[name] = value
    return kept


def _sorted_in(identity: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return an identity in which the lists of some dotted fields are sorted."""
    for name in fields:
        first, _, rest = name.partition(".")
        value = identity.get(first)
        if rest and isinstance(value, dict):
            identity = identity | {first: _sorted_in(value, (rest,))}
        elif isinstance(value, list):
            identity = identity | {first: sorted(value)}
    return identity


def _shorten(value: object) -> str:
    text = json.dumps(value)
    # Digests are recognised by their length; their first 12 digits tell them apart.
    return text.strip('"')[:12] if isinstance(value, str) and len(value) == 64 else text


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage fills, and the identity of what the stage makes it from."""

    stage: str
    """Name of the stage, for messages."""
    folder: str
    """Path or URI."""
    identity: dict[str, Any]
    """JSON value of everything that the artifact depends on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that optional fields have when they are left out, nested as in the identity. Earlier releases recorded
    them where a recipe repeated them."""
    later_fields: Sequence[str] = ()
    """Dotted fields that earlier releases did not record although the artifact depends on them. Where one is not
    recorded, its value is unknown, and the artifact stays."""
    unordered: Sequence[str] = ()
    """Dotted fields whose values are lists in which the order means nothing."""
    other_changes: Callable[[str], list[str]] = lambda folder: []
    """Returns what else of a folder of this identity has changed since it was made, in words."""

    def recorded(self) -> dict[str, Any] | None:
        """Return the identity that the folder records, or None if it records none. Raises InvalidInput."""
        plan = storage.join(self.folder, PLAN)
        if not storage.exists(plan):
            return None
        identity = storage.read_json_object(plan).get("identity")
        if not isinstance(identity, dict):
            raise InvalidInput(
                f"{plan}: found identity {str(identity)[:100]}",
                "a JSON object",
                "restore the file, or move its folder away",
            )
        return identity

    def changes(self, may_change: Sequence[str] = ()) -> list[str]:
        """Return the differences from the recorded identity, without those of the dotted fields in `may_change`.

        If there are none, return the other changes.
        """
        recorded = self.recorded()
        if recorded is None:
            return []
        identity = json.loads(json.dumps(self.identity))  # tuples become lists, as in the record
        defaults = json.loads(json.dumps(self.defaults))
        before, after = (without_defaults(_sorted_in(each, self.unordered), defaults) for each in (recorded, identity))
        lines = [line for line in differences(before, after) if line.partition(":")[0] not in may_change]
        lines = [line for line in lines if not any(line.startswith(f"{name}: null -> ") for name in self.later_fields)]
        return lines or self.other_changes(self.folder)

    def prepare(
        self,
        reasons: Sequence[str] = (),
        may_change: Sequence[str] = (),
        *,
        fits: Callable[[str], bool] = lambda folder: True,
        is_finished: Callable[[str], bool] = lambda folder: True,
        before_move: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the folder ready for this artifact, and record its identity there.

        A folder with another identity is first moved to superseded/, with a message that says why; one in superseded/
        that has this identity takes its place. reasons: further reasons to start again. may_change: dotted fields whose
        differences are no reason. fits: whether a superseded folder of this identity may be used. is_finished: whether
        one is finished; such folders are preferred. before_move: called before anything is moved; what it raises leaves
        all folders where they are. Raises InvalidInput if the folder contains files that raydit did not write.
        """
        names = storage.list_names(self.folder) if storage.exists(self.folder) else []
        recorded = self.recorded()
        changed = [*self.changes(may_change), *reasons]
        earlier = None
        if changed or recorded is None:
            earlier = self.find_superseded(lambda folder: fits(folder) and is_finished(folder))
            earlier = earlier or self.find_superseded(fits)
        if recorded is None and names and not (earlier and _holds_part_of(self.folder, earlier)):
            raise InvalidInput(
                f"{self.folder} contains {', '.join(names[:5])}, which raydit did not write",
                f"an empty folder, or one with {PLAN}",
                "move these files away, or set output to another folder",
            )
        outcome = "starts again" if earlier is None else f"takes back the earlier results from {earlier}"
        if changed:
            if earlier is None:
                before_move()
            kept = self._move_to_superseded()
            say(self.stage, f"{outcome}, because {'; '.join(changed)}. The previous results are kept in {kept}")
        if earlier is not None:
            storage.remove_folder(self.folder)  # an empty one, or a copy of part of the other
            storage.move_folder(earlier, self.folder, last=PLAN)
            if not changed:
                say(self.stage, f"{outcome}, which were made with these settings")
        if self.recorded() is None or self.changes():
            storage.write_json_atomically(storage.join(self.folder, PLAN), {"identity": self.identity})

    def find(self, fits: Callable[[str], bool] = lambda folder: True) -> str | None:
        """Return the folder that holds an artifact of this identity, its own or one in superseded/; None if none does.

        fits: what else a folder must meet.
        """
        is_own = self.recorded() is not None and not self.changes() and fits(self.folder)
        return self.folder if is_own else self.find_superseded(fits)

    def find_superseded(self, fits: Callable[[str], bool] = lambda folder: True) -> str | None:
        """Return the folder in superseded/ that has this identity, the newest of several that fit; None if none does.

        fits: what else a folder must meet.
        """
        output, name = storage.split(self.folder)
        found = [replace(self, folder=folder) for folder in superseded_folders(output, name)]
        matching = (each.folder for each in reversed(found) if each.recorded() is not None and not each.changes())
        return next((folder for folder in matching if fits(folder)), None)

    def _move_to_superseded(self) -> str:
        """Move the folder to superseded/NAME-1, or to the first number that is not used; returns its new path."""
        output, name = storage.split(self.folder)
        number = 1
        while not self._can_move_to(target := storage.join(output, SUPERSEDED, f"{name}-{number}")):
            number += 1
        storage.move_folder(self.folder, target, last=PLAN)
        return target

    def _can_move_to(self, target: str) -> bool:
        """Return whether nothing lies at a path but what an interrupted move of this folder to it has left."""
        if storage.is_local(target):
            return not storage.exists(target)
        return not storage.exists(storage.join(target, PLAN)) and _holds_part_of(target, self.folder)


def _holds_part_of(folder: str, other: str) -> bool:
    """Return whether another folder has all files of a folder, in the same sizes: a move in a store was interrupted."""
    return storage.list_files(folder, recursive=True).items() <= storage.list_files(other, recursive=True).items()


def superseded_folders(output: str, name: str) -> list[str]:
    """Return the paths or URIs of an artifact's superseded folders, output/superseded/NAME-1 and so on, by number."""
    folder = storage.join(output, SUPERSEDED)
    if not storage.exists(folder):
        return []
    numbers = [re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.rstrip("/")) for entry in storage.list_names(folder)]
    return [storage.join(folder, f"{name}-{number}") for number in sorted(int(match[1]) for match in numbers if match)]
