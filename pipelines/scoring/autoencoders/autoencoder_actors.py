"""What Ray actors measure of an autoencoder: shards of images encoded and decoded, and a tiny DiT on the latents.

keys of images -> read and crop -> encode -> decode -> errors, features, latents        (a record per shard)
latents of all records          -> train a tiny DiT -> its loss on held-out latents     (one record)
"""

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import storage
from dit.hardware.device_errors import worker_device
from evaluation.protocol import shard_ranges
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.records import read_arrays
from pipelines.scoring.workers.shards import ScoringShard
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from evaluation.latent_statistics import LatentStatistics

NUM_PICTURES = 20
"""Images that the page shows with their reconstructions."""


@dataclass(frozen=True)
class AutoencoderShard(ScoringShard):
    """A few images to encode and decode."""

    positions: range = range(0)
    """Positions of the shard's images among all images of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class ReconstructedShard:
    """What was measured of one shard, for N images. Field names are the keys of the file."""

    squared_errors: np.ndarray
    """(N,) float64: mean squared error of each image, in squared grey levels."""
    similarities: np.ndarray
    """(N,) float64: structural similarity of each image."""
    features: dict[str, np.ndarray]
    """Name of each extractor in the protocol -> features of the reconstructions, (N, D) float32. In the file
    features_NAME."""
    latents: "LatentStatistics"
    """Statistics of the scaled latents, drawn from the posterior. In the file: latents_n, latents_mean, ..."""
    means: np.ndarray
    """(P, C, h, w) float16: means of the scaled posterior of those images that measure denoising, in their window."""
    stds: np.ndarray
    """The same for the standard deviations."""
    originals: np.ndarray
    """(K, H, W, 3) uint8: the images that the page shows."""
    decoded: np.ndarray
    """(K, H, W, 3) uint8: their reconstructions."""
    moments_shape: tuple[int, ...]
    """(2C, h, w), or (C, h, w) if the posterior is deterministic."""
    encode_seconds: float
    decode_seconds: float
    device: str
    """Device that encoded and decoded."""

    def write(self, file: str) -> None:
        """Write the record to a path or URI, atomically."""
        values: dict[str, Any] = {**vars(self), **{f"latents_{k}": v for k, v in vars(self.latents).items()}}
        values |= {f"features_{name}": array for name, array in self.features.items()}
        del values["latents"], values["features"]
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in values.items()}
        np.savez(buffer, **arrays)
        storage.write_atomically(file, buffer.getvalue())

    @classmethod
    def read(cls, file: Any) -> "ReconstructedShard":
        """Read a record."""
        from evaluation.latent_statistics import LatentStatistics

        arrays: dict[str, Any] = read_arrays(file)
        features, latents = (
            {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
            for prefix in ("features_", "latents_")
        )
        scalars: dict[str, Any] = {name: float(arrays.pop(name)) for name in ("encode_seconds", "decode_seconds")}
        shape, device = tuple(arrays.pop("moments_shape").tolist()), str(arrays.pop("device"))
        latents["n"] = int(latents["n"])
        return cls(
            features=features,
            latents=LatentStatistics(**latents),
            moments_shape=shape,
            device=device,
            **scalars,
            **arrays,
        )


def autoencoder_shards(folder: str, listing: Listing, shard_rows: int) -> list[AutoencoderShard]:
    """Return one shard for each run of shard_rows images; their records are numbered files in `folder`."""
    return [
        AutoencoderShard(
            # Earlier releases wrote shard-00000.npz, whose features are numbered instead of named.
            storage.join(folder, f"reconstructed-{index:05d}.npz"),
            listing.take(part),
            positions=part,
        )
        for index, part in enumerate(shard_ranges(len(listing), shard_rows))
    ]


def read_reconstructed(shards: Sequence[AutoencoderShard]) -> Iterator[ReconstructedShard]:
    """Yield the records of finished shards, in order."""
    files = storage.open_in_order([shard.file for shard in shards])
    for shard, file in zip(shards, files, strict=True):
        with file:
            record = ReconstructedShard.read(file)
        if len(record.squared_errors) != len(shard.images):
            raise InvalidInput(
                f"{shard.file}: found {len(record.squared_errors)} images",
                str(len(shard.images)),
                "Delete it and run again",
            )
        yield record


@dataclass(frozen=True, kw_only=True)
class AutoencoderSource:
    """What an actor needs to know of an autoencoder."""

    handle: AutoencoderHandle
    encode: EncodeConfig
    """Precision, batch size and memory layout."""
    recorded: dict[str, Any]
    """The record of the autoencoder, by which workers find out that theirs is another one."""
    extractors: tuple[str, ...]
    """Names of the extractors in the protocol, in the order of the recipe's."""
    seed: int
    num_images: int
    """Images of the whole evaluation, over which pictures and latents of the tiny DiT are evenly spaced."""
    picture_positions: frozenset[int] = field(default_factory=frozenset)
    probe_positions: frozenset[int] = field(default_factory=frozenset)


