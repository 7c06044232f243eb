"""What is recorded about encoded shards, in the manifest and while a data set is being encoded."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.latents.statistics import ChannelSums
from raydit.listed_names import require_inside


@dataclass(frozen=True)
class QuarantinedImage:
    """An image that could not be used. Columns of quarantine.parquet are the fields."""

    key: str
    error: str
    """The reason, in one line."""


def require_count(value: object) -> int:
    """Return a value that must be a non-negative integer. Raises TypeError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{str(value)[:100]!r} is not a count")
    return value


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it. JSON keys are the fields."""

    file: str
    """Name of the Parquet file in the data set's folder."""
    rows: int
    bytes: int
    """Length of the file."""
    sha256: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "ShardEntry":
        """Read an entry of the manifest.

        Raises InvalidInput for a file outside of the data set's folder, and KeyError or TypeError for what is no entry.
        """
        return cls(
            require_inside(entry["file"], "manifest.json"),
            require_count(entry["rows"]),
            require_count(entry["bytes"]),
            entry["sha256"],
        )


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as .records/part-00000.json keeps it until the manifest is written.

    JSON keys are the fields.
    """

    file: str
    listing: str
    """Digest of the listing of its images: the record is valid for these images only."""
    rows: int
    bytes: int
    sha256: str
    channels: ChannelSums
    quarantined: tuple[QuarantinedImage, ...]
    num_low: int = 0
    """Images that are nearly black because their files hold 10 or 12 of 16 bits."""
    settings: str | None = None
    """Digest of what the latents depend on besides the images (see `pipelines.latents.shards.settings_digest`): the
    record is valid for these settings only. None in records of earlier releases."""

    @property
    def entry(self) -> ShardEntry:
        """The shard as the manifest lists it."""
        return ShardEntry(self.file, self.rows, self.bytes, self.sha256)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ShardRecord":
        """Read a record from JSON values."""
        quarantined = tuple(QuarantinedImage(**image) for image in record["quarantined"])
        return cls(**{**record, "channels": ChannelSums(**record["channels"]), "quarantined": quarantined})
