"""The commands of docs/how-to/lora.md run on adapters of a small model with the layers of its recipe."""

import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path

from tiny_adapter import write_factors
from tiny_checkpoint import MODEL, tiny_output, write_checkpoint

from pipelines.checkpoints.adapters import import_adapter
from pipelines.cli.main import cli
from pipelines.config.model import REFINEMENTS
from pipelines.config.reader import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "how-to" / "lora.md").read_text()


def test_the_commands_about_finished_adapters_run(tmp_path, monkeypatch):
    given = load_recipe(ROOT / "pipelines" / "recipes" / "cifar10.toml").model
    layers = {field.name: getattr(given, field.name) for field in fields(given) if field.name in REFINEMENTS}
    model = replace(MODEL, **{name: value for name, value in layers.items() if value is not None})
    assert model.qk_norm and model.position == "rope"
    monkeypatch.chdir(tmp_path)
    output = Path(tiny_output(tmp_path).output)
    base = tmp_path / "outputs" / "cifar10" / "checkpoints" / "step_0006500"
    write_checkpoint(tiny_output(tmp_path), 6500, model)
    base.parents[1].parent.mkdir()
    shutil.move(output, base.parents[1])
    factors = write_factors(tmp_path / "factors", 0, layers=("blocks.0.attn.qkv",), model=model)
    for step in (500, 1000):
        import_adapter(factors, tmp_path / f"outputs/cifar10-lora/checkpoints/step_{step:07d}", base)
    block = PAGE.partition("## Merge, export, import")[2].split("\n\n")[1]
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["merge", "merge", "sample", "export", "import"]
    for command in commands:
        cli.main(command, standalone_mode=False)
    assert {"merged", "both", "merged.png", "adapter", "imported"} <= {path.name for path in tmp_path.iterdir()}
