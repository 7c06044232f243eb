"""The job server of a Ray cluster: its address, token, version and clock.

It is the dashboard of the head node (port 8265), which is reached over HTTP. The token is read from where Ray reads it:
RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

import functools
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import ParamSpec, TypeVar

from cluster.credentials import ray_token
from raydit.errors import InvalidInput, Unreachable
from raydit.printable import message_of

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_SECONDS = 10
REFUSED = (401, 403)
"""HTTP codes with which a job server answers a request without a token, and with a wrong one."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def server_url(address: str | None) -> str:
    """Return the URL of the job server: the given address, RAY_API_SERVER_ADDRESS, or port 8265 of this machine.

    Raises InvalidInput for an address that is not a URL.
    """
    url = _given_url(address)
    try:
        is_url = bool(urllib.parse.urlsplit(url).hostname)
    except ValueError:  # a bracket of an IPv6 address is missing, for example
        is_url = False
    if not is_url or not url.startswith(("http://", "https://")):
        raise InvalidInput(
            f"job server address: found {url!r}",
            f"http://HOST:PORT of the head's dashboard, for example {DEFAULT_ADDRESS}",
            "correct --address or RAY_API_SERVER_ADDRESS",
        )
    return url.rstrip("/")


def _given_url(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def is_this_machine(address: str | None) -> bool:
    """Return whether a job server has a loopback address, so that its jobs see the same files as this process."""
    host = urllib.parse.urlsplit(server_url(address)).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_version(address: str | None = None) -> str:
    """Return the Ray version of a job server.

    Raises InvalidInput for a refused token and for a server of another kind, and Unreachable if nothing answers.
    """
    url = server_url(address)
    check_port = "check the port (8265 by default)"
    try:
        with _opener.open(_version_request(url), timeout=ANSWER_SECONDS) as response:
            return json.load(response)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in REFUSED:
            found = "no token" if error.code == 401 else "another token"
            raise InvalidInput(
                f"the job server at {url} received {found} (HTTP {error.code})",
                "the token of its cluster",
                "set RAY_AUTH_TOKEN to it, or RAY_AUTH_TOKEN_PATH to a file that contains it",
            ) from None
        raise InvalidInput(f"{url} answered HTTP {error.code}", "a Ray job server", check_port) from None
    except (ValueError, KeyError, http.client.HTTPException):  # the last one at the port of Ray's GCS, for example
        raise InvalidInput(f"{url} is not a Ray job server", "", check_port) from None
    except OSError as error:
        raise Unreachable(
            f"no job server answers at {url} ({getattr(error, 'reason', error)})",
            "the dashboard of a Ray head",
            "start one with `ray start --head`, or forward its port 8265 to this machine",
        ) from None


def accepts_jobs_without_token(address: str | None = None) -> bool:
    """Return whether a job server accepts jobs without a token. Raises OSError if it does not answer, or fails."""
    request = urllib.request.Request(f"{server_url(address)}/api/jobs/")
    try:
        with _opener.open(request, timeout=ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        if error.code in REFUSED:
            return False
        raise


def clock_skew_seconds(address: str | None = None) -> float:
    """Return by how many seconds at least a job server's clock differs from ours.

    The server reports whole seconds, and the time that the request takes is not counted as a difference.
    Raises OSError if it does not answer, and TypeError or ValueError if the answer has no date.
    """
    before = time.time()
    with _opener.open(_version_request(server_url(address)), timeout=ANSWER_SECONDS) as response:
        theirs = parsedate_to_datetime(response.headers["Date"]).timestamp()
    return max(theirs - time.time(), before - theirs - 1.0, 0.0)


def _version_request(url: str) -> urllib.request.Request:
    return urllib.request.Request(f"{url}/api/version", headers=token_header())


def token_header() -> dict[str, str]:
    """Return the HTTP header with the token, looked up in the same order as Ray's own tools do; empty without one."""
    token = ray_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def sends_token_in_clear(address: str | None) -> bool:
    """Return whether requests to a job server carry our token over the network without encryption."""
    url = _given_url(address)
    return url.startswith("http://") and not is_this_machine(url) and bool(token_header())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects become errors: urllib would send the token on to wherever a server points."""

    def redirect_request(self, *_: object) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def explains_failed_requests(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function raise Unreachable where the job server fails, or breaks off, after its version was read."""

    @functools.wraps(function)
    def explained(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        import requests

        try:
            return function(*args, **kwargs)
        except (requests.RequestException, RuntimeError) as error:
            # Ray raises a RuntimeError for every answer that is not a success.
            if isinstance(error, RuntimeError) and "Request failed with status code" not in str(error):
                raise
            raise Unreachable(
                f"the job server failed: {message_of(error)[:300]}",
                "",
                "see dashboard.log and dashboard_agent.log on its node, and run the same command again",
            ) from error

    return explained
