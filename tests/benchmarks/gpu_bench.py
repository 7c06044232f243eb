"""What the parts of gpu_torch.py share: sizes, device, folder and networks of a run; needs only torch."""

import dataclasses
from pathlib import Path

import torch
from harness import matmul_peak

from dit.compilation import compile_network
from dit.config import DiTConfig, named_config
from dit.diffusion import GaussianDiffusion
from dit.model import DiT

SMALL_MODEL = DiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=2)
PROCESS = GaussianDiffusion()


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes, device and folder of a run."""

    device: torch.device
    small: bool
    folder: Path

    def model(self, name: str) -> DiTConfig:
        return SMALL_MODEL if self.small else named_config(name)

    def size(self, images: int) -> int:
        return 2 if self.small else images

    def label(self, name: str) -> str:
        return f"small model for {name}" if self.small else name

    def product(self) -> float:
        """Return the FLOPs per second of the GPU's matrix product in bfloat16, measured now."""
        return matmul_peak(torch.bfloat16, str(self.device), 512 if self.small else 8192)

    def compile(self, network: torch.nn.Module) -> None:
        """Compile block by block; a rehearsal traces the blocks, and generates no code."""
        compile_network(network, "aot_eager" if self.small else "inductor")

    def compile_whole(self, network: torch.nn.Module) -> None:
        network.compile(backend="aot_eager" if self.small else "inductor")

    def network(self, name: str) -> DiT:
        """Return a network without zero weights."""
        torch.manual_seed(0)
        with self.device:  # drawing the weights of DiT-XL/2 on a CPU takes many seconds
            network = DiT(self.model(name))
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.02)
        return network
