"""What tests of the registry share."""

import pytest
from mlflow import MlflowClient


@pytest.fixture
def store(story, monkeypatch, tmp_path):
    """A client of the story's store, which commands in an empty folder use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", story.uri)
    return MlflowClient(story.uri)
