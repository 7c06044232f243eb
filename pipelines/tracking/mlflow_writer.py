"""Delivery of journal entries to MLflow: one method for each kind of entry.

Delivering an entry a second time changes nothing: a process may be killed before the journal has noted the first.
"""

import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster import storage
from pipelines.console import first_line
from pipelines.tracking import tags
from pipelines.tracking.experiment_page import SAMPLES, update_view
from pipelines.tracking.experiments import create_experiment, find_experiment
from pipelines.tracking.journal import Entry, Ids, Refused
from pipelines.tracking.model_writer import MAX_DIGEST_LENGTH, ModelWriter, is_of_training, metric_context, run_id_of
from pipelines.tracking.searches import find_model
from pipelines.tracking.store import (
    check_tracking,
    is_database_failing,
    is_gone,
    is_locked,
    is_refusing_all,
    is_unavailable,
    mlflow_client,
)
from raydit.errors import RayditError

MAX_ATTEMPTS = 10
"""Deliveries of one entry that may fail while the store answers other requests: some minutes. MLflow reports any
failure without a code of its own as an internal error, which may or may not pass."""
PARAMS_PER_REQUEST, METRICS_PER_REQUEST, TAGS_PER_REQUEST = 100, 1000, 100
"""MLflow's limits of one log_batch request."""
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
"""Characters of a tag's value that its column has in PostgreSQL and MySQL, which refuse a longer one."""


OPS = (
    *("run", "params", "settings", "tag", "metrics", "input", "artifact", "image", "end"),
    *("model", "model_removed", "model_picture", "scores"),
)
"""Kinds of entries: what JournalRun appends. Each has a method with its name, after an underscore."""


