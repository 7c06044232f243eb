"""Comparison of reports: refused where the protocols differ, and with differences within the error marked as such."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

from evaluation.metric_names import parse_metric_name
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from evaluation.statistics import IS_SPLITS
from evaluation.text_table import align_columns
from raydit.errors import InvalidInput

NO_DIFFERENCE = "~"
"""Mark of a value that equals the first report's, or differs from it by less than their combined error."""


_SETS = {"reference": "the reference", "held_out": "the held-out images"}
"""Display names of the kinds of unreadable images in reports."""


@dataclass(frozen=True)
class Disagreement:
    """Feature spaces that rank two checkpoints differently, by more than the errors of their Frechet distances."""

    first: str
    """Name of the first report."""
    other: str
    """Name of the other report."""
    better: list[str]
    """Extractors in whose features the other checkpoint is better."""
    worse: list[str]
    """Extractors in whose features it is worse."""

    def __str__(self) -> str:
        return (
            f"Feature spaces disagree: {self.other} is better than {self.first} in {' and '.join(self.better)}, and "
            f"worse in {' and '.join(self.worse)}, by more than the combined errors. One of them may be optimised for "
            "a feature space: look at the samples and at the ratios to real images."
        )


@dataclass(frozen=True)
class Comparison:
    """Metrics of several reports, each compared with the first one."""

    names: list[str]
    """Names of the reports: their checkpoints without the folders that all of them share."""
    reports: list[EvaluationReport]
    differing: list[str]
    """Fields in which the protocols differ; empty: the numbers are comparable."""

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order of the reports."""
        return list(dict.fromkeys(name for report in self.reports for name in report.metrics))

    def is_within_error(self, metric: str, index: int) -> bool:
        """Whether a report's metric equals the first report's, or differs by less than sqrt(error1^2 + error2^2).

        False if either value or both errors are unknown, or if the two are not comparable.
        """
        found = self._difference(metric, index)
        return found is not None and _is_within(*found)

    def _difference(self, metric: str, index: int) -> tuple[float, float] | None:
        """Return by how much a report's metric is above the first report's, and the combined error.

        None if either value or both errors are unknown, or if these are means over other extractors or ratios to other
        held-out images.
        """
        pair = [self.reports[0], self.reports[index]]
        of_first, of_other = (set(report.averaged.get(metric, [])) for report in pair)
        if any(metric not in report.metrics for report in pair) or of_first != of_other:
            return None
        if parse_metric_name(metric).kind.is_ratio and self._has_other_held_out_images(index):
            return None
        (first, first_error), (value, error) = (estimate_with_standard_error(report, metric) for report in pair)
        errors = [known for known in (first_error, error) if known is not None]
        return (value - first, hypot(*errors)) if errors else None

    @property
    def disagreements(self) -> list[Disagreement]:
        """The reports that some feature spaces rank above the first one and others below it, by more than the errors.

        Each space judges by its Frechet distance at the largest N that both reports have with an error, because the
        ratio to real images has the error of these as well, which both reports share. Empty for unequal protocols.
        """
        if self.differing:
            return []
        found = []
        for index in range(1, len(self.reports)):
            signs = self._signs(index)
            better, worse = ([space for space in signs if signs[space] == sign] for sign in (-1, 1))
            if better and worse:
                found.append(Disagreement(self.names[0], self.names[index], better, worse))
        return found

    def _signs(self, index: int) -> dict[str, int]:
        """Return by extractor whether a report's Frechet distance is below (-1) or above (1) the first report's."""
        signs: dict[str, int] = {}
        parsed = {name: parse_metric_name(name) for name in self.metrics}
        distances = [name for name in parsed if parsed[name].kind.name == "fd"]
        for name in sorted(distances, key=lambda name: -parsed[name].num_samples):
            difference = self._difference(name, index)
            if difference is not None:
                value, error = difference
                extractor = self.reports[index].protocol_for(name).extractor
                signs.setdefault(extractor, 0 if _is_within(value, error) else 1 if value > 0 else -1)
        return signs

    def table(self) -> str:
        """Return aligned text with a row for each metric and a column for each report."""
        rows = [["metric", *self.names]]
        for metric in self.metrics:
            rows.append([metric, *(self._cell(metric, index) for index in range(len(self.reports)))])
        lines = align_columns(rows)
        if any(cell.endswith(NO_DIFFERENCE) for row in rows for cell in row[1:]):
            lines.append(f"{NO_DIFFERENCE} differs from {self.names[0]} by less than the combined error.")
        lines += [*self._notes_on_means(), *self._notes_on_ratios(), *self._notes_on_unreadable()]
        lines += map(str, self.disagreements)
        if self.differing:
            lines.append(f"Not comparable: the protocols differ in {', '.join(self.differing)}.")
        return "\n".join(lines) + "\n"

    def _notes_on_means(self) -> list[str]:
        """Return for each mean over extractors which ones it is over, and which reports have another mean."""
        lines = []
        for metric in dict.fromkeys(name for report in self.reports for name in report.averaged):
            owners: dict[str, list[str]] = {}
            for name, report in zip(self.names, self.reports, strict=True):
                if metric in report.averaged:
                    owners.setdefault(" and ".join(sorted(report.averaged[metric])), []).append(name)
            means = [f"of {extractors} in {', '.join(names)}" for extractors, names in owners.items()]
            if len(owners) == 1:
                lines.append(f"{metric} is the mean of {next(iter(owners))}.")
            else:
                lines.append(f"{metric} is not comparable: it is the mean {'; '.join(means)}.")
        return lines

    def _has_other_held_out_images(self, index: int) -> bool:
        """Return whether a report's ratios are known to be to other real images than the first report's."""
        first, other = self.reports[0].held_out_digest, self.reports[index].held_out_digest
        return bool(first and other) and first != other

    def _notes_on_ratios(self) -> list[str]:
        """Return which reports have ratios to other real images than the first that says which it has, if any."""
        pairs = zip(self.names, self.reports, strict=True)
        digests = {name: report.held_out_digest for name, report in pairs if report.held_out_digest and report.ratios}
        first = next(iter(digests), "")
        others = [name for name in digests if digests[name] != digests[first]]
        if not others:
            return []
        found = f"other held-out images in {', '.join(others)} than in {first}"
        return [f"Ratios to real images are not comparable: {found}."]

    def _notes_on_unreadable(self) -> list[str]:
        """Return that reports lack different numbers of real images, which the protocols do not say."""
        if all(report.unreadable == self.reports[0].unreadable for report in self.reports):
            return []
        lacking = []
        for name, report in zip(self.names, self.reports, strict=True):
            counts = [f"{count:,} of {_SETS.get(kind, kind)}" for kind, count in report.unreadable.items()]
            lacking.append(f"{' and '.join(counts) or 'none known'} in {name}")
        note = f"Real images that could not be read: {'; '.join(lacking)}."
        return [note if self.differing else f"{note} The protocols are equal, but the real images were not."]

    def _cell(self, metric: str, index: int) -> str:
        report = self.reports[index]
        if metric not in report.metrics:
            return ""
        value, known = estimate_with_standard_error(report, metric)
        error = "" if known is None else f" +- {known:.3g}"
        mark = f" {NO_DIFFERENCE}" if index and self.is_within_error(metric, index) else ""
        return f"{value:.5g}{error}{mark}"


def estimate_with_standard_error(report: EvaluationReport, metric: str) -> tuple[float, float | None]:
    """Return a metric and its standard error; None where a report does not have it.

    Without repeats, two errors in reports are standard deviations: that of the Inception Score over parts of the
    samples, of whose scores it is the mean, and that of the kernel distance over subsets. Subsets overlap, so that no
    standard error follows from theirs. The standard deviation over parts has their number as its divisor, which the
    standard error of the mean replaces by one less.
    """
    value, error = report.estimate(metric)
    kind, is_repeated = parse_metric_name(metric).kind.name, len(report.repeats.get(metric, [])) > 1
    if error is None or is_repeated or kind not in ("is", "kid"):
        return value, error
    return value, error / (IS_SPLITS - 1) ** 0.5 if kind == "is" else None


def _is_within(difference: float, error: float) -> bool:
    """Return whether a difference is less than its error, or 0: the error of equal values may be 0 as well."""
    return abs(difference) < error or difference == 0


def compare_reports(reports: Sequence[EvaluationReport], *, allow_unequal: bool = False) -> Comparison:
    """Compare reports with the first one, after all protocols of the same extractor were compared with each other.

    A metric that one of two reports lacks, such as those of an extractor that it was not scored by, makes them no
    less comparable. Raises InvalidInput for fewer than two reports, and, unless allow_unequal, for reports of
    different protocols, or without an extractor that leads from one to the other; the message names the fields that
    differ.
    """
    if len(reports) < 2:
        raise InvalidInput(f"{len(reports)} reports to compare", "at least 2", "name more checkpoints or reports")
    pairs = _protocol_pairs(reports)
    values = {name: _unequal_values(pairs, name) for name in vars(reports[0].protocol)}
    columns = _known_columns(reports)
    if len(columns) > 1:
        values["images.image_column"] = [repr(column) for column in columns]
    differing = [name for name in values if values[name]]
    if differing and not allow_unequal:
        fields = "; ".join(f"{name}: {' and '.join(values[name])}" for name in differing)
        unequal = [each for one, other in pairs if one != other for each in (one, other)] or [reports[0].protocol]
        ids = " and ".join(dict.fromkeys(each.label for each in unequal))
        raise InvalidInput(
            f"reports of protocols {ids}, which differ in {fields}",
            "one protocol, because scores of different protocols do not rank checkpoints",
            "evaluate all checkpoints with one recipe, or allow unequal protocols",
        )
    return Comparison(_short_names([report.checkpoint for report in reports]), list(reports), differing)


def find_best(reports: Sequence[EvaluationReport]) -> tuple[EvaluationReport | None, str]:
    """Return the report with the lowest headline, and an empty text; otherwise None, and why none can be named.

    Reports of defective samples are left out. Numbers of different protocols do not rank checkpoints.
    """
    sound = [report for report in reports if not report.disqualified]
    if not sound:
        return None, "the samples of each checkpoint are defective" if reports else "no checkpoint was scored"
    if len({(report.protocol_id, report.headline) for report in sound}) > 1:
        return None, "scores of different protocols do not rank checkpoints"
    if len(_known_columns(sound)) > 1:
        return None, "scores against different columns of images do not rank checkpoints"
    return min(sound, key=lambda report: report.estimate(report.headline)[0]), ""


def _known_columns(reports: Sequence[EvaluationReport]) -> list[str]:
    """Return the columns of real images that reports name: protocols of several may be equal."""
    return list(dict.fromkeys(report.image_column for report in reports if report.image_column))


def _protocol_pairs(reports: Sequence[EvaluationReport]) -> list[tuple[EvaluationProtocol, EvaluationProtocol]]:
    """Return pairs of protocols that are equal where the reports are comparable, whatever the order of the reports.

    For each extractor, these are its first protocol with each other one. A report that shares no extractor with the
    first one, not even by way of other reports, is paired by its first protocol.
    """
    by_extractor: dict[str, list[EvaluationProtocol]] = {}
    for report in reports:
        for protocol in report.protocols:
            by_extractor.setdefault(protocol.extractor, []).append(protocol)
    pairs = [(first, other) for first, *others in by_extractor.values() for other in others]
    linked = _linked_extractors(reports)
    apart = [report.protocol for report in reports if report.protocol.extractor not in linked]
    return [*pairs, *((reports[0].protocol, protocol) for protocol in apart)]


def _linked_extractors(reports: Sequence[EvaluationReport]) -> set[str]:
    """Return the extractors of the first report, and of all that share one with it or with a report among these."""
    remaining = [{protocol.extractor for protocol in report.protocols} for report in reports]
    linked = remaining[0]
    while sharing := [extractors for extractors in remaining if extractors & linked]:
        linked = linked.union(*sharing)
        remaining = [extractors for extractors in remaining if not extractors & linked]
    return linked


def _unequal_values(pairs: Sequence[tuple[EvaluationProtocol, EvaluationProtocol]], name: str) -> list[str]:
    """Return the values of a field in the pairs that differ in it."""
    values = [(vars(one)[name], vars(other)[name]) for one, other in pairs]
    return list(dict.fromkeys(repr(value) for one, other in values if one != other for value in (one, other)))


def _short_names(checkpoints: Sequence[str]) -> list[str]:
    """Remove the folders that all paths share, and number the names if that leaves two equal ones."""
    parts = [checkpoint.rstrip("/").split("/") for checkpoint in checkpoints]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == parts[0][shared] for path in parts):
        shared += 1
    names = ["/".join(path[shared:]) for path in parts]
    return names if len(set(names)) == len(names) else [f"{index + 1}: {name}" for index, name in enumerate(names)]
