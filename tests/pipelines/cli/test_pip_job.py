"""`raydit submit --pip` on a cluster that has only Ray: the job brings raydit, and the node installs what it needs."""

import json
import subprocess
import sys

import pytest
import ray
from ray_head import started_head
from tiny import RECIPE
from tiny_run import Submitter

from pipelines.tracking.provenance import CODE, code_tags
from raydit import __version__

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:ssl=None is deprecated")]


@pytest.fixture
def plain_environment(tmp_path):
    """A virtual environment with Ray and nothing of raydit's own requirements."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        f"ray[data,train,default]=={ray.__version__}",
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package registry answers: {done.stderr[-300:]}")
    return folder


def test_a_whole_run_works_on_a_plain_ray_cluster(plain_environment, tmp_path):
    from mlflow import MlflowClient

    project, output, store = tmp_path / "project", tmp_path / "output", f"sqlite:///{tmp_path / 'mlflow.db'}"
    project.mkdir()
    (project / "my.toml").write_text(RECIPE.read_text())
    code = code_tags(CODE)
    settings = {"images.path": "digits", "output": output, "tracking.uri": store}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with started_head(environment=plain_environment) as head:
        submit = Submitter(head, project)
        job = submit("run", "my.toml", *overrides, flags=("--pip",), timeout=3600)
    assert job.returncode == 0, job.stdout[-3000:]
    assert len(list((output / "evaluations").glob("*/step_0000006/report.json"))) == 1
    record = json.loads((output / "checkpoints" / "step_0000006" / "config.json").read_text())
    assert record["raydit_version"] == __version__
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 5
    for run in runs:
        assert run.data.tags["raydit.version.raydit"] == __version__
        assert code.items() <= run.data.tags.items()
