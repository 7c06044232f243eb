"""Models that older versions promoted bring their own copy of served_model.py, which must still load and sample."""

import io
import shutil
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas
import pytest
from PIL import Image
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry import served_model
from pipelines.registry.model_files import save_model_files
from pipelines.scoring.protocols.build_protocol import sampling_protocol
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler

OLDER = Path(__file__).resolve().parents[2] / "golden" / "707a9da" / "served_model.py"


@pytest.mark.parametrize("code", [OLDER, Path(served_model.__file__)], ids=["707a9da", "now"])
def test_a_promoted_model_samples_with_the_code_that_it_was_saved_with(tmp_path, code):
    config = tiny_output(tmp_path)
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    save_model_files(opened, tmp_path / "model", tmp_path / "work")
    (copied,) = (tmp_path / "model").rglob("served_model.py")
    shutil.copyfile(code, copied)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    answer = model.predict(pandas.DataFrame({"class": ["ring", "2"], "seed": [5, 0]}))
    images = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in answer["png"]])
    protocol = sampling_protocol(config.evaluate, config.seed, opened, config.random)
    expected = CheckpointSampler(opened.path, protocol, batch_size=2).sample([5, 0], np.array([1, 2]))
    assert np.array_equal(images, expected)
