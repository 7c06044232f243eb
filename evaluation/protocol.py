"""The protocol, which makes two scores comparable, and the seeds, labels and shards of samples that follow from it.

Imports neither torch nor any model, so that a plan can be printed at once.
"""

import difflib
import hashlib
import json
import math
import re
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np

from raydit.errors import InvalidInput

UINT8_RULE = "floor(clamp(127.5 x + 128, 0, 255))"
"""Rounding of images x in [-1, 1] to uint8. Truncated `255 (x + 1) / 2` is half a grey level darker and changes FID."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of a network's arithmetic."""

_ADDED = {"dtype": "float32"}
"""Fields that were added later, with the values that protocols without them have.

The JSON leaves these values out, so that older ids stay valid."""

_ALWAYS_RECORDED = frozenset({"cfg_channels", "cfg_interval"})
"""Optional fields of the first protocols, recorded as null where they are not set. The list is closed: an optional
field that is added later defaults to None or () and is recorded only where it is set, so that ids stay."""

_IMPLIED = {"decoder_dtype": "float32", "time_shift": 1.0, "sde_diffusion": "sigma", "sde_norm": 1.0}
"""Values that later fields have where they are None, and are therefore recorded as None."""

_SCORING_FIELDS = frozenset(
    {"extractor", "extractor_sha256", "extractor_preprocessing", "reference_digest", "validation_digest"}
)
"""Fields that say how images are scored, on which the images themselves do not depend."""

MIN_SAMPLES = 10
"""Fewest samples of a protocol: one for each split of the Inception Score."""

_LABEL_STREAM = 2**31
"""Stream of the labels, far from the small stream numbers that callers pass to sample_seed."""


