"""Create the MLflow user that Ray's containers log in as. It is not an administrator.

compose.yaml runs it at every start, so that a password changed in .env is MLflow's, too. Needs only Python.
Environment: MLFLOW_TRACKING_URI; MLFLOW_AUTH_ADMIN_USERNAME and _PASSWORD of the administrator;
MLFLOW_TRACKING_USERNAME and _PASSWORD of the user to create.
"""

import base64
import json
import os
import urllib.error
import urllib.request

ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"


def main() -> None:
    user, password = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    try:
        _ask("POST", "create", username=user, password=password)
        print(f"created the user {user}")
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        if ALREADY_EXISTS not in answer:
            raise SystemExit(f"MLflow did not create the user {user}: {error}, {answer[:500]}") from None
        _ask("PATCH", "update-admin", username=user, is_admin=False)
        _ask("PATCH", "update-password", username=user, password=password)
        print(f"the user {user} has the password of .env, and is no administrator")


def _ask(method: str, what: str, **fields: str | bool) -> None:
    """Send a request as the administrator. Raises urllib.error.HTTPError if MLflow refuses it."""
    names = ("MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD")
    credentials = base64.b64encode(":".join(os.environ[name] for name in names).encode()).decode()
    request = urllib.request.Request(
        f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users/{what}",
        method=method,
        data=json.dumps(fields).encode(),
        headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60).close()


if __name__ == "__main__":
    main()
