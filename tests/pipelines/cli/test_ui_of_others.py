"""`raydit ui` leaves the servers of others alone, which it finds on the ports that it tries."""

from urllib.parse import urlsplit

import pytest
from mlflow_server import answering

from pipelines.cli import mlflow_ui


@pytest.fixture
def server(monkeypatch):
    """A tracking server that asks for a password, whose /health does not: its port."""
    monkeypatch.setattr(mlflow_ui, "_is_healthy", lambda port: True)
    with answering(401, b"You are not authenticated.") as (uri, _):
        yield urlsplit(uri).port


def test_a_server_that_asks_for_a_password_is_another_stores(server):
    assert mlflow_ui._serves(server, "sqlite:///none.db") is False


def test_no_server_gets_the_credentials_of_another(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    asked = []
    monkeypatch.setattr(mlflow_ui, "_experiments", lambda uri: asked.append(uri))
    assert mlflow_ui._serves(server, "sqlite:///none.db") is False and asked == []
