"""What the tracking run of a training records about its settings, its data and its start."""

import json
from typing import Any

from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.latents.dataset import LatentDataset
from pipelines.tracking import tags
from pipelines.tracking.run_log import RunLog, log_sections


def log_train_settings(
    run: RunLog, config: Recipe, latents: LatentDataset, start: dict[str, Any] | None = None
) -> None:
    """Log what identifies a training, and what may be another when it resumes. The whole recipe is an artifact.

    start: what identifies the weights that it starts from, wherever these lie.
    """
    recorded = resolved(config)
    sections = {name: recorded.get(name) for name in ("seed", "random", "model", "objective", "train")}
    if patterns := recorded["train"].get("lr_multipliers"):
        # One param, because MLflow takes no names with the characters of patterns.
        sections["train"] = recorded["train"] | {"lr_multipliers": json.dumps(patterns)}
    log_sections(
        run,
        {**sections, "start": start, "images": latents.preprocessing},
        may_change={"train": ("steps", "start", *NON_IDENTITY_FIELDS)},
    )


def log_latents(run: RunLog, latents: LatentDataset, held_out: LatentDataset | None) -> None:
    """Log the latents as inputs. held_out: those of the validation loss; None without one."""
    run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
    if held_out is not None:
        source = str(held_out.path)
        run.input(name="held-out latents", digest=held_out.fingerprint, source=source, context="validation")


def log_start(run: RunLog, start: dict[str, Any], base: dict[str, Any] | None = None) -> None:
    """Log the weights that a training started from. start: what its checkpoints record about them.

    base: what they record about the base of their adapter, which no training may remove from then on.
    """
    if base is not None:
        run.tag(tags.BASE_DIGEST, base["digest"])
    run.tag(tags.START, start["checkpoint"])
    run.tag(tags.START_SHA256, start["sha256"])
    run.input(name="start", digest=start["sha256"], source=start["checkpoint"], context="start")
