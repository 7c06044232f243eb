"""Delivery of journal entries about LoggedModels: the checkpoints themselves, their pictures and their scores."""

import re
from typing import Any
from urllib.parse import quote

from pipelines.tracking import tags
from pipelines.tracking.experiment_page import SAMPLES, update_view
from pipelines.tracking.experiments import clean_name
from pipelines.tracking.journal import Entry, Ids
from pipelines.tracking.run_log import SCORE
from pipelines.tracking.searches import find_model, find_run_of_id, search_runs

MAX_DIGEST_LENGTH = 36
"""Characters of a data set's digest that MLflow keeps."""


class ModelWriter:
    """The part of MlflowWriter that writes LoggedModels."""

    _client: Any

    def _model(self, entry: Entry, ids: Ids) -> None:
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        key, run_id = f"model {entry['digest']}", run_id_of(entry, ids)
        created = False
        experiment = ids[f"experiment {entry['run']}"]
        known = find_model(self._client, ids[key]) if key in ids else None
        if known is None or known.experiment_id != experiment:
            # There is none yet, or it was deleted, or it belongs to another experiment, from which none is promoted.
            # Another process may have logged it already: a training may be evaluated while it runs.
            same = tags.has(tags.CHECKPOINT_DIGEST, entry["digest"])
            found = self._client.search_logged_models([experiment], filter_string=same)
            created = not found
            known = found[0] if found else self._create_model(experiment, run_id, entry)
            ids[key] = known.model_id
        if known.status != "READY":  # also after a kill between the two requests
            self._client.finalize_logged_model(known.model_id, "READY")
        run = self._client.get_run(run_id)
        if ids[key] in _model_ids(run):
            return
        if is_of_training(entry):
            self._copy_scores(known, run_id)  # first, because a model among the outputs ends this method
        if created or is_of_training(entry):
            self._client.log_outputs(run_id, [LoggedModelOutput(ids[key], entry["step"])])
        else:
            self._client.log_inputs(run_id, models=[LoggedModelInput(ids[key])])

    def _create_model(self, experiment: str, run_id: str, entry: Entry) -> Any:
        return self._client.create_logged_model(
            experiment,
            name=clean_name(entry["name"]),
            source_run_id=run_id,
            params=entry["params"],
            tags=entry["tags"],
            model_type="raydit.checkpoint",
        )

    def _model_picture(self, entry: Entry, ids: Ids) -> None:
        model = self._find_model(entry, ids)
        if model is not None:
            description = model.tags.get(tags.DESCRIPTION, "")
            if not picture_in(description):
                text = f"{description}\n\n{_picture(run_id_of(entry, ids), entry['artifact'])}".strip()
                self._client.set_logged_model_tags(model.model_id, {tags.DESCRIPTION: text})

    def _scores(self, entry: Entry, ids: Ids) -> None:
        """Log scores to the run of a training, and show the first of them in the table of runs."""
        model = self._find_model(entry, ids)
        run = self._find_training(model) if model is not None else None
        if run is None:
            return
        protocols = self._log_scores(run, entry["metrics"], entry["step"], entry["protocol"], entry["time"])
        headline = next(iter(entry["metrics"]))
        if protocols[headline] == entry["protocol"]:
            update_view(self._client, run.info.experiment_id, score=f"{SCORE}{headline}")

    def _copy_scores(self, model: Any, run_id: str) -> None:
        """Log the scores that a LoggedModel has to the run of its training, which MLflow took later or anew."""
        points: dict[tuple[str, str, int], list[Any]] = {}
        for point in sorted(model.metrics or (), key=lambda point: point.timestamp):
            if point.key.startswith(SCORE) and point.dataset_digest:
                points.setdefault((point.run_id, point.dataset_digest, point.step), []).append(point)
        for (evaluation, protocol, step), group in points.items():
            scored = find_run_of_id(self._client, evaluation)
            if scored is not None and tags.DISQUALIFIED not in scored.data.tags:
                metrics = {point.key.removeprefix(SCORE): point.value for point in group}
                self._log_scores(self._client.get_run(run_id), metrics, step, protocol, group[0].timestamp)

    def _log_scores(self, run: Any, metrics: dict[str, float], step: int, protocol: str, time: int) -> dict[str, str]:
        """Log scores to a run, and return the protocols of its metrics; what it has at a step already is left as it is.

        metrics: by name without eval/. time: in milliseconds since 1970.
        """
        from mlflow.entities import Metric

        run_id, known = run.info.run_id, _score_protocols(run.data.tags)
        protocols = dict.fromkeys(metrics, protocol) | known
        if protocols != known:
            names = sorted(name for name in protocols if protocols[name] == protocol)
            self._client.set_tag(run_id, f"{tags.SCORES}.{protocol}", " ".join(names))
        found = []
        for name, value in metrics.items():
            key = f"{SCORE}{name}" if protocols[name] == protocol else f"{SCORE}{protocol}/{name}"
            points = self._client.get_metric_history(run_id, key) if key in run.data.metrics else ()
            if step not in [point.step for point in points]:
                found.append(Metric(key, value, time, step))
        self._client.log_batch(run_id, metrics=found)
        return protocols

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


def is_of_training(entry: Entry) -> bool:
    """Return whether an entry is about the run of a training; the key of a run begins with its stage."""
    return entry["run"].startswith("train-")


def metric_context(point: Entry, ids: Ids) -> dict[str, str]:
    """Return the LoggedModel, if there is one, and the data set of a metric, as arguments of mlflow's Metric."""
    context = {}
    if model_id := ids.get(f"model {point['model']}"):
        context["model_id"] = model_id
    if point["dataset"]:
        context["dataset_name"], digest = point["dataset"]
        context["dataset_digest"] = digest[:MAX_DIGEST_LENGTH]
    return context


def _score_protocols(run_tags: dict[str, str]) -> dict[str, str]:
    """Return the protocol ids of the metrics eval/NAME of a training's run, by NAME."""
    # Older versions kept all of them in one JSON object, of which MLflow may have cut the end.
    protocols = dict(re.findall(r'"([^"]+)": "([^"]+)"', run_tags.get(tags.SCORES, "")))
    for tag, names in run_tags.items():
        if tag.startswith(f"{tags.SCORES}."):
            protocols |= dict.fromkeys(names.split(), tag.removeprefix(f"{tags.SCORES}."))
    return protocols


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
