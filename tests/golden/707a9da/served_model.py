"""A checkpoint as MLflow serves it: a table of classes and seeds in, PNG images out.

MLflow runs this file itself, from a copy beside the weights; what it needs of raydit must be installed.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

FILES = "files"
"""Name of the folder of files: checkpoint/, autoencoder/ and SETTINGS."""
SETTINGS = "sampling.json"
PARAMS = ("sampler", "sampling_steps", "cfg_scale")
"""Fields of a protocol that a request may choose."""


class ServedModel(PythonModel):
    """Images of a checkpoint. The image of a row depends on its class, its seed and the settings only.

    The image of seed i is sample i of the checkpoint's evaluations, where the class is the same.
    """

    def load_context(self, context) -> None:
        import torch

        from evaluation.protocol import EvaluationProtocol
        from pipelines.sampling import Sampler

        folder = Path(context.artifacts[FILES])
        settings = json.loads((folder / SETTINGS).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.has_null_class: bool = settings["has_null_class"]
        self.samplers: list[str] = settings["samplers"]
        self.sampler = Sampler(
            folder / "checkpoint",
            EvaluationProtocol.from_dict(settings["protocol"]),
            batch_size=settings["batch_size"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            autoencoder=folder / "autoencoder",
        )

    def predict(self, context, model_input: pandas.DataFrame, params=None) -> pandas.DataFrame:
        """model_input: columns class (names or numbers) and, if wanted, seed; left out, the row's number.

        Returns columns class, seed and png (bytes of a file; base64 over HTTP).
        """
        import numpy as np
        from PIL import Image

        from pipelines.grids import png_of

        seeds = [int(seed) for seed in model_input.get("seed", range(len(model_input)))]
        labels = [self._label(given) for given in model_input["class"]] if self.class_names else [0] * len(seeds)
        if not seeds:
            return pandas.DataFrame({"class": [], "seed": [], "png": []})
        sampler = copy.copy(self.sampler)  # requests may come at once
        sampler.protocol = replace(sampler.protocol, **self._chosen(params or {}))
        sampler.batch_size = min(sampler.batch_size, len(seeds))
        images = sampler.sample(seeds, np.array(labels, np.int64))
        names = [self.class_names[label] for label in labels] if self.class_names else [""] * len(seeds)
        return pandas.DataFrame(
            {"class": names, "seed": seeds, "png": [png_of(Image.fromarray(image)) for image in images]}
        )

    def _label(self, given) -> int:
        from pipelines.sample import class_label

        # A column of JSON numbers, one of them missing, arrives as floats.
        is_whole = isinstance(given, float) and given.is_integer()
        return class_label(str(int(given) if is_whole else given), self.class_names)

    def _chosen(self, params: dict) -> dict:
        chosen = {name: params[name] for name in PARAMS if params.get(name) is not None}
        if chosen.get("sampler", self.samplers[0]) not in self.samplers:
            raise ValueError(f"sampler: found {chosen['sampler']!r}, expected one of {', '.join(self.samplers)}")
        if chosen.get("cfg_scale", 1.0) > 1 and not self.has_null_class:
            raise ValueError(
                f"cfg_scale: found {chosen['cfg_scale']}, expected 1.0: this model was trained without a null class"
            )
        return chosen


set_model(ServedModel())
