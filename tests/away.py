"""Everything away from this machine's disk: output in a bucket of S3, runs on an MLflow server."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import access
from mlflow_server import MlflowServer, free_port
from ray_head import RayHead
from tiny_run import Submitter

from pipelines.tracking.store import check_tracking

SECRETS = {"AWS_SECRET_ACCESS_KEY": "planted/wJalrXUtnFEMI", "MLFLOW_TRACKING_PASSWORD": "planted-correct-horse"}


class Away:
    """Where everything is: a bucket and a server, empty."""

    def __init__(self, s3_server: str, folder: Path):
        import boto3  # here, because a machine without it can run all tests that need no bucket

        self.folder, self.port = folder, free_port()
        self.variables = {**access(s3_server), **SECRETS, "MLFLOW_TRACKING_USERNAME": "me"}
        self.variables["XDG_CACHE_HOME"] = str(folder / "cache")
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "another", "region_name": "us-east-1"}
        self.s3, self.bucket = boto3.client("s3", endpoint_url=s3_server, **keys), folder.name.replace("_", "-")
        self.s3.create_bucket(Bucket=self.bucket)
        self.uri, self.store = f"http://127.0.0.1:{self.port}", f"sqlite:///{folder / 'mlflow.db'}"
        check_tracking(self.store)  # makes the database

    def names(self, prefix: str = "") -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def objects(self) -> dict[str, bytes]:
        return {name: self.s3.get_object(Bucket=self.bucket, Key=name)["Body"].read() for name in self.names()}

    def submit(self, head: RayHead, recipe: Path, *settings: str) -> subprocess.Popen:
        """`raydit submit -- run`, by somebody without credentials."""
        places = (f"output=s3://{self.bucket}/out", f"tracking.uri={self.uri}", *settings)
        flags = [part for place in places for part in ("--set", place)]
        streams = {"stdout": open(self.folder / "said", "a"), "stderr": subprocess.STDOUT}
        return Submitter(head, self.folder).start("run", str(recipe), *flags, **streams)

    def said(self) -> str:
        return (self.folder / "said").read_text()


@pytest.fixture
def away(s3_server, tmp_path, monkeypatch) -> Iterator[Away]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    away = Away(s3_server, tmp_path)
    with MlflowServer(away.store, away.port, tmp_path) as server:
        server.wait()
        yield away


def report_of(objects: dict[str, bytes], checkpoint: str) -> dict:
    (name,) = [name for name in objects if name.endswith(f"/{checkpoint}/report.json")]
    return json.loads(objects[name])


def numbers(metrics: dict[str, float | None]) -> dict[str, float]:
    """Return the metrics that have a value; pytest compares no None with a tolerance."""
    return {name: value for name, value in metrics.items() if value is not None}


def assert_same(objects: dict[str, bytes], output: Path, checkpoint: str) -> None:
    """Latents and weights as on disk to the bit, and the report's numbers, which another process has reduced."""
    for file in [*(output / "latents").glob("part-*"), *(output / "checkpoints").rglob("*ema*")]:
        assert objects[f"out/{file.relative_to(output).as_posix()}"] == file.read_bytes(), file
    (file,) = (output / "evaluations").glob(f"*/{checkpoint}/report.json")
    found, expected = report_of(objects, checkpoint), json.loads(file.read_text())
    assert found["protocol"] == expected["protocol"]
    # A job's driver may compute with another number of threads, so that sums are rounded otherwise.
    for part in ("metrics", "floor"):
        assert numbers(found[part]) == pytest.approx(numbers(expected[part]), rel=1e-9)
        assert found[part].keys() == expected[part].keys()
