"""The command line: help, exit codes, errors for users and errors for us."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import click
import pytest
import tomli_w
from tiny_encode import autoencoder_folder

from pipelines.cli import main as cli
from pipelines.cli.commands import stages
from raydit.errors import Failed, InvalidInput, RayditError

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "tests" / "recipes" / "tiny.toml")
NO_SUCH = "no such folder"
IMAGES = ("--images", NO_SUCH, "--reference", NO_SUCH)
NO_WEIGHTS = ("--set", "evaluate.extractor_weights=none.pth")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_with_what_it_does(raydit, flag):
    code, out, err = raydit(flag)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.partition("Commands:")[2].splitlines() if line.strip()}
    assert set(lines) == set(cli.cli.commands) >= {"run", "encode", "train", "evaluate", "sample", "submit", "doctor"}
    assert all(len(line.split()) > 2 for line in lines.values())


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_help_for_every_option(raydit, command):
    code, out, _ = raydit(command, "--help")
    assert code == 0 and out.startswith("Usage: ")
    options = [option for option in cli.cli.commands[command].params if isinstance(option, click.Option)]
    assert all(option.opts[0] in out for option in options)


def choices(command, name):
    """The values that an option takes."""
    (option,) = [param for param in cli.cli.commands[command].params if param.name == name]
    return set(option.type.choices)


def test_choices_are_those_of_the_code_that_takes_them():
    """The command line names them itself, because that code is slow to import."""
    from pipelines.checkpoints.exporting import ExportFormat
    from pipelines.registry.promotion import CHALLENGER, CHAMPION
    from pipelines.scoring.samples.saved_samples import SampleFormat

    assert choices("export", "format") == set(get_args(ExportFormat))
    assert choices("evaluate", "save_format") == set(get_args(SampleFormat))
    assert choices("promote", "alias") == {CHAMPION, CHALLENGER}


def test_the_version_is_told(raydit):
    code, out, _ = raydit("--version")
    assert code == 0 and "0.1.0" in out


@pytest.mark.parametrize("command", ["run", "autoencoder", "train"])
def test_a_dry_run_prints_the_resolved_recipe_and_touches_nothing(raydit, command, empty_folder):
    code, out, err = raydit(command, TINY, "--dry-run", "--set", "train.steps=8", "--set", "output=there")
    recipe, plan = json.loads(out), dict(line.split(maxsplit=1) for line in err.splitlines())
    assert code == 0
    assert (recipe["train"]["steps"], recipe["output"], recipe["name"]) == (8, "there", "tiny")
    assert recipe["train"]["ema_decay"] and recipe["seed"] == 0  # defaults are filled in
    assert [*plan] == ["autoencoder", "encode", "train", "evaluate"] if command == "run" else [command]
    if command != "autoencoder":
        assert plan["train"] == "8 steps of 8 images, into there/checkpoints"
    assert list(empty_folder.iterdir()) == []
    _, out, _ = raydit(command, TINY, "--dry-run", "--set", "train.steps=8", "--set", "output=there", "--json")
    assert json.loads(out.splitlines()[-1]) == {"plan": plan}


def test_a_dry_run_refuses_what_the_run_refuses_of_the_recipe_alone(raydit):
    code, _, err = raydit("run", TINY, "--dry-run", "--set", "evaluate.num_samples=5")
    assert code == 2 and "evaluate.num_samples: found 5, expected at least 10" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.toml"], "no recipe at none.toml, expected a TOML file"),
        (["run", TINY, "--set", "train.stpes=8"], 'did you mean "train.steps"?'),
        (["run", TINY, "--set", "train.steps=many"], "--set train.steps: found 'many' (str), expected an integer"),
        (["run", TINY, "--set", "train.steps"], "--set train.steps: found no key and value, expected KEY=VALUE"),
        (["run", TINY, "--set", "evaluate.sampler=ddim"], "a sampler for diffusion, with objective.kind = 'flow'"),
        (["encode", TINY, "--set", "images.path=nowhere"], "images.path: found nothing at "),
        (["train", TINY], "latents"),
        (["evaluate", NO_SUCH], NO_SUCH),
        (["sample", NO_SUCH, "--classes", "1,7"], NO_SUCH),
        (["evaluate", NO_SUCH, NO_SUCH, "--dry-run"], NO_SUCH),
        (["evaluate", NO_SUCH, "--recipe", TINY, "--set", "train.stpes=8"], 'did you mean "train.steps"?'),
        (["evaluate", "--images", NO_SUCH, "--reference", NO_SUCH], f"--reference {NO_SUCH}: nothing there, expected"),
        (["evaluate", "--images", NO_SUCH, "--recipe", TINY], "images.path: found nothing at "),
        (["evaluate", "--images", "digits", "--recipe", TINY, *NO_WEIGHTS, "--dry-run"], "no file at none.pth"),
        (["compare", NO_SUCH, NO_SUCH], NO_SUCH),
        (["reference", "build", NO_SUCH, "--out", "r.npz"], "images.path: found nothing at "),
        (["reference", "build", "digits", "--out", "r.npz", "--extractor", "vgg"], "evaluate.extractor: found 'vgg'"),
        (["import", NO_SUCH, "out"], f"no weights at {NO_SUCH}, expected a .safetensors"),
        (["export", NO_SUCH, "out", "--format", "diffusers"], NO_SUCH),
        (["submit", "--address", "head:6379", "--", "run", TINY], "job server address: found 'head:6379'"),
        (["submit", "--", "run", TINY, "--set", "train.stpes=8"], 'did you mean "train.steps"?'),
        (["ui", "--set", "tracking=http://mlflow:5000"], "tracking: found 'http://mlflow:5000', expected a section"),
        (["ui", "--set", "trackng.uri=sqlite:///runs.db"], 'did you mean "tracking"?'),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(raydit, arguments, message):
    code, _, err = raydit(*arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("raydit: ") and message in line


def test_every_mistake_of_a_recipe_has_its_line(raydit):
    code, _, err = raydit("run", TINY, "--set", "train.stpes=8", "--set", "encode.flop=1")
    assert code == 2
    lines = err.strip().removeprefix("raydit: ").splitlines()
    assert {line.split(":")[0] for line in lines} == {"--set train.stpes", "--set encode.flop"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["run"],
        ["run", TINY, "--num-sample", "3"],
        ["submit"],
        ["sample", NO_SUCH, "--num-samples", "3"],
        ["evaluate"],
        ["evaluate", NO_SUCH, "--images", NO_SUCH],
        ["evaluate", NO_SUCH, NO_SUCH, "--watch"],
        ["evaluate", "--images", NO_SUCH],
        ["evaluate", "--images", NO_SUCH, "--reference", NO_SUCH, "--repeats", "2"],
        ["evaluate", NO_SUCH, "--num-samples", "9"],
        ["reference", "build", "digits"],
        ["compare"],
        ["sample", NO_SUCH, "--npz", "samples.npz", "--classes", "1"],
        ["export", NO_SUCH, "out"],
    ],
)
def test_bad_usage_is_exit_code_2(raydit, arguments):
    code, out, err = raydit(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", *IMAGES, "--num-samples", "1000"], "--num-samples is only for samples of checkpoints"),
        (["evaluate", *IMAGES, "--model", "DiT-S/2"], "--model is only for samples of checkpoints"),
        (["evaluate", *IMAGES, "--save-format", "parquet"], "--save-format is only for samples of checkpoints"),
        (["evaluate", *IMAGES, "--promote", "x"], "--promote is only for samples of checkpoints; leave out --images"),
        (["evaluate", *IMAGES, "--every", "1"], "--every is only for --watch"),
        (["evaluate", NO_SUCH, "--every", "1"], "--every is only for --watch"),
        (["evaluate", NO_SUCH, "--watch", "--model", "DiT-S/2"], "--model is only for official .pt files"),
        (["evaluate", NO_SUCH, "--save-format", "png"], "--save-format is only for --save-images"),
        (["sample", NO_SUCH, "--npz", "f.npz", "--out", "grid.png"], "--out is only for grids; leave out --npz"),
        (["sample", NO_SUCH, "--npz", "f.npz", "--columns", "4"], "--columns is only for grids"),
        (["sample", NO_SUCH, "--address", "auto"], "--address is only for --npz FILE"),
        (["promote", "--rollback", "x", "--protocol", "0"], "--protocol is only for CHECKPOINT; leave out --rollback"),
        (["promote", NO_SUCH, "--rollback", "x"], "expected CHECKPOINT --name NAME, or --rollback NAME"),
        (["plan", TINY, "--price", "2"], "--price is only for --cluster"),
        (["plan", TINY, "--cluster", "8xH100", "--classes", "3"], "--classes is only for --images"),
    ],
)
def test_an_option_without_effect_is_refused(raydit, arguments, message):
    """Also if it is given with its default value."""
    code, out, err = raydit(*arguments)
    assert (code, out) == (2, "")
    assert f"Error: {message}" in err


def test_what_a_job_cannot_reach_is_exit_code_1(raydit):
    code, _, err = raydit("submit", "--address", "http://127.0.0.1:9", "--", "run", TINY)
    assert code == 1
    assert err.strip().startswith("raydit: no job server answers at http://127.0.0.1:9")


def test_an_interrupted_command_is_exit_code_130(raydit, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_load", interrupted)
    code, out, err = raydit("train", TINY)
    assert (code, out) == (130, "")
    assert err.strip() == "raydit: interrupted; run the same command again to resume"


KINDS = [RayditError, *RayditError.__subclasses__(), *Failed.__subclasses__()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_error_for_users_is_one_line_with_its_exit_code(raydit, monkeypatch, kind):
    def fail(*_):
        raise kind("output: found a", "b", "change it")

    monkeypatch.setattr(stages, "_load", fail)
    code, out, err = raydit("train", TINY)
    assert (code, out, err) == (kind.exit_code, "", "\nraydit: output: found a, expected b. Change it\n")
    assert kind.exit_code == (1 if issubclass(kind, Failed) else 2)


def test_an_error_for_users_from_a_worker_of_ray_is_shown_without_its_traceback(raydit, monkeypatch):
    from ray.exceptions import RayTaskError

    def fail(*_):
        raise RayTaskError("read", "Traceback ...", InvalidInput("images: found a", "b", "")).as_instanceof_cause()

    monkeypatch.setattr(stages, "_load", fail)
    code, _, err = raydit("train", TINY)
    assert (code, err) == (2, "\nraydit: images: found a, expected b\n")


@pytest.mark.parametrize(
    ("number", "do"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EACCES, "Give yourself permission"),
        (errno.EROFS, "Choose a path that can be written"),
    ],
)
def test_what_the_machine_refuses_is_one_line_that_says_how_to_resume(raydit, monkeypatch, number, do):
    def fail(*_):
        raise OSError(number, os.strerror(number), "output/part")

    monkeypatch.setattr(stages, "_load", fail)
    code, _, err = raydit("train", TINY)
    assert code == 1 and f"'output/part'. {do}" in err
    assert err.endswith(", and run the same command again to resume\n")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        "int('x')",
        "max([])",
        "open('no such file')",
        "json.loads('not JSON')",
        "{}['key']",
        "[].pop()",
        "(_ for _ in ()).throw(RuntimeError('a bug'))",
    ],
)
def test_an_error_that_is_not_for_users_keeps_its_traceback(error):
    """In a process of its own, because the traceback is printed by Python; raised by a function of our packages."""
    script = f"""
