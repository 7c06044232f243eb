"""A training step and sampling of DiT against diffusers' DiTTransformer2DModel of equal size, alternately.

Needs only torch. Asserts only that both sides compute the same thing.
"""

import copy

import pytest
import torch
from harness import alternate, matmul_peak

from dit.compilation import compile_network
from dit.config import DiTConfig, named_config
from dit.diffusion import GaussianDiffusion
from dit.macs import forward_macs
from dit.model import DiT
from dit.samplers import guided, sample_ddim
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step

pytestmark = pytest.mark.benchmark

SMALL = DiTConfig(input_size=8, hidden_size=128, depth=4, num_heads=4, num_classes=10)
CASES = {
    "DiT-S/2, batch 8": (named_config("DiT-S/2"), 8, 5),
    "width 128, depth 4, batch 128": (SMALL, 128, 20),
}


def diffusers_model(config: DiTConfig):
    """Return diffusers' model of equal size."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.latent_size[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )


class DiffusersAdapter(torch.nn.Module):
    """Wrapper that gives diffusers' model the signature of ours."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, timestep=t, class_labels=y).sample


def batch_of(config: DiTConfig, size: int):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(size, config.in_channels, *config.latent_size, generator=generator) for _ in range(2))
    t = torch.randint(0, 1000, (size,), generator=generator)
    return latents, t, torch.randint(0, config.num_classes, (size,), generator=generator), noise


def make_raydit_step(network, batch, process, compiled=False):
    """Return a function that takes one step of dit.train: fused AdamW, EMA, hybrid loss."""
    config = TrainingConfig(steps=10**9, global_batch_size=len(batch[0]))
    if compiled:
        compile_network(network)
    state = create_state(network, config)

    def losses(model, batch):
        return {name: value.mean() for name, value in process.training_losses(model, *batch).items()}

    return lambda: train_step(state, batch, losses, config)


def make_diffusers_step(network, batch, process, compiled=False):
    """Return a step as in diffusers' example scripts: torch's default AdamW, diffusers' EMA, the same loss."""
    from diffusers.training_utils import EMAModel

    model = torch.compile(DiffusersAdapter(network)) if compiled else DiffusersAdapter(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    ema = EMAModel(network.parameters(), decay=0.9999)
    network.train()

    def step():
        loss = process.training_losses(model, *batch)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    return step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_step(results, quick, case, compiled):
    if quick and (compiled or "DiT-S/2" in case):
        pytest.skip("compiles, or takes 15 seconds")
    config, size, rounds = CASES[case]
    batch, process = batch_of(config, size), GaussianDiffusion()
    torch.manual_seed(0)
    ours, theirs = DiT(config), diffusers_model(config)
    timings = alternate(
        {
            "ours": make_raydit_step(ours, batch, process, compiled),
            "theirs": make_diffusers_step(theirs, batch, process, compiled),
        },
        rounds=2 if quick else rounds,
        warmup=2 if quick else 3,
    )
    name = f"{case}, float32, {'compiled' if compiled else 'eager'}"
    measured = f"{timings['ours'].median:.3f} s"
    results.add_speedup("training step", name, measured, "diffusers", timings["ours"], timings["theirs"])
    share = 6 * forward_macs(config) * size / timings["ours"].median / matmul_peak()
    results.add("training step", name, measured, "matrix product at its best", share)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_guided_sampling(results, quick, case, compiled):
    """DDIM, guided, both halves in one call; diffusers' scheduler and model against ours."""
    if quick and (compiled or "DiT-S/2" in case):
        pytest.skip("compiles, or takes 15 seconds")
    from diffusers import DDIMScheduler

    config, size, rounds = CASES[case]
    latents, _, labels, noise = batch_of(config, size)
    torch.manual_seed(0)
    ours, theirs = DiT(config).eval(), DiffusersAdapter(diffusers_model(config)).eval()
    if compiled:
        compile_network(ours)
        theirs.compile(dynamic=False)
    process, steps = GaussianDiffusion(), 2
    scheduler = DDIMScheduler(beta_end=0.02, beta_start=1e-4, clip_sample=False)
    null = torch.full_like(labels, config.num_classes)

    @torch.no_grad()
    def sample_theirs():
        scheduler.set_timesteps(steps)
        x, classes = noise, torch.cat([labels, null])
        for t in scheduler.timesteps:
            output = theirs(torch.cat([x, x]), t.expand(2 * size), classes)
            conditional, unconditional = output[:, : config.in_channels].chunk(2)
            x = scheduler.step(unconditional + 4.0 * (conditional - unconditional), t, x).prev_sample
        return x

    def sample_ours():
        return sample_ddim(guided(ours, 4.0), noise, labels, process=process, steps=steps)

    assert sample_ours().shape == sample_theirs().shape
    rounds = 2 if quick else max(5, rounds // 2)
    timings = alternate({"ours": sample_ours, "theirs": sample_theirs}, rounds=rounds, warmup=1)
    measured = f"{size / timings['ours'].median * steps / 50:.2f} images/s at 50 steps"
    name = f"{case}, float32, {'compiled' if compiled else 'eager'}"
    results.add_speedup("guided sampling", name, measured, "diffusers", timings["ours"], timings["theirs"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2"])
def test_on_a_gpu(results, name):
    """bfloat16, compiled: images per second, share of the GPU's own matrix product, peak memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config, size = named_config(name), 64
    batch = [part.cuda() for part in batch_of(config, size)]
    process = GaussianDiffusion()
    network = DiT(config).cuda()
    plain = make_raydit_step(copy.deepcopy(network), batch, process, compiled=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            plain()

    torch.cuda.reset_peak_memory_stats()
    timing = alternate({"step": step}, rounds=20, warmup=10)["step"]
    memory = torch.cuda.max_memory_allocated() / 2**30
    share = 6 * forward_macs(config) * size / timing.median / matmul_peak(torch.bfloat16, "cuda")
    measured = f"{size / timing.median:.0f} images/s, {memory:.1f} GiB at most"
    case = f"{name}, batch {size}, bfloat16, compiled"
    results.add("training step", case, measured, "matrix product at its best", share)
