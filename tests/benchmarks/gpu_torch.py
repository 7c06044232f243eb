"""Measure how fast raydit's networks run on a GPU, in under four minutes, on a machine that has torch and this
repository.

    python tests/benchmarks/gpu_torch.py [--out FOLDER] [--limit SECONDS]
    python tests/benchmarks/gpu_torch.py --small      a rehearsal of all parts, on a CPU in under a minute

Needs torch, numpy and safetensors; diffusers for the autoencoder, torchao for float8, and pyarrow for the train job's
loop, which are left out where they are missing. Writes gpu_torch.json and gpu_torch.md. Each figure is reported with
the GPU's own matrix product speed, measured just before. Exits with 1 if a part has failed.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import field_marks  # noqa: F401  # first, because dit needs it where annotated-types is missing
import gpu_report  # records the start time
import torch
from gpu_bench import PROCESS, Bench
from gpu_graphs import compare_graphs
from gpu_official import official_training
from gpu_report import Figure, GpuReport, Part
from gpu_training import (
    Batch,
    batch_of,
    measure_training,
    profile_training,
    relative_difference,
    train_steps,
    training_figure,
)
from harness import alternate, bandwidth

from dit.autoencoder import Autoencoder
from dit.autoencoders.size import decoder_size, encoder_size
from dit.float8 import missing_float8, use_float8
from dit.macs import forward_macs
from dit.model import DiT
from dit.precision import in_dtype
from dit.random import Stream, normal
from dit.samplers import guided, sample_ddpm

LIMIT_SECONDS = 220.0
"""Four minutes, less the import of torch on a machine that has not read it before."""
PAPER_SAMPLES, PAPER_STEPS = 50_000, 250


def gpu_speed(bench: Bench) -> Iterator[Figure]:
    product = bench.product()
    yield Figure(what="matrix product, bfloat16", value=product / 1e12, unit="TFLOP/s", product=product, share=1.0)
    copied = bandwidth(str(bench.device), 2**20 if bench.small else 2**30)
    yield Figure(what="copy, bytes read and written", value=copied / 1e12, unit="TB/s", product=product)


def agreement(bench: Bench) -> Iterator[Figure]:
    """Compare float32 on the CPU with the device: a forward pass, guided samples, five training steps."""
    network, cpu = bench.network("DiT-S/2"), torch.device("cpu")
    batch = batch_of(network.config, 4, PROCESS)
    twins = {device: copy.deepcopy(network).to(device) for device in (cpu, bench.device)}

    def on_both(compute: Callable[[DiT, Batch, torch.device], torch.Tensor]) -> float:
        expected, found = (compute(twin, batch.to(device), device).cpu() for device, twin in twins.items())
        return relative_difference(found, expected)

    if bench.device == cpu:  # a rehearsal compares the CPU with itself
        twins = {cpu: twins[cpu], torch.device("cpu", 0): copy.deepcopy(network)}
    with torch.no_grad():
        forward = on_both(lambda twin, batch, device: twin(batch.latents, batch.t, batch.labels))
    yield Figure(what="CPU against GPU, float32: forward pass", value=forward, unit="relative difference")

    def sample(twin: DiT, batch: Batch, device: torch.device) -> torch.Tensor:
        positions, shape = torch.arange(4, device=device), batch.latents.shape[1:]
        draw = functools.partial(normal, 0, Stream.STEP_NOISE)
        return sample_ddpm(
            guided(twin, 1.5, 3),
            batch.noise,
            batch.labels,
            process=PROCESS,
            steps=5,
            step_noise=lambda i, x: draw(i, positions, shape, device),
        )

    yield Figure(what="the same: five guided DDPM steps", value=on_both(sample), unit="relative difference")

    def losses(twin: DiT, batch: Batch, device: torch.device) -> torch.Tensor:
        return torch.tensor(train_steps(twin, batch, PROCESS, device, steps=5))

    start = torch.cat([parameter.detach().cpu().flatten() for parameter in network.parameters()])
    difference = on_both(losses)
    ends = [torch.cat([p.detach().cpu().flatten() for p in twin.parameters()]) - start for twin in twins.values()]
    details = {"of the weights' change": relative_difference(ends[1], ends[0])}
    what = "the same: losses of five training steps"
    yield Figure(what=what, value=difference, unit="relative difference", details=details)


def training(
    bench: Bench,
    name: str,
    images: int,
    *,
    window: int,
    seconds: float,
    target: float | None = None,
    how: str = "compiled by blocks",
    profiled: bool = False,
) -> Iterator[Figure]:
    """Steps of dit.train's loop in bfloat16, with AdamW and an average of the weights.

    window: steps between reports; the figure is the median of all reports after the first. seconds: time after which
    the loop ends. how: "compiled by blocks", "float8 and compiled by blocks", or "compiled as a whole".
    """
    size, config = bench.size(images), bench.model(name)
    product, network = bench.product(), bench.network(name)
    if how.startswith("float8"):
        if not bench.small and (reason := missing_float8(bench.device)):
            yield Figure(what=f"training step {bench.label(name)}, {how}", value=None, note=f"left out: {reason}")
            return
        use_float8(network, emulate=bench.device.type == "cpu")
    (bench.compile_whole if how.endswith("whole") else bench.compile)(network)
    window = 2 if bench.small else window
    batches = itertools.repeat(batch_of(config, size, PROCESS).to(bench.device))
    measured = measure_training(network, batches, PROCESS, bench.device, size=size, window=window, seconds=seconds)
    yield training_figure(
        f"training step {bench.label(name)}, batch {size}, bfloat16, {how}",
        config,
        measured.images_per_second,
        product,
        target=target,
        details={"first step after s": measured.first_seconds, "GiB": measured.gib},
    )
    if profiled and bench.device.type == "cpu":
        yield Figure(what=f"GPU busy in steps of {bench.label(name)}", value=None, note="left out: no GPU")
    elif profiled:
        yield profile_training(measured, f"GPU busy in steps of {bench.label(name)}", bench.folder / "trace.json")


def job_loop(bench: Bench) -> Iterator[Figure]:
    """Steps of the train job's loop, with the thread that prepares its batches."""
    from gpu_job_loop import profile_job_loop  # latents are read by pyarrow

    yield from profile_job_loop(bench)


