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