class MlflowWriter(ModelWriter):
    """Delivers journal entries to MLflow; called by the journal's thread.

    `ids` maps the journal's names of runs, experiments and models to MLflow's ids. The journal keeps it on disk.
    """

    def __init__(self, uri: str, say: Callable[[str], None], find_file: Callable[[str], str | None]):
        """say: shows a line to the user.

        find_file: returns the path by which a file that an entry names is opened, and None if there is none; raises
        an error for a file that is not to be sent.
        """
        self._uri, self._say, self._find_file = uri, say, find_file
        self._client: Any = None
        self._failing: tuple[Entry, int] = ({}, 0)
        self._has_reported_overwriting = False

    def deliver(self, entries: list[Entry], ids: Ids, history: Callable[[], list[Entry]]) -> int:
        """Deliver one or more entries from the front and return how many; see pipelines.tracking.journal.Server."""
        entry, count = _first_request(entries)
        try:
            self._client = self._client or mlflow_client(self._uri)
            try:
                self._write(entry, ids)
            except Exception as error:
                if is_unavailable(error) or not self._replace_deleted(entry, ids, history):
                    raise
                self._write(entry, ids)
        except Exception as error:
            if is_refusing_all(error) or (is_unavailable(error) and not self._keeps_failing(entries[0], error)):
                raise ConnectionError(_why_unavailable(error)) from error
            if count > 1:
                delivered = self.deliver(entries[:1], ids, history)  # only the entry that MLflow refuses is set aside
                if self._failing[0] == entries[0]:
                    self._failing = (entries[1], self._failing[1])  # it has failed as often, in the same requests
                return delivered
            raise Refused(_why_refused(error)) from error
        return count

    def _write(self, entry: Entry, ids: Ids) -> None:
        if entry["op"] not in OPS:
            raise ValueError(f"{entry['op']!r} is no kind of entry")
        getattr(self, f"_{entry['op']}")(entry, ids)

    def _keeps_failing(self, entry: Entry, error: Exception) -> bool:
        """Return whether an entry has failed MAX_ATTEMPTS times in a store that answers and that nobody has locked.

        entry: the first one of a request, because what follows it grows between two attempts.
        """
        last, attempts = self._failing
        self._failing = (entry, attempts + 1 if entry == last else 1)
        if self._failing[1] < MAX_ATTEMPTS or is_locked(error):
            return False
        if entry["op"] == "run" and is_database_failing(error):
            return False  # without the run, all that follows of it would be refused as well
        try:
            check_tracking(self._uri)
        except RayditError:
            return False
        return True

    def _run(self, entry: Entry, ids: Ids) -> None:
        key, experiment = f"run {entry['run']}", f"experiment {entry['run']}"
        if experiment not in ids:
            ids[experiment] = self._open_experiment(entry["experiment"], ids)
        run_id = ids.get(key) or self._find_run(ids[experiment], entry)
        if run_id is None:
            ids[key] = self._create_run(entry, ids)
            return
        ids[key] = run_id
        self._client.update_run(run_id, status="RUNNING")
        self._set_tags(run_id, entry["tags"])

    def _open_experiment(self, name: str, ids: Ids) -> str:
        if found := find_experiment(self._client, name):
            return found.experiment_id
        experiment, new_name = create_experiment(self._client, self._uri, name)
        if new_name != name:
            self._say(f"the experiment {name!r} was deleted in MLflow; runs go to a new one, {new_name!r}")
            for key in [key for key in ids if key.startswith("model ")]:
                del ids[key]  # models of the deleted experiment
        return experiment

    def _find_run(self, experiment: str, entry: Entry) -> str | None:
        """Return the run that an entry has already created, before a kill or a loss of this journal.

        A journal may be lost with the disk of its machine. This process holds the lease on the output, so no other
        process works on a run of the same execution there. Outputs on a disk are left out: output and journal are lost
        together, and the same path on two machines means two outputs.
        """
        same = f"attributes.run_name {tags.equals(entry['name'])}"
        found = self._client.search_runs([experiment], f"{same} AND attributes.start_time = {entry['time']}")
        output = entry["tags"].get(tags.OUTPUT, "")
        if not found and not storage.is_local(output):
            for tag in (tags.OUTPUT, tags.CHECKPOINT_DIGEST, tags.PROTOCOL_ID):
                if value := entry["tags"].get(tag):
                    same += f" AND {tags.has(tag, value)}"
            found = self._client.search_runs([experiment], f"{same} AND attributes.status = 'RUNNING'", max_results=1)
        return found[0].info.run_id if found else None

    def _create_run(self, entry: Entry, ids: Ids, further: dict[str, str] | None = None) -> str:
        run_tags = {tags.RUN_NAME: entry["name"], **entry["tags"], **(further or {})}
        if parent := ids.get(f"run {entry['parent']}"):
            run_tags[tags.PARENT_RUN] = parent
        experiment = ids[f"experiment {entry['run']}"]
        # MLflow shortens the tags of its other requests itself.
        run_tags = {name: _shorten(value, MAX_TAG_LENGTH) for name, value in run_tags.items()}
        run = self._client.create_run(
            experiment, start_time=entry["time"], tags=run_tags, run_name=run_tags[tags.RUN_NAME]
        )
        return run.info.run_id

    def _replace_deleted(self, entry: Entry, ids: Ids, history: Callable[[], list[Entry]]) -> bool:
        """Return whether an entry failed because its run or experiment was deleted, and write that run anew.

        The new run gets everything that the journal holds of the deleted one.
        """
        key, experiment = entry["run"], f"experiment {entry['run']}"
        run_is_gone = f"run {key}" in ids and not self._is_active_run(ids[f"run {key}"])
        if not run_is_gone:
            if f"run {key}" in ids or experiment not in ids or self._is_active_experiment(ids[experiment]):
                return False
            del ids[experiment]
            return True
        earlier = [each for each in history() if each["run"] == key]
        first = next(each for each in [*earlier, entry] if each["op"] == "run")
        old, changed = ids[f"run {key}"], dict(ids)
        del changed[f"run {key}"]
        in_deleted_experiment = not self._is_active_experiment(ids[experiment])
        if in_deleted_experiment:
            changed[experiment] = self._open_experiment(first["experiment"], changed)
        replaces = {tags.REPLACES: old}
        found = self._client.search_runs([changed[experiment]], tags.has(tags.REPLACES, old), max_results=1)
        changed[f"run {key}"] = found[0].info.run_id if found else self._create_run(first, changed, replaces)
        self._write_again(earlier, changed)
        self._adopt_children(key, changed, history)
        ids.clear()
        ids.update(changed)
        if not in_deleted_experiment:
            self._say(f"the run {first['name']} was deleted in MLflow; all of it is in a new one, {ids[f'run {key}']}")
        return True

    def _write_again(self, entries: list[Entry], ids: Ids) -> None:
        """Write the entries of a run to the new run that `ids` names."""
        while entries:
            entry, count = _first_request(entries)
            try:
                self._write(entry, ids)
            except Exception as error:
                if is_unavailable(error) or is_refusing_all(error):
                    raise
                # It was refused the first time too, and has been set aside.
            entries = entries[count:]

    def _adopt_children(self, key: str, ids: Ids, history: Callable[[], list[Entry]]) -> None:
        """Make the children of a replaced run those of the new one."""
        children = {each["run"] for each in history() if each["op"] == "run" and each["parent"] == key}
        for child in children:
            child_id = ids.get(f"run {child}")
            if child_id and self._is_active_run(child_id):
                self._client.set_tag(child_id, tags.PARENT_RUN, ids[f"run {key}"])

    def _is_active_run(self, run_id: str) -> bool:
        return self._is_active(lambda: self._client.get_run(run_id).info)

    def _is_active_experiment(self, experiment_id: str) -> bool:
        return self._is_active(lambda: self._client.get_experiment(experiment_id))

    def _is_active(self, get: Callable[[], Any]) -> bool:
        """Return whether what `get` asks MLflow for is neither deleted nor removed forever."""
        try:
            return get().lifecycle_stage == "active"
        except Exception as error:
            if is_gone(error):
                return False
            raise

    def _params(self, entry: Entry, ids: Ids) -> None:
        """Log params. Those that the run has with another value, of a run that an older version began, become tags."""
        from mlflow.entities import Param

        run_id = run_id_of(entry, ids)
        wanted = {name: value[:MAX_PARAM_LENGTH] for name, value in entry["params"].items()}
        known = self._client.get_run(run_id).data.params
        changed = {name: value for name, value in wanted.items() if known.get(name, value) != value}
        params = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        self._set_tags(run_id, {f"{tags.SETTING_PREFIX}{name}": value for name, value in changed.items()})

    def _settings(self, entry: Entry, ids: Ids) -> None:
        settings = {f"{tags.SETTING_PREFIX}{name}": value for name, value in entry["settings"].items()}
        self._set_tags(run_id_of(entry, ids), settings)

    def _set_tags(self, run_id: str, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        found = [RunTag(name, value) for name, value in values.items()]
        for start in range(0, len(found), TAGS_PER_REQUEST):
            self._client.log_batch(run_id, tags=found[start : start + TAGS_PER_REQUEST])

    def _tag(self, entry: Entry, ids: Ids) -> None:
        self._client.set_tag(run_id_of(entry, ids), entry["name"], entry["value"])

    def _metrics(self, entry: Entry, ids: Ids) -> None:
        from mlflow.entities import Metric

        points = entry.get("points", [entry])
        metrics = [
            Metric(name, value, point["time"], point["step"], **metric_context(point, ids))
            for point in points
            for name, value in point["metrics"].items()
        ]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self._client.log_batch(run_id_of(entry, ids), metrics=metrics[start : start + METRICS_PER_REQUEST])

    def _model_removed(self, entry: Entry, ids: Ids) -> None:
        model_id = ids.get(f"model {entry['digest']}")
        if model_id and find_model(self._client, model_id):
            self._client.set_logged_model_tags(model_id, {tags.REMOVED: "true"})

    def _input(self, entry: Entry, ids: Ids) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": entry["source"]})
        dataset = Dataset(entry["name"], entry["digest"][:MAX_DIGEST_LENGTH], "local", source)
        context = [InputTag("mlflow.data.context", entry["context"])]
        self._client.log_inputs(run_id_of(entry, ids), datasets=[DatasetInput(dataset, context)])

    def _artifact(self, entry: Entry, ids: Ids) -> None:
        if found := self._find_logged(entry):
            with storage.local_copy(found) as file:
                self._client.log_artifact(run_id_of(entry, ids), file, entry["folder"])

    def _image(self, entry: Entry, ids: Ids) -> None:
        """Log a picture, unless it is there already: each gets a name of which MLflow draws a part at random."""
        run_id, path = run_id_of(entry, ids), self._find_logged(entry)
        if path is None:
            return
        if not self._has_image(run_id, entry):
            from PIL import Image

            with storage.open_file(path) as file, Image.open(file, formats=["PNG"]) as image:
                self._client.log_image(run_id, image, key=entry["key"], step=entry["step"], timestamp=entry["time"])
        if is_of_training(entry) and entry["key"] == SAMPLES:
            update_view(self._client, ids[f"experiment {entry['run']}"], samples_step=entry["step"])

    def _find_logged(self, entry: Entry) -> str | None:
        """Return the path of the file that an entry names; None if it is gone, or has been written again since.

        Then it is another training's, or a later entry of this run names it. Journals of older versions record no
        digest.
        """
        found = self._find_file(entry["path"])
        if found is None or entry.get("sha256") in (None, storage.sha256_file(found)):
            return found
        if not self._has_reported_overwriting:
            self._has_reported_overwriting = True
            self._say(f"{entry['path']} was written again before MLflow took it, so {entry['run']} does not get it")
        return None

    def _has_image(self, run_id: str, entry: Entry) -> bool:
        """Return whether a run has a picture, of which MLflow writes a small copy last."""
        start = f"{entry['key'].replace('/', '~')}+step+{entry['step']}+timestamp+{entry['time']}+"
        names = [Path(file.path).name for file in self._client.list_artifacts(run_id, "images")]
        return any(name.startswith(start) and name.endswith("+compressed.webp") for name in names)

    def _end(self, entry: Entry, ids: Ids) -> None:
        self._client.set_terminated(run_id_of(entry, ids), entry["status"], end_time=entry["time"])


def _why_unavailable(error: Exception) -> str:
    """Return what a store does instead of answering, as the end of a sentence."""
    if is_locked(error):
        return "is locked by another process"
    does = "refuses access" if is_refusing_all(error) else "does not answer"
    return f"{does} ({first_line(error)[:200]})"


def _why_refused(error: Exception) -> str:
    kind = "" if isinstance(error, RayditError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)[:300]}"


def _shorten(text: str, length: int) -> str:
    """Return a text of at most `length` characters; a longer one ends in an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _first_request(entries: list[Entry]) -> tuple[Entry, int]:
    """Return the first entry and 1, or consecutive metrics of one run joined into one entry, and their number."""
    first = entries[0]
    if first["op"] != "metrics":
        return first, 1
    points = list(takewhile(lambda entry: entry["op"] == "metrics" and entry["run"] == first["run"], entries))
    return {"op": "metrics", "run": first["run"], "points": points}, len(points)
