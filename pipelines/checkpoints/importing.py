"""Import checkpoints from the formats of other projects, and write a recipe for them, since they record none."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster import storage
from dit.checkpoint import Checkpoint, import_diffusers, import_official
from dit.config import Numerics, ProcessKind
from dit.formats.record import CheckpointRecord
from dit.formats.shards import find_index
from pipelines.config.overrides import read_overrides
from pipelines.config.reader import RecipeError
from pipelines.config.toml_text import toml_value
from raydit.errors import InvalidInput


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    objective: ProcessKind = "diffusion",
    numerics: Numerics = "diffusers",
    autoencoder: str | None = None,
    overrides: Sequence[str] = (),
) -> Checkpoint:
    """Write a checkpoint folder from an official weights file, or from a diffusers DiT pipeline folder.

    source: may also be the index of a file's shards, or the folder that holds it. model, objective: for a file only,
    see dit.checkpoint.import_official. numerics: for a pipeline only, see dit.checkpoint.import_diffusers. autoencoder:
    hub id or folder; by default sd-vae-ft-ema, or the pipeline's own. overrides: model fields that a file cannot tell,
    such as "model.num_heads=4". Raises NotFound, AlreadyExists and InvalidInput.
    """
    storage.refuse_unwritable(str(out))
    chosen = {} if autoencoder is None else {"autoencoder": autoencoder}
    if not is_pipeline(source):
        return import_official(source, out, model=model, objective=objective, **chosen, **model_fields(overrides))
    given = [flag for flag, value in {"--model": model, "--set": overrides}.items() if value]
    given += ["--objective"] if objective != "diffusion" else []
    if given:
        raise InvalidInput(
            f"{given[0]}: found with a pipeline folder",
            "a weights file, which does not record its model",
            f"omit {given[0]}",
        )
    return import_diffusers(source, out, numerics=numerics, **chosen)


def is_pipeline(source: str | Path) -> bool:
    """Return whether a path is treated as a diffusers pipeline: a folder, unless it holds the shards of one file."""
    return Path(source).is_dir() and ((Path(source) / "model_index.json").is_file() or not find_index(Path(source)))


def with_absolute_autoencoder(overrides: Sequence[str]) -> list[str]:
    """Return recipe overrides of which a folder that autoencoder.id names is the same in every working directory."""
    id = read_overrides(overrides).get("autoencoder", {}).get("id")
    if not isinstance(id, str) or Path(id).is_absolute() or not Path(id).is_dir():
        return list(overrides)
    return [*overrides, f"autoencoder.id={toml_value(str(Path(id).absolute()))}"]


def import_settings(overrides: Sequence[str], *, pipeline: bool) -> dict[str, Any]:
    """Return the arguments of import_checkpoint that recipe overrides stand for.

    The autoencoder for both kinds of source; for a file also the objective and the model's fields. Other overrides
    concern what is done with the checkpoint and are ignored.
    """
    content = read_overrides(overrides)
    settings = {"autoencoder": content.get("autoencoder", {}).get("id")}
    if not pipeline:
        settings |= {"objective": content.get("objective", {}).get("kind")}
        settings |= {"overrides": tuple(override for override in overrides if override.startswith("model."))}
    return {name: value for name, value in settings.items() if value}


def summarize_import(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield lines to print about an imported checkpoint: its model, and what sampling from it computes."""
    record = checkpoint.record
    assert record.source is not None, "an imported checkpoint records its source"
    model, source, autoencoder = record.model_config, record.source, record.autoencoder
    size = f"depth {model.depth}, width {model.hidden_size}, patch {model.patch_size}"
    yield f"{checkpoint.path}: {model.architecture}, {size}, {model.num_classes} classes"
    if source.format in ("official", "diffusers"):
        yield f"took {source.taken or 'the weights as they are'}"
    if source.format == "adapter" and (base := checkpoint.base) is not None:
        yield f"refers to the weights {base.sha256[:12]} of its base, {base.uri}, and holds no copy of them"
    if source.format == "diffusers":
        kept, other = "diffusers", "the official code"
        if source.numerics == "official":
            kept, other = other, kept
        yield f"computes with these weights what {kept} does, which is not what {other} does (timestep frequencies)"
    if autoencoder.sha256 is None:
        yield f"{autoencoder.id} is not on this machine: sampling downloads it, without a digest to verify it by"


def model_fields(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse overrides such as "model.num_heads=4" into fields of a model's configuration.

    Raises RecipeError for an override of another section.
    """
    for override in overrides:
        if set(read_overrides([override])) != {"model"}:
            raise RecipeError(f"--set {override}: expected a field of the model, such as --set model.num_heads=4")
    return read_overrides(overrides).get("model", {})


def recipe_for_imported(record: CheckpointRecord) -> dict[str, Any]:
    """Return the content of a recipe for an imported checkpoint, from its record; there are no images to compare with.

    The samplers are the papers': 250 ancestral steps for DiT, 50 steps of DPM-Solver++ for U-ViT, and 50 Euler steps
    for flow matching.
    """
    assert record.source is not None, "a checkpoint without a recipe is imported and records its source"
    model = record.model_config
    uvit = model.architecture == "uvit"
    sampler = "euler" if record.process_kind == "flow" else ("dpmpp_2m" if uvit else "ddpm")
    shared = ("architecture", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob")
    dit_only = () if uvit else ("conditioning", "timestep_frequency_shift")
    return {
        "name": Path(record.source.name).stem,
        "seed": record.seed,
        "images": {"path": "", "size": model.latent_size[0] * record.autoencoder.downsample},
        "autoencoder": {"id": record.autoencoder.id},
        "model": {name: getattr(model, name) for name in (*shared, *dit_only)},
        "objective": record.objective,
        "evaluate": {"sampler": sampler, "sampling_steps": 250 if sampler == "ddpm" else 50},
    }
