"""What a stage logs about its run. Stages see this interface only; the journal and MLflow are behind it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FIGURES = "figures"
"""Folder of figures in an output, and among the artifacts of a run."""


SCORE = "eval/"
"""Prefix of an evaluation's metrics."""
SYSTEM = "system/"
"""Prefix of metrics of the machine. MLflow's UI shows them on a page of their own."""


class DatasetRef(NamedTuple):
    """A data set that a metric refers to."""

    name: str
    digest: str


class RunLog(Protocol):
    """One MLflow run. Calls return at once; what they log is delivered later, in order."""

    @property
    def key(self) -> str:
        """Name of the run in the journal."""
        ...

    def params(self, params: dict[str, Any]) -> None:
        """Log what identifies the run: settings that are the same in every attempt at it.

        Nested names are joined by dots, and what is not set is left out.
        """
        ...

    def settings(self, settings: dict[str, Any]) -> None:
        """Log settings that may be others when an interrupted stage resumes, such as the number of workers."""
        ...

    def tag(self, name: str, value: str) -> None:
        """Set a tag; see pipelines.tracking.tags."""
        ...

    def metrics(
        self, metrics: dict[str, float], step: int = 0, *, model: str = "", dataset: DatasetRef | None = None
    ) -> None:
        """Log values at a step. model: digest of a checkpoint that `model` has logged before; empty: none."""
        ...

    def points(self, prefix: str) -> dict[str, dict[int, float]]:
        """Return every value logged under a prefix, by name and step, including those of earlier processes."""
        ...

    def model(self, digest: str, *, name: str, step: int, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Log a checkpoint as a LoggedModel. Logging the same digest again creates no second one."""
        ...

    def model_removed(self, digest: str) -> None:
        """Mark the LoggedModel of a checkpoint whose files were removed; its metrics stay."""
        ...

    def model_picture(self, digest: str, artifact: str) -> None:
        """Show a picture in the description of a checkpoint's LoggedModel, if it shows none yet.

        artifact: path of the picture among the artifacts of this run.
        """
        ...

    def scores(self, digest: str, metrics: dict[str, float], step: int, protocol_id: str) -> None:
        """Log the metrics of an evaluation, without eval/, to the run of the training that wrote the checkpoint.

        Each has one value at a step there. The first protocol with a metric of a name has it as eval/NAME, any other
        one as eval/PROTOCOL_ID/NAME: values of several protocols cannot be compared. Does nothing for a checkpoint of
        which no training is known.
        """
        ...

    def input(self, *, name: str, digest: str, source: str, context: str) -> None:
        """Log a data set that the run read."""
        ...

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file, given by path or URI, with the run."""
        ...

    def image(self, path: str | Path, key: str, step: int) -> None:
        """Log a picture, given by path or URI; MLflow's UI shows those of one key with a slider over steps."""
        ...

    def end(self, status: str) -> None:
        """Close the run. status: FINISHED, FAILED or KILLED."""
        ...


def log_sections(run: RunLog, sections: dict[str, Any], may_change: Mapping[str, Collection[str]]) -> None:
    """Log sections of a recipe to a run: as settings those fields that may change, and as params all others.

    sections: dictionaries, or single values, by name. may_change: names of fields by section.
    """
    params, settings = {}, {}
    for name, section in sections.items():
        changeable = may_change.get(name, ())
        if changeable:
            settings[name] = {field: value for field, value in section.items() if field in changeable}
            section = {field: value for field, value in section.items() if field not in changeable}
        params[name] = section
    run.params(params)
    run.settings(settings)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as MLflow params: {"train": {"steps": 5}} -> {"train.steps": "5"}.

    None and empty tuples are left out: an option that is not set is no param, as if it did not exist yet.
    """
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None and value != ():
            flat[f"{prefix}{name}"] = str(value)
    return flat
