"""What is queued on a GPU without the host ever waiting for it: steps of training and sampling, and their batches.

The GPU is torch's fake one (`fake_gpu`), so that this is tested on machines without one. Tables are copied to a device
once, which the first step or batch may wait for.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import GPU, FakeGpu
from tiny_autoencoders import write_autoencoder
from tiny_training import settings_of_worker, training_recipe, write_held_out

import dit.train
from dit.autoencoder import Autoencoder, LatentScale
from dit.conditions import Conditions
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.model import build_model, create_model
from dit.objective import create_process
from dit.sampler_names import SAMPLER_PROCESSES
from dit.samplers import SAMPLERS, guided
from dit.train import StepQueue, create_state
from evaluation.extractors import FeatureExtractor
from evaluation.features.networks import Outputs
from pipelines.config.encode import EncodeConfig
from pipelines.config.training import VALIDATION_BATCH, TrainConfig
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.dataset import LatentArrays
from pipelines.latents.moments import MomentsEncoder
from pipelines.scoring.samples.noise import CounterNoise, GeneratorNoise
from pipelines.training.data.batches import latent_batches
from pipelines.training.data.loading import ArrayLatents
from pipelines.training.data.order import EpochOrder, WorkerShare
from pipelines.training.group.worker import Worker
from pipelines.training.losses import latent_losses
from pipelines.training.validation import Validation, held_out_batches

BATCH, LATENT, CLASSES = 8, (4, 8, 8), 10
PROCESSES = {
    "flow": FlowMatching,
    "diffusion": GaussianDiffusion,
    "v with a fixed variance": lambda: GaussianDiffusion(prediction="v", variance="fixed_large"),
}


@pytest.fixture
def gpu():
    with FakeGpu() as gpu:
        yield gpu


def network(process):
    learn_sigma = getattr(process, "variance", "") == "learned_range"
    with torch.device(GPU):
        return create_model("DiT-S/8", input_size=8, depth=1, num_classes=CLASSES, learn_sigma=learn_sigma)


def batches(process, random="counter"):
    moments = np.zeros((4 * BATCH, 2 * LATENT[0], *LATENT[1:]), np.float16)
    arrays = LatentArrays(np.zeros(len(moments), np.int64), moments, moments)
    return latent_batches(
        ArrayLatents(arrays, EpochOrder(len(moments), 0)),
        process,
        scale=LatentScale((0.5,) * 4, (2.0,) * 4),
        null_class=CLASSES,
        dropout=0.1,
        seed=0,
        share=WorkerShare(0, 1, BATCH),
        first_batch=0,
        random=random,
        device=GPU,
    )


WAITING = {
    "reading a value": lambda value: value.sum().item(),
    "deciding by one": lambda value: bool((value > 0).any()),
    "selecting by a mask": lambda value: value[value > 0],
    "copying to the host": lambda value: value.cpu(),
    "copying from the host": lambda value: value.copy_(torch.zeros(3)),
    "copying from memory that is not pinned": lambda value: torch.zeros(3).to(GPU, non_blocking=True),
    "making a tensor of numbers": lambda value: torch.tensor([1.0, 2.0, 3.0], device=GPU),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_the_fake_gpu_notices_what_a_host_waits_for(gpu, wait):
    value = torch.zeros(3, device=GPU)
    try:
        wait(value)
    except Exception as error:
        assert type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"), error
    else:
        assert len(gpu.waits) == 1, gpu.waits
        assert "test_gpu_waits.py" in gpu.waits[0]


def test_the_fake_gpu_lets_pinned_copies_pass(gpu):
    assert torch.zeros(3).pin_memory().to(GPU, non_blocking=True).to("cpu", non_blocking=True).shape == (3,)
    assert gpu.waits == []


@pytest.mark.parametrize("noise", [CounterNoise, GeneratorNoise])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("sampler", "kind"), [(name, kind) for name, kinds in SAMPLER_PROCESSES.items() for kind in kinds]
)
def test_sampling_waits_for_no_step(gpu, sampler, kind, cfg_scale, noise):
    process = PROCESSES[kind]()
    model = guided(network(process).eval(), cfg_scale, channels=3)
    draws = noise(0, np.arange(BATCH), LATENT, GPU)
    labels = torch.zeros(BATCH, dtype=torch.long, device=GPU)
    waits_until = []
    samples = SAMPLERS[sampler](
        model,
        draws.start(),
        Conditions(labels),
        process=process,
        steps=5,
        step_noise=draws.step,
        callback=lambda i, x: waits_until.append(len(gpu.waits)),
    )
    assert samples.device == GPU
    assert len(waits_until) == 5
    assert len(set(waits_until)) == 1, gpu.waits


@pytest.mark.parametrize("random", [None, "counter"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_batches_of_training_are_prepared_without_waiting(gpu, process, random):
    prepared = batches(process(), random)
    next(prepared)
    gpu.waits.clear()
    batch = next(prepared)
    on_gpu = (batch.latents, batch.t, batch.noise, batch.conditions.labels)
    assert {tensor.device for tensor in on_gpu} == {GPU}
    assert batch.rows.device.type == "cpu"
    assert gpu.waits == []


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_steps_of_training_are_launched_without_waiting(gpu, monkeypatch, process, accumulation_steps):
    """Forward pass, clipping, the optimizer and the averages; the norm's copy is what the host waits for, later."""
    process, copied = process(), []
    settings = TrainConfig(
        steps=9,
        global_batch_size=BATCH,
        accumulation_steps=accumulation_steps,
        grad_clip=1.0,
        ema_sigma_rels=(0.05,),
    )
    state = create_state(network(process), settings)
    monkeypatch.setattr(dit.train, "HostCopy", copied.append)

    def backward(loss):
        assert loss.device == GPU
        for parameter in state.network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    losses = latent_losses(SimpleNamespace(train=settings), process, num_workers=1)
    steps = StepQueue(state, losses, settings, backward)
    prepared = batches(process)
    for batch in itertools.islice(prepared, 1):
        steps.launch(batch)
    gpu.waits.clear()
    for batch in itertools.islice(prepared, 2):
        steps.launch(batch)
    assert [norm.device for norm in copied] == [GPU] * 3
    assert gpu.waits == []


