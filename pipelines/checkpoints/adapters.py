"""Adapters as checkpoints: imported from other projects, exported to them, and merged into ordinary checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster import storage
from dit.adaptation.comparison import meaning_of
from dit.adaptation.draft_weights import part_names
from dit.checkpoint import Checkpoint, save_weights
from dit.config import DiTConfig, UViTConfig, recorded_fields
from dit.files import publish, require_unused
from dit.formats.adapter import (
    AdapterWeights,
    merge_adapters,
    read_adapter,
    read_class_names,
    require_model_of,
    write_adapter,
)
from dit.formats.adapter_diffusers import adapter_for_diffusers, adapter_from_diffusers, written_form
from dit.formats.completion import COMPLETE, step_name, write_completion
from dit.formats.opened_checkpoint import FROZEN, adapter_folder
from dit.formats.record import AutoencoderRecord, CheckpointRecord, describe_checkpoint
from dit.formats.weights import check_finite
from dit.model import meta_state
from pipelines.checkpoints.autoencoder import absolute_autoencoder_id
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint, recorded_options
from pipelines.console import say
from raydit.errors import InvalidInput

AdapterLayout = Literal["peft", "diffusers-lora"]


class Part(NamedTuple):
    """A checkpoint with an adapter, and the share with which its changes are added to the base."""

    checkpoint: LocatedCheckpoint
    share: float


def merge_checkpoints(
    parts: Sequence[tuple[str | Path | LocatedCheckpoint, float]], out: str | Path, *, tracking_uri: str = ""
) -> Checkpoint:
    """Write an ordinary checkpoint of the base's weights with the changes of adapters, each times its share.

    Both its averaged and its trained weights are merged, each from those of the adapters. A registered copy holds only
    one kind of weights, which then stands for both. tracking_uri: MLflow's, where runs and models are looked up, as in
    a recipe. Raises AlreadyExists, NotFound, and InvalidInput for a checkpoint without an adapter, unless all have one
    base, model, objective, autoencoder and classes, and for shares with which weights are not finite.
    """
    storage.refuse_unwritable(str(out))
    folder = require_unused(out)
    opened = [Part(open_checkpoint(name, tracking_uri=tracking_uri), share) for name, share in parts]
    _require_one_base(opened)
    first = opened[0].checkpoint
    base = first.unadapted_weights()
    names = _weights_to_merge(opened)
    merged = {
        name: merge_adapters(base, [(part.checkpoint.adapter(name), part.share) for part in opened], first.origin)
        for name in set(names)
    }
    shares = [{"checkpoint": each.origin, "digest": each.digest, "share": share} for each, share in opened]
    source = {"format": "merge", "name": first.name, "parts": shares}
    for name, tensors in merged.items():
        check_finite(tensors, f"the merged weights {name!r}", "choose smaller shares")
    weights = {"model": merged[names[0]], "ema": merged[names[1]]}
    return save_weights(folder, weights, {"step": first.step, **_described(first, first.config, source)})


def _weights_to_merge(parts: Sequence[Part]) -> tuple[str, str]:
    """Return the names of the parts' weights that become the trained and the averaged weights of their merge.

    Raises InvalidInput if the parts have no weights of the same name, as registered copies may not.
    """
    common = set.intersection(*(part.checkpoint.weights_names for part in parts))
    if {"model", "ema"} <= common:
        return "model", "ema"
    if not common:
        each = (f"{', '.join(sorted(part.checkpoint.weights_names))} in {part.checkpoint.origin}" for part in parts)
        raise InvalidInput(f"found the weights {'; '.join(each)}", "some that all have", "merge each by itself")
    only = "ema" if "ema" in common else min(common)
    say("merge", f"only the weights {only!r} are there, so they become the trained ones and the averaged ones")
    return only, only


def _require_one_base(parts: Sequence[Part]) -> None:
    """Raise InvalidInput unless all parts are adapters of one base that can be added up."""
    first = parts[0].checkpoint
    for opened, _ in parts:
        if opened.base is None or first.base is None:
            raise InvalidInput(
                f"{opened.origin}: found no adapter",
                "a checkpoint that was trained with [train.lora]",
                "choose another",
            )
        found_record, record = opened.record, first.record
        compared = {
            "base": (opened.base.sha256[:12], first.base.sha256[:12]),
            "classes": (found_record.class_names, record.class_names),
            "model": _differing_fields(found_record.model_config, record.model_config),
            "objective": (meaning_of(found_record.objective), meaning_of(record.objective)),
            "autoencoder": _compared_autoencoders(found_record.autoencoder, record.autoencoder),
            "scale of latents": (found_record.autoencoder.scale.to_json(), record.autoencoder.scale.to_json()),
            "weights that are neither trained nor the base's": (opened.files.get(FROZEN), first.files.get(FROZEN)),
        }
        for what, (found, expected) in compared.items():
            if found != expected:
                raise InvalidInput(
                    f"{opened.origin}: found an adapter of another {what} ({str(found)[:200]})",
                    f"{str(expected)[:200]}, as of {first.origin}",
                    "merge each by itself",
                )


def _differing_fields(found: DiTConfig | UViTConfig, expected: DiTConfig | UViTConfig) -> tuple[str, str]:
    """Return two models in words: only the fields in which they differ, so that equal ones are two empty texts."""
    models = recorded_fields(found), recorded_fields(expected)
    names = [name for name in models[0] | models[1] if models[0].get(name) != models[1].get(name)]
    texts = [", ".join(f"{name} {model.get(name)!r}" for name in names) for model in models]
    return texts[0], texts[1]


def _compared_autoencoders(found: AutoencoderRecord, expected: AutoencoderRecord) -> tuple[str, str]:
    """Return two autoencoders in words, which are equal if they encode alike."""
    names = [f"{each.id}, weights {(each.sha256 or 'unknown')[:12]}" for each in (found, expected)]
    return (names[1], names[1]) if found.encodes_like(expected) else (names[0], names[1])


def import_adapter(
    source: str | Path, out: str | Path, base: str | Path | LocatedCheckpoint, *, tracking_uri: str = "", **options: Any
) -> Checkpoint:
    """Write a checkpoint with an adapter that peft or diffusers saved, for a base that it refers to.

    source: a folder in peft's layout, with names of raydit's model or of diffusers', or a file
    pytorch_lora_weights.safetensors. tracking_uri: MLflow's, where a base that is a run or model is looked up.
    options: of `open_checkpoint`, for a base that is a file of weights. Raises NotFound, AlreadyExists, and
    InvalidInput if it is not an adapter of that base, or if that cannot be a base.
    """
    storage.refuse_unwritable(str(out))
    folder = require_unused(out)
    opened = open_checkpoint(base, tracking_uri=tracking_uri, **options)
    if options and storage.exists(storage.join(opened.origin, COMPLETE)):
        raise InvalidInput(
            f"{', '.join(options)}: found with {opened.origin}, which records what it is of",
            "none for such a base",
            "leave out --set, --objective and --autoencoder",
        )
    record, model = base_record(opened, "ema", **options), opened.record.model_config
    adapter = adapter_from_diffusers(read_adapter(source), model.depth, model.hidden_size)
    classes = _classes_of(adapter, source, opened)
    model = replace(model, num_classes=len(classes)) if classes else model
    require_model_of(meta_state(model), adapter, source)
    config, tensors = written_form(adapter)
    origin = {"format": "adapter", "name": Path(source).absolute().name}

    def write(folder: Path) -> None:
        folder.mkdir()
        for name in ("model", "ema"):
            write_adapter(folder / adapter_folder(name), config, tensors)
        described = _described(opened, opened.config, origin, classes)
        write_completion(folder, {"step": 0, **described, "base": record})

    publish(folder, write)
    return open_checkpoint(str(folder))


def _classes_of(adapter: AdapterWeights, source: str | Path, base: LocatedCheckpoint) -> tuple[str, ...]:
    """Return the names of the classes of an adapter's own table of labels; empty where they are those of its base."""
    if not _has_labels(adapter, base.record):
        return ()
    names = read_class_names(source)
    if not names and base.record.class_names:
        say("import", f"{source} has its own label table but no class names; using the class names of the base")
    return names


