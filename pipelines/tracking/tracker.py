"""Runs of a recipe's experiment, written to a journal on disk.

One process writes: the one that runs the jobs. It appends to the journal, from which a thread delivers to MLflow, so
work never waits for a tracking server, and a server that is down costs nothing but delay.
"""

import re
import time
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.jobs import current_job_id
from pipelines.artifacts import digest_of
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.tracking import tags
from pipelines.tracking.delivery import Delivery
from pipelines.tracking.experiments import clean_name
from pipelines.tracking.journal import Entry, Journal, count_undelivered, has_open_runs
from pipelines.tracking.journal_folder import journal_path
from pipelines.tracking.relocation import relocate
from pipelines.tracking.run_log import SYSTEM, DatasetRef, RunLog, flatten
from pipelines.tracking.store import refuse_unusable, tracking_uri

CLOSE_SECONDS = 30.0
"""Longer than MLflow's client waits for a database that another process writes to, 20 s."""


class Tracker:
    """Starts the runs of one experiment. Calls return at once."""

    def __init__(self, journal: Journal, experiment: str, uri: str, delivery: Delivery):
        self._journal, self._experiment, self.uri, self._delivery = journal, experiment, uri, delivery
        self._status: dict[str, str] = {}
        self._with_metrics: set[str] = set()
        last_times: dict[str, int] = {}
        for entry in journal.entries():
            last_times[entry["run"]] = entry.get("time", 0)
            if entry["op"] == "run":
                self._status[entry["run"]] = "RUNNING"
            elif entry["op"] == "end":
                self._status[entry["run"]] = entry.get("status", "KILLED")
            elif entry["op"] == "metrics" and not _is_of_system(entry):
                self._with_metrics.add(entry["run"])
        self._close_runs_of_killed_processes(last_times)

    def _close_runs_of_killed_processes(self, last_times: dict[str, int]) -> None:
        """End the runs that are still open: this process holds the output, so that theirs is dead.

        One that resumes is RUNNING again from then on; one that does not would be RUNNING forever. last_times: when
        each run logged something last, in milliseconds since 1970: its end, as far as is known.
        """
        for key in [key for key, status in self._status.items() if status == "RUNNING"]:
            JournalRun(self._journal, key).append("end", status="KILLED", time=last_times[key])
            self._status[key] = "KILLED"

    @classmethod
    def open(cls, config: Recipe, part: str = "") -> "Tracker":
        """Open the tracker of a recipe's output, and deliver what an earlier process could not.

        part: folder of the output that has a journal of its own, because another process may write the main one. A
        database that was moved or copied is repaired first. Raises InvalidInput, before any work, if the store will
        never take runs.
        """
        uri = tracking_uri(config.tracking.uri)
        for done in relocate(uri, [config.output]):
            say(
                "tracking",
                f"{uri} was moved or copied from {done.old}; its artifacts and outputs lead to {done.new} now",
            )
        refuse_unusable(uri)
        if (name := clean_name(config.name)) != config.name:
            say("tracking", f"models are named {name!r}; MLflow allows {config.name!r} as the experiment's name only")
        delivery = Delivery(uri, config.output, part)
        return cls(delivery.open_journal(), config.name, uri, delivery)

    @staticmethod
    def has_waiting(config: Recipe, part: str = "") -> bool:
        """Return whether an earlier process left entries that wait in a recipe's journal, or a run that is open.

        part: see `open`.
        """
        path = journal_path(config.output, tracking_uri(config.tracking.uri), part)
        return path.exists() and (count_undelivered(path) > 0 or has_open_runs(path))

    @property
    def folder(self) -> Path:
        """Local folder of the journal, and of files that its entries name."""
        return self._journal.path.parent

    def start_run(
        self,
        stage: str,
        identity: dict[str, Any],
        *,
        parent: RunLog | None = None,
        run_tags: dict[str, str] | None = None,
        resumes: str | None = None,
    ) -> RunLog:
        """Start a run, or resume the one that an interrupted execution of the same identity left open.

        resumes: key of the run whose work resumes. None: the newest of that identity. Empty: the work starts over, so
        that a run which has metrics of an earlier attempt is closed, and a new one started.
        """
        run_tags = run_tags or {}
        key = self._choose_key(_key_of(stage, identity), resumes)
        # The job of an earlier attempt must not end a run that continues outside of it.
        job_tags = {tags.JOB_ID: ""} if key in self._status else {}
        self._status[key] = "RUNNING"
        run = JournalRun(self._journal, key)
        run.append(
            "run",
            experiment=self._experiment,
            name=_display_name(key, stage, run_tags),
            parent=parent.key if parent else None,
            tags={tags.STAGE: stage, **job_tags, **_job_tags(), **run_tags},
        )
        return run

    def logged_steps(self, stage: str, identity: dict[str, Any]) -> set[int]:
        """Return the steps of all metrics that the runs of an identity have, as far as the journal knows them."""
        base = _key_of(stage, identity)
        runs = {key for key in self._status if key == base or re.fullmatch(re.escape(base) + r"-\d+", key)}
        entries = (entry for entry in self._journal.entries() if entry["op"] == "metrics" and entry["run"] in runs)
        return {entry["step"] for entry in entries if not _is_of_system(entry)}

    def _choose_key(self, base: str, resumes: str | None) -> str:
        """Return the key of a run to resume, or one that no run has. base: the key of the first run of an identity."""
        if resumes and self._status.get(resumes, "FINISHED") != "FINISHED":
            return resumes
        newest, number = None, 1
        key = base
        while key in self._status:
            number += 1
            newest, key = key, f"{base}-{number}"
        if newest is None or self._status[newest] == "FINISHED":
            return key
        if resumes != "" or newest not in self._with_metrics:
            return newest
        return key

    def flush(self) -> None:
        """Wait until MLflow has everything logged so far, for at most CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._journal.is_delivering and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        """Deliver what is left, and say so if MLflow could not take all of it in time."""
        self._journal.close(CLOSE_SECONDS)
        self._delivery.say_what_is_left(self._journal)


def _key_of(stage: str, identity: dict[str, Any]) -> str:
    """Return the key of the first run of an identity."""
    return f"{stage}-{digest_of(identity)[:8]}"


def _is_of_system(entry: Entry) -> bool:
    """Return whether an entry of metrics says only how busy the machine was."""
    return all(name.startswith(SYSTEM) for name in entry["metrics"])


def _display_name(key: str, stage: str, run_tags: dict[str, str]) -> str:
    """Return the name of a run in the UI: its key, or what an evaluation scores, and by which protocol."""
    protocol = run_tags.get(tags.PROTOCOL)
    if protocol is None:
        return key
    scored = run_tags.get(tags.CHECKPOINT) or run_tags.get(tags.IMAGES) or stage
    name = scored.partition("?")[0].rstrip("/").rpartition("/")[2]
    return f"{re.sub('^step_0*(?=.)', 'step ', name)}: {protocol}"


def _job_tags() -> dict[str, str]:
    """Return the tag of the Ray job that this process runs in, if it runs in one."""
    return {tags.JOB_ID: job} if (job := current_job_id()) else {}


class JournalRun:
    """A RunLog that appends to a journal."""

    def __init__(self, journal: Journal, key: str):
        self._journal, self._key = journal, key

    @property
    def key(self) -> str:
        return self._key

    def append(self, op: str, **content: Any) -> None:
        """Append an entry about this run to the journal."""
        self._journal.append({"op": op, "run": self.key, "time": int(time.time() * 1000), **content})

    def params(self, params: dict[str, Any]) -> None:
        self.append("params", params=flatten(params))

    def settings(self, settings: dict[str, Any]) -> None:
        self.append("settings", settings=flatten(settings))

    def tag(self, name: str, value: str) -> None:
        self.append("tag", name=name, value=value)

    def metrics(
        self, metrics: dict[str, float], step: int = 0, *, model: str = "", dataset: DatasetRef | None = None
    ) -> None:
        self.append("metrics", metrics=metrics, step=step, model=model, dataset=dataset)

    def points(self, prefix: str) -> dict[str, dict[int, float]]:
        points: dict[str, dict[int, float]] = {}
        for entry in self._journal.entries():
            if entry["op"] == "metrics" and entry["run"] == self.key:
                for name, value in entry["metrics"].items():
                    if name.startswith(prefix):
                        points.setdefault(name.removeprefix(prefix), {})[entry["step"]] = value
        return points

    def model(self, digest: str, *, name: str, step: int, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.append("model", digest=digest, name=name, step=step, params=flatten(params), tags=tags)

    def model_removed(self, digest: str) -> None:
        self.append("model_removed", digest=digest)

    def model_picture(self, digest: str, artifact: str) -> None:
        self.append("model_picture", digest=digest, artifact=artifact)

    def scores(self, digest: str, metrics: dict[str, float], step: int, protocol_id: str) -> None:
        self.append("scores", digest=digest, metrics=metrics, step=step, protocol=protocol_id)

    def input(self, *, name: str, digest: str, source: str, context: str) -> None:
        self.append("input", name=name, digest=digest, source=source, context=context)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self.append("artifact", path=str(path), folder=folder, sha256=_picture_digest(path))

    def image(self, path: str | Path, key: str, step: int) -> None:
        self.append("image", path=str(path), key=key, step=step, sha256=_picture_digest(path))

    def end(self, status: str) -> None:
        self.append("end", status=status)


def _picture_digest(path: str | Path) -> str | None:
    """Return the sha256 of a picture on a disk, by which its delivery knows that it was not drawn again since.

    None for other files, which may be completed after they were logged, and for URIs, which take time to read.
    """
    path = str(path)
    if not path.endswith(".png") or not storage.is_local(path):
        return None
    try:
        return storage.sha256_file(path)
    except OSError:  # refused or left out when it is delivered
        return None
