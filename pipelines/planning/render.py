"""`raydit plan`: a plan in words, as JSON, and from the command line's words."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dit.config import MODEL_NAMES, UVIT_NAMES, UViTConfig, named_config
from dit.macs import forward_macs
from pipelines.config.recipe import Recipe
from pipelines.planning.hardware import (
    CORES_PER_DEVICE,
    NODE_DEVICES,
    READ_SECONDS,
    TOGETHER,
    parse_cluster,
    this_machine,
)
from pipelines.planning.plan import STAGES, Plan, known_images, make_plan, planned_subject
from pipelines.planning.sizes import count_parameters
from pipelines.planning.stages import DATA_START_SECONDS, TRAIN_START_SECONDS, StagePlan


def plan_recipe(
    config: Recipe,
    overrides: tuple[str, ...],
    *,
    cluster: str | None,
    images: int | None,
    classes: int,
    measured: tuple[str, ...],
    price: float | None,
) -> Plan:
    """The plan of a recipe for the words of the command line; without `cluster`, for this machine, warmed up."""
    speeds = given_speeds(measured)
    kept = frozenset(override.partition("=")[0].strip() for override in overrides)
    counted = known_images(config, images, classes)
    machines = this_machine() if cluster is None else parse_cluster(cluster, price)
    if machines.core_flops:
        from pipelines.planning.measure import warmed_up

        machines = warmed_up(planned_subject(config, machines, counted, kept)[0])
    return make_plan(config, machines, counted, kept=kept, given=speeds)


def given_speeds(measured: tuple[str, ...]) -> dict[str, float]:
    """ "train=812" -> images per second of a stage. Raises ValueError for another form or an unknown stage."""
    speeds = {}
    for text in measured:
        stage, _, number = text.partition("=")
        try:
            speeds[stage.strip()] = float(number)
        except ValueError:
            number = "0"
        if stage.strip() not in STAGES or not float(number) > 0:
            raise ValueError(
                f"--measured: found {text!r}, expected STAGE=IMAGES_PER_SECOND, such as train=812; stages are "
                f"{', '.join(STAGES)}"
            )
    return speeds


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan in words, a line at a time."""
    counts = count_parameters(plan.model)
    size = f"{_model_name(plan)}, {counts.total / 1e6:,.1f}M parameters, {forward_macs(plan.model) / 1e9:,.2f} GMAC"
    aside = f", {plan.images.held_out:,} held out" if plan.images.held_out else ""
    yield f"recipe       {plan.name}: {size} an image"
    yield f"cluster      {_cluster(plan)}"
    yield f"images       {plan.images.training:,} in {plan.images.classes:,} classes{aside}, {plan.images.source}"
    yield ""
    yield from _table(plan)
    yield ""
    yield (
        f"bytes        {size_of(plan.latent_bytes)} of latents; checkpoints of {size_of(plan.checkpoint_bytes)}: "
        f"{plan.checkpoints_written:,} written, {plan.checkpoints_kept:,} kept, "
        f"{size_of(plan.checkpoints_kept * plan.checkpoint_bytes)}"
    )
    for stage in plan.stages:
        held = ", ".join(f"{name} {size_of(size)}" for name, size in stage.memory.items() if size)
        yield f"memory       {stage.stage}: {held}"
    for stage in plan.stages:
        if stage.step:
            yield f"step         {_step(stage)}"
        if not stage.fits:
            yield f"does not fit {stage.stage}: {stage.advice}"
    if plan.overrides:
        yield f"so planned   {' '.join(f'--set {override}' for override in plan.overrides)}"
    for stage in plan.stages:
        yield f"speed        {stage.stage}: {stage.basis}"
    for stage in plan.stages:
        if gain := plan.cluster.bfloat16_gains.get(stage.stage):
            speed = f"{gain:.2g} times as fast as float32 on a core (measured)"
            yield f'dtype        {stage.stage}.dtype = "bfloat16" is {speed}'
    yield from _assumptions(plan)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; bytes, seconds, FLOPs."""
    content = asdict(plan)
    stages = [
        asdict(stage) | {"step": stage.step._asdict() if stage.step else None, "fits": stage.fits}
        for stage in plan.stages
    ]
    cluster = asdict(plan.cluster) | {"accelerator": None}
    if plan.cluster.accelerator:
        cluster["accelerator"] = plan.cluster.accelerator._asdict()
    return content | {"stages": stages, "cluster": cluster, "seconds": plan.seconds, "dollars": plan.dollars}


def _model_name(plan: Plan) -> str:
    given = {name: getattr(plan.model, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    family = UVIT_NAMES if isinstance(plan.model, UViTConfig) else MODEL_NAMES
    for name in family:
        if all(getattr(named_config(name), field) == value for field, value in given.items()):
            return name
    kind = "U-ViT" if isinstance(plan.model, UViTConfig) else "DiT"
    return f"{kind} of width {plan.model.hidden_size} and depth {plan.model.depth}"


def _cluster(plan: Plan) -> str:
    cluster = plan.cluster
    if cluster.accelerator is None:
        return (
            f"this machine: {cluster.count} cores of {cluster.core_flops / 1e9:,.0f} GFLOP/s in products of float32 "
            f"matrices (measured), {size_of(cluster.memory_bytes)}"
        )
    price = f", ${cluster.dollars_per_hour:.2f} an hour each" if cluster.dollars_per_hour else ""
    nodes = f" in nodes of {NODE_DEVICES}" if cluster.count > NODE_DEVICES else ""
    return f"{cluster.count} x {cluster.name}{nodes}, {cluster.accelerator.memory_gib:,.0f} GiB{price}"


def _table(plan: Plan) -> Iterator[str]:
    rows = [("stage", "work", "most of the time", "workers", "memory of one", "FLOPs", "time", "cost")]
    share = plan.dollars / plan.seconds if plan.dollars else 0.0
    for stage in plan.stages:
        memory = f"{stage.memory_bytes / 2**30:.1f} of {stage.memory_limit / 2**30:.1f} GiB"
        figures = (f"{stage.workers}", memory, f"{stage.flops:.2g}", duration(stage.seconds))
        rows.append((stage.stage, stage.work, stage.limit, *figures, _dollars(share * stage.seconds)))
    flops = sum(stage.flops for stage in plan.stages)
    rows.append(("in all", "", "", "", "", f"{flops:.2g}", duration(plan.seconds), _dollars(plan.dollars or 0.0)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(width) if i > 2 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _dollars(amount: float) -> str:
    return f"${amount:,.0f}" if amount else "-"


def _step(stage: StagePlan) -> str:
    assert stage.step is not None, "of a training step"
    step, speed = stage.step, stage.images / (stage.seconds - TRAIN_START_SECONDS)
    beside = f", beside it the exchange of gradients {step.exchange * 1e3:,.1f}" if step.exchange else ""
    return (
        f"{step.total * 1e3:,.1f} ms: forward {step.forward * 1e3:,.1f}, backward {step.backward * 1e3:,.1f}{beside}, "
        f"update {step.update * 1e3:,.1f}; {speed:,.0f} images/s"
    )


def _assumptions(plan: Plan) -> Iterator[str]:
    """What the figures rest on that was not counted."""
    reading = plan.cluster.read_seconds
    read = f"{READ_SECONDS * 1e3:.0f} ms" if reading is None else f"{reading * 1e3:.1f} ms (measured)"
    start = f"{TRAIN_START_SECONDS:.0f} s for the start of a training stage, {DATA_START_SECONDS:.0f} s for another"
    yield f"assumed      {start}; {read} of a core to read and crop an image"
    if plan.cluster.accelerator is None:
        yield f"assumed      several cores at work together reach {TOGETHER:.0%} of what each reaches alone"
    else:
        accelerator = plan.cluster.accelerator
        yield (
            f"assumed      nodes of {NODE_DEVICES} devices with {CORES_PER_DEVICE} cores each; all-reduce at "
            f"{accelerator.link / 1e9:,.0f} GB/s in a node, {accelerator.network * 8e-9:,.0f} Gbit/s a device between"
        )
        if plan.cluster.dollars_per_hour:
            yield "assumed      the price, about an on-demand list price; give yours with --price"
    yield "not counted  waiting for machines, compilation, arithmetic of the metrics, MLflow"


def duration(seconds: float) -> str:
    """ "4 min 33 s", "7 h 12 min", "3.1 days"."""
    if seconds >= 72 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size_of(number: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"
