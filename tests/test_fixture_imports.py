"""The fixtures of all tests load on a machine that has only what raydit itself needs, such as a GPU machine."""

import subprocess
import sys
from pathlib import Path

SCRIPT = "import sys; sys.modules.update(dict.fromkeys({missing!r})); import conftest"


def test_fixtures_load_without_the_packages_of_single_tests():
    missing = ("boto3", "botocore", "moto", "hypothesis", "scipy", "flask_cors", "polars", "duckdb", "datasets")
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(missing=missing)],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
