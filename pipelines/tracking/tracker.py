"""Tracking: runs, metrics, models and pictures in MLflow.

One process writes: the one that runs the jobs. It appends to a journal, from which a thread tells MLflow; work
never waits for a tracking server, and a server that is away costs nothing but its answers.
"""

import json
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.jobs import current_job_id
from pipelines.artifacts import digest_of
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.tracking.experiment_page import experiment_tags, last_samples
from pipelines.tracking.journal import Journal
from pipelines.tracking.provenance import OUTPUT
from pipelines.tracking.store import check_tracking, is_unavailable, mlflow_client, tracking_uri

JOURNAL_FOLDER = ".tracking"
CLOSE_SECONDS = 30.0
"""Longer than MLflow's client waits for a database that another process writes to, 20 s."""
MOST_ATTEMPTS = 10
"""How often something is told to a store that answers other questions: some minutes. MLflow calls any failure
without a code of its own an internal error, which may pass, or may not."""


class Tracker:
    """Runs of one experiment. Calls return at once."""

    def __init__(self, journal: Journal, experiment: str, uri: str):
        self._journal, self._experiment, self.uri = journal, experiment, uri
        self._runs: dict[str, bool] = {}
        for entry in journal.entries():
            if entry["op"] == "run":
                self._runs[entry["run"]] = False
            elif entry["op"] == "end":
                self._runs[entry["run"]] = entry["status"] == "FINISHED"

    @classmethod
    def open(cls, config: Recipe, part: str = "") -> "Tracker":
        """The tracker of a recipe's output folder; delivers what an earlier process could not.

        part: of the output, whose journal is its own, because another process may write the rest's.
        """
        uri = tracking_uri(config.tracking.uri)
        name = f"{part and part + '-'}{digest_of(uri)[:12]}.jsonl"
        path = Path(storage.on_this_machine(config.folder(JOURNAL_FOLDER))) / name

        def away(reason: str) -> None:
            say("tracking", f"{uri} does not answer ({reason}); work goes on, results are kept in {path}")

        return cls(Journal(path, MlflowCourier(uri, last_samples(config.train)), away), config.name, uri)

    @property
    def folder(self) -> Path:
        """Where the journal lies, and files that it names."""
        return self._journal.path.parent

    def start_run(self, stage: str, identity: dict, *, parent: "RunLog | None" = None, tags=None) -> "RunLog":
        """Begin a run, or take up the one that the same execution left unfinished when it was cut off."""
        base, number = f"{stage}-{digest_of(identity)[:8]}", 1
        key = base
        while self._runs.get(key):
            number += 1
            key = f"{base}-{number}"
        self._runs[key] = False
        run = RunLog(self._journal, key)
        run._tell(
            "run",
            experiment=self._experiment,
            name=_readable(key, stage, tags or {}),
            parent=parent.key if parent else None,
            tags={"raydit.stage": stage, **_job_tags(), **(tags or {})},
        )
        return run

    def flush(self) -> None:
        """Wait until MLflow knows everything so far, but not for ever."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._journal.undelivered and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        if not self._journal.close(CLOSE_SECONDS):
            say("tracking", f"{self.uri} has not taken everything yet; the rest is delivered by the next raydit "
                            f"command with this output, and kept until then in {self._journal.path}")  # fmt: skip


def _readable(key: str, stage: str, tags: dict[str, str]) -> str:
    """The name of a run in the UI: with the checkpoint that it is about."""
    checkpoint = tags.get("raydit.checkpoint", "").partition("?")[0].rstrip("/").rpartition("/")[2]
    return key.replace(stage, f"{stage}-{checkpoint}", 1) if checkpoint else key


def _job_tags() -> dict[str, str]:
    """The Ray job this process runs in, if it does."""
    return {"raydit.job_id": job} if (job := current_job_id()) else {}


class RunLog:
    """One run, written to through the journal."""

    def __init__(self, journal: Journal, key: str):
        self._journal, self.key = journal, key

    def _tell(self, op: str, **what) -> None:
        self._journal.append({"op": op, "run": self.key, "time": int(time.time() * 1000), **what})

    def params(self, params: dict) -> None:
        """Settings, flattened with dots."""
        self._tell("params", params=flatten(params))

    def tag(self, name: str, value: str) -> None:
        self._tell("tag", name=name, value=value)

    def metrics(self, metrics: dict[str, float], step: int = 0, *, model: str = "", dataset=None) -> None:
        """Numbers at a step; `model` is a checkpoint digest given to `model` before; dataset (name, digest)."""
        self._tell("metrics", metrics=metrics, step=step, model=model, dataset=dataset)

    def points(self, prefix: str) -> dict[str, dict[int, float]]:
        """All that was told of metrics below a prefix, by name and step, by earlier processes of this run too."""
        points: dict[str, dict[int, float]] = {}
        for entry in self._journal.entries():
            if entry["op"] == "metrics" and entry["run"] == self.key:
                for name, value in entry["metrics"].items():
                    if name.startswith(prefix):
                        points.setdefault(name.removeprefix(prefix), {})[entry["step"]] = value
        return points

    def model(self, digest: str, *, name: str, step: int, params: dict, tags: dict[str, str]) -> None:
        """A checkpoint, as a LoggedModel; telling it twice makes one."""
        self._tell("model", digest=digest, name=name, step=step, params=flatten(params), tags=tags)

    def model_removed(self, digest: str) -> None:
        """The files of a checkpoint are gone; its metrics stay."""
        self._tell("model_removed", digest=digest)

    def input(self, *, name: str, digest: str, source: str, context: str) -> None:
        """A data set that this run read."""
        self._tell("input", name=name, digest=digest, source=source, context=context)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file to keep with the run, by path or URI."""
        self._tell("artifact", path=str(path), folder=folder)

    def image(self, path: str | Path, key: str, step: int) -> None:
        """A picture by path or URI, shown in the UI with a slider over steps."""
        self._tell("image", path=str(path), key=key, step=step)

    def end(self, status: str) -> None:
        self._tell("end", status=status)


