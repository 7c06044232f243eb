"""The page of an experiment in MLflow's UI: its kind, a description, and a saved view that compares trainings."""

import json
import time

from pipelines.config.training import TrainConfig
from pipelines.tracking import tags

VIEW, VIEW_ID = "Trainings compared", "raydit-trainings"
SECTION = "trainings"
CHARTS = (
    ("train/loss",),
    tuple(f"train/loss_quartile_{q}" for q in (1, 2, 3, 4)),
    ("train/images_per_second",),
    ("train/data_wait", "train/checkpoint_wait"),
)
"""Metrics of the charts in the view, chart by chart."""


def experiment_tags(name: str, samples_step: int) -> dict[str, str]:
    """Return the tags of a new experiment, under MLflow's own names.

    samples_step: training step whose samples the view shows.
    """
    return {
        "mlflow.experimentKind": "custom_model_development",  # else the UI opens for language models and their traces
        tags.DESCRIPTION: experiment_description(name),
        f"mlflow.sharedViewState.{VIEW_ID}": saved_view(samples_step),
    }


def last_samples(train: TrainConfig) -> int:
    """Return the last step at which a training draws samples."""
    return train.steps // (train.sample_every or 1) * (train.sample_every or 1)


def experiment_description(name: str) -> str:
    """Return the description of a recipe's experiment, in Markdown."""
    return (
        f"Runs of the raydit recipe `{name}`: images, latents, trainings and their scores. A `pipeline` run holds the "
        f"stages that one command ran: open it by its plus sign.\n\nViews, {VIEW}: the trainings side by side, with "
        f"their samples. Which checkpoint is best: `raydit runs best {name}`. What one was made from: "
        "`raydit lineage CHECKPOINT`."
    )


def saved_view(samples_step: int) -> str:
    """Return the view as MLflow 3.17's UI saves one: runs of stage train, with charts in a section of their own.

    A UI that expects another form shows its default view.
    """
    samples = {**_chart(0, "IMAGE"), "imageKeys": ["samples"], "showRunParams": False, "step": samples_step}
    lines = [
        {**_chart(index, "LINE"), "metricKey": metrics[0], "selectedMetricKeys": metrics, "xAxisKey": "step"}
        | {"lineSmoothness": 0, "useGlobalLineSmoothing": True}
        for index, metrics in enumerate(CHARTS, start=1)
    ]
    section = {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": False, "deleted": False}
    state = {
        "searchFilter": tags.has(tags.STAGE, "train"),
        # Sorted by date, the UI would fold them into their pipeline runs, whose charts are empty.
        "orderByKey": "metrics.`train/loss`",
        "orderByAsc": True,
        "compareRunCharts": [samples, *lines],
        "compareRunSections": [{**section, "isGenerated": False}],
        "isAccordionReordered": True,  # this section first, before those of all metrics
    }
    now = int(1000 * time.time())
    return json.dumps({"name": VIEW, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def _chart(index: int, kind: str) -> dict:
    shared = {"uuid": f"raydit-{index}", "type": kind, "metricSectionId": SECTION}
    return {**shared, "runsCountToCompare": 10, "deleted": False, "isGenerated": False}