def sampling(bench: Bench) -> Iterator[Figure]:
    """Guided steps in every precision; guidance doubles the batch."""
    network, size, steps = bench.network("DiT-XL/2").eval(), bench.size(32), 2 if bench.small else 5
    batch = batch_of(network.config, size, PROCESS).to(bench.device)
    for dtype, compiled in (("float32", False), ("tf32", False), ("bfloat16", False), ("bfloat16", True)):
        if compiled:
            bench.compile(network)
        model, product = guided(in_dtype(network, dtype), 1.5, 3), bench.product()
        draw = functools.partial(sample_ddpm, model, batch.noise, batch.labels, process=PROCESS, steps=steps)
        seconds = alternate({"sample": draw}, rounds=2, warmup=1)["sample"].median / steps
        hours = PAPER_SAMPLES / size * PAPER_STEPS * seconds / 3600
        precision = f"{dtype}{', compiled by blocks' * compiled}"
        yield Figure(
            what=f"guided sampling step {bench.label('DiT-XL/2')}, batch {size}, {precision}",
            value=1e3 * seconds,
            unit="ms",
            product=product,
            share=2 * size * 2 * forward_macs(network.config) / seconds / product,
            target=0.70 if compiled else None,
            details={"hours for 50,000 samples of 250 steps": hours},
        )


