"""The page of an experiment in MLflow's UI: its kind, a description, and a saved view that compares trainings."""

import json
import shlex
import time
from typing import Any, NamedTuple

from pipelines.tracking import tags
from pipelines.tracking.run_log import SCORE
from pipelines.tracking.searches import experiment_ids

VIEW, VIEW_ID = "Trainings compared", "raydit-trainings"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_ID}"
SAMPLES = "samples"
"""Name of the pictures of samples that a training logs."""
SECTION = "trainings"
CHARTS = (
    ("train/loss",),
    tuple(f"train/loss_quartile_{q}" for q in (1, 2, 3, 4)),
    ("train/images_per_second",),
    ("train/data_wait", "train/checkpoint_wait"),
)
"""Metrics of the charts in the view, chart by chart."""
COLUMNS = (
    "params.`train.steps`",
    "params.`train.global_batch_size`",
    "params.`train.learning_rate`",
    "params.`objective.kind`",
    "metrics.`train/loss`",
    "metrics.`train/images_per_second`",
    "tags.`raydit.hardware`",
)
"""Columns of the view's table of runs, before the score's."""
MODEL_TRAINING = "workflowType=machine_learning"
"""Part of an address that opens the UI for model training, which opens for language models and their traces."""


class ViewContent(NamedTuple):
    """What the view shows of the trainings so far, beside what it always shows."""

    samples_step: int = 0
    """Step whose samples it shows; 0: there are none, and it has no picture."""
    score: str = ""
    """Metric of the trainings' scores; empty: nothing is scored."""


def landing_page(client: Any) -> str:
    """Return the route in MLflow's UI, to be appended to a store's address, of the experiment with the newest run.

    It opens with the trainings' charts, without any trainings with the table of runs, and without any runs with the
    list of experiments. client: MLflow's.
    """
    newest = client.search_runs(experiment_ids(client), order_by=["attributes.start_time DESC"], max_results=1)
    if not newest:
        return f"/#/experiments?{MODEL_TRAINING}"
    experiment = newest[0].info.experiment_id
    route = f"/#/experiments/{experiment}/runs?{MODEL_TRAINING}"
    has_view = VIEW_TAG in client.get_experiment(experiment).tags
    if has_view and client.search_runs([experiment], tags.has(tags.STAGE, "train"), max_results=1):
        route += f"&compareRunsMode=CHART&viewStateShareKey={VIEW_ID}"
    return route


def experiment_tags(name: str) -> dict[str, str]:
    """Return the tags of a new experiment, under MLflow's own names."""
    return {
        "mlflow.experimentKind": "custom_model_development",  # else the UI opens for language models and their traces
        tags.DESCRIPTION: experiment_description(name),
        VIEW_TAG: saved_view(ViewContent()),
    }


def experiment_description(name: str) -> str:
    """Return the description of a recipe's experiment, in Markdown."""
    return (
        f"Runs of the raydit recipe `{name}`: images, latents, trainings and their scores. A `pipeline` run holds the "
        f"stages that one command ran: open it by its plus sign.\n\nViews, {VIEW}: the trainings side by side, with "
        f"their samples. Which checkpoint is best: `raydit runs best {shlex.quote(name)}`. What one was made from: "
        "`raydit lineage CHECKPOINT`."
    )


def saved_view(content: ViewContent) -> str:
    """Return the view as MLflow 3.17's UI saves one: runs of stage train, with charts in a section of their own.

    A UI that expects another form shows its default view.
    """
    samples = {**_chart(0, "IMAGE"), "imageKeys": [SAMPLES], "showRunParams": False, "step": content.samples_step}
    charts = [(content.score,), *CHARTS] if content.score else CHARTS
    lines = [
        {**_chart(index, "LINE"), "metricKey": metrics[0], "selectedMetricKeys": metrics, "xAxisKey": "step"}
        | {"lineSmoothness": 0, "useGlobalLineSmoothing": True}
        for index, metrics in enumerate(charts, start=1)
    ]
    section = {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": False, "deleted": False}
    state = {
        "searchFilter": tags.has(tags.STAGE, "train"),
        # Sorted by date, the UI would fold them into their pipeline runs, whose charts are empty.
        "orderByKey": "metrics.`train/loss`",
        "orderByAsc": True,
        "selectedColumns": [*([f"metrics.`{content.score}`"] if content.score else []), *COLUMNS],
        "compareRunCharts": [*([samples] if content.samples_step else []), *lines],
        "compareRunSections": [{**section, "isGenerated": False}],
        "isAccordionReordered": True,  # this section first, before those of all metrics
    }
    now = int(1000 * time.time())
    return json.dumps({"name": VIEW, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def read_content(view: str) -> ViewContent:
    """Return what a view, as saved_view returns it, shows of the trainings."""
    charts = json.loads(json.loads(view)["state"])["compareRunCharts"]
    steps = [chart["step"] for chart in charts if chart["type"] == "IMAGE"]
    scores = [chart["metricKey"] for chart in charts if chart.get("metricKey", "").startswith(SCORE)]
    return ViewContent(*steps[:1] or [0], *scores[:1])


def update_view(client: Any, experiment_id: str, **changes: Any) -> None:
    """Change what an experiment's view shows, if it has the view; changes: fields of ViewContent."""
    view = client.get_experiment(experiment_id).tags.get(VIEW_TAG)
    if view is None:
        return
    content = read_content(view)
    changed = content._replace(**changes)
    if changed != content:
        client.set_experiment_tag(experiment_id, VIEW_TAG, saved_view(changed))


def _chart(index: int, kind: str) -> dict:
    shared = {"uuid": f"raydit-{index}", "type": kind, "metricSectionId": SECTION}
    return {**shared, "runsCountToCompare": 10, "deleted": False, "isGenerated": False}
