"""Export checkpoints to the formats of other projects."""

import shlex
from pathlib import Path
from typing import Literal

from cluster import storage
from dit.checkpoint import OFFICIAL_AUTOENCODER, export_diffusers, export_official
from dit.formats.adapter import ADAPTER_CONFIG
from dit.formats.official import fields_to_give
from pipelines.checkpoints.adapters import export_adapter
from pipelines.checkpoints.autoencoder import absolute_autoencoder_id, checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.console import say

ExportFormat = Literal["official", "diffusers", "peft", "diffusers-lora"]


def export_checkpoint(
    checkpoint: str | Path | LocatedCheckpoint,
    out: str | Path,
    *,
    format: ExportFormat,
    weights: str = "ema",
    tracking_uri: str = "",
) -> Path:
    """Write a checkpoint as a weights file of the official code, or as a folder for diffusers' DiTPipeline.

    Of a checkpoint with an adapter these are the merged weights; "peft" and "diffusers-lora" write the adapter alone
    (`pipelines.checkpoints.adapters.export_adapter`). weights: "ema", "raw" (as trained) or another average's name.
    tracking_uri: MLflow's, where runs and models are looked up, as in a recipe.

    Options that `raydit import` needs for an official file are printed, because the file does not contain them.
    Returns the path that was written. Raises AlreadyExists, and InvalidInput if the format cannot express the model.
    """
    storage.refuse_unwritable(str(out))
    opened = open_checkpoint(checkpoint, tracking_uri=tracking_uri)
    if format == "official":
        file = export_official(opened, out, weights=weights)
        if options := flags_for_import(opened):
            say("export", f"the file lacks these options, which `raydit import` needs: {shlex.join(options)}")
        return file
    if format == "peft" or format == "diffusers-lora":
        return export_adapter(opened, out, layout=format, weights=weights)
    return export_diffusers(opened, out, autoencoder=checkpoint_autoencoder(opened), weights=weights)


def flags_for_import(opened: LocatedCheckpoint) -> list[str]:
    """Return the options with which `raydit import` restores a checkpoint from the official file of its weights."""
    record = opened.record
    options = ["--objective", "flow"] if record.process_kind == "flow" else []
    for name, value in fields_to_give(record.model_config).items():
        options += ["--set", f"model.{name}={value}"]
    if record.autoencoder.id != OFFICIAL_AUTOENCODER:
        options += ["--autoencoder", absolute_autoencoder_id(opened)]
    return options


def describe_export(path: Path) -> str:
    """Say in one line how an exported file or folder is loaded, and what it then computes."""
    if path.is_file():
        return "a state dict for the official code; it holds neither configuration nor autoencoder"
    if (path / ADAPTER_CONFIG).is_file():
        return f'an adapter: peft.PeftModel.from_pretrained(model, "{path}"), with a model that has the base\'s weights'
    if not any((path / "transformer").glob("*.py")):
        return f'DiTPipeline.from_pretrained("{path}") computes the same'
    return (
        f'DiTPipeline.from_pretrained("{path}", trust_remote_code=True) computes the same, by a class in the folder '
        "with the official timestep frequencies; diffusers' own class has other frequencies and refuses these weights"
    )
