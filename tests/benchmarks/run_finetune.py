"""Compare training on the digits 5 to 9 from scratch and from a model of the digits 0 to 4: how many steps reach the
same score.

    python tests/benchmarks/run_finetune.py [OUTPUT [--set KEY=VALUE ...]]

About 15 minutes on two cores. Writes results/finetune.md, all from the reports.
"""

import re
import sys
from pathlib import Path
from statistics import fmean, stdev

from results import commit, machine
from study import RECIPES, RESULTS, raydit, settings, table

from dit.formats.completion import step_name

SEEDS = (0, 1, 2)
SCRATCH_STEPS, TUNED_STEPS, CHECKPOINT_EVERY = 1200, 400, 200
"""The target: the score of SCRATCH_STEPS after at most TUNED_STEPS, a third of them."""
METRIC = "fd_efficientnet_lite0_500"
SCRATCH = {"train__steps": SCRATCH_STEPS, "train__learning_rate": 2e-3, "train__warmup_steps": 50}
"""The training settings of digits-0-4.toml."""


def main(output: str = "outputs/finetune", *flags: str) -> None:
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    common = [*settings(tracking__uri=f"sqlite:///{folder / 'mlflow.db'}"), *flags]
    base = folder / "base"
    for stage in ("autoencoder", "encode"):
        raydit(stage, RECIPES / "digits-0-4.toml", *common, *settings(output=base))
    start = raydit("train", RECIPES / "digits-0-4.toml", *common, *settings(output=base))["path"]
    common += settings(autoencoder__id=base / "autoencoder", encode__output=folder / "latents")
    recipe, scratch = RECIPES / "digits-5-9.toml", write_recipe_without_start(folder / "scratch.toml")
    raydit("encode", recipe, *common, *settings(output=folder / "images"))
    scores: dict[str, list[float]] = {}
    for seed in SEEDS:
        flags_of_seed = settings(
            output=folder / f"scratch-{seed}", seed=seed, train__checkpoint_every=SCRATCH_STEPS, **SCRATCH
        )
        checkpoints = [raydit("train", scratch, *common, *flags_of_seed)["path"]]
        steps = {"train__steps": TUNED_STEPS, "train__checkpoint_every": CHECKPOINT_EVERY}
        flags_of_seed = settings(output=folder / f"tuned-{seed}", seed=seed, train__start__checkpoint=start, **steps)
        raydit("train", recipe, *common, *flags_of_seed)
        tuned = range(0, TUNED_STEPS + 1, CHECKPOINT_EVERY)
        checkpoints += [folder / f"tuned-{seed}" / "checkpoints" / step_name(step) for step in tuned]
        names = [f"from scratch, {SCRATCH_STEPS} steps", *(f"from the digits 0 to 4, {step} steps" for step in tuned)]
        for name, report in zip(names, raydit("evaluate", *checkpoints)["reports"], strict=True):
            scores.setdefault(name, []).append(report["metrics"][METRIC])
    write(scores)


def write_recipe_without_start(target: Path) -> Path:
    """Write the recipe of the digits 5 to 9 without its start, for training from random weights."""
    text = (RECIPES / "digits-5-9.toml").read_text()
    target.write_text(re.sub(r"\[train\.(start|lr_multipliers)\].*?(?=\n\[)", "", text, flags=re.DOTALL))
    return target


def format_mean(values: list[float]) -> str:
    """Format the mean over the seeds and its standard error."""
    return (
        f"{fmean(values):.2f} \u00b1 {stdev(values) / len(values) ** 0.5:.2f}"
        if len(values) > 1
        else f"{values[0]:.2f}"
    )


def write(scores: dict[str, list[float]]) -> None:
    """Write the table, and which step reaches the score of the training from scratch."""
    RESULTS.mkdir(exist_ok=True)
    described = "; ".join(f"{name}: {value}" for name, value in machine().items())
    scratch, *tuned = scores.items()
    target = fmean(scratch[1])
    reached = next((name for name, values in tuned if fmean(values) <= target), "none of them")
    text = (
        f"The digits 5 to 9 (`pipelines/recipes/digits-5-9.toml`), commit {commit()}: the same latents, {len(SEEDS)} "
        f"seeds of training and sampling each; mean and standard error of `{METRIC}`. First to reach the score of "
        f"{SCRATCH_STEPS} steps from scratch: {reached}. Written by `tests/benchmarks/run_finetune.py`.\n\n"
        f"{described}\n\n"
    )
    rows = [[name, format_mean(values)] for name, values in scores.items()]
    (RESULTS / "finetune.md").write_text(text + table(["training", METRIC], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