class ReconstructingActor(ScoringActor):
    """Encode and decode the images of a shard and measure what was lost; originals are scored as by ScoringActor."""

    def __init__(self, images: ImagesConfig, evaluate: EvaluateConfig, source: AutoencoderSource):
        from pipelines.latents.encoding import EncodeImages

        super().__init__(images, evaluate)
        self.source = source
        workers = {name: getattr(evaluate, name) for name in ("cpus_per_worker", "gpus_per_worker")}
        self.encoder = EncodeImages(source.handle, replace(source.encode, **workers), source.recorded)
        self._is_warm = False

    def __call__(self, shard: ScoringShard) -> None:
        """Compute a shard and write its record. Raises InvalidInput if an image cannot be read."""
        if not isinstance(shard, AutoencoderShard):
            return super().__call__(shard)
        from pipelines.images.preprocess import read_cropped

        assert isinstance(shard.images, Listing), "an autoencoder encodes images"
        images, _, errors = read_cropped(self.images, shard.images.keys, shard.images.locations)
        if errors:
            raise InvalidInput(
                f"{len(errors)} images cannot be read, such as {min(errors)}",
                "every image to be readable",
                "Remove or replace them",
            )
        if not self._is_warm:  # the first pass chooses kernels and takes memory
            self.decode(self._means(self.encoder.encode(images[:1])))
            self._is_warm = True
        self.measure(images, shard.positions).write(shard.file)

    def measure(self, images: np.ndarray, positions: range) -> ReconstructedShard:
        """Measure images uint8 (N, H, W, 3) at some positions among those of the evaluation."""
        import torch

        from dit.autoencoders.denoising_score import central_window
        from evaluation.image_quality import structural_similarities
        from evaluation.latent_statistics import LatentStatistics

        started = time.perf_counter()
        moments = self.encoder.encode(images)
        encoded = time.perf_counter()
        decoded = self.decode(self._means(moments))
        finished = time.perf_counter()
        mean, std = self._scaled_posterior(moments)
        before, after = (torch.from_numpy(each).to(self.device) for each in (images, decoded))
        probed = [index for index, position in enumerate(positions) if position in self.source.probe_positions]
        shown = [index for index, position in enumerate(positions) if position in self.source.picture_positions]
        return ReconstructedShard(
            squared_errors=(before.double() - after.double()).square().flatten(1).mean(dim=1).cpu().numpy(),
            similarities=structural_similarities(before, after).cpu().numpy(),
            features={
                name: extract(after.permute(0, 3, 1, 2)).features
                for name, extract in zip(self.source.extractors, self.extractors, strict=True)
            },
            latents=LatentStatistics.of(self._draw(mean, std, positions).numpy()),
            means=central_window(mean[probed]).half().numpy(),
            stds=central_window(std[probed]).half().numpy(),
            originals=images[shown],
            decoded=decoded[shown],
            moments_shape=moments.shape[1:],
            encode_seconds=encoded - started,
            decode_seconds=finished - encoded,
            device=_device_name(self.device, self.encoder.settings.dtype),
        )

    def decode(self, means: "torch.Tensor") -> np.ndarray:
        """Decode unscaled latents float32 (N, C, h, w) to images uint8 (N, H, W, 3), always in full batches."""
        import torch

        from dit.precision import tf32_products

        autoencoder, size, decoded = self.encoder.autoencoder, self.source.encode.batch_size, []
        for part in means.split(size):
            batch = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])]).to(self.device)
            with tf32_products(self.device, self.encoder.settings.dtype):
                decoded.append(autoencoder.decode(autoencoder.scale.scale(batch))[: len(part)].cpu())
        return torch.cat(decoded).numpy()

    def _means(self, moments: np.ndarray) -> "torch.Tensor":
        """Return the means of stored moments, float32 (N, C, h, w). Raises InvalidInput if one is not finite."""
        import torch

        if not np.isfinite(moments).all():
            raise InvalidInput(
                f"{self.source.handle.id}: found moments that are not finite in float16, in which latents are stored",
                "finite ones",
                'choose another autoencoder, or set encode.dtype = "float32"',
            )
        return torch.from_numpy(moments).float()[:, : self.encoder.autoencoder.latent_channels]

    def _scaled_posterior(self, moments: np.ndarray) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return mean and standard deviation (N, C, h, w) of the latents that a diffusion model sees."""
        import torch

        from dit.autoencoder import sample_posterior

        scale, unscaled, stored = self.encoder.autoencoder.scale, self._means(moments), torch.from_numpy(moments)
        mean = scale.scale(unscaled)
        # The draw for noise 1 is one standard deviation above the mean.
        return mean, scale.scale(sample_posterior(stored, torch.ones_like(unscaled))) - mean

    def _draw(self, mean: "torch.Tensor", std: "torch.Tensor", positions: range) -> "torch.Tensor":
        """Draw latents from the scaled posterior; the noise of an image depends on the seed and its position only."""
        import torch

        from dit.random import Stream, normal

        places = torch.arange(positions.start, positions.stop)
        stream = Stream.VALIDATION_POSTERIOR_NOISE
        return mean + std * normal(self.source.seed, stream, 0, places, mean.shape[1:])


@dataclass(frozen=True)
class DenoisingTask:
    """The latents of all shards, on which the tiny DiT is trained."""

    shards: tuple[AutoencoderShard, ...]
    """Shards that contain latents for the measurement."""
    file: str
    """Path or URI of the record: JSON with "loss", "baseline" and "seconds"."""
    seed: int


class DenoisingActor:
    """Train a tiny DiT on latents and write how well it denoises held-out ones."""

    def __init__(self, evaluate: EvaluateConfig):
        import torch

        torch.set_num_threads(evaluate.cpus_per_worker)
        self.device = worker_device(evaluate.gpus_per_worker)

    def __call__(self, task: DenoisingTask) -> None:
        """Measure and write the record."""
        import torch

        from dit.autoencoders.denoising_score import denoising_score

        started = time.perf_counter()
        parts = [(record.means, record.stds) for record in read_reconstructed(task.shards)]
        mean, std = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
        score = denoising_score(mean, std, seed=task.seed, device=self.device)
        seconds = round(time.perf_counter() - started, 3)
        storage.write_json_atomically(task.file, {"loss": score.loss, "baseline": score.baseline, "seconds": seconds})


def _device_name(device: str, dtype: str) -> str:
    """Return the name of a device with the precision and, of a CPU, the number of threads."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {dtype}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {dtype}"
