"""The checkpoint format: a folder that describes itself, complete when its last file is there.

    step_0001000/
        config.json            format, version, model, objective, autoencoder, class names, step, seed, recipe
        model.safetensors      the weights as trained
        ema.safetensors        the averaged weights, which sampling uses
        ema_0.05.safetensors   further averages, if any, by their relative width
        trainer/optimizer.safetensors   moments of AdamW by parameter name
        trainer/state.json     the data cursor and how random numbers are made
        COMPLETE               digests of all of the above, written last

An imported one has no trainer/: it can be sampled from and evaluated, not trained on.
Nothing is pickled: a checkpoint from a stranger cannot run code.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.autoencoder import LatentScale, record_autoencoder
from dit.config import DiTConfig, Numerics, ProcessKind, UViTConfig, config_from_dict
from dit.distributed import placed_like
from dit.files import digest_of_files, publish, sha256_of, sync, unused, write_json
from dit.formats.diffusers_pipeline import pipeline_scale, read_pipeline, write_pipeline
from dit.formats.official import check_official, published_objective, read_official
from dit.formats.weights import load_weights
from dit.snapshot import Snapshot, take_snapshot
from dit.train import TrainState

FORMAT = "raydit.checkpoint"
VERSION = 1
COMPLETE = "COMPLETE"


def step_name(step: int) -> str:
    """Folder name of the checkpoint at `step`; names sort as steps do up to ten million."""
    return f"step_{step:07d}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on a local disk."""

    path: Path
    config: dict
    digest: str
    """sha256 over the digests of all files: equal digests, equal checkpoints."""

    @property
    def step(self) -> int:
        return self.config["step"]

    @property
    def trainer_state(self) -> dict:
        """The data cursor; empty for an imported one."""
        file = self.path / "trainer" / "state.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def weights(self, which: str = "ema", device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """State dict of the averaged ("ema", "ema_0.05") or the trained ("model") weights."""
        file = self.path / f"{which}.safetensors"
        if not file.is_file():
            found = ", ".join(sorted(other.stem for other in self.path.glob("*.safetensors")))
            raise FileNotFoundError(
                f"{self.path} has no weights {which!r}: found {found}. Choose one of them, or train from the start "
                "with this average in train.ema_sigma_rels"
            )
        return load_file(file, device=str(device))


def save_checkpoint(state: TrainState | Snapshot, folder: Path, config: dict, cursor: dict) -> Checkpoint:
    """Write a state, or a snapshot of one, into `folder`, atomically: a reader sees all of it or nothing.

    config: what the artifact says of itself (merged with format, version and step). cursor: what the data side
    needs to go on. An unfinished folder left by a killed process is replaced; a complete one is kept.
    """
    folder = Path(folder)
    if (folder / COMPLETE).exists():
        return load_checkpoint(folder)
    snapshot = state if isinstance(state, Snapshot) else take_snapshot(state)
    assert snapshot is not None, "kept by this process"

    def write(folder: Path) -> None:
        (folder / "trainer").mkdir(parents=True)
        _write_weights(folder, snapshot.weights)
        save_file(snapshot.optimizer, folder / "trainer" / "optimizer.safetensors")
        progress = {"step": snapshot.step, "batches": snapshot.batches}
        write_json(folder / "trainer" / "state.json", {**progress, **cursor})
        _complete(folder, {"step": snapshot.step, **config})

    publish(folder, write)
    return load_checkpoint(folder)


def _write_weights(folder: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, state in weights.items():
        contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(contiguous, folder / f"{name}.safetensors")


def _complete(folder: Path, config: Mapping[str, Any]) -> None:
    """Describe a checkpoint whose other files are written, and say that it is whole."""
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **config})
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in files:
        sync(folder / name)
    write_json(folder / COMPLETE, {name: sha256_of(folder / name) for name in files})
    sync(folder / COMPLETE)  # after a power cut, COMPLETE must not be there without what it names


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint without reading its weights. Raises FileNotFoundError or ValueError if it is not whole."""
    folder = Path(folder)
    if folder.is_file() or (folder / "model_index.json").is_file():
        found = "a file" if folder.is_file() else "a diffusers pipeline"
        raise ValueError(
            f"{folder} is {found}: expected a checkpoint folder such as checkpoints/step_0001000. If it holds weights, "
            f"import them first: raydit import {folder} OUT"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: expected a folder such as checkpoints/step_0001000")
    if not (folder / COMPLETE).exists():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
        steps = ", ".join(step_name(step) for step in finished_steps(folder)[-3:])
        advice = f"name one of those in it: {steps}" if steps else "choose a finished one, or train again"
        raise FileNotFoundError(
            f"{folder} is not a finished checkpoint: found {found}; expected the file {COMPLETE}, which is written "
            f"last. Either it is not a checkpoint or its writing was cut off; {advice}"
        )
    digests = json.loads((folder / COMPLETE).read_text())
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which its {COMPLETE} file names. Copy the folder again"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(
            f"{folder}/config.json: found format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected {FORMAT!r} version {VERSION}. Use the raydit version that wrote it"
        )
    return Checkpoint(folder, config, digest_of_files(digests))


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with its digest. Raises ValueError naming the first that differs."""
    for name, expected in json.loads((checkpoint.path / COMPLETE).read_text()).items():
        found = sha256_of(checkpoint.path / name)
        if found != expected:
            raise ValueError(
                f"{checkpoint.path / name}: found sha256 {found[:12]}, expected {expected[:12]}: the file changed "
                "after it was written. Copy the checkpoint again, or use an earlier one"
            )


def restore(state: TrainState, checkpoint: Checkpoint) -> TrainState:
    """Put a checkpoint's weights, averages, optimizer and step into `state`, and return it."""
    if not (checkpoint.path / "trainer").is_dir():
        raise ValueError(
            f"{checkpoint.path} is imported and holds weights only: found no trainer/, expected the optimizer and the "
            "data cursor to go on from. Sample from it or evaluate it; training starts anew"
        )
    verify_checkpoint(checkpoint)
    load_weights(state.network, checkpoint.weights("model"))
    for name, average in state.averages.items():
        average.load_state_dict(checkpoint.weights(name))
    tensors = load_file(checkpoint.path / "trainer" / "optimizer.safetensors")
    parameters = dict(state.network.named_parameters())
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The step count too: fused AdamW keeps it beside its parameter, though in one piece.
        moment = tensor.to(parameter.device) if kind == "step" else placed_like(tensor, parameter)
        state.optimizer.state[parameter][kind] = moment
    state.step = checkpoint.step
    state.batches = checkpoint.trainer_state.get("batches", state.step)
    return state


