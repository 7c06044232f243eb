"""The records of real images, some of which cannot be read: a few are left out, and many are refused."""

from collections.abc import Iterator, Sequence

from cluster import storage
from pipelines.console import say
from pipelines.latents.quarantine import most_unusable
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import ShardResult, read_results, remove_unreadable
from pipelines.scoring.workers.shards import ScoringShard
from raydit.errors import InvalidInput

RECONSTRUCTIONS = "-reconstructions"
"""End of the names, without suffix, under which features of reconstructed held-out images are kept."""


def read_real_results(
    settings: ScoringSettings, shards: Sequence[ScoringShard], least: int = 1
) -> Iterator[ShardResult]:
    """Yield the records of all training images or of all held-out images, in order; unreadable images are left out.

    Says after the last record how many these are. If they are more than encoding would quarantine, or fewer than
    `least` images are readable, raises InvalidInput instead, after removing the records with unreadable images, so that
    the same command reads them again.
    """
    unreadable: list[str] = []
    for record in read_results(shards):
        unreadable += [] if record.unreadable is None else record.unreadable.tolist()
        yield record
    if not unreadable:
        return
    total, is_held_out = sum(len(shard.images) for shard in shards), shards[0].held_out
    kind = "held-out images" if is_held_out else "images"
    found = f"{len(unreadable):,} of {total:,} {kind} cannot be read"
    allowed = max(0, min(most_unusable(settings.max_quarantined, total), total - least))
    if len(unreadable) <= allowed:
        extractor = settings.extractor.name
        say("reference", f"{found} and are left out of the features by {extractor}, such as {unreadable[0]}")
        return
    remove_unreadable(shards)
    if is_held_out:
        _remove_reconstructions(settings.references)
    raise InvalidInput(
        f"images.path: {found}, such as {unreadable[0]}",
        f"at most {allowed:,} (encode.max_quarantined = {settings.max_quarantined:g}, and {least} readable)",
        "repair them, or raise encode.max_quarantined, and run the command again",
    )


def _remove_reconstructions(references: str) -> None:
    """Remove the records of reconstructed held-out images, which lack the unreadable ones as well."""
    for name in storage.list_names(references):
        if f"{RECONSTRUCTIONS}.shards-" in name:
            storage.remove_folder(storage.join(references, name))