def _has_labels(adapter: AdapterWeights, record: CheckpointRecord) -> bool:
    """Return whether an adapter replaces the table of labels."""
    return any(name.startswith(part_names(record.model_config)["labels"]) for name in adapter.full)


def export_adapter(opened: LocatedCheckpoint, out: str | Path, *, layout: AdapterLayout, weights: str = "ema") -> Path:
    """Write a checkpoint's adapter as a folder for `peft.PeftModel.from_pretrained`.

    layout: "peft" has the names of raydit's model, and "diffusers-lora" those of diffusers' DiTTransformer2DModel.
    Raises AlreadyExists, and InvalidInput for a checkpoint without an adapter, and for one that diffusers has no layers
    for.
    """
    folder = require_unused(out)
    if opened.base is None:
        raise InvalidInput(
            f"{opened.origin}: found no adapter, which --format {layout} is for",
            "a checkpoint that was trained with [train.lora]",
            "use --format diffusers or official",
        )
    adapter = opened.adapter(weights)
    if layout == "diffusers-lora":
        adapter = adapter_for_diffusers(adapter, opened.record.model_config.depth)
    config, tensors = written_form(adapter)
    uri, classes = opened.base.uri, opened.record.class_names if _has_labels(adapter, opened.record) else ()
    publish(folder, lambda folder: write_adapter(folder, config, tensors, uri, classes))
    return folder