import json
from pipelines.cli import main as cli
from pipelines.cli.commands import stages
from raydit.errors import Failed, InvalidInput, RayditError

def faulty(*_):
    return {error}

module = {{"__name__": "pipelines.training.loop", "json": json}}
stages._load = type(faulty)(faulty.__code__, module)
cli.main()
"""
    process = subprocess.run(
        [sys.executable, "-c", script, "train", TINY],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback") and "in faulty" in process.stderr
    assert "raydit: " not in process.stderr


@pytest.mark.parametrize("command", [("run", "--dry-run"), ("train", "--dry-run"), ("encode", "--dry-run"), ("plan",)])
def test_a_size_that_the_autoencoder_does_not_divide_is_refused_at_once(raydit, command, tmp_path):
    """By the autoencoder's own factor: 8 for Stable Diffusion's, 2 for the one in a folder."""
    name, *flags = command
    pretrained = autoencoder_folder(tmp_path / "pretrained")
    content = tomllib.loads(Path(TINY).read_text()) | {"images": {"path": "digits", "size": 36}}
    for id, size, sides in (("stabilityai/sd-vae-ft-ema", 36, "32 or 40"), (str(pretrained), 17, "16 or 18")):
        content["autoencoder"], content["images"]["size"] = {"id": id}, size
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(tomli_w.dumps(content))
        code, _, err = raydit(name, str(recipe), *flags)
        assert code == 2 and f"images.size: found {size}, expected a multiple of" in err, err
        assert f"Set images.size = {sides}, or choose another autoencoder" in err


INTERRUPTED_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pipelines.cli.main":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["raydit", "doctor"]
from pipelines.cli.entry import main
main()
"""


def test_an_interruption_while_the_command_line_is_imported_is_one_line_and_exit_code_130():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "\nraydit: interrupted; run the same command again to resume\n"


def test_the_installed_command_begins_where_signals_are_handled():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"raydit": "pipelines.cli.entry:main"}
