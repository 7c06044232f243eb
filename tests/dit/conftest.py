"""Golden numbers and small models for the tests of the mathematics."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dit.autoencoder import LatentScale, create_autoencoder, record_autoencoder, save_autoencoder
from dit.checkpoint import Checkpoint, save_checkpoint
from dit.config import DiTConfig, config_from_dict
from dit.formats.record import describe_checkpoint
from dit.formats.weights import load_weights
from dit.model import DiT, build_model
from dit.schedule import TrainingConfig
from dit.train import create_state
from dit.uvit import UViT

TESTS = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("RAYDIT_SHARED", TESTS.parents[1] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors run faster on one thread, and other work shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """golden("embeddings.safetensors") or golden("configs.json"): outputs of reference implementations.

    Small files are in tests/golden; tests that need a large one are skipped where it is missing.
    """

    def load(name: str) -> Any:
        for folder in (TESTS / "golden", SHARED / "golden"):
            path = folder / name
            if path.exists():
                return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        pytest.skip(f"{name} is in neither tests/golden nor {SHARED / 'golden'}; set RAYDIT_SHARED")

    return load


@pytest.fixture(scope="session")
def dit_a(golden: Callable[[str], Any]) -> DiT:
    """The reference's small model with the reference's weights."""
    model = DiT(DiTConfig(**golden("configs.json")["dit_a"]))
    model.load_state_dict(golden("dit_a.state_dict.safetensors"))
    return model.eval()


@pytest.fixture(scope="session")
def small_model() -> Callable[..., DiT | UViT]:
    """small_model(**fields): a DiT (or a U-ViT) of width 32 with random weights, none of them zero."""

    def build(**fields: Any) -> DiT | UViT:
        defaults = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
        model = build_model(config_from_dict({**defaults, **fields}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained autoencoder, 16 px to 8 x 8 x 4, whose scale has means and differs by channel."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    save_autoencoder(module, folder, LatentScale((0.5, -1.0, 2.0, 0.0), (2.0, 0.25, 1.0, 4.0)))
    return folder


@pytest.fixture
def save_model(tmp_path: Path, tiny_autoencoder: Path) -> Callable[..., Checkpoint]:
    """save_model(model): its checkpoint at step 3 without training; averaged weights are half of the trained ones."""

    def save(model: DiT | UViT, name: str = "step_0000003", **config: Any) -> Checkpoint:
        state = create_state(model, TrainingConfig(steps=3, global_batch_size=1))
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state.ema.load_state_dict(
            {name: value / 2 if name in learned else value for name, value in model.state_dict().items()}
        )
        state.step = 3
        learns_sigma = getattr(model.config, "learn_sigma", False)
        described = {
            "objective": {"kind": "diffusion", "variance": "learned_range" if learns_sigma else "fixed_small"},
            "autoencoder": record_autoencoder(str(tiny_autoencoder), 4),
            "class_names": [f"class {label}" for label in range(model.config.num_classes)],
            "seed": 7,
        }
        return save_checkpoint(
            state, tmp_path / name, describe_checkpoint(model=model.config, **{**described, **config}), {}
        )

    return save


@pytest.fixture(scope="session")
def rebuilt() -> Callable[..., DiT | UViT]:
    """rebuilt(checkpoint): the network with its averaged weights."""

    def rebuild(checkpoint: Checkpoint, which: str = "ema") -> DiT | UViT:
        return load_weights(build_model(config_from_dict(checkpoint.config["model"])), checkpoint.weights(which)).eval()

    return rebuild
