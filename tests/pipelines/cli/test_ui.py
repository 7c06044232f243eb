"""What users see: MLflow's own UI, started by `raydit ui`, in a browser after a pipeline.

RAYDIT_SCREENSHOTS names a folder for the pictures, to be kept by a CI; RAYDIT_SCREENSHOTS_OF another recipe than the
tiny one. docs/tracking.png is `view` of pipelines/recipes/digits.toml, reduced to 64 colours.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from browser import CHROMIUM, Browser
from mlflow import MlflowClient
from mlflow_server import free_port, is_healthy, wait_until
from tiny import tiny_recipe

from cluster import storage
from cluster.listeners import listeners_below
from dit.formats.completion import step_name
from pipelines.cli import mlflow_ui
from pipelines.config.reader import load_recipe
from pipelines.registry.promotion import promote_checkpoint
from pipelines.run import run_pipeline
from pipelines.tracking.experiment_page import VIEW
from pipelines.tracking.lookup import model_id_of
from pipelines.tracking.store import check_tracking

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
NAME = "tiny-dit"
CLASSICAL = "workflowType=machine_learning"
"""MLflow's UI has two halves; the other one is of language models."""


class Ui:
    """`raydit ui` as a user starts it."""

    def __init__(self, store, folder):
        self.store, self.log = store, folder / "ui.log"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        command = [sys.executable, "-m", "pipelines.cli", "ui", "--port", str(self.port)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--set", f"tracking.uri={self.store}"],
                env=env,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        try:
            wait_until(lambda: self.address in self.log.read_text() or self.process.poll() is not None)
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def landing_address(self):
        """The address that it prints."""
        return re.search(rf"{self.address}\S*", self.log.read_text())[0]

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="module")
def told(local_ray, tmp_path_factory):
    """A pipeline with samples on the way, whose last checkpoint is champion; its recipe."""
    folder = tmp_path_factory.mktemp("shown")
    recipe = os.environ.get("RAYDIT_SCREENSHOTS_OF")
    output = (f"output={folder / 'output'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}")
    config = load_recipe(recipe, output) if recipe else tiny_recipe(folder)
    config = replace(config, train=replace(config.train, sample_every=config.train.checkpoint_every))
    run_pipeline(config)
    promote_checkpoint(storage.join(config.folder("checkpoints"), step_name(config.train.steps)), NAME)
    return config


@pytest.fixture(scope="module")
def served(told, tmp_path_factory):
    with Ui(told.tracking.uri, tmp_path_factory.mktemp("ui")) as running:
        yield running


