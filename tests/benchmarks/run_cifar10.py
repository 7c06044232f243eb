"""CIFAR-10 from pixels to metrics: cifar10.toml end to end, and 5,000 samples of two checkpoints scored.

    python tests/benchmarks/run_cifar10.py FOLDER_OF_IMAGES [OUTPUT [--set KEY=VALUE ...]]

About 90 minutes on two cores. Writes results/cifar10.md and its pictures, all from MLflow and the reports.
"""

import sys
from pathlib import Path
from statistics import fmean

from PIL import Image
from results import commit, machine
from study import RECIPES, RESULTS, history, newest_run, raydit, score_reconstructions, settings, table

NUM_SAMPLES = 5_000
NUM_AVERAGED_LOSSES = 10
"""Number of logged losses, each a mean over train.log_every steps, that are averaged for a checkpoint's loss."""


def main(images: str, output: str = "outputs/cifar10", *flags: str) -> None:
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    common_flags = [*settings(images__path=Path(images).absolute(), output=folder, tracking__uri=store), *flags]
    recipe = RECIPES / "cifar10.toml"
    for stage in ("autoencoder", "encode", "train"):
        raydit(stage, recipe, *common_flags)
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    checkpoints = [checkpoints[len(checkpoints) // 2 - 1], checkpoints[-1]]  # scoring one takes as long as 1,200 steps
    scored = raydit("evaluate", *checkpoints, "--num-samples", str(NUM_SAMPLES))
    run = newest_run(store, "cifar10", "train")
    losses = history(store, run, "train/loss")
    rows = []
    for checkpoint, report in zip(checkpoints, scored["reports"], strict=True):
        step = int(checkpoint.name.removeprefix("step_"))
        loss = fmean([value for logged_step, value in losses if logged_step <= step][-NUM_AVERAGED_LOSSES:])
        rows.append([f"{step:,}", f"{loss:.4f}", *format_metrics(report)])
    report = scored["reports"][-1]
    real_baseline = [f"{report['floor'][name]:.4g}" if name in report["floor"] else "" for name in metric_names(report)]
    reconstructed = score_reconstructions(recipe, folder, NUM_SAMPLES, *common_flags)
    rows += [["reconstructed images", "", *format_metrics(reconstructed)], ["real images", "", *real_baseline]]
    write(rows, metric_names(report), report, folder / "evaluations" / report["protocol_id"])


def metric_names(report: dict) -> list[str]:
    """Return the names of the metrics that could be computed from all samples."""
    return [name for name, value in report["metrics"].items() if name.endswith("_5k") and value is not None]


def format_metrics(report: dict) -> list[str]:
    def format_metric(name: str) -> str:
        error = f" \u00b1 {report['errors'][name]:.2g}" if name in report["errors"] else ""
        return f"{report['metrics'][name]:.4g}{error}"

    return [format_metric(name) for name in metric_names(report)]


def write(rows: list[list[str]], metrics: list[str], report: dict, evaluations: Path) -> None:
    RESULTS.mkdir(exist_ok=True)
    pictures = {"classes": evaluations / Path(report["checkpoint"]).name / report["artifacts"]["classes"]}
    pictures["curve"] = evaluations / "curve.png"
    image_links = []
    for name, file in pictures.items():
        target = RESULTS / f"cifar10_{name}.png"
        Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)
        image_links.append(f"![{name}]({target.name})")
    described = "; ".join(f"{name}: {value}" for name, value in machine().items())
    text = (
        f"CIFAR-10 with `pipelines/recipes/cifar10.toml`, commit {commit()}, protocol {report['protocol_id']}, "
        f"{NUM_SAMPLES:,} samples of each checkpoint. Written by `tests/benchmarks/run_cifar10.py`. Errors: jackknife "
        "over random tenths of the samples for distances, standard deviation over splits or subsets for the inception "
        f"score and the kernel distance. Rows for comparison, against the same reference: reconstructions of training "
        f"images, and held-out real images.\n\n"
        f"{described}\n\n"
    )
    (RESULTS / "cifar10.md").write_text(
        text + table(["step", "loss", *metrics], rows) + "\n" + "\n".join(image_links) + "\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