def test_the_validation_loss_is_queued_without_waiting(gpu, tmp_path):
    recipe = training_recipe(tmp_path / "run", validate_every=3)
    write_held_out(recipe, 2 * VALIDATION_BATCH)
    settings = settings_of_worker(recipe)
    validation = Validation(settings, create_process(**settings.objective), Worker(0, 1, GPU, print), print)
    with torch.device(GPU):
        model = build_model(settings.model)
    measured = []
    for rows in held_out_batches(2 * VALIDATION_BATCH):
        gpu.waits.clear()
        measured.append(validation._losses(model, rows))
    assert [losses.device for losses, _ in measured] == [GPU] * 2
    assert gpu.waits == []


def test_encoding_waits_once_for_all_batches_of_a_shard(gpu, monkeypatch, tmp_path):
    module = write_autoencoder("AutoencoderKL", tmp_path)
    with torch.device(GPU):
        on_gpu = Autoencoder(type(module).from_config(module.config))
    monkeypatch.setattr(Autoencoder, "load", lambda *_: on_gpu)
    encoder = MomentsEncoder(AutoencoderHandle(str(tmp_path), ""), EncodeConfig(batch_size=4), GPU)
    images = np.zeros((10, 16, 16, 3), np.uint8)
    encoder.encode(images)
    gpu.waits.clear()
    assert encoder.encode(images).shape == (10, 8, 4, 4)
    assert len(gpu.waits) == 1, gpu.waits


def test_features_are_waited_for_once_for_all_batches(gpu):
    def forward(images):
        assert images.device == GPU
        return Outputs(images.float().mean(dim=(2, 3)), images.float().amax(dim=(2, 3)), None)

    extractor = FeatureExtractor("tiny", "", 3, 3, GPU, 4, forward)
    features = extractor(torch.zeros(10, 3, 8, 8, dtype=torch.uint8))
    assert features.features.shape == features.logits.shape == (10, 3)
    assert features.spatial is None
    assert len(gpu.waits) == 2, gpu.waits
