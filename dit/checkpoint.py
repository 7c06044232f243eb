"""The checkpoint format: a folder that describes itself, complete when its last file is there.

    step_0001000/
        config.json            format, version, model, objective, autoencoder, class names, step, seed, recipe
        model.safetensors      the weights as trained
        ema.safetensors        the averaged weights, which sampling uses
        ema_0.05.safetensors   further averages, if any, by their relative width
        trainer/optimizer.safetensors   moments of AdamW by parameter name
        trainer/state.json     the data cursor and how random numbers are made
        COMPLETE               digests of all of the above, written last

Nothing is pickled: a checkpoint from a stranger cannot run code.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit.files import full_disk_as_oserror
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


def save_checkpoint(state: TrainState, folder: Path, config: dict, cursor: dict) -> Checkpoint:
    """Write `state` into `folder`, atomically: a reader sees all of it or nothing.

    config: what the artifact says of itself (merged with format, version and step). cursor: what the data side
    needs to go on. An unfinished folder left by a killed process is replaced; a complete one is kept.
    """
    folder = Path(folder)
    if (folder / COMPLETE).exists():
        return load_checkpoint(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "trainer").mkdir(parents=True)
    try:
        with full_disk_as_oserror(folder):
            _write_files(state, temporary, config, cursor)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return load_checkpoint(folder)


def _write_files(state: TrainState, folder: Path, config: dict, cursor: dict) -> None:
    save_file(_contiguous(state.network.state_dict()), folder / "model.safetensors")
    for name, average in state.averages.items():
        save_file(_contiguous(average.state_dict()), folder / f"{name}.safetensors")
    save_file(_optimizer_tensors(state), folder / "trainer" / "optimizer.safetensors")
    _write_json(folder / "trainer" / "state.json", {"step": state.step, **cursor})
    described = {"format": FORMAT, "version": VERSION, "step": state.step, **config}
    _write_json(folder / "config.json", described)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in files:
        _sync(folder / name)
    _write_json(folder / COMPLETE, {name: _sha256(folder / name) for name in files})
    _sync(folder / COMPLETE)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint without reading its weights. Raises FileNotFoundError or ValueError if it is not whole."""
    folder = Path(folder)
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
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return Checkpoint(folder, config, digest)


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with its digest. Raises ValueError naming the first that differs."""
    for name, expected in json.loads((checkpoint.path / COMPLETE).read_text()).items():
        found = _sha256(checkpoint.path / name)
        if found != expected:
            raise ValueError(
                f"{checkpoint.path / name}: found sha256 {found[:12]}, expected {expected[:12]}: the file changed "
                "after it was written. Copy the checkpoint again, or use an earlier one"
            )


def restore(state: TrainState, checkpoint: Checkpoint) -> TrainState:
    """Put a checkpoint's weights, averages, optimizer and step into `state`, and return it."""
    verify_checkpoint(checkpoint)
    load_weights(state.network, checkpoint.weights("model"))
    for name, average in state.averages.items():
        average.load_state_dict(checkpoint.weights(name))
    tensors = load_file(checkpoint.path / "trainer" / "optimizer.safetensors")
    parameters = dict(state.network.named_parameters())
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The step count too: fused AdamW keeps it beside its parameter.
        state.optimizer.state[parameter][kind] = tensor.to(parameter.device)
    state.step = checkpoint.step
    return state


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


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    named: dict[Tensor, str] = {parameter: name for name, parameter in state.network.named_parameters()}
    return {
        f"{key}/{named[parameter]}": value.contiguous()
        for parameter, entries in state.optimizer.state.items()
        for key, value in entries.items()
    }


def _contiguous(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load a state dict whose names must match exactly; the error lists the first that differ."""
    expected, found = network.state_dict(), weights
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape)
    if wrong:
        lines = [
            f"  {name}: found {_shape(found.get(name))}, expected {_shape(expected.get(name))}" for name in wrong[:5]
        ]
        raise ValueError(
            f"these weights are of another model; {len(wrong)} entries differ, the first:\n" + "\n".join(lines)
        )
    network.load_state_dict(weights)
    return network


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _sync(path: Path) -> None:
    """Force a file to disk: after a power cut, COMPLETE must not be there without what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