def flatten(nested: dict, prefix: str = "") -> dict[str, str]:
    """{"train": {"steps": 5}} -> {"train.steps": "5"}; what is not set is left out."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = str(value)
    return flat


class MlflowCourier:
    """Delivers journal entries to MLflow. `known` maps our names of runs and models to MLflow's ids."""

    def __init__(self, uri: str, samples_step: int = 0):
        """samples_step: at which the page of a new experiment shows samples."""
        self._uri, self._samples_step = uri, samples_step
        self._client: Any = None
        self._stuck: tuple[dict, int] = ({}, 0)

    def __call__(self, entries: list[dict], known: dict) -> int:
        entry, count = _first_call(entries)
        try:
            self._client = self._client or mlflow_client(self._uri)
            getattr(self, f"_{entry['op']}")(entry, known)
        except Exception as error:
            if is_unavailable(error) and not self._is_stuck(entry):
                raise ConnectionError(str(error).splitlines()[0][:200]) from error
            if count > 1:
                return self(entries[:1], known)  # only what is refused itself shall be lost
            # Refused for good: waiting would hold up everything behind it.
            say("tracking", f"{entry['op']} of {entry['run']} refused: {type(error).__name__}: {error}")
        return count

    def _is_stuck(self, entry: dict) -> bool:
        """Whether a store that answers has failed at this entry again and again: it will never take it."""
        last, attempts = self._stuck
        self._stuck = (entry, attempts + 1 if entry == last else 1)
        if self._stuck[1] < MOST_ATTEMPTS:
            return False
        try:
            check_tracking(self._uri)
        except ConnectionError:
            return False
        return True

    def _run(self, entry: dict, known: dict) -> None:
        key, experiment = f"run {entry['run']}", f"experiment {entry['run']}"
        if experiment not in known:
            name = entry["experiment"]
            known[experiment] = self._find_experiment(name) or self._create_experiment(name)
        run_id = known.get(key) or self._lost_run(known[experiment], entry)
        if run_id is None:
            known[key] = self._create_run(entry, known)
            return
        known[key] = run_id
        self._client.update_run(run_id, status="RUNNING")
        for name, value in entry["tags"].items():
            self._client.set_tag(run_id, name, value)

    def _lost_run(self, experiment: str, entry: dict) -> str | None:
        """The run of the same execution, whose machine was lost with the journal on its disk.

        Nobody else runs it: this process holds the lease on the output. Not on a disk, where journal and output are
        lost together, and where the same path on two machines is two outputs.
        """
        output = entry["tags"].get(OUTPUT, "")
        if storage.is_local(output):
            return None
        same = f"attributes.run_name = '{entry['name']}' AND tags.`{OUTPUT}` = '{output}'"
        found = self._client.search_runs([experiment], f"attributes.status = 'RUNNING' AND {same}", max_results=1)
        return found[0].info.run_id if found else None

    def _create_run(self, entry: dict, known: dict) -> str:
        tags = {"mlflow.runName": entry["name"], **entry["tags"]}
        if entry["parent"]:
            tags["mlflow.parentRunId"] = known[f"run {entry['parent']}"]
        experiment = known[f"experiment {entry['run']}"]
        run = self._client.create_run(experiment, start_time=entry["time"], tags=tags, run_name=entry["name"])
        return run.info.run_id

    def _find_experiment(self, name: str) -> str | None:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else None

    def _create_experiment(self, name: str) -> str:
        """With a database file as the store, files lie beside it, not where this process happens to run."""
        scheme, _, database = self._uri.partition(":///")
        location = str(Path(database).absolute().parent / "mlruns") if scheme == "sqlite" else None
        try:
            return self._client.create_experiment(name, location, experiment_tags(name, self._samples_step))
        except Exception:
            if found := self._find_experiment(name):  # another process was faster
                return found
            raise

    def _params(self, entry: dict, known: dict) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:6000]) for name, value in entry["params"].items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(known[f"run {entry['run']}"], params=params[start : start + 100])

    def _tag(self, entry: dict, known: dict) -> None:
        self._client.set_tag(known[f"run {entry['run']}"], entry["name"], entry["value"])

    def _metrics(self, entry: dict, known: dict) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point["time"], point["step"], **_context(point, known))
            for point in entry["points"]
            for name, value in point["metrics"].items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(known[f"run {entry['run']}"], metrics=metrics[start : start + 1000])

    def _model(self, entry: dict, known: dict) -> None:
        from mlflow.entities import LoggedModelOutput

        key, run_id = f"model {entry['digest']}", known[f"run {entry['run']}"]
        if key in known:
            return
        experiment = known[f"experiment {entry['run']}"]
        # Another process may have told of it: a training that is scored while it runs.
        same = f"tags.`raydit.checkpoint_digest` = '{entry['digest']}'"
        found = self._client.search_logged_models([experiment], filter_string=same)
        model = found[0] if found else self._create_model(experiment, run_id, entry)
        if not found or entry["run"].startswith("train-"):
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry["step"])])
        known[key] = model.model_id

    def _create_model(self, experiment: str, run_id: str, entry: dict):
        model = self._client.create_logged_model(
            experiment,
            name=entry["name"],
            source_run_id=run_id,
            params=entry["params"],
            tags=entry["tags"],
            model_type="raydit.checkpoint",
        )
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _model_removed(self, entry: dict, known: dict) -> None:
        self._client.set_logged_model_tags(known[f"model {entry['digest']}"], {"raydit.removed": "true"})

    def _input(self, entry: dict, known: dict) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": entry["source"]})
        dataset = Dataset(entry["name"], entry["digest"][:36], "local", source)
        tags = [InputTag("mlflow.data.context", entry["context"])]
        self._client.log_inputs(known[f"run {entry['run']}"], datasets=[DatasetInput(dataset, tags)])

    def _artifact(self, entry: dict, known: dict) -> None:
        if storage.exists(entry["path"]):
            with storage.local_copy(entry["path"]) as file:
                self._client.log_artifact(known[f"run {entry['run']}"], file, entry["folder"])

    def _image(self, entry: dict, known: dict) -> None:
        if storage.exists(entry["path"]):
            from PIL import Image

            with storage.opened(entry["path"]) as file, Image.open(file) as image:
                self._client.log_image(known[f"run {entry['run']}"], image, key=entry["key"], step=entry["step"])

    def _end(self, entry: dict, known: dict) -> None:
        self._client.set_terminated(known[f"run {entry['run']}"], entry["status"], end_time=entry["time"])


def _first_call(entries: list[dict]) -> tuple[dict, int]:
    """The first entry and 1, or the metrics of one run that follow each other as one entry, and their number."""
    first = entries[0]
    if first["op"] != "metrics":
        return first, 1
    points = list(takewhile(lambda entry: entry["op"] == "metrics" and entry["run"] == first["run"], entries))
    return {"op": "metrics", "run": first["run"], "points": points}, len(points)


def _context(point: dict, known: dict) -> dict:
    """The model and data set that a metric is about."""
    context = {}
    if point["model"]:
        context["model_id"] = known[f"model {point['model']}"]
    if point["dataset"]:
        context["dataset_name"], digest = point["dataset"]
        context["dataset_digest"] = digest[:36]
    return context
