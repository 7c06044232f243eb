"""What sampling and scoring need of a recipe, in one value."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from cluster import storage
from dit.config import RandomKind
from evaluation.extractors import ExtractorIdentity, identify_extractor
from evaluation.features.extractor_names import extractor_kind
from pipelines.config.evaluate import EvaluateConfig, path_for
from pipelines.config.recipe import ImagesConfig, Recipe

EVALUATIONS = "evaluations"
"""Folder of an output that holds reports. The holder of its lease may also write references/."""
REFERENCES = "references"
"""Folder of an output that holds features of real images."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The real images that samples are compared with, how samples are drawn and scored, and where results go."""

    images: ImagesConfig
    evaluate: EvaluateConfig
    seed: int
    random: RandomKind | None = None
    """How samples' noise is drawn, as in the recipe."""
    output: str
    """Absolute path or URI of the recipe's output."""
    latents: str = ""
    """Absolute path or URI of the latents; empty: those in the output."""
    max_quarantined: float
    """encode.max_quarantined: the share of real images that may be unreadable."""

    @classmethod
    def from_recipe(cls, config: Recipe) -> Self:
        """Take from a recipe what sampling and scoring need."""
        output = storage.absolute(config.output)
        weights = absolute_paths(config.evaluate.extractor_weights)  # workers run in other folders
        return cls(
            images=config.images,
            evaluate=replace(config.evaluate, extractor_weights=weights),
            seed=config.seed,
            random=config.random,
            output=output,
            latents=config.latents,
            max_quarantined=config.encode.max_quarantined,
        )

    @property
    def evaluations(self) -> str:
        """Path or URI of the folder of reports."""
        return storage.join(self.output, EVALUATIONS)

    @property
    def references(self) -> str:
        """Path or URI of the folder of features of real images."""
        return storage.join(self.output, REFERENCES)

    @cached_property
    def each_extractor(self) -> "list[ScoringSettings]":
        """The settings of a run with each extractor alone, in order."""
        return [replace(self, evaluate=evaluate) for evaluate in self.evaluate.for_each_extractor()]

    @cached_property
    def extractor_weights(self) -> str | None:
        """Path of the weights of the (first) extractor; None: the published ones."""
        return path_for(self.evaluate.extractor, self.evaluate.extractor_weights)

    @cached_property
    def reference(self) -> str | None:
        """Path or URI of reference statistics for the (first) extractor; None: those of the training images."""
        return path_for(self.evaluate.extractor, self.evaluate.reference)

    @cached_property
    def extractor(self) -> ExtractorIdentity:
        """What protocols record of the (first) extractor."""
        return identify_extractor(self.evaluate.extractor, self.extractor_weights)

    @cached_property
    def extractor_identity(self) -> list[str | None]:
        """What features depend on of the (first) extractor: a network's weights; of others the name and input as well.

        One module holds several functions, and one library may feed the same weights in several ways.
        """
        own = extractor_kind(self.evaluate.extractor) != "network"
        return [self.extractor.sha256, *([self.extractor.name, self.extractor.preprocessing] if own else [])]

    @cached_property
    def extractor_digests(self) -> dict[str, str]:
        """Digest of each extractor's weights by its name in the recipe, which workers must find as well."""
        return {each.evaluate.extractor: each.extractor.sha256 for each in self.each_extractor}


def absolute_paths(given: Any) -> Any:
    """Return a path as an absolute one if it is on this machine, in a table too; any other name unchanged."""
    if isinstance(given, dict):
        return {name: absolute_paths(path) for name, path in given.items()}
    return storage.absolute(given) if given and Path(given).exists() else given
