"""A random adapter of the tiny checkpoint's model."""

import torch
from tiny_checkpoint import MODEL, random_network

from dit.formats.adapter import AdapterConfig, write_adapter

LAYERS = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.adaLN_modulation.1")


def write_factors(folder, seed, layers=LAYERS, rank=2, alpha=3.0, model=MODEL, **full):
    """Write a random adapter of the tiny model."""
    torch.manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in random_network(0, model).state_dict().items()}
    tensors = dict(full)
    for name in layers:
        rows, columns = shapes[f"{name}.weight"]
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, columns)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(rows, rank)
    write_adapter(folder, AdapterConfig(rank=rank, alpha=alpha, layers=layers, full=tuple(full)), tensors)
    return folder
