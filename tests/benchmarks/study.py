"""Helpers of the longer studies: run raydit commands as a user would, and read metrics from MLflow.

An interrupted study resumes when it is started again, because raydit's stages do.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
RECIPES = ROOT / "pipelines" / "recipes"


def raydit(*arguments: str | Path) -> dict:
    """Run a command with --json, echo its output, and return the JSON of its last line."""
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "stdout is a pipe"
        last = ""
        for line in process.stdout:
            last = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(last)


def score_reconstructions(recipe: Path, folder: Path, count: int, *flags: str) -> dict:
    """Return the report on reconstructions of `count` training images: the autoencoder's share of every score."""
    import numpy as np

    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.samples import decode_moments, evenly_spaced, load_autoencoder, read_rows

    dataset, target = LatentDataset.open(folder / "latents"), folder / "reconstructions.npz"
    rows = read_rows(dataset, evenly_spaced(len(dataset), count))
    np.savez(target, arr_0=decode_moments(load_autoencoder(dataset, download=False), rows.moments))
    output = settings(output=folder, evaluate__num_samples=count)
    return raydit("evaluate", "--images", target, "--recipe", recipe, *flags, *output)


def settings(**values: object) -> list[str]:
    """--set flags: model__conditioning="adaln" is --set model.conditioning="adaln"."""
    flags: list[str] = []
    for name, value in values.items():
        flags += ["--set", f"{name.replace('__', '.')}={json.dumps(str(value) if isinstance(value, Path) else value)}"]
    return flags


def first_images(folder: Path, count: int, target: Path) -> Path:
    """Write the first images of a folder's Parquet files into one file, of row groups of 1,000, and return it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, rows = [], 0
    for file in sorted(folder.glob("*.parquet")):
        if rows < count:
            tables.append(pq.read_table(file).slice(0, count - rows))
            rows += tables[-1].num_rows
    pq.write_table(pa.concat_tables(tables), target, row_group_size=1000)
    return target


def history(store: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return the steps and values of a run's metric in MLflow."""
    from mlflow import MlflowClient

    points = MlflowClient(store).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def newest_run(store: str, experiment: str, stage: str) -> str:
    """Return the id of an experiment's newest run of a stage."""
    from pipelines.registry.queries import list_runs

    return list_runs(store, experiment=experiment, stage=stage, limit=1)[0]["id"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
