"""Compare the search of `raydit tune`, which may spend a third of the cost, with the full grid.

    python tests/benchmarks/run_tune.py CHECKPOINT [--set KEY=VALUE ...]

Also measures every candidate on all samples, reusing the records of the search, and writes results/tune.md: the
search's result, its cost, and its distance from the best of the grid.
"""

import sys
from functools import partial

from results import commit, machine
from study import RESULTS

from evaluation.halving import search
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.tune import TuneGrid
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.scoring.settings import EVALUATIONS
from pipelines.scoring.tuning.candidates import Candidate
from pipelines.scoring.tuning.measure_candidates import Measurer
from pipelines.stage import StageContext
from pipelines.tune import BUDGET, plan_candidates, tune_rungs

GRID = TuneGrid(
    cfg_scale=(1.0, 1.25, 1.5, 2.0, 3.0),
    cfg_interval=(None, (0.2, 0.8)),
    sampling_steps=(12, 25),
    weights=("ema", "raw"),
)


def main(name: str, *flags: str) -> None:
    opened = open_checkpoint(name)
    recipe_of = partial(checkpoint_recipe, overrides=tuple(flag for flag in flags if flag != "--set"))
    candidates = plan_candidates([opened], recipe_of, GRID)
    config = candidates[0].config
    costs, sizes = [candidate.cost for candidate in candidates], tune_rungs(config)
    with StageContext(config, part=EVALUATIONS) as context:
        measurer = Measurer(context, candidates, f"{config.folder('tuning')}/benchmark")
        rungs = search(costs, sizes, BUDGET, measurer.measure)
        full = measurer.measure(range(len(candidates)), sizes[-1])
    best = min(range(len(full)), key=lambda position: full[position].value)
    chosen = rungs[-1].kept[0]
    lines = [
        "Written by `tests/benchmarks/run_tune.py`: the search of `raydit tune`, compared with the full grid. "
        f"Commit {commit()}, {len(candidates)} candidates, {sizes[-1]:,} samples.",
        "",
        "; ".join(f"{name}: {value}" for name, value in machine().items()),
        "",
        "| | settings | distance on all samples | cost |",
        "| --- | --- | --- | --- |",
        row("found by the search", candidates[chosen], full[chosen], rungs[-1].spent),
        row("best of the grid", candidates[best], full[best], 1.0),
        "",
    ]
    (RESULTS / "tune.md").write_text("\n".join(lines))
    print("\n".join(lines))


def row(title: str, candidate: Candidate, measured, cost: float) -> str:
    summary = candidate.protocol.summary.partition(", ")[2]
    return f"| {title} | {summary} | {measured.value:.4g} ± {measured.error:.2g} | {cost:.0%} |"


if __name__ == "__main__":
    main(*sys.argv[1:])