def implied_values(weights: str) -> dict[str, Any]:
    """Return the values that fields have where a protocol records None. weights: those that draw its samples."""
    return {**_IMPLIED, "autoguidance_weights": weights}


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """Everything that affects a score except the checkpoint. Scores with the same `protocol_id` are comparable.

    Defaults are those of DiT's FID-50K without guidance (Peebles & Xie 2022, arXiv 2212.09748, section 4).
    """

    num_samples: int = 50_000
    """Number of generated images."""
    seed: int = 0
    """Seed of all samples; see sample_seed."""
    random: Literal["counter"] | None = None
    """How noise is drawn: "counter" by `dit.random`; None by generators that sample_seed seeds."""
    labels: Literal["random", "balanced"] = "random"
    """Class labels: drawn for each sample, or the index modulo the number of classes. FIDs differ by about 0.1."""
    sampler: str = "ddpm"
    """Name of the sampler."""
    sampling_steps: int = 250
    """Number of steps of the sampler."""
    time_shift: float | None = None
    """Factor by which the times of a flow's sampler are shifted, whatever rule gave it; None: no shift."""
    sde_diffusion: str | None = None
    """Form of the noise that the sampler "sde" adds; None: "sigma"."""
    sde_norm: float | None = None
    """Factor of that noise; None: 1."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1.0 is no guidance."""
    cfg_channels: int | None = None
    """Number of guided latent channels; None: all. Official DiT numbers guide the first 3."""
    cfg_interval: tuple[float, float] | None = None
    """Interval of times in which guidance is on; None: always."""
    autoguidance: str | None = None
    """Digest of the checkpoint that guides instead of the null class; None if the null class guides."""
    autoguidance_weights: str | None = None
    """Weights of that checkpoint; None: those of the same name as `weights`."""
    weights: str = "ema"
    """Weights that samples are drawn with: "ema", "raw", or a further average such as "ema_0.05"."""
    dtype: Precision = "float32"
    """Precision of the network; published numbers use float32. It affects no noise, sampler, guidance or decoder."""
    decoder_dtype: Precision | None = None
    """Precision of the decoder; None: float32, which is therefore recorded as None."""
    decoder: str
    """Identity (id and sha256) of the decoder from latents to images."""
    uint8_rule: str = UINT8_RULE
    """Rule by which images are rounded to uint8."""
    extractor: str
    """Name of the feature extractor."""
    extractor_sha256: str
    """Digest of the extractor's weights."""
    reference_digest: str
    """Digest of the reference statistics."""
    validation_digest: str | None = None
    """Digest of held-out real images that were chosen for themselves; None: a share of the training images, or none."""
    extractor_preprocessing: str | None = None
    """The extractor's preprocessing, for models whose library defines it; None if the extractor's name implies it."""

    def __post_init__(self) -> None:
        for name, value in implied_values(self.weights).items():
            if getattr(self, name) == value:
                object.__setattr__(self, name, None)
        precisions = get_args(Precision)
        wanted = {
            **{name: ("a finite number", _is_finite(value)) for name, value in vars(self).items()},
            "labels": ("'random' or 'balanced'", self.labels in ("random", "balanced")),
            "weights": ("'ema', 'raw' or a name such as 'ema_0.05'", re.fullmatch(r"raw|ema(_\d.*)?", self.weights)),
            "random": ("'counter' or nothing", self.random in (None, "counter")),
            "dtype": (f"one of {', '.join(precisions)}", self.dtype in precisions),
            "decoder_dtype": (f"one of {', '.join(precisions)}", self.decoder_dtype in (None, *precisions)),
            "num_samples": (
                f"at least {MIN_SAMPLES}, one for each split of the Inception Score",
                self.num_samples >= MIN_SAMPLES,
            ),
            "sampling_steps": ("at least 1", self.sampling_steps >= 1),
        }
        for name, (expected, met) in wanted.items():
            if not met:
                found = getattr(self, name)
                raise InvalidInput(f"{name} is {found!r}", expected, f"set evaluate.{name}")

    @property
    def protocol_id(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def is_of_given_images(self) -> bool:
        """Whether it is of images from another source, of which nobody knows how they were drawn."""
        return self.sampler == "unknown"

    @property
    def summary(self) -> str:
        """What the protocol says in a few words: "N=200, euler 25, cfg 2, efficientnet-lite0".

        What is usual is left out, so protocols with one summary may differ in the reference, in the decoder, or in how
        noise is drawn.
        """
        if self.is_of_given_images:
            return f"N={self.num_samples}, given images, {self.extractor}"
        parts = [f"N={self.num_samples}", f"{self.sampler} {self.sampling_steps}"]
        parts += [f"diffusion {self.sde_diffusion}"] if self.sde_diffusion is not None else []
        parts += [f"diffusion norm {self.sde_norm:g}"] if self.sde_norm is not None else []
        parts += [f"time shift {self.time_shift:g}"] if self.time_shift is not None else []
        parts += [f"cfg {self.cfg_scale:g}"]
        if self.cfg_interval is not None:
            parts.append("guided from {:g} to {:g}".format(*self.cfg_interval))
        parts += [f"autoguidance by {self.autoguidance[:8]}"] if self.autoguidance is not None else []
        parts += [f"its {self.autoguidance_weights} weights"] if self.autoguidance_weights is not None else []
        parts += [f"{self.cfg_channels} channels guided"] if self.cfg_channels is not None else []
        parts += [f"{self.labels} labels"] if self.labels != "random" else []
        parts += [f"{self.weights} weights"] if self.weights != "ema" else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"decoder {self.decoder_dtype}"] if self.decoder_dtype is not None else []
        parts += [f"seed {self.seed}"] if self.seed else []
        return ", ".join([*parts, self.extractor])

    @property
    def label(self) -> str:
        """The id with the summary: an id alone says nothing to a reader."""
        return f"{self.protocol_id} ({self.summary})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        `dtype` is left out if it is float32, because there were ids before that field. Scales and factors become
        floats, so that guidance 4 and 4.0 have one id.
        """
        values = {name: value for name, value in vars(self).items() if not self._is_unset(name, value)}
        interval = self.cfg_interval
        values["cfg_scale"] = float(self.cfg_scale)
        values["cfg_interval"] = None if interval is None else [float(bound) for bound in interval]
        values |= {name: float(values[name]) for name in ("time_shift", "sde_norm") if name in values}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """The fields that the samples depend on, as JSON values: all but those that say how they are scored."""
        return {name: value for name, value in self.to_dict().items() if name not in _SCORING_FIELDS}

    @staticmethod
    def _is_unset(name: str, value: object) -> bool:
        """Whether a field is left out of the JSON values, so that ids stay what they were before it existed."""
        if name in _ADDED:
            return value == _ADDED[name]
        return (value is None or value == ()) and name not in _ALWAYS_RECORDED

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a protocol that to_dict returned. Raises InvalidInput for unknown or missing fields."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else ""
                raise InvalidInput(f"unknown protocol field {name!r}", f"one of {', '.join(known)}", hint)
        missing = [field.name for field in fields(cls) if field.name not in values and not cls._may_lack(field)]
        if missing:
            raise InvalidInput(
                f"protocol lacks {', '.join(missing)}",
                f"all of {', '.join(known)}",
                "take the protocol from an unedited report.json, or build EvaluationProtocol(...) yourself",
            )
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**arguments)

    @classmethod
    def _may_lack(cls, field: Field[Any]) -> bool:
        """Whether protocols without this field are complete, because it was added later."""
        return field.name in _ADDED or (field.default is not MISSING and cls._is_unset(field.name, field.default))


def _is_finite(value: object) -> bool:
    """Return whether a field's value holds neither NaN nor infinity, which JSON and so protocol ids do not have."""
    numbers = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def sample_seed(seed: int, index: int, stream: int = 0) -> int:
    """Return the seed in [0, 2^32) of sample `index`, which depends neither on workers nor on batches.

    `stream` separates independent draws of one sample (0: the initial noise, 1: the steps' noise).
    Within a stream no two samples share a seed: torch's CPU generator keeps only 32 bits of its seed, so
    hashed seeds would give two of 50,000 samples the same noise in one run of four. Multiplying by an odd
    number is a bijection modulo 2^32; the offset comes from numpy's SeedSequence, whose output is
    guaranteed stable (NEP 19).
    """
    offset = int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0])
    return (index * 0x9E3779B1 + offset) % 2**32


def sample_label(seed: int, index: int, num_classes: int, mode: Literal["random", "balanced"]) -> int:
    """Return the class of sample `index`, which depends neither on workers nor on batches; 0 without classes.

    balanced: index modulo num_classes, so that in any prefix the classes' counts differ by one at most.
    random: uniform, drawn from the sample's own seed sequence.
    """
    if num_classes == 0:
        return 0
    if mode == "balanced":
        return index % num_classes
    draw = np.random.SeedSequence(seed, spawn_key=(_LABEL_STREAM, index)).generate_state(1, np.uint64)
    return int(draw[0]) % num_classes


def shard_ranges(num_samples: int, shard_rows: int) -> list[range]:
    """Return the sample indices of every shard, in order. All shards have shard_rows samples except the last one."""
    return [range(start, min(start + shard_rows, num_samples)) for start in range(0, num_samples, shard_rows)]
