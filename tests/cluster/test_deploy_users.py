"""The scripts of compose.yaml that make the users of Ray's containers, run against what they talk to."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "cluster" / "deploy"
PASSWORD = "user-password-0123456789"
MC = """#!/bin/sh
echo "$@" >> "$CALLS/arguments"
case "$*" in
    "admin user add root") cat >> "$CALLS/input" ;;
    "admin policy attach"*) echo "The specified policy change is already in effect." >&2; exit 1 ;;
    "ls user/raydit") printenv MC_HOST_user >> "$CALLS/user" ;;
    "admin info user") exit $ADMINISTERS ;;
esac
"""
"""A client of MinIO that writes down what it is asked."""


def make_minio_user(folder, administers):
    (folder / "bin").mkdir()
    (folder / "bin" / "mc").write_text(MC)
    (folder / "bin" / "mc").chmod(0o755)
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "CALLS": str(folder), "ADMINISTERS": administers}
    env |= {"MC_HOST_root": "http://root:root-password@s3:9000", "AWS_ENDPOINT_URL": "http://s3:9000"}
    env |= {"AWS_ACCESS_KEY_ID": "raydit", "AWS_SECRET_ACCESS_KEY": PASSWORD}
    return subprocess.run(["/bin/sh", DEPLOY / "minio-user.sh"], env=env, capture_output=True, text=True, timeout=60)


def test_the_stores_user_is_made_without_a_password_in_a_command_line(tmp_path):
    done = make_minio_user(tmp_path, administers="1")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "arguments").read_text()
    assert calls.splitlines()[:3] == [
        "mb --ignore-existing root/raydit",
        "admin user add root",
        f"admin policy create root raydit {DEPLOY}/minio-policy.json",
    ]
    assert "password" not in calls
    assert (tmp_path / "input").read_text() == f"raydit\n{PASSWORD}\n"
    assert (tmp_path / "user").read_text() == f"http://raydit:{PASSWORD}@s3:9000\n"


def test_a_user_of_the_store_who_administers_it_is_refused(tmp_path):
    done = make_minio_user(tmp_path, administers="0")
    assert done.returncode == 1 and "give the root user another name" in done.stderr


class Users(BaseHTTPRequestHandler):
    """MLflow's API for users, as far as the script needs it: /api/2.0/mlflow/users/WHAT."""

    def answer(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what, users = self.path.removeprefix("/api/2.0/mlflow/users/"), self.server.users
        code, body = 200, {}
        if self.headers["Authorization"] != f"Basic {base64.b64encode(b'admin:admin-password').decode()}":
            code, body = 401, {"error_code": "UNAUTHENTICATED"}
        elif (self.command, what) == ("POST", "create"):
            if asked["username"] in users:
                code, body = 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "User already exists."}
            else:
                users[asked["username"]] = {"password": asked["password"], "is_admin": False}
        elif (self.command, what) in {("PATCH", "update-admin"), ("PATCH", "update-password")}:
            users[asked.pop("username")].update(asked)
        else:
            code = 404
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_PATCH = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mlflow():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Users)
    server.users = {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make_mlflow_user(server, password=PASSWORD, admin="admin-password"):
    env = os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.server_port}"}
    env |= {"MLFLOW_AUTH_ADMIN_USERNAME": "admin", "MLFLOW_AUTH_ADMIN_PASSWORD": admin}
    env |= {"MLFLOW_TRACKING_USERNAME": "raydit", "MLFLOW_TRACKING_PASSWORD": password}
    script = DEPLOY / "mlflow_user.py"
    return subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60)


def test_mlflows_user_is_made_once_and_then_follows_the_password_of_env(mlflow):
    done = make_mlflow_user(mlflow)
    assert (done.returncode, done.stdout) == (0, "created the user raydit\n"), done.stderr
    assert mlflow.users == {"raydit": {"password": PASSWORD, "is_admin": False}}
    mlflow.users["raydit"]["is_admin"] = True  # as a stack of earlier files made it
    assert make_mlflow_user(mlflow, password="another-password").returncode == 0
    assert mlflow.users == {"raydit": {"password": "another-password", "is_admin": False}}


def test_a_wrong_administrator_is_one_line(mlflow):
    done = make_mlflow_user(mlflow, admin="wrong")
    assert done.returncode == 1 and mlflow.users == {}
    assert (
        done.stderr.startswith("MLflow did not create the user raydit: HTTP Error 401") and PASSWORD not in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
