"""A training whose latents changed on purpose: its newest checkpoint becomes the start of a new training.

Never a resume: the order of images and the optimizer's state are those of other latents. The identity of the new
training records, as "accepted", which checkpoint it starts from, and the fingerprint of the latents before.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_recorded
from pipelines.config.start import StartConfig
from pipelines.training.starting.find_start import TrainingStart
from raydit.errors import InvalidInput, NotFound

ACCEPTED = "accepted"
"""Entry of a training's identity."""


def keep_accepted(training: Artifact) -> Artifact:
    """Return a training with what the recorded one accepted in its identity, if they are equal in all else."""
    accepted = (training.recorded() or {}).get(ACCEPTED)
    kept = replace(training, identity=training.identity | {ACCEPTED: accepted})
    return kept if accepted and not kept.changes() else training


def take_new_data(training: Artifact, say: Callable[[str], object]) -> Artifact:
    """Return a training that starts from the newest checkpoint of the one in the folder.

    training: the recipe's; returned as it is where there is nothing to accept, which is said.
    """
    identity, recorded, checkpoints = training.identity, training.recorded(), CheckpointFolder(training.folder)
    if ACCEPTED in identity or recorded is None or not checkpoints.has_any():
        return training
    before = recorded["latents"]["fingerprint"]
    if before == identity["latents"]["fingerprint"]:
        say("there are no new data to accept: the latents are those of the checkpoints")
        return training
    newest = checkpoints.describe(checkpoints.last_step())
    accepted = {
        "checkpoint": newest.name,
        "digest": newest.digest,
        "sha256": newest.weights_sha256(),
        "latents": before,
    }
    return replace(training, identity=identity | {ACCEPTED: accepted})


def accepted_start(identity: Mapping[str, Any], checkpoints: CheckpointFolder) -> TrainingStart | None:
    """Open the checkpoint that a training which accepted new data starts from; None for another training.

    It lies in the folder of checkpoints until that is moved to superseded/, and there afterwards. If it is gone, the
    training resumes from checkpoints of its own; raises NotFound if there are none.
    """
    accepted = identity.get(ACCEPTED)
    if accepted is None:
        return None
    location = storage.join(storage.absolute(checkpoints.uri), accepted["checkpoint"])
    try:
        opened = open_recorded(location, location, accepted["digest"])
    except (NotFound, InvalidInput) as error:
        if not checkpoints.has_any():
            raise
        own = checkpoints.describe(checkpoints.last_step()).record
        return TrainingStart(StartConfig(checkpoint=location), accepted["sha256"], own, None, error)
    settings = StartConfig(checkpoint=opened.origin)
    return TrainingStart(settings, accepted["sha256"], opened.record, opened, earlier=opened.record.start)
