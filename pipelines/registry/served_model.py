"""A checkpoint as a model that MLflow serves: a table of classes and seeds in, PNG images out.

MLflow executes a copy of this file that lies beside the weights, so raydit must be installed where it is served.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from raydit.errors import InvalidInput, RayditError

FILES = "files"
"""Name of the folder of files: checkpoint/, autoencoder/, SETTINGS, and guide/ if the samples have autoguidance."""
SETTINGS = "sampling.json"
PARAMS = ("sampler", "sampling_steps", "cfg_scale")
"""Fields of the protocol that a request may set."""
COUNTER_BITS = 32
"""Size of a seed where noise is drawn by `dit.random`, which on a GPU would cut off what is above."""


class ServedModel(PythonModel):
    """Samples from a checkpoint. The image of a row depends only on its class, its seed and the params.

    The image of seed i is sample i of the checkpoint's evaluations if the class is the same.
    """

    def load_context(self, context: Any) -> None:
        import torch

        from evaluation.protocol import EvaluationProtocol
        from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler

        folder = Path(context.artifacts[FILES])
        settings = json.loads((folder / SETTINGS).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.has_null_class: bool = settings["has_null_class"]
        self.samplers: list[str] = settings["samplers"]
        self.sampler = CheckpointSampler(
            folder / "checkpoint",
            EvaluationProtocol.from_dict(settings["protocol"]),
            batch_size=settings["batch_size"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            autoencoder=folder / "autoencoder",
            guide=folder / "guide",
        )

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Sample one image for each row.

        model_input: column class (names or numbers) and optionally seed, by default the number of the row. Returns
        columns class, seed and png (the bytes of a file; base64 over HTTP). Raises MlflowException for wrong input.
        """
        try:
            return self._sample(model_input, params or {})
        except RayditError as error:  # over HTTP, MLflow shows the messages of its own class only
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _sample(self, model_input: pandas.DataFrame, params: dict[str, Any]) -> pandas.DataFrame:
        import numpy as np
        from PIL import Image

        from pipelines.images.grids import encode_png

        if self.class_names and "class" not in model_input:
            raise InvalidInput(
                f"columns: found {', '.join(map(str, model_input.columns)) or 'none'}",
                f"class, with one of {', '.join(self.class_names)}, or their numbers",
                "add the column class",
            )
        seeds = [int(seed) for seed in model_input.get("seed", range(len(model_input)))]
        bits = COUNTER_BITS if self.sampler.protocol.random == "counter" else 63
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**bits]:
            raise InvalidInput(f"seed: found {wrong[0]}", f"an integer in [0, 2^{bits})", "choose another seed")
        labels = [self._label(given) for given in model_input["class"]] if self.class_names else [0] * len(seeds)
        if not seeds:
            return pandas.DataFrame({"class": [], "seed": [], "png": []})
        sampler = copy.copy(self.sampler)  # requests may run at the same time
        sampler.protocol = replace(sampler.protocol, **self._chosen(params))
        sampler.batch_size = min(sampler.batch_size, len(seeds))
        images = sampler.sample(seeds, np.array(labels, np.int64))
        names = [self.class_names[label] for label in labels] if self.class_names else [""] * len(seeds)
        return pandas.DataFrame(
            {"class": names, "seed": seeds, "png": [encode_png(Image.fromarray(image)) for image in images]}
        )

    def _label(self, given: Any) -> int:
        from pipelines.scoring.sample_grid import class_label

        # A column of JSON numbers arrives as floats if one of them is missing.
        is_whole = isinstance(given, float) and given.is_integer()
        return class_label(str(int(given) if is_whole else given), self.class_names)

    def _chosen(self, params: dict[str, Any]) -> dict[str, Any]:
        from dit.sampler_names import most_steps

        chosen = {name: params[name] for name in PARAMS if params.get(name) is not None}
        if chosen.get("sampler", self.samplers[0]) not in self.samplers:
            known = ", ".join(self.samplers)
            raise InvalidInput(f"sampler: found {chosen['sampler']!r}", f"one of {known}", "choose another sampler")
        if not 1 <= chosen.get("cfg_scale", 1.0) < math.inf:
            raise InvalidInput(
                f"cfg_scale: found {chosen['cfg_scale']}",
                "a number of at least 1, which is no guidance",
                "choose another",
            )
        most = most_steps(chosen.get("sampler", self.sampler.protocol.sampler), self.sampler.process.kind)
        steps = chosen.get("sampling_steps", 1)
        if steps < 1 or (most is not None and steps > most):
            expected = "at least 1" if most is None else f"a number from 1 to {most}"
            raise InvalidInput(f"sampling_steps: found {steps}", expected, "choose another number of steps")
        if chosen.get("cfg_scale", 1.0) > 1 and not self.has_null_class:
            raise InvalidInput(
                f"cfg_scale: found {chosen['cfg_scale']}",
                "1.0, because this model was trained without a null class",
                "leave cfg_scale out",
            )
        return chosen


set_model(ServedModel())
