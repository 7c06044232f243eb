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


@pytest.mark.parametrize("port", ["0", "70000", "-1"])
def test_a_number_that_is_no_port_is_bad_usage(raydit, port):
    code, _, err = raydit("ui", "--port", port)
    assert code == 2 and "is not in the range 1<=x<=65535" in err


def test_no_port_above_the_highest_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(mlflow_ui, "check_tracking", lambda uri: "")
    monkeypatch.setattr(mlflow_ui, "earlier_folders", lambda uri: [])
    monkeypatch.setattr(mlflow_ui, "_is_free", lambda port: tried.append(port))
    monkeypatch.setattr(mlflow_ui, "_serves", lambda port, uri: False)
    with pytest.raises(ValueError, match="ports 65534 to 65535: found other programs on all of them"):
        mlflow_ui.serve_ui("sqlite:///none.db", 65_534)
    assert tried == [65_534, 65_535]
