"""Delivery of journal entries to MLflow: one method for each kind of entry."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster import storage
from pipelines.console import say
from pipelines.tracking import tags
from pipelines.tracking.experiment_page import experiment_tags
from pipelines.tracking.journal import Entry
from pipelines.tracking.store import check_tracking, is_unavailable, mlflow_client

MAX_ATTEMPTS = 10
"""Deliveries of one entry that may fail while the store answers other requests: some minutes. MLflow reports any
failure without a code of its own as an internal error, which may or may not pass."""
PARAMS_PER_REQUEST, METRICS_PER_REQUEST = 100, 1000
"""MLflow's limits of one log_batch request."""
MAX_PARAM_LENGTH = 6000
MAX_DIGEST_LENGTH = 36


class MlflowWriter:
    """Delivers journal entries to MLflow; called by the journal's thread.

    `ids` maps the journal's names of runs, experiments and models to MLflow's ids. The journal keeps it on disk.
    """

    def __init__(self, uri: str, samples_step: int = 0):
        """samples_step: training step whose samples the page of a new experiment shows."""
        self._uri, self._samples_step = uri, samples_step
        self._client: Any = None
        self._failing: tuple[Entry, int] = ({}, 0)

    def __call__(self, entries: list[Entry], ids: dict[str, str]) -> int:
        """Deliver one or more entries from the front and return how many. Raises ConnectionError to try again later."""
        entry, count = _first_request(entries)
        try:
            self._client = self._client or mlflow_client(self._uri)
            getattr(self, f"_{entry['op']}")(entry, ids)
        except Exception as error:
            if is_unavailable(error) and not self._keeps_failing(entry):
                raise ConnectionError(str(error).splitlines()[0][:200]) from error
            if count > 1:
                return self(entries[:1], ids)  # only the entry that MLflow refuses may be lost
            # MLflow will never take it, and waiting would hold up everything behind it.
            say("tracking", f"{entry['op']} of {entry['run']} was refused by MLflow: {type(error).__name__}: {error}")
        return count

    def _keeps_failing(self, entry: Entry) -> bool:
        """Return whether an entry has failed MAX_ATTEMPTS times in a store that answers."""
        last, attempts = self._failing
        self._failing = (entry, attempts + 1 if entry == last else 1)
        if self._failing[1] < MAX_ATTEMPTS:
            return False
        try:
            check_tracking(self._uri)
        except ConnectionError:
            return False
        return True

    def _run(self, entry: Entry, ids: dict[str, str]) -> None:
        key, experiment = f"run {entry['run']}", f"experiment {entry['run']}"
        if experiment not in ids:
            name = entry["experiment"]
            ids[experiment] = self._find_experiment(name) or self._create_experiment(name)
        run_id = ids.get(key) or self._find_lost_run(ids[experiment], entry)
        if run_id is None:
            ids[key] = self._create_run(entry, ids)
            return
        ids[key] = run_id
        self._client.update_run(run_id, status="RUNNING")
        for name, value in entry["tags"].items():
            self._client.set_tag(run_id, name, value)

    def _find_lost_run(self, experiment: str, entry: Entry) -> str | None:
        """Return the run of the same execution if its machine was lost together with the journal on its disk.

        This process holds the lease on the output, so no other process works on that run. Outputs on a disk are left
        out: output and journal are lost together, and the same path on two machines means two outputs.
        """
        output = entry["tags"].get(tags.OUTPUT, "")
        if storage.is_local(output):
            return None
        same = f"attributes.run_name = '{entry['name']}' AND {tags.has(tags.OUTPUT, output)}"
        found = self._client.search_runs([experiment], f"attributes.status = 'RUNNING' AND {same}", max_results=1)
        return found[0].info.run_id if found else None

    def _create_run(self, entry: Entry, ids: dict[str, str]) -> str:
        run_tags = {tags.RUN_NAME: entry["name"], **entry["tags"]}
        if entry["parent"]:
            run_tags[tags.PARENT_RUN] = ids[f"run {entry['parent']}"]
        experiment = ids[f"experiment {entry['run']}"]
        run = self._client.create_run(experiment, start_time=entry["time"], tags=run_tags, run_name=entry["name"])
        return run.info.run_id

    def _find_experiment(self, name: str) -> str | None:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else None

    def _create_experiment(self, name: str) -> str:
        """Create an experiment. If the store is a database file, artifacts lie beside it, not in the working folder."""
        scheme, _, database = self._uri.partition(":///")
        location = str(Path(database).absolute().parent / "mlruns") if scheme == "sqlite" else None
        try:
            return self._client.create_experiment(name, location, experiment_tags(name, self._samples_step))
        except Exception:
            if found := self._find_experiment(name):  # another process created it first
                return found
            raise

    def _params(self, entry: Entry, ids: dict[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:MAX_PARAM_LENGTH]) for name, value in entry["params"].items()]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            self._client.log_batch(ids[f"run {entry['run']}"], params=params[start : start + PARAMS_PER_REQUEST])

    def _tag(self, entry: Entry, ids: dict[str, str]) -> None:
        self._client.set_tag(ids[f"run {entry['run']}"], entry["name"], entry["value"])

    def _metrics(self, entry: Entry, ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point["time"], point["step"], **_metric_context(point, ids))
            for point in entry["points"]
            for name, value in point["metrics"].items()
        ]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self._client.log_batch(ids[f"run {entry['run']}"], metrics=metrics[start : start + METRICS_PER_REQUEST])

    def _model(self, entry: Entry, ids: dict[str, str]) -> None:
        from mlflow.entities import LoggedModelOutput

        key, run_id = f"model {entry['digest']}", ids[f"run {entry['run']}"]
        if key in ids:
            return
        experiment = ids[f"experiment {entry['run']}"]
        # Another process may have logged it already: a training may be evaluated while it runs.
        same = tags.has(tags.CHECKPOINT_DIGEST, entry["digest"])
        found = self._client.search_logged_models([experiment], filter_string=same)
        model = found[0] if found else self._create_model(experiment, run_id, entry)
        if not found or entry["run"].startswith("train-"):
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry["step"])])
        ids[key] = model.model_id

    def _create_model(self, experiment: str, run_id: str, entry: Entry) -> Any:
        model = self._client.create_logged_model(
            experiment,
            name=entry["name"],
            source_run_id=run_id,
            params=entry["params"],
            tags=entry["tags"],
            model_type="raydit.checkpoint",
        )
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _model_removed(self, entry: Entry, ids: dict[str, str]) -> None:
        self._client.set_logged_model_tags(ids[f"model {entry['digest']}"], {tags.REMOVED: "true"})

    def _input(self, entry: Entry, ids: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": entry["source"]})
        dataset = Dataset(entry["name"], entry["digest"][:MAX_DIGEST_LENGTH], "local", source)
        context = [InputTag("mlflow.data.context", entry["context"])]
        self._client.log_inputs(ids[f"run {entry['run']}"], datasets=[DatasetInput(dataset, context)])

    def _artifact(self, entry: Entry, ids: dict[str, str]) -> None:
        if storage.exists(entry["path"]):
            with storage.local_copy(entry["path"]) as file:
                self._client.log_artifact(ids[f"run {entry['run']}"], file, entry["folder"])

    def _image(self, entry: Entry, ids: dict[str, str]) -> None:
        if storage.exists(entry["path"]):
            from PIL import Image

            with storage.open_file(entry["path"]) as file, Image.open(file) as image:
                self._client.log_image(ids[f"run {entry['run']}"], image, key=entry["key"], step=entry["step"])

    def _end(self, entry: Entry, ids: dict[str, str]) -> None:
        self._client.set_terminated(ids[f"run {entry['run']}"], entry["status"], end_time=entry["time"])


def _first_request(entries: list[Entry]) -> tuple[Entry, int]:
    """Return the first entry and 1, or consecutive metrics of one run joined into one entry, and their number."""
    first = entries[0]
    if first["op"] != "metrics":
        return first, 1
    points = list(takewhile(lambda entry: entry["op"] == "metrics" and entry["run"] == first["run"], entries))
    return {"op": "metrics", "run": first["run"], "points": points}, len(points)


def _metric_context(point: Entry, ids: dict[str, str]) -> dict[str, str]:
    """Return the LoggedModel and the data set that a metric belongs to, as arguments of mlflow's Metric."""
    context = {}
    if point["model"]:
        context["model_id"] = ids[f"model {point['model']}"]
    if point["dataset"]:
        context["dataset_name"], digest = point["dataset"]
        context["dataset_digest"] = digest[:MAX_DIGEST_LENGTH]
    return context
