"""Checkpoints as tracking knows them."""

import re


def log_checkpoint(run, checkpoint, place: str | None = None) -> None:
    """Tell tracking of a checkpoint; the same one twice is one LoggedModel.

    place: what leads to it, where its local path is a copy.
    """
    recipe, place = checkpoint.config["recipe"], place or str(checkpoint.path)
    name = place.partition("?")[0].rstrip("/").rpartition("/")[2]
    run.model(
        checkpoint.digest,
        # Of an imported one the folder's name, without what MLflow does not take.
        name=f"{recipe['name']}-{name}" if recipe else re.sub(r"[^\w-]", "-", name),
        step=checkpoint.step,
        params={"model": checkpoint.config["model"], "objective": checkpoint.config["objective"]},
        tags={
            "raydit.checkpoint": place,
            "raydit.checkpoint_digest": checkpoint.digest,
            "raydit.latents_fingerprint": checkpoint.config["latents_fingerprint"] or "unknown",
        },
    )
