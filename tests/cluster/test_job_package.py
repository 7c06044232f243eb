"""Files that are sent with a job: the code, never data, outputs or keys."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster.job_package import Package, pack, pinned_requirements

CODE = ("my.toml", "src/data/loader.py", "src/model.py", "run.sh")
EXCLUDED = (
    *(".env", ".aws/credentials", ".venv/bin/python", "src/__pycache__/model.pyc", "data/a.png", "outputs/x/plan.json"),
    *("mlflow.db", "mlflow.db-wal", "certificates/server.key", "ignored.bin", "big/huge.npz", "auth_token"),
)


@pytest.fixture
def tree(tmp_path):
    for name in (*CODE, *EXCLUDED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / ".gitignore").write_text("ignored.bin\n")
    (tmp_path / "big" / ".gitignore").write_text("*.npz\n")
    (tmp_path / "run.sh").chmod(0o755)
    return tmp_path


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_only_code_and_recipes_are_packed(tree):
    assert set(pack(tree).files) == set(CODE)


def test_a_subfolder_of_a_repository_can_be_packed(tree):
    git(tree, "init")
    git(tree, "add", "src/model.py")
    (tree / "src" / "deleted.py").touch()
    git(tree, "add", "src/deleted.py")
    (tree / "src" / "deleted.py").unlink()
    assert set(pack(tree).files) == set(CODE)
    assert set(pack(tree / "src").files) == {"model.py"}  # src/data is now a data folder at the top


def test_without_git_only_gitignore_has_no_effect(tree, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert set(pack(tree).files) == {*CODE, "ignored.bin", "big/huge.npz"}


def test_a_package_that_is_too_large_is_refused_with_its_largest_files(tree):
    (tree / "src" / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ValueError, match=r"5 files of 3\.0 MiB.*largest: src/weights.bin \(3\.0 MiB.*at most 2\.0 MiB"):
        pack(tree, max_bytes=2 * 2**20)


def test_the_digest_depends_on_the_content_only(tree, tmp_path_factory):
    before = pack(tree).digest()
    os.utime(tree / "src" / "model.py", (1, 1))
    assert pack(tree).digest() == before
    (tree / "data" / "b.png").touch()
    assert pack(tree).digest() == before
    (tree / "src" / "model.py").write_text("changed")
    assert pack(tree).digest() != before


def test_archives_of_equal_content_are_equal_and_keep_execute_permissions(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for name in ("first.zip", "second.zip"):
        pack(tree).write(folder / name)
        os.utime(tree / "run.sh", (1, 1))
    assert (folder / "first.zip").read_bytes() == (folder / "second.zip").read_bytes()
    with zipfile.ZipFile(folder / "first.zip") as archive:
        modes = {info.filename: info.external_attr >> 16 & 0o777 for info in archive.infolist()}
        assert modes == dict.fromkeys(CODE, 0o644) | {"run.sh": 0o755}
        assert archive.read("src/model.py") == b"content of src/model.py"


def test_extra_files_may_be_anywhere(tree, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("another_folder") / "other.toml"
    recipe.write_text("name = 'other'")
    package = pack(tree, {"submitted/other.toml": recipe})
    assert package.files["submitted/other.toml"] == recipe
    assert package.contains("src") and package.contains("src/model.py") and not package.contains("data")


def test_a_file_with_a_secret_of_this_environment_is_refused(tree, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    (tree / "src" / "settings.py").write_text("key = 'wJalrXUtnFEMI'")
    with pytest.raises(ValueError, match="src/settings.py: found the value of AWS_SECRET_ACCESS_KEY") as refused:
        pack(tree)
    assert "wJalrXUtnFEMI" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        *("id_ecdsa", "prod.env", "secrets.toml", "server.pfx", "token.txt", "KUBECONFIG", "service-account-1.json"),
        *("gcp_credentials.json", "hf_token.txt", "release.keystore", "key.PEM"),
    ],
)
def test_files_whose_names_say_that_they_hold_keys_stay_here(tree, name):
    (tree / "src" / name).write_text("x")
    assert set(pack(tree).files) == set(CODE)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("-----BEGIN OPENSSH " + "PRIVATE KEY-----", "a private key"),
        ('{"type": "service_account", "private_key' + '_id": "1"}', "the key of a service account"),
        ("users: [{user: {client-key" + "-data: LS0tLS1C}}]", "the key of a Kubernetes client"),
        ("AWS_SECRET" + "_ACCESS_KEY = '" + "aB3/" * 10 + "'", "a secret key of AWS"),
        ("token = gh" + "p_" + "a1" * 18, "a token of GitHub"),
        ("0123456789abcdef" * 4, "the token of a Ray cluster"),
    ],
)
def test_a_file_that_holds_a_key_is_refused_whatever_its_name(tree, monkeypatch, tmp_path_factory, content, what):
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tree / "src" / "notes.md").write_text(f"see {content}\n")
    with pytest.raises(ValueError, match=f"src/notes.md: found {what}, expected no credentials") as refused:
        pack(tree)
    assert content not in str(refused.value)


def test_a_file_whose_name_is_not_utf8_is_refused(tree):
    (tree / "src" / os.fsdecode(b"\xff.py")).touch()
    with pytest.raises(ValueError, match=r"found the file name b'src/\\xff.py' in .*, expected UTF-8. Rename the file"):
        pack(tree)


def test_links_out_of_the_folder_or_to_what_is_not_sent_are_refused(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "notes.md"
    other.write_text("private")
    link = tree / "src" / "link.md"
    link.symlink_to("model.py")
    assert set(pack(tree).files) == {*CODE, "src/link.md"}
    for target in (other, tree / ".env"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(ValueError, match="src/link.md: found a link to .*Replace the link by the file"):
            pack(tree)


def test_requirements_are_pinned_to_the_installed_versions():
    from importlib.metadata import version

    pinned = pinned_requirements("raydit")
    assert f"click=={version('click')}" in pinned
    assert not any(line.startswith(("ray==", "ray[")) or "+" in line or "pytest" in line for line in pinned)


def test_an_empty_package_has_no_bytes():
    assert Package(files={}).num_bytes == 0 and not Package(files={}).contains(str(Path("src")))
