"""The protocol, which makes two scores comparable, and the seeds, labels and shards of samples that follow from it.

Imports neither torch nor any model, so that a plan can be printed at once.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np

UINT8_RULE = "floor(clamp(127.5 x + 128, 0, 255))"
"""Pixels x in [-1, 1] to uint8. `255 (x + 1) / 2` truncated is half a grey level darker and moves FID."""

_ADDED = {"dtype": "float32"}
"""Fields that protocols got later, and what those without them mean: named where they differ, so that ids stay."""

_LABEL_STREAM = 2**31
"""Kept far from the small stream numbers that callers pass to sample_seed."""


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """Everything that moves a score, except the checkpoint. Equal `protocol_id`: comparable numbers.

    Defaults are those of DiT's FID-50K without guidance (Peebles & Xie 2022, arXiv 2212.09748, section 4).
    """

    num_samples: int = 50_000
    """Generated images."""
    seed: int = 0
    """Seed of the whole evaluation; see sample_seed."""
    labels: Literal["random", "balanced"] = "random"
    """Class labels drawn per sample, or index modulo the classes. They differ by about 0.1 FID."""
    sampler: str = "ddpm"
    """Sampler name."""
    sampling_steps: int = 250
    """Steps of the sampler."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1.0 is no guidance."""
    cfg_channels: int | None = None
    """Guided latent channels; None: all. Official DiT numbers guide the first 3."""
    cfg_interval: tuple[float, float] | None = None
    """Times between which guidance is on; None: always."""
    weights: str = "ema"
    """Which weights of the checkpoint sample: the averaged, the raw, or a further average such as "ema_0.05"."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the network computes; published numbers are of float32. Noise, sampler, guidance and decoder are not
    affected."""
    decoder: str
    """Identity (id and sha256) of the decoder that turns latents into pixels."""
    uint8_rule: str = UINT8_RULE
    """How pixels are rounded."""
    extractor: str
    """Name of the feature extractor."""
    extractor_sha256: str
    """Digest of the extractor's weights."""
    reference_digest: str
    """Digest of the reference statistics."""

    def __post_init__(self) -> None:
        wanted = {
            "labels": ("'random' or 'balanced'", self.labels in ("random", "balanced")),
            "weights": ("'ema', 'raw' or such as 'ema_0.05'", re.fullmatch(r"raw|ema(_\d.*)?", self.weights)),
            "dtype": ("'float32' or 'bfloat16'", self.dtype in ("float32", "bfloat16")),
            "num_samples": ("at least 10, one for each split of the Inception Score", self.num_samples >= 10),
            "sampling_steps": ("at least 1", self.sampling_steps >= 1),
        }
        for name, (expected, met) in wanted.items():
            if not met:
                found = getattr(self, name)
                raise ValueError(f"{name} is {found!r}, expected {expected}. Set evaluate.{name}.")

    @property
    def protocol_id(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, `dtype` only if it is not float32: ids are older than that field.

        Floats stay floats, so that guidance 4 and 4.0 have one id.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, usual in _ADDED.items():
            if values[name] == usual:
                del values[name]
        interval = self.cfg_interval
        values["cfg_scale"] = float(self.cfg_scale)
        values["cfg_interval"] = None if interval is None else [float(bound) for bound in interval]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of to_dict. Raises ValueError on unknown or missing fields."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
                raise ValueError(f"Found unknown protocol field {name!r}. {hint}")
        missing = [name for name in known if name not in values and name not in _ADDED]
        if missing:
            raise ValueError(
                f"The protocol lacks {', '.join(missing)}; expected all of {', '.join(known)}. "
                "Take it from an unedited report.json, or build EvaluationProtocol(...) yourself."
            )
        interval = values["cfg_interval"]
        return cls(**{**values, "cfg_interval": None if interval is None else tuple(interval)})


def sample_seed(seed: int, index: int, stream: int = 0) -> int:
    """Seed in [0, 2^32) of sample `index`, a function of its arguments alone: not of workers or batches.

    `stream` separates independent draws of one sample (0: the starting noise, 1: the steps' noise).
    Within a stream no two samples share a seed: torch's CPU generator keeps only 32 bits of its seed, so
    hashed seeds would give two of 50,000 samples the same noise in one run of four. Multiplying by an odd
    number is a bijection modulo 2^32; the offset comes from numpy's SeedSequence, whose output is
    guaranteed stable (NEP 19).
    """
    offset = int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0])
    return (index * 0x9E3779B1 + offset) % 2**32


def sample_label(seed: int, index: int, num_classes: int, mode: Literal["random", "balanced"]) -> int:
    """Class of sample `index`, a function of its arguments alone; 0 without classes.

    balanced: index modulo num_classes, so that any prefix is balanced to within one image.
    random: uniform, drawn from the sample's own seed sequence.
    """
    if num_classes == 0:
        return 0
    if mode == "balanced":
        return index % num_classes
    draw = np.random.SeedSequence(seed, spawn_key=(_LABEL_STREAM, index)).generate_state(1, np.uint64)
    return int(draw[0]) % num_classes


def shard_ranges(num_samples: int, shard_rows: int) -> list[range]:
    """Sample indices of every shard, in order; all have shard_rows but the last, which has the rest."""
    return [range(start, min(start + shard_rows, num_samples)) for start in range(0, num_samples, shard_rows)]
