"""The environment variables that a job gets: where storage and tracking are, never credentials."""

import os

from cluster import job_server
from evaluation.features.function_extractor import MODULES_VARIABLE
from pipelines.tracking.database import absolute_uri
from pipelines.tracking.store import tracking_uri

FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "GOOGLE_CLOUD_PROJECT",
)
"""Variables that say where storage and tracking are. Credentials are not among them: the cluster has its own."""


def forwarded_environment() -> dict[str, str]:
    """Return the variables of FORWARDED that are set here."""
    return {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}


def local_job_environment() -> dict[str, str]:
    """Return the variables for a job on this machine, which tracks where the command would track if run here.

    Users' functions are found where the command would find them.
    """
    here = {"MLFLOW_TRACKING_URI": absolute_uri(tracking_uri()), MODULES_VARIABLE: os.getcwd()}
    return forwarded_environment() | here


def remote_job_environment() -> dict[str, str]:
    """Return the variables for a job on another machine: those whose values do not refer to this machine."""
    return {key: value for key, value in forwarded_environment().items() if not refers_to_this_machine(value)}


def refers_to_this_machine(value: str) -> bool:
    """Whether a value is a URI or path that only this machine can reach: on its disk, or at its loopback address."""
    if value.startswith(("http://", "https://")):
        return job_server.is_this_machine(value)
    return value.startswith(("sqlite:", "file:", "/", "."))
