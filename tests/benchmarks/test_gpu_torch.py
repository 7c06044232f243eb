"""What the benchmark of networks on a GPU needs, and its parts that other files hold."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import torch
from gpu_bench import Bench
from gpu_graphs import compare_graphs
from gpu_job_loop import profile_job_loop
from gpu_official import official_training
from missing_packages import canonical, missing_packages

SCRIPT = "import json, sys; sys.modules.update(dict.fromkeys(json.load(sys.stdin))); import gpu_torch"


def test_the_benchmark_begins_with_torch_numpy_and_safetensors_alone():
    enough = {"raydit", *missing_packages(("torch", "numpy", "safetensors"), ())}
    names = packages_distributions()
    absent = [each for each, owners in names.items() if enough.isdisjoint(map(canonical, owners))]
    assert {"annotated_types", "pydantic", "ray", "pyarrow", "diffusers"} <= set(absent)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        input=json.dumps(absent),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


def test_the_jobs_loop_trains_on_batches_of_its_thread(tmp_path):
    speed, busy = profile_job_loop(Bench(torch.device("cpu"), True, tmp_path))
    assert speed.value > 0 and busy.note == "left out: no GPU"


def test_cuda_graphs_are_left_out_without_a_gpu(tmp_path):
    (figure,) = compare_graphs(Bench(torch.device("cpu"), True, tmp_path))
    assert figure.value is None and figure.note == "left out: needs a GPU"


MODELS = """
from dit.config import DiTConfig
from dit.model import DiT as Network


def DiT(**fields):
    return Network(DiTConfig(**fields))
"""


def test_the_official_model_is_measured_in_the_loop_that_it_was_published_with(tmp_path):
    """A model of raydit's stands for the file, whose licence keeps it out of this repository."""
    (tmp_path / "models.py").write_text(MODELS)
    bench = Bench(torch.device("cpu"), True, tmp_path)
    (figure,) = official_training(bench, tmp_path / "models.py", images=64, compiled=False)
    assert figure.value > 0 and figure.share > 0 and "official small model for DiT-XL/2" in figure.what


def test_without_a_copy_of_its_file_the_official_model_is_left_out(tmp_path):
    (figure,) = official_training(Bench(torch.device("cpu"), True, tmp_path), None, images=64, compiled=True)
    assert figure.value is None and "--official" in figure.note
