"""The files of a promoted checkpoint, which `mlflow.pyfunc.load_model` opens and `mlflow models serve` runs.

They are a copy, not a reference: everyone who reaches the store can load the model without access to the storage of
its training, and it outlives the training's own checkpoints. Only the weights that sample are copied, unchanged.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.autoencoder import is_same_autoencoder
from dit.files import sha256_of, write_json
from dit.formats.completion import COMPLETE
from dit.formats.diffusers_files import find_weights
from dit.formats.digests import require_digest
from dit.formats.opened_checkpoint import BASE_COPY
from dit.sampler_names import fitting_samplers
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.checkpoints.registered import ALL_DIGESTS
from pipelines.latents.autoencoder import explain_other
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, sampling_protocol
from pipelines.scoring.samples.guide import open_guide
from pipelines.tracking import tags
from pipelines.tracking.lookup import MODEL_FILE
from raydit import __version__
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


def upload(client: Any, model_id: str, opened: LocatedCheckpoint) -> None:
    """Upload the files that make a checkpoint loadable to its LoggedModel."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_model_files(opened, work / "model", work)
        # Uploaded last, so that half an upload does not count.
        recognised = work / MODEL_FILE
        (work / "model" / MODEL_FILE).rename(recognised)
        client.log_model_artifacts(model_id, str(work / "model"))
        client.log_model_artifact(model_id, str(recognised))


def save_model_files(opened: LocatedCheckpoint, folder: Path, work: Path) -> None:
    """Write the MLflow model of a checkpoint into `folder`, which must not exist; `work` is an empty folder."""
    # MLflow prints a progress bar and a line about the input example.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    import mlflow.pyfunc
    import pandas

    from pipelines.registry import served_model
    from pipelines.registry.served_model import FILES

    settings = gather(opened, work / FILES)
    names = opened.record.class_names
    extra = "[rae]" if opened.record.autoencoder.class_name == "AutoencoderRAE" else ""
    example = pandas.DataFrame({"class": [*names, "", ""][:2], "seed": [0, 1]})
    mlflow.pyfunc.save_model(
        folder,
        python_model=served_model.__file__,
        artifacts={FILES: str(work / FILES)},
        signature=signature(settings["protocol"]),
        input_example=example,
        pip_requirements=[f"raydit{extra}=={__version__}"],
        metadata={tags.CHECKPOINT: opened.origin, tags.CHECKPOINT_DIGEST: opened.digest},
    )


def gather(opened: LocatedCheckpoint, folder: Path) -> dict[str, Any]:
    """Copy the files that sampling needs, and write and return the sampling settings of the checkpoint's recipe."""
    from pipelines.registry.served_model import SETTINGS

    config = checkpoint_recipe(opened)
    protocol = sampling_protocol(config.evaluate, config.seed, opened, config.random)
    _copy_checkpoint(opened, folder / "checkpoint", protocol.weights)
    if guide := open_guide(config.evaluate, opened):
        _copy_checkpoint(guide, folder / "guide", protocol.autoguidance_weights or protocol.weights)
    _copy_autoencoder(opened, folder / "autoencoder")
    fitting = fitting_samplers(opened.record.process_kind)
    settings = {
        "protocol": protocol.to_dict(),
        "batch_size": config.evaluate.batch_size,
        "class_names": list(opened.record.class_names),
        "samplers": sorted(fitting, key=lambda name: name != protocol.sampler),
        # What guidance needs: the model's null class, or another model.
        "has_null_class": opened.record.model_config.null_class is not None or guide is not None,
    }
    write_json(folder / SETTINGS, settings)
    return settings


def _copy_checkpoint(opened: LocatedCheckpoint, target: Path, weights: str) -> None:
    """Copy some weights of a checkpoint as a checkpoint of its own, after comparing them with their digests.

    An adapter's base is copied too, because the copy may outlive it.
    """
    kept = ("config.json", *opened.weights_files(weights))
    _copy(opened.path, target, kept)
    for name in kept:  # of the copy, which is what is promoted
        require_digest(sha256_of(target / name), opened.path / name, opened.files.get(name))
    if (base := opened.base) is not None:
        shutil.copyfile(opened.find_base(base), target / BASE_COPY)
        require_digest(sha256_of(target / BASE_COPY), base.uri, base.sha256)
    write_json(target / ALL_DIGESTS, opened.files)
    write_json(target / COMPLETE, {name: opened.files[name] for name in kept})


def _copy_autoencoder(opened: LocatedCheckpoint, target: Path) -> None:
    """Copy the autoencoder of a checkpoint: the weights that sampling loads, after comparing them with its record."""
    source, recorded = checkpoint_autoencoder(opened), opened.record.autoencoder
    weights = find_weights(source)
    files = (*weights.files, *([weights.index] if weights.index else []))
    _copy(source, target, ("config.json", *(file.relative_to(source).as_posix() for file in files)))
    if recorded.sha256 is not None and not is_same_autoencoder(target, vars(recorded)):
        raise InvalidInput(
            f"{source}: found an autoencoder of {explain_other(vars(recorded), target)}",
            f"that of {opened.origin}, {recorded.sha256[:12]}: it has changed while it was copied",
            "promote the checkpoint again when the autoencoder is restored",
        )


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def signature(protocol: dict[str, Any]) -> "ModelSignature":
    """Return the columns in and out, and the params that a request may set, with the recipe's as defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    from pipelines.registry.served_model import PARAMS

    types = {str: "string", int: "long", float: "double"}
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "class", required=False), ColSpec("long", "seed", required=False)]),
        outputs=Schema([ColSpec("string", "class"), ColSpec("long", "seed"), ColSpec("binary", "png")]),
        params=ParamSchema([ParamSpec(name, types[type(protocol[name])], protocol[name]) for name in PARAMS]),
    )
