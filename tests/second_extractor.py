"""A second extractor that works offline: the smallest DINOv2, with seeded random weights in a file."""

from pathlib import Path

import torch

from evaluation.features.dinov2 import DinoV2, DinoV2Config

SECOND = "dinov2-vit-s-14"


def write_second_weights(path: Path) -> Path:
    """Write weights of SECOND that are as large as trained ones: as initialised, some are zero."""
    generator = torch.Generator().manual_seed(0)
    network = DinoV2(DinoV2Config(dim=384, depth=12, num_heads=6))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5, generator=generator)
    torch.save(network.state_dict(), path)
    return path
