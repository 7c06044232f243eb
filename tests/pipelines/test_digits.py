"""The demo's own promises: its digits can be read, and a cluster gives the numbers of this machine."""

from pathlib import Path

import numpy as np
import pytest
from away import assert_same
from ray_head import started_head

from dit.formats.completion import step_name
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.reader import load_recipe
from pipelines.config.recipe import ImagesConfig
from pipelines.images.preprocess import read_cropped
from pipelines.run import run_pipeline
from pipelines.sample import sample_file
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.settings import ScoringSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:ssl=None is deprecated")]
RECIPE = Path(__file__).resolve().parents[2] / "pipelines" / "recipes" / "digits.toml"


def pixels(config: ImagesConfig, keys: list[str]) -> np.ndarray:
    images, _, errors = read_cropped(config, keys)
    assert not errors
    return images.mean(axis=-1).reshape(len(images), -1) / 255


@pytest.fixture(scope="module")
def config(local_ray, tmp_path_factory):
    """What `make demo` does, here; its recipe."""
    folder = tmp_path_factory.mktemp("demo")
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    config = load_recipe(RECIPE, (f"output={folder / 'output'}", store))
    run_pipeline(config)
    return config


def test_one_job_with_everything_away_has_the_numbers_of_the_demo(config, away):
    with started_head(**away.variables) as head:
        assert away.submit(head, RECIPE).wait(timeout=1800) == 0, away.said()
    assert_same(away.objects(), Path(config.output), step_name(config.train.steps))


def test_a_classifier_of_real_digits_recognises_sampled_ones(config, tmp_path):
    from sklearn.svm import SVC

    real = RealImages.of(ScoringSettings.from_recipe(config))
    classifier = SVC(C=10).fit(pixels(config.images, real.training.keys), real.training.labels)
    held_out = classifier.score(pixels(config.images, real.held_out.keys), real.held_out.labels)
    assert held_out > 0.95

    checkpoint = CheckpointFolder(config.folder("checkpoints")).newest()
    sample_file(checkpoint.path, config, str(tmp_path / "samples.npz"), num_samples=1000)
    with np.load(tmp_path / "samples.npz") as file:
        images, labels = file["arr_0"].mean(axis=-1), file["arr_1"]
    assert len(labels) == 1000 and np.bincount(labels).tolist() == [100] * 10
    recognised = (classifier.predict(images.reshape(1000, -1) / 255) == labels).mean()
    print(f"recognised under their intended label: {recognised:.1%}; real held-out digits: {held_out:.1%}")
    assert recognised >= 0.97
