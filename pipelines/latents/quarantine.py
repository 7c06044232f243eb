"""Images that could not be used: nothing is dropped in silence, and too many of them stop the job."""

from cluster import storage
from pipelines.latents import schema

QUARANTINE = "quarantine.parquet"
ALWAYS_ALLOWED = 10
"""Unusable images that stop no job, however few images there are, unless none at all are allowed."""
EXAMPLES = 3


def write_quarantine(path: str, entries: list[dict]) -> None:
    """Write {"key", "error"} of every unusable image, also where there are none."""
    import pyarrow as pa

    columns = {name: pa.array([entry[name] for entry in entries], pa.string()) for name in ("key", "error")}
    storage.write_atomically(path, schema.parquet_bytes(pa.table(columns)))


class QuarantineLimit:
    """Collects unusable images, and stops the job as soon as nothing that may follow can make them few enough."""

    def __init__(self, folder: str, share: float, num_images: int):
        self.folder, self.share, self.num_images = folder, share, num_images
        allowed = max(ALWAYS_ALLOWED, int(share * num_images)) if share else 0
        # A job of which nothing at all is usable has failed, however few images it has.
        self.allowed = min(allowed, num_images - 1)
        self.entries: list[dict] = []

    def add(self, entries: list[dict]) -> None:
        """Count further ones. Raises ValueError with examples if they are too many, all of them written down."""
        self.entries += entries
        if len(self.entries) <= self.allowed:
            return
        path = storage.join(self.folder, QUARANTINE)
        write_quarantine(path, self.entries)
        examples = "; ".join(f"{entry['key']} ({entry['error']})" for entry in self.entries[:EXAMPLES])
        raise ValueError(
            f"found {len(self.entries):,} unusable images among {self.num_images:,}, expected at most "
            f"{self.allowed:,} (encode.max_quarantined = {self.share:g}), such as {examples}. See "
            f"{path} for all so far; mend or remove them, or raise encode.max_quarantined and go "
            "on: finished shards are kept"
        )