def describe_checkpoint(
    *,
    model: DiTConfig | UViTConfig,
    objective: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    class_names: Sequence[str],
    seed: int,
    latents_fingerprint: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    **further: Any,
) -> dict[str, Any]:
    """What a checkpoint's config.json says beside format, version and step; None is for what is not known."""
    return {
        "model": asdict(model),
        "objective": dict(objective),
        "autoencoder": dict(autoencoder),
        "preprocessing": preprocessing,
        "class_names": list(class_names),
        "seed": seed,
        "latents_fingerprint": latents_fingerprint,
        "raydit_version": version("raydit"),
        "recipe": recipe,
        **further,
    }


def import_official(
    file: str | Path,
    folder: str | Path,
    *,
    model: str | None = None,
    objective: ProcessKind = "diffusion",
    autoencoder: str = "stabilityai/sd-vae-ft-ema",
    **known: Any,
) -> Checkpoint:
    """Make a checkpoint of an official DiT or U-ViT weights file (.pt, .pth or .safetensors); nothing in it is run.

    model: a name that the weights must fit. objective: "flow" for SiT's weights, which carry DiT's names.
    autoencoder: hub id or diffusers folder that decodes. known: fields of the configuration that weights cannot
    tell, such as num_heads where the size has no name. Classes are named by their numbers.
    Raises FileNotFoundError, FileExistsError if `folder` is taken, and ValueError as read_official does.
    """
    folder = unused(folder)
    found = read_official(file, model, **known)
    config = describe_checkpoint(
        model=found.config,
        objective=published_objective(found.config, objective),
        autoencoder=record_autoencoder(autoencoder, found.config.in_channels),
        class_names=[str(label) for label in range(found.config.num_classes)],
        seed=found.seed,
        source={"format": "official", "name": Path(file).name},
    )
    return _save_imported(folder, found.model, found.ema, {"step": found.step, **config})


