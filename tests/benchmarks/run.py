"""Run all benchmarks, or only those that need just torch if Ray is not installed.

    make benchmark                                 about half an hour on two cores
    make benchmark ARGS=--quick                    about three minutes: small cases, few rounds
    python tests/benchmarks/run.py -k training     only those that match

Further arguments are pytest's. Results go to tests/benchmarks/results.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))


def main(arguments: list[str]) -> int:
    from cluster.session import LOCAL_ENVIRONMENT

    torch_only = [HERE / f"test_{name}.py" for name in ("dit", "draws", "compile_speed")]
    chosen = [HERE] if importlib.util.find_spec("ray") else torch_only
    # Memory is allocated as in raydit's own workers, on both sides.
    paths = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | LOCAL_ENVIRONMENT | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-s", "-m", "benchmark", "--confcutdir", str(HERE)]
    return subprocess.run([*command, *map(str, chosen), *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
