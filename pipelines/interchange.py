"""The import and export jobs: between checkpoints of ours and the files of others."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dit.config import Numerics, ProcessKind, config_from_dict
from pipelines.recipe_file import RecipeError, apply_override


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


def import_summary(checkpoint) -> Iterator[str]:
    """What an import made, and what it computes, in lines to print."""
    config = checkpoint.config
    model, source, autoencoder = config["model"], config["source"], config["autoencoder"]
    size = f"depth {model['depth']}, width {model['hidden_size']}, patch {model['patch_size']}"
    yield f"{checkpoint.path}: {model['architecture']}, {size}, {model['num_classes']} classes"
    if source["format"] == "diffusers":
        kept, other = "diffusers", "the official code"
        if source["numerics"] == "official":
            kept, other = other, kept
        yield f"computes with these weights what {kept} does, which is not what {other} does (timestep frequencies)"
    if autoencoder["sha256"] is None:
        yield f"{autoencoder['id']} is not on this machine: sampling fetches it, and cannot check that it is the same"


def how_to_load(path: Path) -> str:
    """How an exported file or folder is used, and what it then computes."""
    if path.is_file():
        return "a state dict for the official code; it holds neither configuration nor autoencoder"
    if not any((path / "transformer").glob("*.py")):
        return f'DiTPipeline.from_pretrained("{path}") computes the same'
    return (
        f'DiTPipeline.from_pretrained("{path}", trust_remote_code=True) computes the same, by a class in the folder '
        "with the official timestep frequencies; diffusers' own has others and refuses"
    )


def model_fields(overrides: Sequence[str]) -> dict:
    """Fields of a model's configuration from overrides such as "model.num_heads=4"."""
    content: dict = {}
    for override in overrides:
        apply_override(content, override)
        if set(content) != {"model"}:
            raise RecipeError(f"--set {override}: expected a field of the model, such as --set model.num_heads=4")
    return content.get("model", {})


def export_checkpoint(checkpoint: str | Path, out: str | Path, *, format: str, weights: str = "ema") -> Path:
    """Write a checkpoint as a file of the official code, or as a folder of diffusers' DiTPipeline.

    Raises FileExistsError, and ValueError where that format cannot say what the checkpoint is.
    """
    from dit.checkpoint import export_diffusers, export_official, load_checkpoint
    from pipelines.sampling import checkpoint_autoencoder

    opened = load_checkpoint(checkpoint)
    if format == "official":
        return export_official(opened, out, weights=weights)
    return export_diffusers(opened, out, autoencoder=checkpoint_autoencoder(opened), weights=weights)


def imported_recipe(config: dict) -> dict:
    """A recipe for a checkpoint that records none: what its config says, and no images to compare with.

    Samplers are the papers': 250 ancestral steps for DiT, 50 steps of DPM-Solver++ for U-ViT, 50 Euler steps for flow.
    """
    model = config_from_dict(config["model"])
    uvit = model.architecture == "uvit"
    sampler = "euler" if config["objective"]["kind"] == "flow" else ("dpmpp_2m" if uvit else "ddpm")
    shared = ("architecture", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob")
    of_dit = () if uvit else ("conditioning", "timestep_frequency_shift")
    return {
        "name": Path(config["source"]["name"]).stem,
        "seed": config["seed"],
        "images": {"path": "", "size": model.latent_size[0] * config["autoencoder"]["downsample"]},
        "autoencoder": {"id": config["autoencoder"]["id"]},
        "model": {name: getattr(model, name) for name in (*shared, *of_dit)},
        "objective": config["objective"],
        "evaluate": {"sampler": sampler, "sampling_steps": 250 if sampler == "ddpm" else 50},
    }
