"""The grid that `raydit tune` searches: values for those fields of [evaluate] that affect how samples are drawn."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.reader import check_settings
from pipelines.config.recipe import Recipe

DEFAULT_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Guidance scales that are tried where none are given."""
Interval = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TuneGrid:
    """Values to try of each field of [evaluate] of the same name; the recipe's own value alone where there are none.

    Raises InvalidInput for a value that no recipe may have.
    """

    sampler: tuple[str, ...] = ()
    sampling_steps: tuple[int, ...] = ()
    cfg_scale: tuple[float, ...] = ()
    cfg_interval: tuple[Interval, ...] = ()
    """None means guidance at all times."""
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            for value in getattr(self, each.name):
                check_settings(EvaluateConfig, {each.name: value}, lambda key: f"evaluate.{key}")

    @property
    def is_empty(self) -> bool:
        """Whether no values are given."""
        return not any(getattr(self, each.name) for each in fields(self))

    def recipes(self, config: Recipe) -> Iterator[Recipe]:
        """Yield a recipe for each combination of the values, each different from the others.

        Without guidance there is no interval, so that combinations that differ in it alone are one. A combination goes
        without those of the recipe's settings that only other samplers or guidance read. Raises InvalidInput for a
        combination that cannot be sampled.
        """
        names = [each.name for each in fields(self)]
        values = [getattr(self, name) or (getattr(config.evaluate, name),) for name in names]
        seen: set[tuple[Any, ...]] = set()
        for combination in itertools.product(*values):
            settings = dict(zip(names, combination, strict=True))
            if settings["cfg_scale"] == 1:
                settings["cfg_interval"] = None
            if (key := tuple(settings.values())) not in seen:
                seen.add(key)
                settings |= dict.fromkeys(_unread_fields(settings["sampler"], settings["cfg_scale"]))
                yield replace(config, evaluate=replace(config.evaluate, **settings))


def _unread_fields(sampler: str, cfg_scale: float) -> tuple[str, ...]:
    """Return the fields of [evaluate] that a recipe with this sampler and guidance may not have."""
    of_sde = () if sampler == "sde" else ("sde_diffusion", "sde_norm")
    of_guide = ("autoguidance", "autoguidance_model", "autoguidance_weights") if cfg_scale == 1 else ()
    return (*of_sde, *of_guide)


def passes_per_sample(config: Recipe) -> float:
    """Return how many passes of the network a sample takes; with guidance in an interval, about."""
    evaluate, calls = config.evaluate, float(config.evaluate.calls_per_sample)
    if evaluate.cfg_scale == 1:
        return calls
    if evaluate.cfg_interval is None:
        return 2 * calls
    low, high = evaluate.cfg_interval
    last = 1.0 if config.objective.kind == "flow" else 999.0
    return calls * (1 + max(0.0, min(high, last) - max(low, 0.0)) / last)
