"""A training whose latents changed on purpose: its newest checkpoint becomes the start of a new training.

Never a resume: the order of images and the optimizer's state are those of other latents. The identity of the new
training records, as "accepted", which checkpoint it starts from, and the fingerprint of the latents before.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cluster import storage
from pipelines.artifacts import Artifact, differences
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_recorded
from pipelines.config.start import StartConfig
from pipelines.training.start import TrainingStart
from raydit.errors import InvalidInput, NotFound

ACCEPTED = "accepted"
"""Entry of a training's identity."""


def keep_accepted(identity: dict[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the identity of a training, with what the recorded one accepted, if they are equal in all else."""
    accepted = (recorded or {}).get(ACCEPTED)
    kept = identity | {ACCEPTED: accepted}
    return kept if accepted and not differences(recorded or {}, kept) else identity


def take_new_data(
    identity: dict[str, Any], checkpoints: CheckpointFolder, say: Callable[[str], object]
) -> dict[str, Any]:
    """Return the identity of a training that starts from the newest checkpoint of the one in the folder.

    identity: of the recipe's training; returned as it is where there is nothing to accept, which is said.
    """
    recorded = Artifact("train", checkpoints.uri, identity).recorded()
    if ACCEPTED in identity or recorded is None or not checkpoints.has_any():
        return identity
    before = recorded["latents"]["fingerprint"]
    if before == identity["latents"]["fingerprint"]:
        say("there are no new data to accept: the latents are those of the checkpoints")
        return identity
    newest = checkpoints.describe(checkpoints.last_step())
    accepted = {
        "checkpoint": newest.name,
        "digest": newest.digest,
        "sha256": newest.weights_sha256(),
        "latents": before,
    }
    return identity | {ACCEPTED: accepted}


def accepted_start(identity: Mapping[str, Any], checkpoints: CheckpointFolder) -> TrainingStart | None:
    """Open the checkpoint that a training which accepted new data starts from; None for another training.

    It lies in the folder of checkpoints until that is moved to superseded/, and there afterwards. If it is gone, the
    training goes on from checkpoints of its own; raises NotFound if there are none.
    """
    accepted = identity.get(ACCEPTED)
    if accepted is None:
        return None
    location = storage.join(storage.absolute(checkpoints.uri), accepted["checkpoint"])
    try:
        opened = open_recorded(location, location, accepted["digest"])
    except (NotFound, InvalidInput):
        if not checkpoints.has_any():
            raise
        own = checkpoints.describe(checkpoints.last_step()).record
        return TrainingStart(StartConfig(checkpoint=location), accepted["sha256"], own, None)
    settings = StartConfig(checkpoint=opened.origin)
    return TrainingStart(settings, accepted["sha256"], opened.record, opened, earlier=opened.record.start)
