"""docs/reference/environment.md names every environment variable that the code names, and none that it made up."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "environment.md"
PACKAGES = ("raydit", "dit", "evaluation", "cluster", "pipelines")
VARIABLE = re.compile(r"(?:RAYDIT|RAY|MLFLOW|AWS|GOOGLE|HF|GLOO|NCCL|CUDA|OMP|MALLOC|XDG)_\w+")
OUR_SECTIONS = ("Read by raydit", "Sent with a job", "Set by raydit")


def named_in(tree: ast.AST) -> set[str]:
    """Return the strings that look like a variable's name, or that os.environ is asked for."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if VARIABLE.fullmatch(text)} | set(asked_for(tree))


def asked_for(tree: ast.AST) -> list[str]:
    """Return the names written out in os.environ[NAME], os.environ.get(NAME) and os.getenv(NAME)."""
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            keys.append(node.slice)
        elif isinstance(node, ast.Call) and re.match(r"os\.(environ\.|getenv)", ast.unparse(node.func)):
            keys += node.args[:1]
    return [key.value for key in keys if isinstance(key, ast.Constant)]


def variables_of_the_code() -> set[str]:
    files = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names_some = re.compile(rf"os.environ|os.getenv|[\"']{VARIABLE.pattern}")
    return {name for text in files if names_some.search(text) for name in named_in(ast.parse(text))}


def sections() -> dict[str, str]:
    """Return the text of each section of the page, by its heading."""
    return {part.partition("\n")[0]: part for part in PAGE.read_text().split("\n## ")[1:]}


def test_every_variable_that_the_code_names_is_on_the_page():
    found = variables_of_the_code()
    assert {"MLFLOW_TRACKING_URI", "RAYDIT_MODULES", "RAY_ADDRESS", "XDG_CACHE_HOME"} <= found
    assert found <= set(re.findall(r"\w+", PAGE.read_text()))


def test_every_variable_of_raydit_on_the_page_is_in_the_code():
    code = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    ours = "".join(text for heading, text in sections().items() if heading in OUR_SECTIONS)
    written = set(re.findall(r"`([A-Z][A-Z0-9]*_\w+)(?:=\w+)?`", ours))
    assert len(written) > 30
    assert {name for name in written if name not in code} <= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}  # Ray's constant


def test_a_variable_is_found_however_the_code_reads_it():
    reads = 'os.environ["A"], os.environ.get("B"), os.getenv("C", ""), os.environ.setdefault("D", ""), ("RAY_E",)'
    assert named_in(ast.parse(reads)) == {"A", "B", "C", "D", "RAY_E"}
