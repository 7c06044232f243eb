"""The import job: checkpoints of ours from the files of others; and a recipe for them, who record none."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dit.config import Numerics, ProcessKind
from dit.formats.record import CheckpointRecord
from pipelines.config.reader import RecipeError, apply_override


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    objective: ProcessKind = "diffusion",
    numerics: Numerics = "diffusers",
    autoencoder: str | None = None,
    overrides: Sequence[str] = (),
):
    """Make a checkpoint folder of an official weights file, or of a diffusers DiT pipeline folder.

    model, objective: of a file, see dit.checkpoint.import_official. numerics: of a pipeline, see import_diffusers.
    autoencoder: hub id or folder; left out, sd-vae-ft-ema, or the pipeline's own. overrides: fields of the model that
    a file cannot tell, as "model.num_heads=4". Raises FileNotFoundError, FileExistsError and ValueError.
    """
    from dit.checkpoint import import_diffusers, import_official

    chosen = {} if autoencoder is None else {"autoencoder": autoencoder}
    if not Path(source).is_dir():
        return import_official(source, out, model=model, objective=objective, **chosen, **model_fields(overrides))
    given = [name for name, value in {"--model": model, "--set": overrides}.items() if value]
    given += ["--objective"] if objective != "diffusion" else []
    if given:
        raise ValueError(f"{given[0]}: found with a pipeline folder, which says all of it itself; leave {given[0]} out")
    return import_diffusers(source, out, numerics=numerics, **chosen)


def import_settings(overrides: Sequence[str], *, pipeline: bool) -> dict:
    """Arguments of import_checkpoint that a recipe's fields mean: the autoencoder, and of a file more than that.

    The other fields are about what is done with the checkpoint, and left alone.
    """
    content: dict = {}
    for override in overrides:
        apply_override(content, override)
    settings = {"autoencoder": content.get("autoencoder", {}).get("id")}
    if not pipeline:
        settings |= {"objective": content.get("objective", {}).get("kind")}
        settings |= {"overrides": tuple(override for override in overrides if override.startswith("model."))}
    return {name: value for name, value in settings.items() if value}


def import_summary(checkpoint) -> Iterator[str]:
    """What an import made, and what it computes, in lines to print."""
    record = checkpoint.record
    assert record.source is not None, "an imported checkpoint records its source"
    model, source, autoencoder = record.model_config, record.source, record.autoencoder
    size = f"depth {model.depth}, width {model.hidden_size}, patch {model.patch_size}"
    yield f"{checkpoint.path}: {model.architecture}, {size}, {model.num_classes} classes"
    if source.format == "diffusers":
        kept, other = "diffusers", "the official code"
        if source.numerics == "official":
            kept, other = other, kept
        yield f"computes with these weights what {kept} does, which is not what {other} does (timestep frequencies)"
    if autoencoder.sha256 is None:
        yield f"{autoencoder.id} is not on this machine: sampling fetches it, and cannot check that it is the same"


def model_fields(overrides: Sequence[str]) -> dict:
    """Fields of a model's configuration from overrides such as "model.num_heads=4"."""
    content: dict = {}
    for override in overrides:
        apply_override(content, override)
        if set(content) != {"model"}:
            raise RecipeError(f"--set {override}: expected a field of the model, such as --set model.num_heads=4")
    return content.get("model", {})


def imported_recipe(record: CheckpointRecord) -> dict:
    """A recipe for a checkpoint that records none: what its config says, and no images to compare with.

    Samplers are the papers': 250 ancestral steps for DiT, 50 steps of DPM-Solver++ for U-ViT, 50 Euler steps for flow.
    """
    assert record.source is not None, "a checkpoint without a recipe is imported and records its source"
    model = record.model_config
    uvit = model.architecture == "uvit"
    sampler = "euler" if record.process_kind == "flow" else ("dpmpp_2m" if uvit else "ddpm")
    shared = ("architecture", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob")
    of_dit = () if uvit else ("conditioning", "timestep_frequency_shift")
    return {
        "name": Path(record.source.name).stem,
        "seed": record.seed,
        "images": {"path": "", "size": model.latent_size[0] * record.autoencoder.downsample},
        "autoencoder": {"id": record.autoencoder.id},
        "model": {name: getattr(model, name) for name in (*shared, *of_dit)},
        "objective": record.objective,
        "evaluate": {"sampler": sampler, "sampling_steps": 250 if sampler == "ddpm" else 50},
    }
