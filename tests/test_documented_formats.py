"""docs/reference/checkpoints.md and reports.md name what the files hold, and their examples run on real ones."""

import hashlib
import json
import re
import textwrap
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from dit.formats.record import AutoencoderRecord, BaseRecord, CheckpointRecord, SourceRecord
from evaluation.per_class import ClassDistance
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport, FurtherScores
from pipelines.training.cursor import DataCursor

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"
GOLDEN = ROOT / "tests" / "golden" / "707a9da"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output of a tiny run, by an older commit."""
    folder = tmp_path_factory.mktemp("formats")
    with zipfile.ZipFile(GOLDEN / "artifacts.zip") as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("output/")])
    return folder / "output"


def names_on(page: str) -> set[str]:
    """Return the words of a page that are marked as code, without its indented blocks."""
    text = re.sub(r"^    .*\n", "", (PAGES / page).read_text(), flags=re.MULTILINE)
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}


def examples_on(page: str) -> list[str]:
    """Return the indented blocks of a page."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (PAGES / page).read_text(), flags=re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in blocks]


def test_every_entry_of_a_checkpoint_is_on_its_page(output):
    folder = output / "checkpoints" / "step_0000003"
    config, state = (json.loads((folder / name).read_text()) for name in ("config.json", "trainer/state.json"))
    classes = (CheckpointRecord, SourceRecord, BaseRecord, DataCursor, AutoencoderRecord)
    named = {field.name for each in classes for field in fields(each)} - {"class_name", "imported"}
    entries = {*config, *config["autoencoder"], *state, *named, "base", "interrupted"}
    assert entries <= names_on("checkpoints.md") | {"class"}


def test_every_file_of_a_checkpoint_is_on_its_page(output):
    folder = output / "checkpoints"
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    page = (PAGES / "checkpoints.md").read_text()
    assert files and not [name for name in files if name not in page]


def test_examples_of_checkpoints_run(output):
    found = {}
    for example in examples_on("checkpoints.md"):
        real = example.replace("outputs/digits/checkpoints/step_0001600", str(output / "checkpoints" / "step_0000006"))
        assert real != example
        exec(real, found)
    assert found["config"]["step"] == 6 and found["checkpoint"].step == 6
    assert found["model"].state_dict().keys() == found["weights"].keys()


def test_every_entry_of_a_report_is_on_its_page(output):
    (file,) = output.rglob("report.json")
    classes = (EvaluationReport, FurtherScores, ClassDistance, EvaluationProtocol, ReferenceStatistics)
    named = {field.name for each in classes for field in fields(each)} - {"real_baseline"}  # "floor" in the file
    assert {*json.loads(file.read_text()), "floor", "protocols", "meta", *named} <= names_on("reports.md")


def test_examples_of_reports_run(output, capsys):
    (file,) = output.rglob("report.json")
    paths = {
        "outputs/digits/evaluations/PROTOCOL_ID/step_0001600/report.json": file,
        "reference.npz": GOLDEN / "reference.npz",
    }
    show, canonical, reference = examples_on("reports.md")
    found = {}
    for example in (show, reference):
        for written, real in paths.items():
            example = example.replace(f'"{written}"', f'r"{real}"')
        exec(example, found)
    digest = hashlib.sha256(eval(canonical, found).encode()).hexdigest()
    assert digest[:12] == found["report"]["protocol_id"]
    assert "fd_efficientnet_lite0_12" in capsys.readouterr().out
    assert found["meta"]["n"] == 20
