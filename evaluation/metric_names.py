"""The table of metrics, and their names, which carry the extractor and the number of images.

A score means nothing without these two: `fid_50k` and `fd_efficientnet_lite0_1k` are different metrics. Imports neither
torch nor any model, so that a plan can be printed at once.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from evaluation.features.extractor_names import CLIP_L_336, INCEPTION, metric_part
from raydit.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class MetricKind:
    """A metric, whatever the extractor and the number of images."""

    name: str
    """First part of the metric's names with any extractor but `published_extractor`."""
    label: str
    """Name for people, as in the title of a table's row."""
    higher_is_better: bool
    """Direction in which checkpoints are ranked."""
    published_name: str = ""
    """The metric's name with `published_extractor`; empty: `name`."""
    published_extractor: str = INCEPTION
    """The extractor of the metric's paper, with verified weights: with it alone names leave the extractor out."""

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def is_ratio(self) -> bool:
        """Whether it compares a metric of samples with that of held-out real images."""
        return self.name.startswith(RATIO) or self == MEAN_RATIO


METRIC_KINDS = {
    kind.name: kind
    for kind in (
        MetricKind(name="fd", label="Fréchet distance", higher_is_better=False, published_name="fid"),
        MetricKind(
            name="fd_infinity",
            label="Fréchet distance at infinite N",
            higher_is_better=False,
            published_name="fid_infinity",
        ),
        MetricKind(name="sfd", label="spatial Fréchet distance", higher_is_better=False, published_name="sfid"),
        MetricKind(name="is", label="Inception Score", higher_is_better=True),
        MetricKind(name="kid", label="kernel distance", higher_is_better=False),
        MetricKind(name="precision", label="precision", higher_is_better=True),
        MetricKind(name="recall", label="recall", higher_is_better=True),
        MetricKind(name="density", label="density", higher_is_better=True),
        MetricKind(name="coverage", label="coverage", higher_is_better=True),
        MetricKind(name="cmmd", label="CMMD", higher_is_better=False, published_extractor=CLIP_L_336),
        MetricKind(name="mind", label="Monge Inception Distance", higher_is_better=False),
        MetricKind(name="rbf_mmd", label="squared MMD, Gaussian kernel", higher_is_better=False),
    )
}
"""Every metric by its name. Names, tables, pages and ranking follow from this entry; evaluation.score computes it."""

RATIO = "ratio_"
"""Prefix of the names of ratios, which divide a metric of samples by the same metric of as many held-out real
images."""

MEAN_RATIO = MetricKind(name="fdr", label="mean ratio of Fréchet distances", higher_is_better=False)
"""The mean of the ratios of Frechet distances over extractors, which its name does not tell: reports name them."""


class MetricName(NamedTuple):
    """The parts of a metric's name."""

    stem: str
    """The name without the number of images: "fid", "fd_efficientnet_lite0"."""
    kind: MetricKind
    num_samples: int


def metric_name(kind: str, extractor: str, num_samples: int) -> str:
    """Return the name of a metric over num_samples images in an extractor's features.

    kind: a key of METRIC_KINDS, or one with ratio_ before it, which gives ratio_ before the metric's name. With the
    verified Inception weights fid_50k, fid_infinity_50k, sfid_50k, is_50k, ratio_fid_50k and so on, and with those of
    CMMD's CLIP cmmd_50k; otherwise fd_efficientnet_lite0_1k, fd_timm_resnet50_a1_in1k_10k, where every character of the
    extractor's name but letters and digits is "_". Raises ValueError for an unknown kind.
    """
    if kind.startswith(RATIO):
        return RATIO + metric_name(kind.removeprefix(RATIO), extractor, num_samples)
    if kind not in METRIC_KINDS:
        raise ValueError(f"Found metric kind {kind!r}, expected one of {', '.join(METRIC_KINDS)}. Use one of these.")
    count = format_count(num_samples)
    if extractor == METRIC_KINDS[kind].published_extractor:
        return f"{METRIC_KINDS[kind].published_name or kind}_{count}"
    return f"{kind}_{metric_part(extractor)}_{count}"


def mean_ratio_name(num_samples: int) -> str:
    """Return the name of the mean of several extractors' ratios of Frechet distances: fdr_50k."""
    return f"{MEAN_RATIO.name}_{format_count(num_samples)}"


def parse_metric_name(name: str) -> MetricName:
    """Split a metric's name into its parts: the inverse of metric_name and mean_ratio_name.

    Raises InvalidInput for a name that neither gives.
    """
    stem, _, count = name.rpartition("_")
    kind = _find_kind(stem)
    if kind is None or not re.fullmatch(r"\d+k?", count):
        raise InvalidInput(f"metric name {name!r}", "a name such as fid_50k", "Copy it from a report")
    return MetricName(stem, kind, int(count.removesuffix("k")) * (1000 if count.endswith("k") else 1))


def is_of_extractor(name: str, extractor: str) -> bool:
    """Return whether a metric's name is one that metric_name gives with an extractor, which a mean ratio's never is.

    Raises the same errors as parse_metric_name.
    """
    parts = parse_metric_name(name)
    return parts.kind != MEAN_RATIO and metric_name(parts.kind.name, extractor, parts.num_samples) == name


def check_metric_part(extractor: str) -> None:
    """Raise InvalidInput for an extractor whose part of a name looks like a metric's: infinity_x in fd_infinity_x.

    Those of networks, timm and transformers never do.
    """
    for kind in METRIC_KINDS:
        found = parse_metric_name(metric_name(kind, extractor, 1000)).kind.name
        if found != kind:
            raise InvalidInput(
                f"found {extractor!r}, whose {kind} would have a name of {found}", "another name", "rename the module"
            )


def _find_kind(stem: str) -> MetricKind | None:
    """Return the kind of a name without its number of images."""
    if stem == MEAN_RATIO.name:
        return MEAN_RATIO
    if not stem.startswith(RATIO):
        return _find_metric(stem)
    kind = _find_metric(stem.removeprefix(RATIO))
    return replace(kind, name=f"{RATIO}{kind.name}", label=f"{kind.label} / real images'") if kind else None


def _find_metric(stem: str) -> MetricKind | None:
    """Return the metric with this published name, or the one with the longest name that the stem begins with."""
    published = [kind for kind in METRIC_KINDS.values() if stem and kind.published_name == stem]
    by_length = sorted(METRIC_KINDS.values(), key=lambda kind: len(kind.name), reverse=True)
    return next(iter(published + [kind for kind in by_length if f"{stem}_".startswith(f"{kind.name}_")]), None)


def format_count(num_samples: int) -> str:
    """Abbreviate whole thousands: 50000 -> "50k", 297 -> "297"."""
    return f"{num_samples // 1000}k" if num_samples >= 1000 and num_samples % 1000 == 0 else str(num_samples)
