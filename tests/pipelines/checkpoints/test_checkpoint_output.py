"""The output folder that a checkpoint belongs to."""

from pathlib import Path

import pytest

from cluster import storage
from pipelines.checkpoints.open import LocatedCheckpoint


@pytest.mark.parametrize(
    ("origin", "output"),
    [
        ("/models/step_0001000", "/models"),
        ("/step_0001000", "/"),
        ("/models/run/step_0001000", "/models/run"),
        ("/models/checkpoints/step_0001000", "/models"),
        ("/models/superseded/checkpoints-1/step_0001000", "/models"),
        ("s3://bucket/step_0001000", "s3://bucket"),
        ("s3://bucket/a/checkpoints/step_0001000?region=x", "s3://bucket/a?region=x"),
        ("s3://checkpoints/step_0001000", "s3://checkpoints"),
        ("s3://superseded/checkpoints/step_0001000", "s3://superseded"),
    ],
)
def test_results_stay_in_the_folder_of_a_checkpoint_outside_of_an_output(monkeypatch, origin, output):
    monkeypatch.setattr("cluster.storage.exists", lambda path: False)
    assert LocatedCheckpoint(Path("/x"), {"recipe": {}}, "", {}, origin).output == output
    imported = LocatedCheckpoint(Path("/x"), {"recipe": None}, "", {}, origin)
    assert imported.output == storage.split(origin)[0]


@pytest.mark.parametrize("artifact", ["autoencoder", "latents", "evaluations"])
def test_an_output_is_recognised_by_its_other_artifacts(tmp_path, artifact):
    """Where the checkpoints were moved to a folder of another name, reports and autoencoder are found as before."""
    opened = LocatedCheckpoint(Path("/x"), {"recipe": {}}, "", {}, str(tmp_path / "kept" / "step_0001000"))
    (tmp_path / artifact).mkdir()
    assert opened.output == str(tmp_path)
