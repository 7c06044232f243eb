"""The tune job: which guidance, average of weights, sampler and steps give a checkpoint's samples the lowest distance.

    grid -> candidates -> samples on growing rungs -> distances -> the best protocol

The search has a seed of its own, so that the score that is reported afterwards is not of the samples that chose.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from evaluation.halving import plan_rungs, search
from evaluation.plots.tuning import plot_tuning
from evaluation.protocol import EvaluationProtocol
from evaluation.uncertainty import BLOCKS
from pipelines.artifacts import digest_of
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.config.tune import DEFAULT_SCALES, TuneGrid
from pipelines.images.grids import save_png
from pipelines.scoring.checks import check_scoring_inputs, check_weights
from pipelines.scoring.protocols.build_protocol import evaluation_protocol, evaluation_protocols, scoring_fields
from pipelines.scoring.protocols.protocol_file import protocol_file
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.settings import EVALUATIONS, ScoringSettings
from pipelines.scoring.tuning.candidates import Candidate
from pipelines.scoring.tuning.measure_candidates import Measurer
from pipelines.scoring.tuning.tune_result import SETTINGS, describe_result, tuned_point
from pipelines.stage import StageContext
from pipelines.tracking import tags
from pipelines.tracking.run_log import RunLog
from raydit.errors import InvalidInput

TUNING = "tuning"
"""Folder of an output that holds the results of searches, each in a folder named after its identity."""
RESULT, PROTOCOL, PICTURE = "tune.json", "protocol.json", "tune.png"
SEED_OFFSET = 1_000_003
"""Added to the recipe's seed for the samples of the search; --repeats takes the seeds that follow the recipe's."""
MIN_SAMPLES = 2 * BLOCKS
"""Samples of the first rung: two in each block of those that errors follow from."""
BUDGET = 0.35
"""Default of the share that is spent of the cost of scoring all candidates."""


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search."""

    folder: str
    """Path or URI with tune.json, protocol.json and tune.png."""
    content: dict[str, Any]
    """Content of tune.json."""

    @property
    def best(self) -> dict[str, Any]:
        """The entry of the best candidate."""
        found: dict[str, Any] = self.content["candidates"][self.content["best"]]
        return found

    @property
    def protocol(self) -> str:
        """Path or URI of the best candidate's protocol, with the recipe's seed."""
        return storage.join(self.folder, PROTOCOL)


@listed_once()
def tune(
    checkpoints: Sequence[LocatedCheckpoint],
    recipe_of: Callable[[LocatedCheckpoint], Recipe],
    grid: TuneGrid,
    *,
    budget: float = BUDGET,
    context: StageContext,
) -> TuneResult:
    """Find the settings of [evaluate] with the lowest Frechet distance by the recipe's (first) extractor.

    recipe_of: gives the recipe of a checkpoint; evaluate.num_samples is what the best candidates are measured on.
    budget: share of the cost of measuring all candidates on as many. A search that was killed resumes, and a finished
    one is returned. Raises NotFound or InvalidInput before any work if something is missing or does not fit.
    """
    candidates = plan_candidates(checkpoints, recipe_of, grid)
    config = candidates[0].config
    sizes = tune_rungs(config)
    identity = tune_identity(candidates, sizes, budget)
    folder = storage.join(storage.absolute(config.output), TUNING, digest_of(identity)[:12])
    result, records = storage.join(folder, RESULT), storage.join(folder, "records")
    with context.holding(EVALUATIONS):
        if storage.exists(result):
            # It was interrupted between writing and logging the result.
            if context.is_writable and storage.exists(records):
                with context.run("tune", identity, run_tags(checkpoints)) as run:
                    run.artifact(result)
                    storage.remove_folder(records)
            context.skipped("tune", result)
            return TuneResult(folder, storage.read_json(result))
        for candidate in candidates:
            check_weights(candidate.opened, candidate.config.evaluate, candidate.protocol)
        context.say("tune", describe_search(candidates, sizes, budget))
        context.prepare_work(config.evaluate, "tune")
        with context.run("tune", identity, run_tags(checkpoints)) as run:
            measurer = Measurer(context, candidates, records)
            costs = [candidate.cost for candidate in candidates]
            rungs = search(costs, sizes, budget, measurer.measure, multiple=rung_multiple(config))
            content = describe_result(candidates, rungs, measurer, identity, budget)
            chosen = candidates[content["best"]]
            storage.write_atomically(storage.join(folder, PROTOCOL), protocol_file(reported_protocols(chosen)))
            log_result(run, content, folder)
            storage.write_atomically(result, (json.dumps(content, indent=2) + "\n").encode())
            run.artifact(result)
            storage.remove_folder(records)
    return TuneResult(folder, content)


def tune_rungs(config: Recipe) -> list[int]:
    """Return the number of samples of each rung. Raises InvalidInput for too few for the errors of distances."""
    wanted = config.evaluate.num_samples
    if wanted < MIN_SAMPLES:
        raise InvalidInput(f"evaluate.num_samples: found {wanted}", f"at least {MIN_SAMPLES}", "raise it")
    return plan_rungs(wanted, rung_multiple(config))


