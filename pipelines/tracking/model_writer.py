"""Delivery of journal entries about LoggedModels: the checkpoints themselves, their pictures and their scores."""

import json
import re
from typing import Any
from urllib.parse import quote

from pipelines.tracking import tags
from pipelines.tracking.experiment_page import SAMPLES, update_view
from pipelines.tracking.experiments import clean_name
from pipelines.tracking.journal import Entry, Ids
from pipelines.tracking.searches import find_model, search_runs


class ModelWriter:
    """The part of MlflowWriter that writes LoggedModels."""

    _client: Any

    def _model(self, entry: Entry, ids: Ids) -> None:
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        key, run_id = f"model {entry['digest']}", run_id_of(entry, ids)
        created = False
        if key in ids and find_model(self._client, ids[key]) is None:
            del ids[key]  # it was deleted in MLflow, where nothing leads to it any more
        if key not in ids:
            experiment = ids[f"experiment {entry['run']}"]
            # Another process may have logged it already: a training may be evaluated while it runs.
            same = tags.has(tags.CHECKPOINT_DIGEST, entry["digest"])
            found = self._client.search_logged_models([experiment], filter_string=same)
            created = not found
            ids[key] = (found[0] if found else self._create_model(experiment, run_id, entry)).model_id
        run = self._client.get_run(run_id)
        if ids[key] in _model_ids(run):
            return
        if created or entry["run"].startswith("train-"):
            self._client.log_outputs(run_id, [LoggedModelOutput(ids[key], entry["step"])])
        else:
            self._client.log_inputs(run_id, models=[LoggedModelInput(ids[key])])

    def _create_model(self, experiment: str, run_id: str, entry: Entry) -> Any:
        model = self._client.create_logged_model(
            experiment,
            name=clean_name(entry["name"]),
            source_run_id=run_id,
            params=entry["params"],
            tags=entry["tags"],
            model_type="raydit.checkpoint",
        )
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _model_picture(self, entry: Entry, ids: Ids) -> None:
        model = self._find_model(entry, ids)
        if model is not None:
            description = model.tags.get(tags.DESCRIPTION, "")
            if not picture_in(description):
                text = f"{description}\n\n{_picture(run_id_of(entry, ids), entry['artifact'])}".strip()
                self._client.set_logged_model_tags(model.model_id, {tags.DESCRIPTION: text})

    def _scores(self, entry: Entry, ids: Ids) -> None:
        """Log scores to the run of a training; those that it has at this step already are left as they are."""
        from mlflow.entities import Metric

        model = self._find_model(entry, ids)
        run = self._find_training(model) if model is not None else None
        if run is None:
            return
        run_id, known = run.info.run_id, json.loads(run.data.tags.get(tags.SCORES, "{}"))
        protocols = dict.fromkeys(entry["metrics"], entry["protocol"]) | known
        if protocols != known:
            self._client.set_tag(run_id, tags.SCORES, json.dumps(protocols))
        metrics = []
        for name, value in entry["metrics"].items():
            key = f"eval/{name}" if protocols[name] == entry["protocol"] else f"eval/{entry['protocol']}/{name}"
            points = self._client.get_metric_history(run_id, key) if key in run.data.metrics else ()
            if entry["step"] not in [point.step for point in points]:
                metrics.append(Metric(key, value, entry["time"], entry["step"]))
        self._client.log_batch(run_id, metrics=metrics)
        headline = next(iter(entry["metrics"]))
        if protocols[headline] == entry["protocol"]:
            update_view(self._client, run.info.experiment_id, score=f"eval/{headline}")

    def _find_model(self, entry: Entry, ids: Ids) -> Any | None:
        """Return the LoggedModel that an entry is about; None if it was not logged, or was deleted."""
        model_id = ids.get(f"model {entry['digest']}")
        if model_id is None:
            return None
        found = tags.has(tags.CHECKPOINT_DIGEST, entry["digest"])
        models = self._client.search_logged_models([ids[f"experiment {entry['run']}"]], filter_string=found)
        return next((model for model in models if model.model_id == model_id), None)

    def _find_training(self, model: Any) -> Any | None:
        """Return the run of the training that wrote a model; None if there is none, or if it was deleted.

        An evaluation that was faster may have logged the model, which is then among the outputs of both runs.
        """
        trainings = search_runs(self._client, [model.experiment_id], tags.has(tags.STAGE, "train"))
        wrote = [run for run in trainings if model.model_id in _model_ids(run)]
        return next((run for run in wrote if run.info.run_id == model.source_run_id), next(iter(wrote), None))


def run_id_of(entry: Entry, ids: Ids) -> str:
    """Return the id of the run that an entry is about. Raises LookupError if MLflow has not taken it."""
    if run_id := ids.get(f"run {entry['run']}"):
        return run_id
    raise LookupError(f"MLflow has not taken the run {entry['run']}, which this is of")


def _model_ids(run: Any) -> list[str]:
    """Return the ids of the LoggedModels that a run wrote or read."""
    outputs = run.outputs.model_outputs if run.outputs else ()
    inputs = run.inputs.model_inputs if run.inputs else ()
    return [each.model_id for each in (*outputs, *inputs)]


def _picture(run_id: str, artifact: str) -> str:
    """Return an artifact of a run as a picture in Markdown; its address is relative to that of the UI."""
    return f"![{SAMPLES}](get-artifact?path={quote(artifact, safe='')}&run_uuid={run_id})"


def picture_in(description: str) -> str:
    """Return the picture in a description, in Markdown; empty if it has none."""
    found = re.search(r"!\[[^][]*\]\([^()]*\)", description)
    return found[0] if found else ""
