"""The networks of a recipe whose training starts from a checkpoint, some of whose fields the recipe may leave out."""

from dit.config import UViTConfig
from pipelines.config.model import UVIT_FIELDS
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.planning.networks import Networks, resolve_networks
from raydit.errors import NotFound, StorageFailed, Unreachable


def resolve_started_networks(config: Recipe, num_classes: int) -> Networks:
    """Return the networks of a recipe as `resolve_networks` does, with the transformer that its training trains.

    Fields of a U-ViT that the recipe leaves out are those of its start, which is opened for them alone: that imports
    torch, and may download the start. They are the recipe's own where the start cannot be opened from this machine.
    Raises the same errors as `resolve_networks`, and InvalidInput for a start that no training can have.
    """
    networks, model = resolve_networks(config, num_classes), config.model
    if config.train.start is None or not isinstance(networks.model, UViTConfig):
        return networks
    if all(getattr(model, name) is not None for name in UVIT_FIELDS):
        return networks
    from pipelines.checkpoints.folder import CheckpointFolder
    from pipelines.training.starting.find_start import find_start
    from pipelines.training.starting.training_start import started_model

    try:
        start = find_start(config)
    except (NotFound, StorageFailed, Unreachable):
        return networks
    assert start is not None, "the recipe names a start"
    checkpoints = CheckpointFolder(config.folder("checkpoints"))
    return networks._replace(model=started_model(networks.model, resolved(config)["model"], start, checkpoints))
