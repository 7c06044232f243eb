"""Baselines for encoding, in a process of their own: the autoencoder alone, and a typical hand-written loop.

    python plain_encode.py alone|loop IMAGES.parquet AUTOENCODER OUT SIZE BATCH_SIZE NUM_IMAGES

Prints the seconds per image at steady state, from the end of the first batch to the end of the last. One thread
computes the autoencoder; in the loop, a second process reads images.
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    """The encoded images of a Parquet file, decoded and cropped one by one: float32 (3, size, size) in [-1, 1]."""

    def __init__(self, file: str, size: int, count: int):
        column = pq.read_table(file, columns=["image"]).column("image").slice(0, count)
        self.images = [cell["bytes"] for cell in column.to_pylist()]
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.images[index])).convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def alone(autoencoder: AutoencoderKL, pictures: Pictures, batch_size: int, out: Path) -> float:
    """Encode batches that are already in memory, and discard the results."""
    batches = list(DataLoader(pictures, batch_size))
    autoencoder.encode(batches[0])
    started = time.perf_counter()
    for batch in batches[1:]:
        autoencoder.encode(batch)
    return (time.perf_counter() - started) / (len(pictures) - batch_size)


def loop(autoencoder: AutoencoderKL, pictures: Pictures, batch_size: int, out: Path) -> float:
    """Encode batches from a DataLoader, and write one file per image."""
    started = count = 0
    for batch in DataLoader(pictures, batch_size, num_workers=1):
        moments = autoencoder.encode(batch).latent_dist.parameters.half().numpy()
        for row in moments:
            np.save(out / f"{count:06d}.npy", row)
            count += 1
        started = started or time.perf_counter()
    return (time.perf_counter() - started) / (len(pictures) - batch_size)


def main(kind: str, images: str, autoencoder: str, out: str, *numbers: str) -> None:
    size, batch_size, count = map(int, numbers)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    encode = {"alone": alone, "loop": loop}[kind]
    Path(out).mkdir(parents=True, exist_ok=True)
    module = AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False).eval()
    print(encode(module, Pictures(images, size, count), batch_size, Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