def base_record(opened: LocatedCheckpoint, weights: str, **options: Any) -> dict[str, Any]:
    """Return what a checkpoint with an adapter records of its base (`dit.formats.record.BaseRecord`).

    weights: "ema" or "raw". options: by which the base was opened. Raises NotFound if it lacks the weights, and
    InvalidInput if it has an adapter itself, or if its own training will remove it.
    """
    require_all_weights(opened)
    if opened.interrupted and opened.name == step_name(opened.step):
        raise InvalidInput(
            f"{opened.origin}: found the checkpoint of an interrupted training, which is removed when that training "
            "resumes, as the base of an adapter",
            "a checkpoint that stays",
            "choose one of a regular step, or copy the folder to one of another name, such as base",
        )
    (file,) = opened.weights_files(weights)
    found = {"uri": opened.origin, "file": file, "sha256": opened.files[file], "digest": opened.digest}
    is_imported = opened.record.source is not None and options
    return {**found, "imported": recorded_options(options)} if is_imported else found


def require_all_weights(opened: LocatedCheckpoint) -> None:
    """Raise InvalidInput if the base of an adapter has an adapter itself."""
    if opened.base is not None:
        raise InvalidInput(
            f"{opened.origin}: found an adapter as the base of another",
            "a checkpoint that holds all of its weights",
            "merge it first: raydit merge CHECKPOINT OUT",
        )


def _described(
    opened: LocatedCheckpoint, config: dict[str, Any], source: dict[str, Any], classes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the config.json of a checkpoint that is made from another one, and lies anywhere.

    classes: names of its classes; when left out, they are those of the other one.
    """
    record = opened.record
    model = replace(record.model_config, num_classes=len(classes)) if classes else record.model_config
    return describe_checkpoint(
        model=model,
        objective=record.objective,
        autoencoder={**config["autoencoder"], "id": absolute_autoencoder_id(opened)},
        class_names=classes or record.class_names,
        seed=record.seed,
        latents_fingerprint=record.latents_fingerprint,
        preprocessing=record.preprocessing,
        source=source,
    )