def import_diffusers(
    pipeline: str | Path, folder: str | Path, *, numerics: Numerics = "diffusers", autoencoder: str | None = None
) -> Checkpoint:
    """Make a checkpoint of a diffusers DiT pipeline folder; nothing in it is run.

    numerics: "diffusers" keeps what diffusers computes, "official" is for weights that were converted from official
    ones; see dit.formats.diffusers_pipeline. autoencoder: another than the pipeline's own vae/, which is not copied.
    Raises FileNotFoundError, FileExistsError if `folder` is taken, and ValueError as read_pipeline does.
    """
    folder = unused(folder)
    found = read_pipeline(pipeline, numerics)
    shift = found.config.timestep_frequency_shift
    decoder = record_autoencoder(autoencoder or str(Path(pipeline) / "vae"), found.config.in_channels)
    if autoencoder is None:
        scale = pipeline_scale(Path(pipeline) / "vae")
        decoder |= {"latents_mean": list(scale.mean), "latents_std": list(scale.std)}
    config = describe_checkpoint(
        model=found.config,
        objective=found.objective,
        autoencoder=decoder,
        class_names=found.class_names,
        seed=0,
        source={
            "format": "diffusers",
            "name": Path(pipeline).absolute().name,
            "numerics": "diffusers" if shift else "official",
        },
    )
    return _save_imported(folder, found.weights, found.weights, {"step": 0, **config})


def _save_imported(folder: Path, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], config: dict) -> Checkpoint:
    def write(folder: Path) -> None:
        folder.mkdir()
        _write_weights(folder, {"model": model, "ema": ema})
        _complete(folder, config)

    publish(folder, write)
    return load_checkpoint(folder)


def export_official(checkpoint: Checkpoint, file: str | Path, *, weights: str = "ema") -> Path:
    """Write a checkpoint's averaged ("ema") or trained ("raw") weights as the official code's state dict.

    A name that ends in .safetensors makes such a file, any other a PyTorch file. Configuration, objective and
    autoencoder are not in it. Raises FileExistsError, and ValueError where the official code would compute something
    else with the weights.
    """
    file = unused(file)
    check_official(config_from_dict(checkpoint.config["model"]))
    state = exported_weights(checkpoint, weights)

    def write(temporary: Path) -> None:
        if file.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            with open(temporary, "wb") as opened:  # torch takes an open file of any name, but no name with a dot first
                torch.save(state, opened)

    publish(file, write)
    return file


def export_diffusers(
    checkpoint: Checkpoint, folder: str | Path, *, autoencoder: str | Path, weights: str = "ema"
) -> Path:
    """Write a checkpoint as a pipeline folder of diffusers, which computes the same; autoencoder is a local folder.

    With timestep_frequency_shift 1, `DiTPipeline.from_pretrained(folder)` takes it. With 0, the official code's,
    trust_remote_code=True must be added, and without it diffusers refuses: see dit.formats.diffusers_pipeline.
    Raises FileExistsError, and ValueError for what a DiTPipeline cannot express, such as flow.
    """
    folder = unused(folder)
    state = exported_weights(checkpoint, weights)
    config = checkpoint.config
    model = config_from_dict(config["model"])
    scale = LatentScale(config["autoencoder"]["latents_mean"], config["autoencoder"]["latents_std"])

    def write(folder: Path) -> None:
        objective, names = config["objective"], config["class_names"]
        write_pipeline(folder, model, objective, state, names, Path(autoencoder), scale)

    publish(folder, write)
    return folder


def exported_weights(checkpoint: Checkpoint, which: str) -> dict[str, Tensor]:
    """State dict by the name that protocols use: "raw" for the weights as trained."""
    return checkpoint.weights("model" if which == "raw" else which)


def finished_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    steps = (re.fullmatch(r"step_(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in steps if match and (folder / match[0] / COMPLETE).exists())


def newest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The complete checkpoint with the highest step, or None."""
    steps = finished_steps(folder)
    return load_checkpoint(Path(folder) / step_name(steps[-1])) if steps else None