def rung_multiple(config: Recipe) -> int:
    """Return what the number of samples of a rung is a multiple of: whole records, and enough for errors."""
    rows = search_rows(config)
    return -(-MIN_SAMPLES // rows) * rows


def search_rows(config: Recipe) -> int:
    """Return the samples in a record of the search: evaluate.shard_rows, or as few as the first rung has."""
    (first, *_) = plan_rungs(config.evaluate.num_samples, 1)
    return min(config.evaluate.shard_rows, max(MIN_SAMPLES, first))


def default_grid(checkpoints: Sequence[LocatedCheckpoint], recipes: Sequence[Recipe]) -> TuneGrid:
    """Return the grid where no values are given: guidance scales, and all averages that every checkpoint holds.

    recipes: of each checkpoint. With autoguidance there is no scale of 1, which would be none.
    """
    held = [opened.weights_names for opened in checkpoints]
    averages = sorted(name for name in set.intersection(*held) if re.fullmatch(r"ema(_.+)?", name))
    has_guide = [recipe.evaluate.autoguidance is not None for recipe in recipes]
    has_null_class = [recipe.model.condition_dropout_prob > 0 for recipe in recipes]
    guides = all(one or other for one, other in zip(has_guide, has_null_class, strict=True))
    scales = [scale for scale in (DEFAULT_SCALES if guides else (1.0,)) if scale > 1 or not any(has_guide)]
    return TuneGrid(cfg_scale=tuple(scales), weights=tuple(averages))


def plan_candidates(
    checkpoints: Sequence[LocatedCheckpoint], recipe_of: Callable[[LocatedCheckpoint], Recipe], grid: TuneGrid
) -> list[Candidate]:
    """Return all candidates: each checkpoint with each combination of the grid's values.

    Labels, noise and the size of records are those of the first checkpoint's recipe. Raises InvalidInput if candidates
    could not be compared, because checkpoints have other extractors or real images.
    """
    candidates = []
    recipes = [recipe_of(opened) for opened in checkpoints]
    for opened, own in zip(checkpoints, recipes, strict=True):
        recipe = with_draws_of(recipes[0], own)
        scoring = scoring_fields(ScoringSettings.from_recipe(recipe))  # the same for all of a checkpoint's candidates
        for config in grid.recipes(recipe):
            settings = replace(ScoringSettings.from_recipe(config), seed=config.seed + SEED_OFFSET)
            protocol = evaluation_protocol(settings, opened, scoring)
            candidates.append(Candidate(opened, config, protocol, search_rows(recipes[0])))
    first = candidates[0]
    check_scoring_inputs(ScoringSettings.from_recipe(first.config), first.protocol)
    for name in ("num_samples", *scoring):
        for candidate in candidates:
            if (found := getattr(candidate.protocol, name)) != (expected := getattr(first.protocol, name)):
                raise InvalidInput(
                    f"{candidate.opened.origin} with {name} = {found!r}",
                    f"{expected!r}, as of {first.opened.origin}, so that their scores can be compared",
                    "tune them one by one, or give one --recipe for all",
                )
    return candidates


def with_draws_of(first: Recipe, recipe: Recipe) -> Recipe:
    """Return a recipe by which sample i has the label and the noise that it has by the first one."""
    evaluate = replace(recipe.evaluate, labels=first.evaluate.labels)
    return replace(recipe, seed=first.seed, random=first.random, evaluate=evaluate)


def tune_identity(candidates: Sequence[Candidate], sizes: Sequence[int], budget: float) -> dict[str, Any]:
    """Return what the outcome of a search depends on."""
    named = [[candidate.opened.digest, candidate.protocol.protocol_id] for candidate in candidates]
    further = evaluation_protocols(ScoringSettings.from_recipe(candidates[0].config), candidates[0].protocol)[1:]
    return {
        "candidates": named,
        "samples": list(sizes),
        "budget": budget,
        **({"further": [each.protocol_id for each in further]} if further else {}),
    }


def reported_protocols(candidate: Candidate) -> list[EvaluationProtocol]:
    """Return the protocol of each extractor by which a candidate's score is reported: with the recipe's seed."""
    settings = ScoringSettings.from_recipe(candidate.config)
    return evaluation_protocols(settings, evaluation_protocol(settings, candidate.opened))


def run_tags(checkpoints: Sequence[LocatedCheckpoint]) -> dict[str, str]:
    """Return the tags of the search's run; it has a checkpoint's where there is one alone."""
    if len(checkpoints) > 1:
        return {}
    return {tags.CHECKPOINT: checkpoints[0].origin, tags.CHECKPOINT_DIGEST: checkpoints[0].digest}


def describe_search(candidates: Sequence[Candidate], sizes: Sequence[int], budget: float) -> str:
    """Say in one line what a search does."""
    steps, most = ", ".join(f"{size:,}" for size in sizes), max(budget, sizes[0] / sizes[-1])
    return f"{len(candidates)} candidates on {steps} samples, at most {most:.0%} of what scoring all of them costs"


def log_result(run: RunLog, content: dict[str, Any], folder: str) -> None:
    """Log the best candidate's settings and figures, and the picture of all."""
    best = content["candidates"][content["best"]]
    last = best["rungs"][-1]
    run.params({"best": {name: best[name] for name in ("checkpoint", "protocol_id", *SETTINGS)}})
    figures = {"distance": last["distance"], "ratio": last["ratio"], "recall": last["recall"]}
    figures["spent"] = content["spent"]
    run.metrics({f"tune/{name}": value for name, value in figures.items() if value is not None})
    points = [tuned_point(entry, position == content["best"]) for position, entry in enumerate(content["candidates"])]
    run.artifact(save_png(plot_tuning(f"{content['metric']}, expected", points), storage.join(folder, PICTURE)))
    run.artifact(storage.join(folder, PROTOCOL))
