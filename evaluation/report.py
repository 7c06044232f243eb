"""The evaluation report: protocol, checkpoint, metrics and their errors, in one JSON file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from evaluation.explanations import explain_low_precision, explain_ratios, explain_shares, name_extractors
from evaluation.finite_numbers import refuse_nonfinite
from evaluation.metric_names import MEAN_RATIO, RATIO, format_count, is_of_extractor, parse_metric_name
from evaluation.per_class import ClassDistance
from evaluation.protocol import EvaluationProtocol
from evaluation.ratios import Deviations, RatioRow, mean_ratio_id
from evaluation.text_table import align_columns
from raydit.errors import InvalidInput
from raydit.listed_names import require_all_inside

if TYPE_CHECKING:
    from pydantic import TypeAdapter

REPORT_FILE = "report.json"

_JSON_NAMES = {"real_baseline": "floor"}
"""Fields whose key in the file is not their name."""
_LEFT_OUT = (
    *("missing", "disqualified", "date", "raydit_version", "latents", "model", "reconstructions", "further"),
    *("protocols", "deviations", "averaged", "per_class", "held_out_digest", "image_column", "unreadable"),
)
"""Keys that the file leaves out where their values are empty."""
BY_METRIC = ("metrics", "errors", "real_baseline", "repeats", "missing", "reconstructions", "deviations")
"""Fields that map names of metrics; those of all extractors stand in one dictionary."""


@dataclass(frozen=True, kw_only=True)
class FurtherScores:
    """What a report has for each extractor after the first; its metrics stand among those of the report."""

    protocol: EvaluationProtocol
    """The report's own protocol, but for the extractor and its reference: that of a run with this extractor alone."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Like `curve` of the report, in this extractor's features."""
    warnings: list[str] = field(default_factory=list)
    """Caveats about this extractor's metrics; earlier reports leave out those that are about the first one's, too."""
    per_class: list[ClassDistance] = field(default_factory=list)
    """As the report's own, in this extractor's features; left out of the file where it is empty."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores of one checkpoint under one protocol, or under one for each of several extractors."""

    protocol: EvaluationProtocol
    """The protocol, of several extractors that of the first."""
    checkpoint: str
    """Path or URI of the checkpoint."""
    checkpoint_digest: str
    """sha256 that identifies its weights."""
    metrics: dict[str, float]
    """Metric name -> value."""
    errors: dict[str, float] = field(default_factory=dict)
    """Metric name -> standard error of Frechet distances and of their ratios to those of real images, or standard
    deviation over splits (is) or subsets (kid)."""
    real_baseline: dict[str, float] = field(default_factory=dict)
    """Metrics of held-out real images against the same reference: the best values that can be expected."""
    repeats: dict[str, list[float]] = field(default_factory=dict)
    """Metric name -> its value for each of several seeds, this report's own first; empty: sampled once."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(N, Frechet distance) of the first N samples in random order, from which infinite N is extrapolated."""
    warnings: list[str] = field(default_factory=list)
    """Caveats that a reader of the metrics must know."""
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a metric that could not be computed -> why. The file has null for it among the metrics; the field is
    left out of the file where all could be computed."""
    disqualified: str = ""
    """Why a defective checkpoint can be neither best nor champion; empty, and left out of the file, for all others."""
    timings: dict[str, float] = field(default_factory=dict)
    """Stage, with the suffix _seconds -> seconds."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name -> file of the report's folder, such as an image grid."""
    code: dict[str, Any] | None = None
    """Git commit of the code that scored ("commit"), and whether it had uncommitted changes ("dirty"), if known."""

    date: str = field(default="", compare=False)
    """When it was scored, in UTC, as ISO 8601; empty, and left out of the file, if it was not recorded. This field and
    those that follow were added to the format later."""
    raydit_version: str = ""
    """Version of raydit that scored."""
    latents: str = ""
    """Fingerprint of the latents that the checkpoint was trained on."""
    model: str = ""
    """The checkpoint's model and process in a few words."""
    reconstructions: dict[str, float] = field(default_factory=dict)
    """Scores of held-out images that the autoencoder has encoded and decoded, by name; empty if they were not made."""
    further: list[FurtherScores] = field(default_factory=list)
    """The protocols of the extractors after the first, in order; left out of the file where there is one extractor."""
    deviations: dict[str, Deviations] = field(default_factory=dict)
    """Name of a ratio to real images -> its deviations, from which the errors of means over extractors follow."""
    averaged: dict[str, list[str]] = field(default_factory=dict)
    """Name of a mean ratio -> the extractors that it is the mean over."""
    per_class: list[ClassDistance] = field(default_factory=list)
    """Distance of each class, in the (first) extractor's features; empty: it was not asked for."""
    held_out_digest: str = ""
    """Digest of the held-out real images, where the reference is given and the protocol has none; empty elsewhere."""
    image_column: str = ""
    """Column of the real images, where several hold images and the protocol does not say which was read."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """Real images that could not be read, which the protocol does not say: their number by "reference" and "held_out";
    left out where there are none. Earlier reports do not say."""

    @property
    def protocol_id(self) -> str:
        """Id of the (first) protocol. Metrics of reports with the same id are comparable."""
        return self.protocol.protocol_id

    @property
    def protocols(self) -> list[EvaluationProtocol]:
        """The protocol of each extractor, the first one's first."""
        return [self.protocol, *(each.protocol for each in self.further)]

    def protocol_id_for(self, metric: str) -> str:
        """Return the id of a metric's protocol, or of all those that a mean ratio is over. Raises the same errors as
        protocol_for.

        Metrics of two reports are comparable where these are equal.
        """
        if metric not in self.averaged:
            return self.protocol_for(metric).protocol_id
        names = self.averaged[metric]
        return mean_ratio_id(each.protocol_id for each in self.protocols if each.extractor in names)

    def summary_for(self, metric: str) -> str:
        """Return what a metric's protocol says in a few words, of a mean ratio that of all extractors."""
        if metric not in self.averaged:
            return self.protocol_for(metric).summary
        return f"{self.protocol.summary.rpartition(', ')[0]}, {self._feature_space(metric)}"

    def protocol_for(self, metric: str) -> EvaluationProtocol:
        """Return the protocol of a metric, which its name's extractor tells.

        Raises InvalidInput for a name that several extractors leave open.
        """
        fitting = [each for each in self.protocols if not self.further or is_of_extractor(metric, each.extractor)]
        if not fitting:
            extractors = " or ".join(each.extractor for each in self.protocols)
            raise InvalidInput(f"metric {metric}", f"one of {extractors}", "evaluate the checkpoint again")
        return fitting[0]

    @property
    def all_warnings(self) -> list[str]:
        """Return the warning that ratios contradict each other, if they do, and the warnings about each extractor; see
        name_extractors."""
        named = name_extractors({part.protocol.extractor: part.warnings for part in self.parts})
        return [*filter(None, [explain_ratios(self.ratios)]), *named]

    @property
    def explanations(self) -> list[str]:
        """Sentences that help to read the scores; see name_extractors."""
        texts = {}
        for part in self.parts:
            shares = explain_shares(part.metrics, part.real_baseline, part.reconstructions)
            texts[part.protocol.extractor] = [shares, explain_low_precision(part.metrics, part.protocol)]
        return name_extractors(texts)

    @property
    def ratios(self) -> list[RatioRow]:
        """The ratios to real images by each extractor, and their mean, also those that could not be computed."""
        rows = []
        for name in (*self.metrics, *self.missing):
            kind = parse_metric_name(name).kind
            if kind.is_ratio:
                value, error = self.estimate(name) if name in self.metrics else (None, None)
                rows.append(RatioRow(name, self._feature_space(name), value, error, self.missing.get(name, "")))
        return rows

    def _feature_space(self, ratio: str) -> str:
        kind = parse_metric_name(ratio).kind
        if kind == MEAN_RATIO:
            return f"mean of {' and '.join(self.averaged.get(ratio, ['all']))}"
        return self.protocol_for(ratio).extractor + (", spatial" if kind.name == f"{RATIO}sfd" else "")

    @property
    def parts(self) -> list[Self]:
        """The report of each extractor alone, as a run without the others writes it; see merge_reports."""
        if not self.further:
            return [self]
        first = FurtherScores(
            protocol=self.protocol, curve=self.curve, warnings=self.warnings, per_class=self.per_class
        )
        return [self._part(each) for each in (first, *self.further)]

    def _part(self, scores: FurtherScores) -> Self:
        part: dict[str, Any] = {**vars(scores), "further": []}
        for name in BY_METRIC:
            values = getattr(self, name)  # a mean over extractors is of none of them
            own = [key for key in values if parse_metric_name(key).kind != MEAN_RATIO]
            part[name] = {key: values[key] for key in own if self.protocol_for(key) == scores.protocol}
        return replace(self, **part, averaged={})

    @property
    def headline(self) -> str:
        """Name of the metric that ranks checkpoints: the Frechet distance at the largest N; lower is better."""
        return next(iter(self.metrics))

    @property
    def commit(self) -> str:
        """The first digits of the commit, marked if there were uncommitted changes; empty if it is unknown."""
        if self.code is None:
            return ""
        return self.code["commit"][:12] + (" with uncommitted changes" if self.code["dirty"] else "")

    @property
    def baselines(self) -> "list[Baseline]":
        """Scores of other images than samples: of held-out real ones, and of these after encoding and decoding."""
        found = {"real images": self.real_baseline, "reconstructions": self.reconstructions}
        return [
            Baseline(title, count, {stem: metrics[name] for stem, name in column.items()})
            for title, metrics in found.items()
            for count, column in group_by_num_samples(metrics).items()
        ]

    def estimate(self, name: str) -> tuple[float, float | None]:
        """Return a metric and its error: mean and standard error over seeds if repeated, otherwise as in `errors`."""
        values = self.repeats.get(name, [])
        if len(values) < 2:
            return self.metrics[name], self.errors.get(name)
        return fmean(values), stdev(values) / len(values) ** 0.5

    def to_json(self) -> str:
        """Return the report as JSON text, including the protocol's id."""
        values = {_JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}
        values |= {"protocol": self.protocol.to_dict(), "protocol_id": self.protocol_id}
        values["metrics"] = {**self.metrics, **dict.fromkeys(self.missing)}
        values["protocols"] = {each.extractor: each.protocol_id for each in self.protocols} if self.further else {}
        for scores, each in zip(values["further"], self.further, strict=True):
            scores["protocol"] = each.protocol.to_dict()
            if not each.per_class:
                del scores["per_class"]
        for name in _LEFT_OUT:
            if not values[name]:
                del values[name]
        if self.code is None:  # a file without it is one of before it was recorded
            del values["code"]
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = REPORT_FILE) -> Self:
        """Read a report that to_json wrote. name: of the file, for messages.

        Raises InvalidInput for what is no report, for numbers that are not finite, for a protocol whose id is not the
        recorded one, and for files outside of the report's folder.
        """
        try:
            values = json.loads(text)
            refuse_nonfinite(values, name)
            report, recorded = cls._parse(values)
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidInput(
                f"{name}: found no report ({type(error).__name__}: {str(error)[:200]})",
                "what `raydit evaluate` wrote",
                "evaluate the checkpoint again",
            ) from error
        for found, expected in zip((each.protocol_id for each in report.protocols), recorded, strict=True):
            if found != expected:
                raise InvalidInput(
                    f"the report's protocol has the id {found}",
                    f"the recorded {expected}: the report was edited",
                    "evaluate the checkpoint again",
                )
        for metric in report.metrics:
            report.protocol_id_for(metric)  # raises for a name of no extractor
        # Their names are those of files that are shown, sent and renamed.
        require_all_inside([*report.artifacts.values(), report.checkpoint_digest or "none"], name)
        return report

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> tuple[Self, list[str]]:
        """Return the report in the content of its file, and the recorded ids of its protocols."""
        recorded, further = [values.pop("protocol_id")], values.pop("further", [])
        ids = values.pop("protocols", {})
        values |= {name: values.pop(key) for name, key in _JSON_NAMES.items() if key in values}
        values["metrics"] = {name: value for name, value in values["metrics"].items() if value is not None}
        curve = [(count, value) for count, value in values.get("curve", [])]
        protocol = EvaluationProtocol.from_dict(values["protocol"])
        further = [{**each, "protocol": EvaluationProtocol.from_dict(each["protocol"])} for each in further]
        recorded += [ids[each["protocol"].extractor] for each in further]
        content = {**values, "curve": curve, "protocol": protocol, "further": further}
        return _validator().validate_python(content), recorded

    def table(self) -> str:
        """Return the metrics as aligned text, with a column for each N of samples and of held-out real images."""
        generated, baselines = group_by_num_samples(self.metrics), self.baselines
        titles = [f"generated (N = {format_count(n)})" for n in generated]
        titles += [f"{baseline.title} (N = {format_count(baseline.num_images)})" for baseline in baselines]
        repeats = max(map(len, self.repeats.values()), default=0)
        rows = [["metric", *titles, *([f"mean of {repeats} seeds"] if repeats else [])]]
        for stem in next(iter(generated.values())):
            cells = [self._cell(column[stem]) if stem in column else "" for column in generated.values()]
            cells += [f"{each.values[stem]:.6g}" if stem in each.values else "" for each in baselines]
            names = [column[stem] for column in generated.values() if column.get(stem) in self.repeats]
            cells += [self._mean(names[0]) if names else ""] if repeats else []
            rows.append([stem, *cells])
        lines = align_columns(rows)
        if len(generated.keys() | {baseline.num_images for baseline in baselines}) > 1:
            lines.append("Frechet distance falls as N grows: compare only columns of equal N.")
        lines += align_columns([row.cells for row in self.ratios])
        lines += self.explanations
        return "\n".join(lines) + "\n"

    def _mean(self, name: str) -> str:
        mean, error = self.estimate(name)
        return f"{mean:.6g} +- {error:.4g}"

    def _cell(self, name: str) -> str:
        return f"{self.metrics[name]:.6g}" + (f" +- {self.errors[name]:.4g}" if name in self.errors else "")


@cache
def _validator() -> "TypeAdapter[Any]":
    """Return what checks the types of a report's fields; making one takes longer than all else of reading a report."""
    from pydantic import TypeAdapter

    return TypeAdapter(EvaluationReport)


class Baseline(NamedTuple):
    """Scores that samples are read against."""

    title: str
    num_images: int
    values: dict[str, float]
    """The notes, by the stem of the metric's name."""


def group_by_num_samples(metrics: Mapping[str, float]) -> dict[int, dict[str, str]]:
    """Group names by N, largest first, and stem: fid_50k, is_50k -> {50000: {"fid": "fid_50k", "is": "is_50k"}}.

    Ratios are left out, because they compare two columns.
    """
    columns: dict[int, dict[str, str]] = {}
    for name in metrics:
        parts = parse_metric_name(name)
        if parts.kind.is_ratio:
            continue
        columns.setdefault(parts.num_samples, {})[parts.stem] = name
    return dict(sorted(columns.items(), reverse=True))
