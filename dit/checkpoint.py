"""Checkpoints: self-describing folders, which are complete once their last file exists.

    step_0001000/
        config.json            format, version, model, objective, autoencoder, class names, step, seed, recipe
        model.safetensors      trained weights
        ema.safetensors        averaged weights, which sampling uses by default
        ema_0.05.safetensors   power-function averages, if any, by their relative width
        adapter/               instead of model.safetensors: a low-rank adapter in peft's layout (dit.formats.adapter)
        adapter_ema/           its average, and so on; config.json then says where the base's weights are
        frozen.safetensors     what an adapter's training started from that is neither trained nor the base's
        trainer/optimizer.safetensors   moments of AdamW by parameter name
        trainer/state.json     position in the data, and how random numbers are drawn
        INTERRUPTED            empty; only where training was stopped between two regular checkpoints
        COMPLETE               digests of all other files, written last

An imported checkpoint has no trainer/. It can be sampled from and evaluated, but not resumed.
Nothing is pickled, so that checkpoints from untrusted sources cannot run code.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.autoencoder import record_autoencoder
from dit.autoencoders.latent_scale import record_scale
from dit.config import Numerics, ProcessKind
from dit.distributed import distribute_like
from dit.files import digest_of_files, publish, require_unused, write_json
from dit.formats.adapter import write_adapter
from dit.formats.completion import (
    COMPLETE,
    CONFIG,
    FORMAT,
    INTERRUPTED,
    TRAINER,
    TRAINER_STATE,
    VERSION,
    step_name,
    write_completion,
)
from dit.formats.diffusers_pipeline import pipeline_scale, read_pipeline, write_pipeline
from dit.formats.digests import MAX_JSON_BYTES, parse_digests, read_object, require_recorded
from dit.formats.official import check_official, published_objective, read_official
from dit.formats.opened_checkpoint import FROZEN, Checkpoint, adapter_folder
from dit.formats.record import describe_checkpoint, describe_source
from dit.formats.weights import load_weights
from dit.imagenet import imported_names
from dit.lora import load_adapter
from dit.snapshot import Snapshot, take_snapshot
from dit.train import TrainState
from raydit.errors import InvalidInput, NotFound
from raydit.regular_files import read_regular

OFFICIAL_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""The autoencoder of official weights that are imported without one."""


def save_checkpoint(
    state: TrainState | Snapshot, folder: Path, config: Mapping[str, Any], cursor: Mapping[str, Any]
) -> Checkpoint:
    """Write a training state, or a snapshot of one, into `folder` atomically, and return the checkpoint.

    config: content of config.json except for format, version and step (see `describe_checkpoint`). cursor: what is
    needed to resume reading the data; merged into trainer/state.json. An unfinished folder of a killed process and an
    interrupted checkpoint are replaced; any other complete checkpoint is kept and returned.
    """
    folder = Path(folder)
    if (folder / COMPLETE).exists() and not (folder / INTERRUPTED).exists():
        return load_checkpoint(folder)
    snapshot = state if isinstance(state, Snapshot) else take_snapshot(state)
    assert snapshot is not None, "a snapshot is None only without keep"

    def write(folder: Path) -> None:
        (folder / TRAINER).mkdir(parents=True)
        if snapshot.adapter is None:
            _write_weights(folder, snapshot.weights)
        else:
            for name, weights in snapshot.weights.items():
                write_adapter(folder / adapter_folder(name), snapshot.adapter, weights)
        save_file(snapshot.optimizer, folder / TRAINER / "optimizer.safetensors")
        if snapshot.frozen:
            save_file(snapshot.frozen, folder / FROZEN)
        progress = {"step": snapshot.step, "batches": snapshot.batches}
        if snapshot.skipped:
            progress["skipped"] = snapshot.skipped
        write_json(folder / TRAINER_STATE, {**progress, **cursor})
        if snapshot.interrupted:
            (folder / INTERRUPTED).touch()
        mark = {"interrupted": True} if snapshot.interrupted else {}
        write_completion(folder, {"step": snapshot.step, **config, **mark})

    publish(folder, write)
    return load_checkpoint(folder)


