"""Vision models of transformers as extractors: transformers:ID, by hub id or folder, from files on this machine.

Features are image embeddings of length 1 where the model has them (CLIP, SigLIP); otherwise its pooled output, or where
its weights have no pooling the first token. Images are resized, cropped and normalised by the parameters of the model's
image processor, which is compared with it once.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.features.extractor_names import TRANSFORMERS
from evaluation.features.function_extractor import MODULES_VARIABLE
from evaluation.features.image_preprocessing import Preprocessing
from evaluation.features.image_processors import preprocessing_of, require_agreement
from evaluation.features.networks import Network, Outputs
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_NOT_OF_THE_NETWORK = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id")
"""Entries of a model's config.json that change no feature."""


def find_folder(name: str, folder: str | Path | None = None) -> Path:
    """Return the folder with a model's files on this machine. folder: the one that is given for it.

    An ID is a folder if there is one, and otherwise a hub id that is looked up in the Hugging Face cache. Raises
    NotFound if it is not there, and InvalidInput for a folder without a model.
    """
    model = name.removeprefix(TRANSFORMERS)
    path = Path(folder) if folder is not None else _local_folder(model) or Path(_find_snapshot(name, model))
    for file in ("config.json", "preprocessor_config.json"):
        if not (path / file).is_file():
            raise NotFound(
                f"no {file} in {path}, which the extractor {name!r} needs",
                "a folder that save_pretrained of a model and of its image processor wrote",
                "Correct the path, or save both there",
            )
    weight_files(name, path)
    return path


def weight_files(name: str, folder: Path) -> dict[str, Path]:
    """Return the files of weights in a folder by their names: one, or the shards that an index lists."""
    for file in _WEIGHTS:
        if (folder / file).is_file():
            return {file: folder / file}
        if (index := folder / f"{file}.index.json").is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if all((folder / each).is_file() for each in names):
                return {each: folder / each for each in names}
    raise NotFound(
        f"no weights in {folder}, which the extractor {name!r} needs", " or ".join(_WEIGHTS), "Copy them there"
    )


def recorded_name(name: str, sha256: str) -> str:
    """Return the name in protocols: a folder's path is of one machine, so only its last part and a digest are kept."""
    folder = _local_folder(name.removeprefix(TRANSFORMERS))
    return f"{TRANSFORMERS}{folder.resolve().name}-{sha256[:8]}" if folder else name


def describe_input(name: str, folder: Path) -> str:
    """Return what is done to images, and the digest of the network's configuration, as protocols record them."""
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_NETWORK}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return f"{read_preprocessing(name, folder)}; config {digest[:12]}"


def read_preprocessing(name: str, folder: Path) -> Preprocessing:
    """Return what a model's image processor does, after comparing the two on images.

    Raises NotFound without transformers, and InvalidInput as `preprocessing_of` and `require_agreement`.
    """
    return _read_preprocessing(name, folder, (folder / "preprocessor_config.json").stat().st_mtime_ns)


@cache
def _read_preprocessing(name: str, folder: Path, modified: int) -> Preprocessing:
    try:
        from transformers import AutoImageProcessor
    except ImportError:
        raise NotFound(
            "the package transformers is not installed",
            "transformers 5 or newer",
            "run `pip install 'raydit[extractors]'`",
        ) from None
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    preprocessing = preprocessing_of(name, processor.to_dict())
    require_agreement(name, preprocessing, lambda image: processor(images=image, return_tensors="pt")["pixel_values"])
    return preprocessing


def build_transformers(name: str, folder: Path, device: torch.device) -> Network:
    """Build a model from a folder. Raises InvalidInput if it is none of images, or its files do not fit each other."""
    import torch

    prepare, model = read_preprocessing(name, folder), _load(name, folder)
    model.float().eval().requires_grad_(False).to(device)

    def forward(images: Tensor) -> Outputs:
        return Outputs(_features(name, model, prepare(images)))

    side = prepare.crop or (prepare.resize if isinstance(prepare.resize, tuple) else (prepare.resize or 224,) * 2)
    with torch.inference_mode():
        features = forward(torch.zeros(1, 3, *side, dtype=torch.uint8, device=device)).features
    return Network(forward, feature_dim=features.shape[1], num_logits=0)


def _features(name: str, model: Any, pixels: Tensor) -> Tensor:
    import torch.nn.functional as F

    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixels)
        return F.normalize(found if hasattr(found, "ndim") else found.pooler_output, dim=1)
    output = model(pixel_values=pixels)
    if getattr(output, "image_embeds", None) is not None:
        return F.normalize(output.image_embeds, dim=1)
    if (pooled := getattr(output, "pooler_output", None)) is not None:
        return pooled.flatten(1)
    states = output.last_hidden_state
    return states[:, 0] if states.ndim == 3 else states.mean(dim=(2, 3))


def _load(name: str, folder: Path) -> Any:
    """Load a model by the class that its configuration names, or the headless one of its kind."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = (config.architectures or [""])[0]
    loader = getattr(transformers, named, None) if named.endswith("WithProjection") else None
    loader = loader or transformers.AutoModel
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(folder, **options)
        if info["missing_keys"] and all("pooler" in key for key in info["missing_keys"]):
            model, info = loader.from_pretrained(folder, add_pooling_layer=False, **options)
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        found = f"{folder}: found a model that cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise InvalidInput(found, f"the files of {name}", "copy them again") from error
    lacking = sorted(map(str, info["missing_keys"]))
    if lacking or info["mismatched_keys"]:
        wrong = lacking or sorted(map(str, info["mismatched_keys"]))
        found = f"{folder}: found weights that lack or contradict {wrong[0]} and {len(wrong) - 1} more"
        raise InvalidInput(found, f"all of {type(model).__name__}", "copy the files of one model")
    return model


def _local_folder(model: str) -> Path | None:
    """Return the folder that an ID names, here or where a job was submitted; None for a hub id."""
    places = [Path(), *map(Path, filter(None, [os.environ.get(MODULES_VARIABLE)]))]
    return next((place / model for place in places if (place / model).is_dir()), None)


def _find_snapshot(name: str, model: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise NotFound(
            f"no files of {name} on this machine: {model!r} is neither a folder nor in the Hugging Face cache",
            "config.json, preprocessor_config.json and weights",
            f"Get them with `hf download {model}` on a machine with network and copy its cache here, or set "
            f'evaluate.extractor_weights to their folder, such as extractor_weights = {{ "{name}" = "models/clip" }}',
        ) from None
