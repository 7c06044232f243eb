"""The report on an autoencoder, and the protocol that makes two of them comparable."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from evaluation.finite_numbers import refuse_nonfinite
from evaluation.metric_names import METRIC_KINDS, format_count, metric_name, parse_metric_name
from evaluation.protocol import UINT8_RULE, Precision
from evaluation.report import REPORT_FILE
from evaluation.text_table import align_columns
from raydit.errors import InvalidInput
from raydit.listed_names import require_all_inside

_OF_AUTOENCODER = ("autoencoder", "autoencoder_config", "dtype")
"""Fields of a protocol in which reports that are compared differ."""
BEST_MARK = "*"
"""Mark of the best value in a comparison."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderProtocol:
    """Everything that affects the numbers of an autoencoder, except for its speed."""

    images_digest: str
    """Digest of the keys of the images, as their source lists them."""
    image_size: int
    """Side of the images in pixels."""
    crop: str
    """How images are cropped to squares, as in recipes."""
    num_images: int
    """Number of images, which are evenly spaced over the source."""
    seed: int = 0
    """Seed of the draws from the posterior and of the measurement of denoising."""
    autoencoder: str
    """sha256 of the weights."""
    autoencoder_config: str
    """sha256 of the config, which holds the scale of the latents."""
    dtype: Precision = "float32"
    """Precision of encoder and decoder."""
    uint8_rule: str = UINT8_RULE
    """Rule by which decoded images are rounded to uint8."""
    denoising: str
    """How denoising is measured, in a few words."""
    extractors: dict[str, str]
    """Name of each feature extractor -> sha256 of its weights."""

    @property
    def protocol_id(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the canonical JSON."""
        return _short_digest(asdict(self))

    @property
    def comparable_id(self) -> str:
        """Id of the protocol without the fields of the autoencoder: reports with equal comparable_id can be
        compared."""
        return _short_digest({name: value for name, value in asdict(self).items() if name not in _OF_AUTOENCODER})

    @property
    def summary(self) -> str:
        """What the protocol says in a few words: "N=1000, 32 px, efficientnet-lite0"."""
        parts = [f"N={self.num_images}", f"{self.image_size} px", *([self.dtype] if self.dtype != "float32" else [])]
        return ", ".join([*parts, *([f"seed {self.seed}"] if self.seed else []), *self.extractors])


def _short_digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class MetricLabel(NamedTuple):
    """How a metric of an autoencoder is shown."""

    text: str
    """Name for people, with the unit."""
    higher_is_better: bool | None
    """Whether a lower value is better; None if neither direction is."""

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values; empty if there is none."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


_LABELS = {
    "psnr": MetricLabel("PSNR in dB", True),
    "ssim": MetricLabel("structural similarity", True),
    "bytes_per_image": MetricLabel("stored bytes per image", False),
    "encode_images_per_second": MetricLabel("images encoded per second", True),
    "decode_images_per_second": MetricLabel("images decoded per second", True),
    "latent_mean": MetricLabel("latents: root mean square of the channels' means", None),
    "latent_std": MetricLabel("latents: root mean square of the channels' standard deviations", None),
    "latent_kurtosis": MetricLabel("latents: excess kurtosis, mean over channels", None),
    "latent_correlation": MetricLabel("latents: root mean square of the channels' correlations", None),
    "denoising_loss": MetricLabel("denoising: loss of a tiny DiT", None),
    "denoising_baseline": MetricLabel("denoising: loss from each value alone", None),
    "denoising_ratio": MetricLabel("denoising: loss over loss from each value alone", False),
}


def reconstruction_distance_name(extractor: str, num_images: int) -> str:
    """Return the name of the Frechet distance of reconstructions from their originals: rfid_50k with Inception."""
    return f"r{metric_name('fd', extractor, num_images)}"


def describe_metric(name: str) -> MetricLabel:
    """Return how a metric of an autoencoder is shown. Raises InvalidInput for an unknown name."""
    if name in _LABELS:
        return _LABELS[name]
    parts = parse_metric_name(name.removeprefix("r"))
    if not name.startswith("rf") or parts.kind is not METRIC_KINDS["fd"]:
        raise InvalidInput(f"metric {name!r}", "a metric of an autoencoder", "Copy it from a report")
    return MetricLabel(f"Fréchet distance of reconstructions, N = {format_count(parts.num_samples)}", False)


@dataclass(frozen=True, kw_only=True)
class AutoencoderReport:
    """What was measured of one autoencoder under one protocol."""

    protocol: AutoencoderProtocol
    autoencoder: str
    """Hub id, path or URI."""
    kind: str
    """Class of diffusers."""
    moments_shape: tuple[int, ...]
    """(2C, h, w), or (C, h, w) if the posterior is deterministic."""
    metrics: dict[str, float]
    """Metric name -> value; speeds are of one worker."""
    channels: dict[str, list[float]]
    """"mean", "std" and "kurtosis" of each channel of the scaled latents."""
    device: str
    """The device that the speeds were measured on."""
    images: str
    """Path, URI or name of the source of images."""
    warnings: list[str] = field(default_factory=list)
    """Caveats that a reader of the metrics must know."""
    timings: dict[str, float] = field(default_factory=dict)
    """Stage, with the suffix _seconds -> seconds."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name -> file of the report's folder."""
    date: str = ""
    """When it was measured, in UTC, as ISO 8601."""
    raydit_version: str = ""
    code: dict[str, Any] | None = None
    """Git commit of the code ("commit"), and whether it had uncommitted changes ("dirty"), if known."""

    def to_json(self) -> str:
        """Return the report as JSON text, including the protocol's id."""
        values = {**asdict(self), "protocol_id": self.protocol.protocol_id}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = REPORT_FILE) -> Self:
        """Read what to_json returned. name: of the file, for messages.

        Raises InvalidInput for anything else, numbers that are not finite, an edited protocol, or outside files.
        """
        from pydantic import TypeAdapter

        try:
            values = json.loads(text)
            refuse_nonfinite(values, name, "evaluate the autoencoder again")
            recorded = values.pop("protocol_id")
            report: Self = TypeAdapter(cls).validate_python(values)
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidInput(
                f"{name}: found no report on an autoencoder ({type(error).__name__}: {str(error)[:200]})",
                "what `raydit autoencoders evaluate` wrote",
                "evaluate the autoencoder again",
            ) from error
        if report.protocol.protocol_id != recorded:
            raise InvalidInput(
                f"the report's protocol has the id {report.protocol.protocol_id}",
                f"the recorded {recorded}: the report was edited",
                "evaluate the autoencoder again",
            )
        for metric in report.metrics:
            describe_metric(metric)
        require_all_inside(list(report.artifacts.values()), name)
        return report

    def table(self) -> str:
        """Return the metrics as aligned text."""
        return compare_autoencoders([self])


