"""The four conditionings of the DiT paper on the digits: equal small budget, several seeds.

    python tests/benchmarks/run_conditionings.py [OUTPUT [--set KEY=VALUE ...]]

About 30 minutes on two cores. Writes results/conditionings.md, all from the reports and MLflow.
"""

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

from results import commit, machine
from study import RECIPES, RESULTS, history, raydit, score_reconstructions, settings, table

from dit.checkpoint import load_checkpoint
from dit.config import config_from_dict
from dit.macs import forward_macs
from dit.model import build_model
from pipelines.config.model import ModelConfig

SEEDS = (0, 1, 2)
METRICS = (
    "fd_efficientnet_lite0_1k",
    "kid_efficientnet_lite0_1k",
    "is_efficientnet_lite0_1k",
    "fd_efficientnet_lite0_340",
    "precision_efficientnet_lite0_340",
)
"""There are 340 held-out real images, so metrics at N = 340 can be compared with theirs."""
NUM_AVERAGED_LOSSES = 5
CONDITIONINGS = get_args(ModelConfig.__annotations__["conditioning"])


def main(output: str = "outputs/conditionings", *flags: str) -> None:
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    common = [*settings(name="conditionings", tracking__uri=store), *flags]
    for stage in ("autoencoder", "encode"):
        raydit(stage, RECIPES / "digits.toml", *common, *settings(output=folder / "images"))
    recipe = with_autoencoder(folder / "images" / "autoencoder", folder / "digits.toml")
    common += settings(encode__output=folder / "images" / "latents")
    rows, real_baseline = [], {}
    for conditioning in CONDITIONINGS:
        reports, losses = [], []
        for seed in SEEDS:
            output_flags = settings(
                output=folder / f"{conditioning}-{seed}", model__conditioning=conditioning, seed=seed
            )
            checkpoint = raydit("train", recipe, *common, *output_flags)["path"]
            reports.append(raydit("evaluate", checkpoint))
            run = find_training_run(store, folder / f"{conditioning}-{seed}")
            losses.append(fmean(value for _, value in history(store, run, "train/loss")[-NUM_AVERAGED_LOSSES:]))
        scores = [format_mean([report["metrics"][metric] for report in reports]) for metric in METRICS]
        rows.append([conditioning, *describe_size(checkpoint), format_mean(losses), *scores])
        real_baseline = reports[0]["floor"]
    count = reports[0]["protocol"]["num_samples"]
    reconstructed = score_reconstructions(recipe, folder / "images", count, *common)["metrics"]
    for name, metrics in (("reconstructed images", reconstructed), ("real images", real_baseline)):
        rows.append([name, "", "", "", *(f"{metrics[metric]:.3f}" if metric in metrics else "" for metric in METRICS)])
    write(rows)


def with_autoencoder(autoencoder: Path, target: Path) -> Path:
    """Write the digits' recipe with an existing autoencoder, the same for all trainings."""
    text = (RECIPES / "digits.toml").read_text()
    section = f"[autoencoder]\nid = {json.dumps(str(autoencoder))}\n"
    target.write_text(re.sub(r"\[autoencoder\.train\].*?(?=\n\[)", lambda _: section, text, flags=re.DOTALL))
    return target


def find_training_run(store: str, output: Path) -> str:
    """Return the id of the training run that wrote to a folder."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("conditionings").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`raydit.stage` = 'train' and params.output = '{output}'")
    return run.info.run_id


def describe_size(checkpoint: str) -> list[str]:
    """Return the number of parameters, and of multiply-accumulates per image, as text."""
    config = config_from_dict(load_checkpoint(checkpoint).config["model"])
    parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    return [f"{parameters / 1e6:.2f} M", f"{forward_macs(config) / 1e6:.1f} M"]


def format_mean(values: list[float]) -> str:
    """Format the mean over the seeds and its standard error."""
    return f"{fmean(values):.3f} \u00b1 {stdev(values) / len(values) ** 0.5:.3f}"


def write(rows: list[list[str]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    described = "; ".join(f"{name}: {value}" for name, value in machine().items())
    text = (
        f"The digits of `pipelines/recipes/digits.toml` with the four conditionings of the DiT paper, commit "
        f"{commit()}: the same latents, steps and settings, {len(SEEDS)} seeds of training and sampling each; mean and "
        f"standard error. Rows for comparison, against the same reference: reconstructions of training images, "
        f"and held-out real images. Written by `tests/benchmarks/run_conditionings.py`.\n\n{described}\n\n"
    )
    head = ["conditioning", "parameters", "MACs", "loss", *METRICS]
    (RESULTS / "conditionings.md").write_text(text + table(head, rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