def autoencoder(bench: Bench) -> Iterator[Figure]:
    """Stable Diffusion's autoencoder, encode and decode, in both dtypes and layouts."""
    from gpu_autoencoder import create_stable_diffusion_autoencoder, stable_diffusion_settings

    settings = stable_diffusion_settings(bench.small)
    module = create_stable_diffusion_autoencoder(settings).to(bench.device)
    size, side = bench.size(32), 32 if bench.small else 256
    macs = {"encode": encoder_size(settings, side).macs, "decode": decoder_size(settings, side).macs}
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    latents = torch.randn(size, 4, side // 8, side // 8, device=bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in layouts.items():
            ours = Autoencoder(copy.deepcopy(module).to(dtype=dtype, memory_format=memory_format))
            images = torch.rand(size, 3, side, side, device=bench.device).to(memory_format=memory_format)
            calls = {
                "encode": functools.partial(ours.encode, images),
                "decode": functools.partial(ours.decode, latents),
            }
            for name, call in calls.items():
                product = bench.product()
                seconds = alternate({name: call}, rounds=3, warmup=2)[name].median
                yield Figure(
                    what=f"autoencoder {name}, {side} px, batch {size}, {str(dtype).removeprefix('torch.')}, {layout}",
                    value=size / seconds,
                    unit="images/s",
                    product=product,
                    share=2 * macs[name] * size / seconds / product,
                )


def parts_of(bench: Bench, official: Path | None) -> dict[str, Part]:
    """Return the parts, the most wanted first, with the seconds that each takes at most on a GPU such as an H200.

    official: copy of the official DiT's models.py.
    """
    xl, b, s = (functools.partial(training, bench, f"DiT-{name}/2") for name in ("XL", "B", "S"))
    by_blocks, rival = "float8 and compiled by blocks", functools.partial(official_training, bench, official)
    parts = {
        "the GPU": Part(5, functools.partial(gpu_speed, bench)),
        "agreement": Part(15, functools.partial(agreement, bench)),
        "training DiT-XL/2": Part(45, lambda: xl(128, window=5, seconds=35, target=0.67, profiled=True)),
        "training DiT-S/2": Part(25, lambda: s(256, window=20, seconds=20, target=0.45)),
        "training job's loop DiT-S/2": Part(25, functools.partial(job_loop, bench), "pyarrow"),
        "sampling DiT-XL/2": Part(40, functools.partial(sampling, bench)),
        "training DiT-XL/2 in float8": Part(
            45, lambda: xl(128, window=5, seconds=35, target=0.80, how=by_blocks), "torchao"
        ),
        "CUDA graphs": Part(25, functools.partial(compare_graphs, bench)),
        "autoencoder": Part(35, functools.partial(autoencoder, bench), "diffusers"),
        "training DiT-B/2": Part(25, lambda: b(256, window=10, seconds=20)),
        "official DiT-XL/2": Part(25, lambda: rival(images=64, compiled=False), "timm"),
        "official DiT-XL/2 compiled by blocks": Part(40, lambda: rival(images=128, compiled=True), "timm"),
        "training DiT-XL/2 compiled as a whole": Part(
            85, lambda: xl(128, window=5, seconds=75, how="compiled as a whole")
        ),
    }
    if bench.small:
        return {name: dataclasses.replace(part, seconds=0) for name, part in parts.items()}
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a GPU gives raydit's networks.")
    parser.add_argument("--small", action="store_true", help="rehearse all parts with tiny sizes, on a CPU if need be")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        help="a part starts only if it is expected to end within this many seconds",
    )
    parser.add_argument("--official", type=Path, help="copy of the official DiT's models.py, to measure it as well")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the results")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.small:
        parser.error("torch finds no GPU here; --small rehearses on the CPU")
    if arguments.official and not arguments.official.is_file():
        parser.error(f"--official {arguments.official}: found no such file")
    device = torch.device("cuda" if has_gpu else "cpu")
    name = torch.cuda.get_device_name() if has_gpu else "CPU"
    machine = {"device": name, "torch": torch.__version__, "rehearsal": arguments.small}
    report = GpuReport(arguments.out, "gpu_torch", machine)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # as if nothing had been compiled before
        report.run(parts_of(Bench(device, arguments.small, Path(folder)), arguments.official), arguments.limit)
    gpu_report.say(f"{gpu_report.elapsed():.0f} s in all; {report.path}.md and .json")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
