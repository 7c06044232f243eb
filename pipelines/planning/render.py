"""A plan as lines of text, and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dit.macs import forward_macs
from pipelines.planning.hardware import CORES_PER_DEVICE, MULTICORE_EFFICIENCY, NODE_DEVICES, READ_SECONDS, Cluster
from pipelines.planning.plan import Plan
from pipelines.planning.sizes import count_parameters
from pipelines.planning.stages import DATA_START_SECONDS, TRAIN_START_SECONDS, StagePlan


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values, in bytes, seconds, FLOPs and dollars."""
    content = asdict(plan) | {"seconds": plan.seconds, "dollars": plan.dollars}
    if plan.cluster.accelerator:
        content["cluster"]["accelerator"] = plan.cluster.accelerator._asdict()
    for stage, values in zip(plan.stages, content["stages"], strict=True):
        values["fits"] = stage.fits
        if stage.step:
            step = stage.step._asdict()
            values["step"] = {"exchange" if name == "all_reduce" else name: value for name, value in step.items()}
    return content


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield a plan as lines of text: what is planned, a table of the stages, then details and assumptions."""
    size = f"{count_parameters(plan.model).total / 1e6:,.1f}M parameters, {forward_macs(plan.model) / 1e9:,.2f} GMAC"
    held_out = f", {plan.images.held_out:,} held out" if plan.images.held_out else ""
    yield f"recipe       {plan.name}: {plan.model_name}, {size} per image"
    yield f"cluster      {_cluster(plan.cluster)}"
    yield f"images       {plan.images.training:,} in {plan.images.classes:,} classes{held_out}, {plan.images.source}"
    yield from ("", *_table(plan), "")
    written, kept = plan.checkpoints_written, plan.checkpoints_kept
    checkpoints = f"{written:,} written, {kept:,} kept, {format_bytes(kept * plan.checkpoint_bytes)}"
    yield f"bytes        {format_bytes(plan.latent_bytes)} of latents"
    yield f"bytes        checkpoints of {format_bytes(plan.checkpoint_bytes)}: {checkpoints}"
    for stage in plan.stages:
        parts = (f"{name} {format_bytes(size)}" for name, size in stage.memory.items() if size)
        yield f"memory       {stage.stage}: {', '.join(parts)}"
    for stage in plan.stages:
        if stage.step:
            yield f"step         {_step(stage)}"
        if not stage.fits:
            yield f"does not fit {stage.stage}: {stage.advice}"
    if plan.overrides:
        yield f"planned with {' '.join(f'--set {override}' for override in plan.overrides)}"
    for stage in plan.stages:
        yield f"speed        {stage.stage}: {stage.basis}"
    for stage in plan.stages:
        if gain := plan.cluster.bfloat16_gains.get(stage.stage):
            speed = f"{gain:.2g} times as fast as float32 on a core (measured)"
            yield f'dtype        {stage.stage}.dtype = "bfloat16" is {speed}'
    yield from _assumptions(plan.cluster)


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
    rows: list[tuple[str, ...]] = [
        ("stage", "work", "bottleneck", "workers", "memory of each", "FLOPs", "time", "cost")
    ]
    dollars_per_second = (plan.dollars or 0.0) / plan.seconds
    for stage in plan.stages:
        memory = f"{stage.memory_bytes / 2**30:.1f} of {stage.memory_limit / 2**30:.1f} GiB"
        figures = (f"{stage.workers}", memory, f"{stage.flops:.2g}", format_duration(stage.seconds))
        rows.append((stage.stage, stage.work, stage.limit, *figures, _dollars(dollars_per_second * stage.seconds)))
    flops = sum(stage.flops for stage in plan.stages)
    rows.append(("total", *[""] * 4, f"{flops:.2g}", format_duration(plan.seconds), _dollars(plan.dollars or 0.0)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        numbers = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        yield "  ".join([*words, *numbers])


def _dollars(amount: float) -> str:
    return f"${amount:,.0f}" if amount else "-"


def _step(stage: StagePlan) -> str:
    assert stage.step is not None, "only a training on accelerators is planned by its steps"
    step, speed = stage.step, stage.images / (stage.seconds - TRAIN_START_SECONDS)
    overlapped = f", overlapped by the gradient all-reduce {step.all_reduce * 1e3:,.1f}" if step.all_reduce else ""
    return (
        f"{step.total * 1e3:,.1f} ms: forward {step.forward * 1e3:,.1f}, backward {step.backward * 1e3:,.1f}"
        f"{overlapped}, update {step.update * 1e3:,.1f}; {speed:,.0f} images/s"
    )


def _assumptions(cluster: Cluster) -> Iterator[str]:
    """Yield what the figures rest on that is not counted."""
    measured = cluster.read_seconds
    read = f"{READ_SECONDS * 1e3:.0f} ms" if measured is None else f"{measured * 1e3:.1f} ms (measured)"
    start = f"a training stage starts in {TRAIN_START_SECONDS:.0f} s, another one in {DATA_START_SECONDS:.0f} s"
    yield f"assumed      {start}; a core reads and crops an image in {read}"
    if cluster.accelerator is None:
        yield f"assumed      several cores at work reach {MULTICORE_EFFICIENCY:.0%} of what each reaches alone"
    else:
        link, network = cluster.accelerator.link / 1e9, cluster.accelerator.network * 8e-9
        yield (
            f"assumed      nodes of {NODE_DEVICES} devices with {CORES_PER_DEVICE} cores each; all-reduce at "
            f"{link:,.0f} GB/s within a node, {network:,.0f} Gbit/s per device between nodes"
        )
        if cluster.dollars_per_hour:
            yield "assumed      the price, about an on-demand list price; give yours with --price"
    yield "not counted  waiting for machines, compilation, arithmetic of the metrics, MLflow"


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
