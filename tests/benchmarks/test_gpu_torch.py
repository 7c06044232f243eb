"""What the benchmark of networks on a GPU needs."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

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