@pytest.fixture
def page(served, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with Browser(tmp_path) as browser:
        yield browser


@pytest.fixture
def kept(page, tmp_path):
    """Keep a picture of the page."""
    folder = Path(os.environ.get("RAYDIT_SCREENSHOTS", tmp_path / "screenshots"))
    return lambda name: page.screenshot(folder / f"{name}.png")


@pytest.fixture(scope="module")
def known(told):
    """What the store knows: id of the experiment, and runs by their stages."""
    client = MlflowClient(told.tracking.uri)
    experiment = client.get_experiment_by_name(told.name).experiment_id
    return experiment, {run.data.tags["raydit.stage"]: run.info for run in client.search_runs([experiment])}


def test_the_experiment_names_its_runs_and_holds_a_view_that_compares_trainings(page, served, told, known, kept):
    experiment, runs = known
    page.open(f"{served.address}/#/experiments/{experiment}/runs?{CLASSICAL}")
    page.wait_for(f"Runs of the raydit recipe {told.name}", runs["pipeline"].run_name)
    kept("experiment")
    assert f"/#/experiments/{experiment}/runs?{CLASSICAL}" in served.landing_address
    page.open(served.landing_address)
    page.wait_for(VIEW, runs["train"].run_name, "train/loss")
    page.wait_until(page.has_picture, "expected the samples")
    page.wait_until(
        lambda: page.run("document.querySelectorAll('.js-plotly-plot path.js-line').length"), "expected a line"
    )
    kept("view")


def test_a_training_shows_its_charts_samples_and_figures(page, served, known, kept):
    experiment, runs = known
    place = f"{served.address}/#/experiments/{experiment}/runs/{runs['train'].run_id}"
    page.open(f"{place}?{CLASSICAL}")
    page.wait_for(runs["train"].run_name, runs["pipeline"].run_name, "train of the recipe", "raydit.hardware")
    kept("run")
    page.open(f"{place}/model-metrics?{CLASSICAL}")
    page.wait_for("fd_efficientnet_lite0_")  # the scores by step come first
    page.scroll_to("train")
    page.wait_for("loss", "grad_norm")
    page.wait_until(
        lambda: page.run("document.querySelectorAll('.js-plotly-plot path.js-line').length"), "expected a line"
    )
    kept("charts")
    for figure in ("loss_by_timestep", "throughput", "time"):
        page.open(f"{place}/artifacts/figures/{figure}.png?{CLASSICAL}")
        page.wait_for(f"figures/{figure}.png")
        page.wait_until(lambda: page.has_picture(400), "expected the figure")
        kept(f"figure_{figure}")


def test_reconstructions_stand_in_the_run_of_the_autoencoder(told, known):
    client, (_, runs) = MlflowClient(told.tracking.uri), known
    pictures = [file.path for file in client.list_artifacts(runs["autoencoder"].run_id, "images")]
    assert any("reconstructions" in path for path in pictures)


def test_the_registered_model_shows_its_alias_and_what_it_scored(page, served, told, kept):
    version = MlflowClient(told.tracking.uri).get_model_version_by_alias(NAME, "champion")
    page.open(f"{served.address}/#/models/{NAME}?{CLASSICAL}")
    page.wait_for(NAME, "champion", "Version 1", version.tags["raydit.protocol_id"])
    kept("model")
    page.open(f"{served.address}/#/models/{NAME}/versions/1?{CLASSICAL}")
    page.wait_for(f"Step {told.train.steps:,}: fd_efficientnet_lite0_", "raydit lineage")
    page.wait_until(page.has_picture, "expected the samples in the description")
    kept("version")
    model, experiment = (
        model_id_of(version),
        MlflowClient(told.tracking.uri).get_experiment_by_name(told.name).experiment_id,
    )
    page.open(f"{served.address}/#/experiments/{experiment}/models/{model}?{CLASSICAL}")
    page.wait_for(
        "eval/fd_efficientnet_lite0_", f"N={told.evaluate.num_samples}, ", f"Step {told.train.steps:,} of the recipe"
    )
    page.wait_until(page.has_picture, "expected the samples in the description")
    kept("checkpoint")


def test_the_ui_listens_on_loopback_only(served):
    """It asks nobody for a password."""
    assert is_healthy(served.address)
    assert listeners_below(psutil.Process(served.process.pid)) == []


def test_a_ui_that_runs_is_found_and_another_stores_is_left_alone(served, tmp_path, capsys, monkeypatch):
    mlflow_ui.serve_ui(served.store, served.port)
    assert f"{served.landing_address} on {served.store} (already running)" in capsys.readouterr().out
    mlflow_ui.serve_ui(served.store, served.port - 1)  # one that is free is no reason to start another
    assert "(already running)" in capsys.readouterr().out
    other = f"sqlite:///{tmp_path}/mlflow.db"
    check_tracking(other)
    monkeypatch.setattr(mlflow_ui, "NUM_PORTS", 1)
    with pytest.raises(ValueError, match=f"ports {served.port} to {served.port}: found other programs on all of them"):
        mlflow_ui.serve_ui(other, served.port)
    mlflow_ui.serve_ui(served.address, served.port)
    assert f"{served.landing_address}: the UI of the server in use, 2 experiments" in capsys.readouterr().out


def test_ctrl_c_ends_what_was_started(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with Ui(store, tmp_path) as running:
        assert is_healthy(running.address)
    assert running.process.returncode == 130 and not is_healthy(running.address)


def test_ctrl_c_ends_the_server_and_says_so_in_one_line(tmp_path):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with Ui(store, tmp_path) as ui:
        before = ui.log.read_text()
        wait_until(lambda: is_healthy(ui.address))
    assert ui.process.returncode == 130
    said = ui.log.read_text().removeprefix(before)
    assert said.split() == ["ui", "stopped"], said
    assert not is_healthy(ui.address)
