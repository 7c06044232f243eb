"""Checkpoints as LoggedModels."""

import re
import shlex

from dit.checkpoint import Checkpoint
from dit.formats.record import model_label
from pipelines.tracking import tags
from pipelines.tracking.run_log import RunLog


def log_checkpoint(run: RunLog, checkpoint: Checkpoint, location: str | None = None) -> None:
    """Log a checkpoint as a LoggedModel; logging the same one again creates no second.

    location: path or URI under which others find it, if its local path is a copy.
    """
    recipe, location = checkpoint.record.recipe, location or str(checkpoint.path)
    name = location.partition("?")[0].rstrip("/").rpartition("/")[2]
    run.model(
        checkpoint.digest,
        # An imported checkpoint has no recipe: its folder names it, without characters that MLflow refuses.
        name=f"{recipe['name']}-{name}" if recipe else re.sub(r"[^\w-]", "-", name),
        step=checkpoint.step,
        params={"model": checkpoint.record.model, "objective": checkpoint.record.objective},
        tags={
            tags.DESCRIPTION: describe_model(checkpoint, location),
            tags.CHECKPOINT: location,
            tags.CHECKPOINT_DIGEST: checkpoint.digest,
            tags.LATENTS_FINGERPRINT: checkpoint.record.latents_fingerprint or "unknown",
        },
    )


def describe_model(checkpoint: Checkpoint, location: str) -> str:
    """Return the description of a checkpoint's LoggedModel, in Markdown. location: path or URI of the checkpoint."""
    record = checkpoint.record
    trained = f"Step {checkpoint.step:,} of the recipe `{record.recipe['name']}`" if record.recipe else "Imported"
    return (
        f"{trained}: {model_label(record.model, record.recipe)}, {record.process_kind}.\n\n"
        f"Checkpoint `{location}`, digest `{checkpoint.digest[:12]}`. "
        f"Its lineage: `raydit lineage {shlex.quote(location)}`"
    )
