"""The address of the Ray cluster to join: where it comes from, and whether a Ray that accepts our token answers there.

Ray itself needs 20 seconds, and as many lines of output, to notice; these checks take milliseconds.
"""

import ipaddress
import logging
import os
import socket
import sys
from typing import Any

from cluster.listeners import is_loopback
from raydit.errors import InvalidInput, Unreachable

ANSWER_SECONDS = 5
ADDRESS_VARIABLE = "RAY_ADDRESS"
_TOKEN = "RAY_AUTH_TOKEN to it, or RAY_AUTH_TOKEN_PATH to a file that contains it"


def given_address(address: str | None) -> tuple[str, str]:
    """Return the address to join and where it was given: --address, RAY_ADDRESS, or ("local", "") where neither is.

    Ray sets RAY_ADDRESS inside a submitted job.
    """
    if address:
        return address, "--address"
    if from_environment := os.environ.get(ADDRESS_VARIABLE):
        return from_environment, ADDRESS_VARIABLE
    return "local", ""


def refuse_wrong_address(address: str | None) -> None:
    """Raise an error if no Ray can be joined at an address; does nothing where a local Ray is to be started.

    Nor where Ray is initialized already, which then is used. address: as in `ray_session`. Raises InvalidInput for an
    address of the wrong kind and for a refused token, and Unreachable if no Ray answers. The message names the flag or
    variable that the address comes from.
    """
    ray = sys.modules.get("ray")
    address, source = given_address(address)
    if address != "local" and not (ray and ray.is_initialized()):
        _ask_ray(_find_ray(source) if address == "auto" else _host_and_port(address, source), source)


def _host_and_port(address: str, source: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in host:
        raise InvalidInput(
            f"{source}: found the Ray address {address!r}",
            '"HOST:PORT" of a cluster that this machine belongs to (port 6379 by default), "auto" or "local"',
            f"correct {source}; from a machine outside of the cluster use: raydit submit",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise _no_ray(address, source, str(error)) from error
    return address


def is_on_loopback_only(address: str) -> bool:
    """Return whether a Ray answers at a loopback address, and not at the machine's own, by which Ray replaces it.

    address: as for `refuse_wrong_address`, but not "local".
    """
    from ray._private.services import canonicalize_bootstrap_address, get_ray_address_from_environment

    given = get_ray_address_from_environment("auto", None) if address == "auto" else address
    host = (given or "").rpartition(":")[0].strip("[]")
    if host != "localhost" and not (_is_ip(host) and is_loopback(host)):
        return False
    replaced_host, _, port = (canonicalize_bootstrap_address(given) or "").rpartition(":")
    try:
        socket.create_connection((replaced_host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError:
        return True
    return False


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _find_ray(source: str) -> str:
    """Return the address of the Ray that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address, get_ray_address_from_environment

    try:
        if is_on_loopback_only("auto"):
            return get_ray_address_from_environment("auto", None) or ""
        return canonicalize_bootstrap_address("auto") or ""
    except ConnectionError as error:
        raise Unreachable(
            f'{source}: found "auto", and no Ray runs on this machine',
            "a head or node that `ray start` has started here",
            f"start one, or unset {source} for a Ray of this command's own",
        ) from error


def _ask_ray(address: str, source: str) -> None:
    """Ask the cluster for its id; if it wants a token, with ours, if there is one."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # compiled

    code = _answer(grpc.insecure_channel(address))
    if code == "OK" and get_authentication_mode() == AuthenticationMode.TOKEN:
        raise InvalidInput(
            f"{source}: the Ray cluster at {address} has no token authentication, which is on in this process",
            "the same setting on both sides, because otherwise every actor counts as lost",
            "restart the cluster with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here before Python starts",
        )
    if code == "UNAUTHENTICATED" and _use_token():
        code = _answer(create_gcs_channel(address))
    if code == "UNAUTHENTICATED":
        raise InvalidInput(
            f"{source}: the Ray cluster at {address} refuses our token, or we have none",
            "the token of this cluster, which its head has in ~/.ray/auth_token",
            f"set {_TOKEN}",
        )
    if code != "OK":
        raise _no_ray(address, source, f"another server is there, or none that is ready: {code}")


def _answer(channel: Any) -> str:
    """Return the status with which a head answers, such as "OK" and "UNAUTHENTICATED". channel: gRPC's, to the head."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    try:
        with channel:
            cluster = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]  # generated code has no types
            cluster.GetClusterId(request, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def _use_token() -> bool:
    """Turn token authentication on if there is a token, and return whether it is on.

    Ray leaves it off in a process that joins, unless RAY_AUTH_MODE is set before Python starts. It must be off in a
    cluster without tokens: this process would then refuse what the cluster's own processes ask it, and its actors
    would count as lost.
    """
    from ray._private.authentication import authentication_token_setup as setup

    setup.logger.setLevel(logging.ERROR)  # a warning that authentication is on
    return setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _no_ray(address: str, source: str, reason: str) -> Unreachable:
    return Unreachable(
        f"{source}: no Ray answers at {address} ({reason})",
        "the address that `ray start --head` printed",
        f"check the address and the firewall, or unset {source} for a Ray of this command's own",
    )