def _write_weights(folder: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, state in weights.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")


def load_checkpoint(folder: str | Path, *, resumable: bool = True) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    resumable: whether trainer/ must be there, which a copy for sampling may lack. Raises NotFound if the folder does
    not exist or is not complete, and InvalidInput if it is not a checkpoint of this format and version.
    """
    folder = Path(folder)
    if folder.is_file() or (folder / "model_index.json").is_file():
        found = "a file" if folder.is_file() else "a diffusers pipeline"
        raise InvalidInput(
            f"{folder} is {found}",
            "a checkpoint folder such as checkpoints/step_0001000",
            f"import it first if it contains weights: raydit import {shlex.quote(str(folder))} OUT",
        )
    if not folder.is_dir():
        raise NotFound(f"no checkpoint at {folder}", "a folder such as checkpoints/step_0001000", "check the path")
    if not (folder / COMPLETE).exists():
        raise _unfinished(folder)
    digests = parse_digests(read_regular(folder / COMPLETE, MAX_JSON_BYTES), folder / COMPLETE)
    needed = [name for name in digests if resumable or not name.startswith(f"{TRAINER}/")]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise NotFound(
            f"{folder} lacks {', '.join(missing)}", f"all files that {COMPLETE} lists", "copy the folder again"
        )
    config = read_object(folder / CONFIG)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise InvalidInput(
            f"{folder}/config.json: found format {config.get('format')!r} version {config.get('version')!r}",
            f"{FORMAT!r} version {VERSION}",
            "use the version of raydit that wrote it",
        )
    require_recorded(folder, CONFIG, digests)
    return Checkpoint(folder, config, digest_of_files(digests), digests)


def _unfinished(folder: Path) -> NotFound:
    content = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
    steps = ", ".join(step_name(step) for step in finished_steps(folder)[-3:])
    return NotFound(
        f"{folder} is not a finished checkpoint: it contains {content}",
        f"the file {COMPLETE}, which is written last",
        f"name a checkpoint in it: {steps}" if steps else "choose a finished checkpoint, or train again",
    )


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file of a checkpoint with its digest. Raises InvalidInput, naming the first that differs.

    A copy for sampling has no trainer/, which is then left out.
    """
    has_trainer = (checkpoint.path / TRAINER).is_dir()
    for name in checkpoint.files:
        if has_trainer or not name.startswith(f"{TRAINER}/"):
            require_recorded(checkpoint.path, name, checkpoint.files)


def restore(state: TrainState, checkpoint: Checkpoint) -> TrainState:
    """Load a checkpoint's weights, averages, optimizer and step into `state`, and return it.

    Raises InvalidInput if the checkpoint was imported, is damaged, or is of another model.
    """
    if not (checkpoint.path / TRAINER).is_dir():
        raise InvalidInput(
            f"{checkpoint.path} was imported, or fetched to sample from, and contains weights only: found no trainer/",
            "the optimizer's state and the position in the data",
            "sample from it or evaluate it; training cannot resume from it",
        )
    verify_checkpoint(checkpoint)
    if state.adapter is None:
        load_weights(state.network, checkpoint.weights("model"))
        for name, average in state.averages.items():
            average.load_state_dict(checkpoint.weights(name))
    else:
        trained = {
            "model": state.network.state_dict(),
            **{name: each.state_dict() for name, each in state.averages.items()},
        }
        for name, weights in trained.items():
            load_adapter(weights, state.adapter, checkpoint.adapter(name))
    tensors = load_file(checkpoint.path / TRAINER / "optimizer.safetensors")
    parameters = dict(state.network.named_parameters())
    state.optimizer.state.clear()  # it may have moments of later steps, for parameters of which the checkpoint has none
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The step count is moved as well: fused AdamW needs it on the parameter's device, though it is not sharded.
        moment = tensor.to(parameter.device) if kind == "step" else distribute_like(tensor, parameter)
        state.optimizer.state[parameter][kind] = moment
    state.step = checkpoint.step
    state.batches = checkpoint.trainer_state.get("batches", state.step)
    state.skipped = checkpoint.trainer_state.get("skipped", 0)
    return state


def import_official(
    file: str | Path,
    folder: str | Path,
    *,
    model: str | None = None,
    objective: ProcessKind = "diffusion",
    autoencoder: str = OFFICIAL_AUTOENCODER,
    **known: Any,
) -> Checkpoint:
    """Convert an official DiT or U-ViT weights file (.pt, .pth or .safetensors) to a checkpoint, running no code in it.

    model: name of a model that the weights must fit. objective: "flow" for SiT's weights, which have DiT's names.
    autoencoder: hub id or diffusers folder of the autoencoder that decodes samples. known: fields of the configuration
    that weights do not determine, such as num_heads. Classes are named by `dit.imagenet.imported_names`.
    Raises NotFound if the file or the autoencoder is missing, AlreadyExists if `folder` is in use, and InvalidInput
    if the file contains anything but weights, or if they are not finite or do not fit the model.
    """
    folder = require_unused(folder)
    found = read_official(file, model, **known)
    config = describe_checkpoint(
        model=found.config,
        objective=published_objective(found.config, objective),
        autoencoder=record_autoencoder(autoencoder, found.config.in_channels, found.config.latent_size),
        class_names=imported_names(found.config.num_classes),
        seed=found.seed,
        source=describe_source("official", Path(file), found.taken),
    )
    return save_weights(folder, {"model": found.model, "ema": found.ema}, {"step": found.step, **config})


def import_diffusers(
    pipeline: str | Path, folder: str | Path, *, numerics: Numerics = "diffusers", autoencoder: str | None = None
) -> Checkpoint:
    """Convert a diffusers DiT pipeline folder to a checkpoint, running no code in it.

    numerics: "diffusers" computes the same as diffusers; "official" is for weights that were converted from official
    ones, and computes the same as the official code (see `dit.formats.diffusers_pipeline`). autoencoder: hub id or
    folder to use instead of the pipeline's vae/, which is referred to and not copied. Raises NotFound if a file is
    missing, AlreadyExists if `folder` is in use, and InvalidInput if the pipeline is of another kind, or if its weights
    are not finite.
    """
    folder = require_unused(folder)
    found = read_pipeline(pipeline, numerics)
    model, vae = found.config, Path(pipeline) / "vae"
    decoder = record_autoencoder(autoencoder or str(vae), model.in_channels, model.latent_size)
    if autoencoder is None:
        decoder |= record_scale(decoder["class"], pipeline_scale(vae))
    config = describe_checkpoint(
        model=found.config,
        objective=found.objective,
        autoencoder=decoder,
        class_names=found.class_names,
        seed=0,
        source=describe_source("diffusers", Path(pipeline), found.taken, numerics=found.numerics),
    )
    return save_weights(folder, {"model": found.weights, "ema": found.weights}, {"step": 0, **config})


def save_weights(folder: Path, weights: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint that can be sampled from, and not be resumed, atomically, and return it.

    weights: state dicts by the names of their files, "model" and "ema". config: content of config.json except for
    format and version.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        _write_weights(folder, weights)
        write_completion(folder, config)

    publish(folder, write)
    return load_checkpoint(folder)


def export_official(checkpoint: Checkpoint, file: str | Path, *, weights: str = "ema") -> Path:
    """Write a checkpoint's averaged ("ema") or trained ("raw") weights as a state dict for the official code.

    A name that ends in .safetensors gives a safetensors file, any other name a PyTorch file. Neither contains
    configuration, objective or autoencoder. Raises AlreadyExists if the file exists, and InvalidInput if the official
    code would compute something else with the weights, also because it does not have the objective.
    """
    file = require_unused(file)
    check_official(checkpoint.record.model_config, checkpoint.record.objective)
    state = checkpoint.weights(weights)

    def write(temporary: Path) -> None:
        if file.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            with open(temporary, "wb") as opened:  # torch.save refuses names that begin with a dot, but not open files
                torch.save(state, opened)

    publish(file, write)
    return file


def export_diffusers(
    checkpoint: Checkpoint, folder: str | Path, *, autoencoder: str | Path, weights: str = "ema"
) -> Path:
    """Write a checkpoint as a DiTPipeline folder, with which diffusers computes the same.

    autoencoder: a local diffusers folder, which is copied. weights: "ema", another average, or "raw".
    With timestep_frequency_shift 1, `DiTPipeline.from_pretrained(folder)` loads it. With 0, as in the official code,
    trust_remote_code=True is needed, without which diffusers refuses (see `dit.formats.diffusers_pipeline`).
    Raises AlreadyExists if the folder is in use, and InvalidInput for what a DiTPipeline cannot express, such as flow.
    """
    folder = require_unused(folder)
    state = checkpoint.weights(weights)
    record = checkpoint.record

    def write(folder: Path) -> None:
        model, scale = record.model_config, record.autoencoder.scale
        write_pipeline(folder, model, record.objective, state, record.class_names, Path(autoencoder), scale)

    publish(folder, write)
    return folder


def finished_steps(folder: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a local folder, in ascending order."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    steps = (re.fullmatch(r"step_(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in steps if match and (folder / match[0] / COMPLETE).exists())
