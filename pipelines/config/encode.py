"""The section [encode] of a recipe."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import PositiveInt

from pipelines.config.defaults import leave_out_defaults
from pipelines.config.training import ComputeDtype, WorkersConfig

MemoryFormat = Literal["contiguous", "channels_last"]
"""Memory layouts of weights and activations, as in dit.autoencoder.MEMORY_FORMATS."""
LAYOUTS: dict[str, MemoryFormat] = {"cpu": "channels_last", "cuda": "contiguous"}
"""The faster layout on each type of device."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(WorkersConfig):
    """Encoding of images into latents. Defaults are raydit's own."""

    output: str | None = None
    """Folder or URI of the latents; `latents` in the recipe's output when left out. Recipes that share it encode
    once."""
    flip: bool = True
    """Also store the moments of each image's horizontal flip."""
    shard_rows: PositiveInt = 512
    """Images per Parquet file."""
    batch_size: PositiveInt = 32
    """Images per forward pass of the autoencoder."""
    dtype: ComputeDtype = "float32"
    """Precision of the autoencoder: "tf32" is float32 on devices without it; "bfloat16" can depend on the batch."""
    memory_format: MemoryFormat | None = None
    """Memory layout of the autoencoder's tensors; when left out the faster one: "contiguous" on a GPU, and on CPUs
    "channels_last", the layout of stored images."""
    compile: bool = False
    """Compile the autoencoder's encoder: minutes at the start of each worker, then faster on a GPU."""
    store: bool | None = None
    """false: store no moments, which are large for some autoencoders; training reads the images again and encodes them
    on its own device, in batches of `batch_size`. True is the default."""
    max_quarantined: Annotated[float, Ge(0), Le(1)] = 0.05
    """Largest share of the images that may be unusable: more stop the job. Ten are always tolerated, unless the share
    is 0; a data set without a usable image never is. Evaluations apply the same limit to real images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        leave_out_defaults(self, {"store": True, "memory_format": LAYOUTS[self._device]})

    @property
    def layout(self) -> MemoryFormat:
        """The memory layout on the devices of this stage's workers."""
        return self.layout_on(self._device)

    @property
    def _device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"

    def layout_on(self, device: str) -> MemoryFormat:
        """Return the memory layout on a type of device: the one that is set, or else the faster one there."""
        return self.memory_format or LAYOUTS.get(device, "contiguous")

    @property
    def stores_moments(self) -> bool:
        """Whether the moments of training images are stored; those of held-out images always are."""
        return self.store is not False
