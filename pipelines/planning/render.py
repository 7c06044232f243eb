"""A plan as lines of text, and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dit.macs import forward_macs
from pipelines.planning.hardware import CORES_PER_DEVICE, MULTICORE_EFFICIENCY, NODE_DEVICES, READ_SECONDS, Cluster
from pipelines.planning.networks import count_parameters
from pipelines.planning.plan import Plan
from pipelines.planning.time import DATA_START_SECONDS, TRAIN_START_SECONDS


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values, in bytes, seconds, FLOPs and dollars."""
    content = asdict(plan) | {"seconds": plan.seconds, "dollars": plan.dollars}
    if plan.cluster.accelerator:
        content["cluster"]["accelerator"] = plan.cluster.accelerator._asdict()
    for stage, values in zip(plan.stages, content["stages"], strict=True):
        values["fits"] = stage.fits
    return content


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield a plan as lines of text: what is planned, a table of the stages, then details and assumptions."""
    size = f"{count_parameters(plan.model).total / 1e6:,.1f}M parameters, {forward_macs(plan.model) / 1e9:,.2f} GMAC"
    held_out = f", {plan.images.held_out:,} held out" if plan.images.held_out else ""
    yield f"recipe       {plan.name}: {plan.model_name}, {size} per image"
    yield f"cluster      {_cluster(plan.cluster)}"
    yield f"images       {plan.images.training:,} in {plan.images.classes:,} classes{held_out}, {plan.images.source}"
    if plan.start:
        yield f"start        train starts from {plan.start}"
    yield from ("", *_table(plan), "")
    written, kept = plan.checkpoints_written, plan.checkpoints_kept
    checkpoints = f"{written:,} written, {kept:,} kept, {format_bytes(kept * plan.checkpoint_bytes)}"
    yield f"bytes        {format_bytes(plan.latent_bytes)} of latents"
    yield f"bytes        checkpoints of {format_bytes(plan.checkpoint_bytes)}: {checkpoints}"
    for stage in plan.stages:
        parts = (f"{name} {format_bytes(size)}" for name, size in stage.memory.items() if size)
        yield f"memory       {stage.stage}: {', '.join(parts)}"
    yield from (f"does not fit {stage.stage}: {stage.advice}" for stage in plan.stages if not stage.fits)
    if plan.overrides:
        yield f"planned with {' '.join(f'--set {override}' for override in plan.overrides)}"
    yield from (f"speed        {stage.stage}: {stage.basis}" for stage in plan.stages)
    for name, gain in plan.cluster.bfloat16_gains.items():
        yield f'dtype        {name}.dtype = "bfloat16" is {gain:.2g} times as fast as float32 on a core (measured)'
    yield from _assumptions(plan.cluster)
    yield f"not counted  {', '.join(_uncounted(plan))}"


def _cluster(cluster: Cluster) -> str:
    if cluster.accelerator is None:
        return (
            f"this machine: {cluster.count} cores of {cluster.core_flops / 1e9:,.0f} GFLOP/s in products of float32 "
            f"matrices (measured), {format_bytes(cluster.memory_bytes)}"
        )
    price = f", ${cluster.dollars_per_hour:.2f} an hour each" if cluster.dollars_per_hour else ""
    nodes = f" in nodes of {NODE_DEVICES}" if cluster.count > NODE_DEVICES else ""
    return f"{cluster.count} x {cluster.name}{nodes}, {cluster.accelerator.memory_gib:,.0f} GiB{price}"


def _table(plan: Plan) -> Iterator[str]:
    """Yield the rows of the table of stages, the first three columns to the left and figures to the right."""
    rows = [("stage", "work", "bottleneck", "workers", "memory of each", "FLOPs", "time", "cost")]
    price = (plan.dollars or 0.0) / plan.seconds
    for stage in plan.stages:
        memory = f"{stage.memory_bytes / 2**30:.1f} of {stage.memory_limit / 2**30:.1f} GiB"
        figures = _figures(stage.flops, stage.seconds, price)
        rows.append((stage.stage, stage.work, stage.limit, f"{stage.workers}", memory, *figures))
    total = _figures(sum(stage.flops for stage in plan.stages), plan.seconds, price)
    rows.append(("total", "", "", "", "", *total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        yield "  ".join(cell.ljust(width) if at < 3 else cell.rjust(width) for at, (cell, width) in columns)


def _figures(flops: float, seconds: float, dollars_per_second: float) -> tuple[str, str, str]:
    dollars = dollars_per_second * seconds
    return f"{flops:.2g}", format_duration(seconds), f"${dollars:,.0f}" if dollars else "-"


def _assumptions(cluster: Cluster) -> Iterator[str]:
    """Yield what the figures rest on."""
    read = f"{cluster.read_seconds * 1e3:.1f} ms{' (measured)' if cluster.read_seconds != READ_SECONDS else ''}"
    start = f"a training stage starts in {TRAIN_START_SECONDS:.0f} s, another one in {DATA_START_SECONDS:.0f} s"
    yield f"assumed      {start}; a core reads and crops an image in {read}"
    if cluster.accelerator:
        link, network = cluster.accelerator.link / 1e9, cluster.accelerator.network * 8e-9
        yield (
            f"assumed      nodes of {NODE_DEVICES} devices with {CORES_PER_DEVICE} cores each; all-reduce at "
            f"{link:,.0f} GB/s within a node, {network:,.0f} Gbit/s per device between nodes"
        )
    else:
        yield f"assumed      several cores at work reach {MULTICORE_EFFICIENCY:.0%} of what each reaches alone"
    if cluster.dollars_per_hour:
        yield "assumed      the price, about an on-demand list price; give yours with --price"


def _uncounted(plan: Plan) -> Iterator[str]:
    """Yield what the figures leave out."""
    yield from ("waiting for machines", "compilation", "previews")
    if any(stage.stage == "autoencoder" for stage in plan.stages):
        yield "measurements of the trained autoencoder"
    yield from ("arithmetic of the metrics", "MLflow")


def format_duration(seconds: float) -> str:
    """Return a duration in words, such as "4 min 33 s", "7 h 12 min" or "3.1 days"."""
    if seconds >= 72 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_bytes(number: float) -> str:
    """Return a number of bytes in the unit that fits, such as "39.1 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"
