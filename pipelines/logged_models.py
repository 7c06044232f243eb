"""Checkpoints as tracking knows them."""

import re


def log_checkpoint(run, checkpoint) -> None:
    """Tell tracking of a checkpoint; the same one twice is one LoggedModel."""
    recipe = checkpoint.config["recipe"]
    run.model(
        checkpoint.digest,
        # Of an imported one the folder's name, without what MLflow does not take.
        name=f"{recipe['name']}-{checkpoint.path.name}" if recipe else re.sub(r"[^\w-]", "-", checkpoint.path.name),
        step=checkpoint.step,
        params={"model": checkpoint.config["model"], "objective": checkpoint.config["objective"]},
        tags={
            "raydit.checkpoint": str(checkpoint.path),
            "raydit.checkpoint_digest": checkpoint.digest,
            "raydit.latents_fingerprint": checkpoint.config["latents_fingerprint"] or "unknown",
        },
    )
