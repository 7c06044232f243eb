"""The house of DESIGN.md: which package may import which."""

import ast
import functools
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "dit": {"ray", "mlflow", "pyarrow", "evaluation", "cluster", "pipelines"},
    "evaluation": {"ray", "mlflow", "dit", "cluster", "pipelines"},
    "cluster": {"mlflow", "dit", "evaluation", "pipelines"},
    "pipelines": set(),
    "raydit": {"ray", "mlflow", "pyarrow", "torch", "dit", "evaluation", "cluster", "pipelines"},
}
JOBS = (
    "autoencoder",
    "build_reference",
    "encode",
    "evaluate",
    "evaluate_autoencoder",
    "evaluate_images",
    "sample",
    "train",
    "tune",
)
"""Modules of pipelines that are a job each; `run` is the jobs in a row."""
LAYERS = [
    ("cli",),
    ("run",),
    JOBS,
    ("registry", "planning"),
    ("training", "sampling", "grids"),
    ("scoring",),
    ("checkpoints", "stage"),
    ("latents", "tracking"),
    ("images", "artifacts"),
    ("config", "console"),
]
"""Folders and modules of pipelines from the top down: each may import those in lower layers, and none in its own.

`sampling` and `grids` hold names that models promoted by older versions import.
"""
SOURCES = [file for package in FORBIDDEN for file in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def imported_names(file: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_the_house_allows(package):
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imported_names(file)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert not found


def test_only_tracking_and_the_models_it_serves_import_mlflow():
    users = {file.name for file in SOURCES if any(name.split(".")[0] == "mlflow" for name in imported_names(file))}
    assert users == {"store.py", "mlflow_writer.py", "model_writer.py", "model_files.py", "served_model.py"}


def test_files_import_each_other_in_one_direction():
    """No circle among our own files."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in SOURCES}
    arrows = {name: (imported_names(file) & modules.keys()) - {name} for name, file in modules.items()}
    seen: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert seen.get(name) != "open", f"circle: {' -> '.join((*path, name))}"
        if name not in seen:
            seen[name] = "open"
            for target in sorted(arrows[name]):
                visit(target, (*path, name))
            seen[name] = "done"

    for name in modules:
        visit(name, ())


def folder_of(module: str) -> str:
    """The folder or module of pipelines that a dotted name lies in."""
    return module.split(".")[1]


def test_folders_of_pipelines_import_downwards_only():
    layer_of = {folder: layer for layer, names in enumerate(LAYERS) for folder in names}
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SOURCES}
    found = set()
    for file in sorted((ROOT / "pipelines").rglob("*.py")):
        if file == ROOT / "pipelines" / "__init__.py":
            continue
        folder = folder_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        assert folder in layer_of, f"{file.relative_to(ROOT)} is in no layer of LAYERS: add its folder or module to one"
        for name in imported_names(file) & modules:
            if (
                name.startswith("pipelines.")
                and folder_of(name) != folder
                and layer_of[folder_of(name)] <= layer_of[folder]
            ):
                found.add(f"{file.relative_to(ROOT)} imports {name}")
    assert not found


def test_a_scoring_actor_imports_neither_jobs_nor_tracking():
    modules = "pipelines.scoring.workers.actors, pipelines.scoring.samples.checkpoint_sampler"
    script = f"import sys, {modules}; print(*(name for name in sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(output.stdout.split())
    unwanted = {"pipelines.stage", "pipelines.tracking", "pipelines.registry", "pipelines.training", "pipelines.cli"}
    unwanted |= {f"pipelines.{job}" for job in JOBS} | {"cluster.lease", "cluster.storage.lease", "mlflow", "ray"}
    assert "pipelines.scoring.workers.actors" in loaded and not loaded & unwanted


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_readable(file):
    assert len(file.read_text().splitlines()) <= 350


def test_the_command_line_imports_nothing_heavy():
    heavy = "('torch', 'ray', 'mlflow', 'numpy')"
    script = f"import sys, pipelines.cli.main; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_checking_a_recipe_imports_nothing_heavy():
    script = (
        "import sys; from pipelines.config.reader import load_recipe; load_recipe('pipelines/recipes/digits.toml');"
        "print([m for m in ('torch', 'ray', 'mlflow', 'diffusers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_packages_of_extras_are_imported_only_where_they_are_used():
    """Inside a function, so that nobody needs an extra for what does not use it."""
    statements = [node for file in SOURCES for node in ast.parse(file.read_text()).body]
    imported = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in statements if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported}
    assert "torch" in packages and not packages & {"transformers", "peft", "timm", "torchao"}


def test_every_requirement_has_a_pin_that_meets_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"text", "lora", "fp8"} <= extras.keys()
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, [*project["dependencies"], *itertools.chain(*extras.values())]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
    assert {"transformers", "peft", "timm"} <= pins.keys()