def require_comparable(reports: Sequence[AutoencoderReport]) -> None:
    """Raise InvalidInput if reports differ in the images or in how they were measured."""
    first = reports[0].protocol
    for other in (report.protocol for report in reports[1:]):
        if other.comparable_id != first.comparable_id:
            fields = [name for name in vars(first) if vars(first)[name] != vars(other)[name]]
            differing = [name for name in fields if name not in _OF_AUTOENCODER]
            raise InvalidInput(
                f"the protocols differ in {', '.join(differing)}", "the same images", "evaluate both with the same ones"
            )


def best_positions(reports: Sequence[AutoencoderReport], metric: str) -> set[int]:
    """Return the positions of the reports with the best value of a metric; none if neither direction is better."""
    better = describe_metric(metric).higher_is_better
    values = {index: report.metrics[metric] for index, report in enumerate(reports) if metric in report.metrics}
    if better is None or len(reports) < 2:
        return set()
    best = max(values.values()) if better else min(values.values())
    return {index for index, value in values.items() if value == best}


def short_names(reports: Sequence[AutoencoderReport]) -> list[str]:
    """Return the names of the autoencoders without the folders that all of them share; equal names get numbers."""
    parts = [report.autoencoder.rstrip("/").split("/") for report in reports]
    shared = 0
    while min(map(len, parts)) > shared + 1 and len({name[shared] for name in parts}) == 1:
        shared += 1
    names = [
        "/".join(name[shared:]) if len(reports) > 1 else report.autoencoder
        for name, report in zip(parts, reports, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def compare_autoencoders(reports: Sequence[AutoencoderReport]) -> str:
    """Return the metrics of several autoencoders as aligned text, the best values marked.

    Raises InvalidInput if the reports are not comparable.
    """
    require_comparable(reports)
    rows = [["metric", *short_names(reports)]]
    for metric in dict.fromkeys(name for report in reports for name in report.metrics):
        best = best_positions(reports, metric)
        cells = [
            f"{report.metrics[metric]:.6g}{f' {BEST_MARK}' if index in best else ''}"
            if metric in report.metrics
            else ""
            for index, report in enumerate(reports)
        ]
        rows.append([metric, *cells])
    notes = [f"{BEST_MARK} best value."] if len(reports) > 1 else []
    if len({report.device for report in reports}) > 1:
        notes.append("Speeds were measured on different devices.")
    return "\n".join([*align_columns(rows), *notes]) + "\n"
