"""Environment variables that a job is given."""

import os

from cluster import job_server
from pipelines.tracking.store import tracking_uri

PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "GOOGLE_CLOUD_PROJECT",
)
"""Where storage and tracking are. Never who we are: credentials are the cluster's own."""


def given_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def sendable_environment() -> dict[str, str]:
    """What of it another machine can use."""
    return {key: value for key, value in given_environment().items() if not is_of_this_machine(value)}


def is_of_this_machine(value: str) -> bool:
    """Whether a setting names a place that only this machine reaches: its own disk, or its loopback address."""
    if value.startswith(("http://", "https://")):
        return job_server.is_this_machine(value)
    return value.startswith(("sqlite:", "file:", "/", "."))


def job_environment() -> dict[str, str]:
    """Where storage is, and where the job tracks: where the command would, run here."""
    return given_environment() | {"MLFLOW_TRACKING_URI": tracking_uri()}
