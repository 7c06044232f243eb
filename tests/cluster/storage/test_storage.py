"""Storage on a local disk, through file:// URIs, and through a substitute for an object store."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from cluster import storage
from cluster.storage import files, paths
from cluster.storage.lease import hold_folder
from cluster.storage.object_stores import resolve_in_bucket
from cluster.storage.temporaries import TEMPORARY_PREFIX
from raydit.errors import InvalidInput, StorageFull
from raydit.regular_files import FileTooLarge, SpecialFile


@pytest.fixture(params=["path", "uri", "bucket"])
def base(request, tmp_path, monkeypatch):
    """A local path, a file:// URI, and a bucket whose objects are in memory and which has no folders."""
    if request.param != "bucket":
        return str(tmp_path) if request.param == "path" else tmp_path.as_uri()
    bucket = PyFileSystem(FSSpecHandler(MemoryFileSystem()))

    def resolve_bucket(path):
        inner = path.replace("s3://bucket", f"/{tmp_path.name}")
        return (bucket, inner) if inner != path else resolve_in_bucket(path)

    monkeypatch.setattr(paths, "resolve_in_bucket", resolve_bucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "s3://bucket"


def write_folder(folder):
    (folder / "trainer").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "trainer" / "state").write_bytes(b"s")
    (folder / "COMPLETE").write_text("{}")
    return str(folder)


def test_what_is_written_is_read_back(base):
    path = storage.join(base, "a", "report.json")
    assert not storage.exists(path)
    storage.write_json_atomically(path, {"fid": 2.27})
    storage.write_json_atomically(path, {"fid": 2.1})
    assert storage.read_json(path) == {"fid": 2.1}
    assert storage.list_names(storage.join(base, "a")) == ["report.json"]
    assert storage.file_size(path) == len(storage.read_bytes(path))


def test_a_sha256_is_that_of_the_bytes(base):
    path = storage.join(base, "abc")
    storage.write_atomically(path, b"abc")
    assert storage.sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-2, appendix B.1


def test_a_folder_is_published_moved_fetched_and_removed(base, tmp_path):
    local = write_folder(tmp_path / "scratch" / "step")
    published, aside = storage.join(base, "step_1"), storage.join(base, "step_1.superseded")
    storage.publish_folder(local, published, last="COMPLETE")
    assert not os.path.exists(local)
    assert storage.list_names(published) == ["COMPLETE", "trainer", "weights"]
    fetched = storage.fetch_folder(published)
    assert (Path(fetched) / "trainer" / "state").read_bytes() == b"s"
    assert storage.fetch_folder(published) == fetched
    storage.move_folder(published, aside, last="COMPLETE")
    assert not storage.exists(published)
    assert storage.read_bytes(storage.join(aside, "trainer/state")) == b"s"
    storage.remove_folder(aside)
    storage.remove_folder(aside)
    assert not storage.exists(aside)


def test_publishing_over_a_finished_folder_is_refused(base, tmp_path):
    published = storage.join(base, "step_1")
    storage.publish_folder(write_folder(tmp_path / "one"), published, last="COMPLETE")
    again = write_folder(tmp_path / "two")
    with pytest.raises(FileExistsError, match="step_1 exists already, expected a new path. Move it away"):
        storage.publish_folder(again, published, last="COMPLETE")
    assert os.path.exists(again)
    other = storage.join(base, "other")
    storage.publish_folder(again, other, last="COMPLETE")
    with pytest.raises(FileExistsError):
        storage.move_folder(other, published, last="COMPLETE")


def test_the_last_file_is_uploaded_last_and_a_broken_upload_can_be_repeated(tmp_path, monkeypatch):
    put, copy_files = [], files.copy_files
    bucket = tmp_path / "bucket"

    def copy_and_break(source, target, *filesystems):
        put.append(os.path.basename(target))
        if put == ["state", "weights"]:
            raise OSError("connection lost")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        copy_files(source, target, *filesystems)

    monkeypatch.setattr(files, "copy_files", copy_and_break)
    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (LocalFileSystem(), uri.replace("s3:/", str(bucket))))
    local = write_folder(tmp_path / "step")
    with pytest.raises(OSError, match="connection lost"):
        storage.publish_folder(local, "s3://b/step", last="COMPLETE")
    assert not storage.exists("s3://b/step/COMPLETE")
    storage.publish_folder(local, "s3://b/step", last="COMPLETE")
    assert put[2:] == ["state", "weights", "COMPLETE"]


def test_a_writer_killed_halfway_leaves_the_old_content_and_a_stale_temporary(tmp_path):
    target = tmp_path / "manifest.json"
    target.write_text("old")
    code = (
        "import os, sys, time; from cluster import storage\n"
        "def wait(descriptor): print('written', flush=True); time.sleep(60)\n"
        "os.fsync = wait\n"
        f"storage.write_atomically({str(target)!r}, b'new' * 10**6)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert writer.stdout.readline() == b"written\n"
    temporaries = [name for name in os.listdir(tmp_path) if name.startswith(TEMPORARY_PREFIX)]
    assert len(temporaries) == 1
    assert storage.remove_stale_temporaries(str(tmp_path)) == []  # its writer is alive
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert target.read_text() == "old"
    assert storage.list_names(str(tmp_path)) == ["manifest.json"]
    assert storage.remove_stale_temporaries(str(tmp_path)) == temporaries
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_only_our_stale_temporaries_are_removed(tmp_path):
    day_old = time.time() - 25 * 3600
    for name in (".tmp-otherhost-1-0123abcd", ".tmp-mine", ".tmp-otherhost-2-0123abcd", "part-00000.parquet"):
        (tmp_path / name).mkdir() if "host-1" in name else (tmp_path / name).touch()
        os.utime(tmp_path / name, (day_old, day_old))
    (tmp_path / ".tmp-otherhost-2-0123abcd").write_text("being written on another host")
    assert storage.remove_stale_temporaries(str(tmp_path)) == [".tmp-otherhost-1-0123abcd"]
    assert storage.remove_stale_temporaries(str(tmp_path / "nowhere")) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output error"):
        storage.write_atomically(str(tmp_path / "a"), b"data")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tiny_disk, tmp_path):
    with pytest.raises(
        StorageFull, match=r"no space left \(262,144 bytes are free\), expected room for 1,000,000 bytes. Free"
    ):
        storage.write_atomically(str(tiny_disk / "part-00000.parquet"), b"0" * 1_000_000)
    local = Path(write_folder(tmp_path / "step"))
    (local / "weights").write_bytes(b"0" * 1_000_000)
    with pytest.raises(StorageFull, match="no space left"):
        storage.publish_folder(str(local), str(tiny_disk / "step"), last="COMPLETE")
    assert os.listdir(tiny_disk) == []
    assert (local / "weights").stat().st_size == 1_000_000
    (local / "weights").write_bytes(b"small")
    storage.publish_folder(str(local), str(tiny_disk / "step"), last="COMPLETE")  # another disk: a copy, then a rename
    assert (tiny_disk / "step" / "weights").read_bytes() == b"small"


def test_a_disk_that_fills_during_a_download_is_reported(tiny_disk, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "step")
    (Path(source) / "weights").write_bytes(b"0" * 1_000_000)
    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (LocalFileSystem(), source))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_disk))
    with pytest.raises(StorageFull, match="1,000,003 bytes"):
        storage.fetch_folder("s3://b/step")
    assert os.listdir(tiny_disk / "raydit" / "fetched") == []


def test_copies_that_are_not_used_make_room_for_another(tiny_disk, tmp_path, monkeypatch):
    """The disk holds two of them. A copy of a file, which may be read late, stays."""
    for name in ("one", "two", "three"):
        (Path(write_folder(tmp_path / name)) / "weights").write_bytes(b"0" * 100_000)
    monkeypatch.setattr(
        paths, "resolve_in_bucket", lambda uri: (LocalFileSystem(), str(tmp_path / uri[len("s3://b/") :]))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_disk))
    single = storage.fetch_file("s3://b/one/COMPLETE")
    one, two = (storage.fetch_folder(f"s3://b/{name}") for name in ("one", "two"))
    with pytest.raises(StorageFull):
        storage.fetch_folder("s3://b/three")
    for copy in (one, two, os.path.dirname(single)):
        os.utime(copy, (0, 0))
    assert storage.fetch_folder("s3://b/one") == one  # which is a use
    three = storage.fetch_folder("s3://b/three")
    assert os.path.getsize(os.path.join(three, "weights")) == 100_000
    assert os.path.isdir(one) and os.path.isfile(single) and not os.path.exists(two)


def test_join_keeps_the_query_of_a_uri_at_the_end():
    assert (
        storage.join("s3://b/x/?endpoint_override=host:9000", "a", "b/") == "s3://b/x/a/b?endpoint_override=host:9000"
    )
    assert storage.join("/x", "a") == "/x/a"


@pytest.mark.parametrize(
    "path",
    ["s3://b/x/y?endpoint_override=host:9000", "s3://b/x/y", "gs://b/x/y", "file:///x/y", "/x/y", "out/y", "/y", "y"],
)
def test_a_path_is_its_folder_and_its_name(path):
    folder, name = storage.split(path)
    assert name == "y" and storage.join(folder, name) == path


def test_a_folder_at_the_root_of_a_disk_is_in_the_root():
    assert storage.split("/latents") == ("/", "latents")
    assert storage.split("latents") == ("", "latents")


def test_names_that_a_uri_escapes_are_joined_and_split(tmp_path):
    for name in ("run#1", "50%41", "what?"):
        for base in ("s3://b/x?endpoint_override=host%3A9000", tmp_path.as_uri(), str(tmp_path)):
            path = storage.join(base, name)
            assert storage.split(path) == (base, name)
            assert storage.resolve(path)[1] == f"{storage.resolve(base)[1]}/{name}"


@pytest.mark.parametrize("path", ["s3://b/run#1/a.json", "file:///data/run#1/x", "s3://b/run?scheme=http#1"])
def test_a_uri_that_ends_early_is_refused(path):
    with pytest.raises(InvalidInput, match=r"found .*, a URI with a #, expected %23 instead. Write # as %23"):
        storage.resolve(path)


def test_an_absolute_path_means_the_same_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out/a") == str(tmp_path / "out" / "a")
    assert storage.absolute(tmp_path.as_uri()) == str(tmp_path)
    assert storage.absolute("s3://bucket/x?scheme=http") == "s3://bucket/x?scheme=http"


def test_files_that_cannot_be_in_an_object_store_have_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert storage.local_folder_for(str(tmp_path)) == storage.local_folder_for(tmp_path.as_uri()) == str(tmp_path)
    here = {storage.local_folder_for(f"s3://bucket/{name}") for name in ("a", "b", "a")}
    assert len(here) == 2 and all(folder.startswith(str(tmp_path / "cache")) for folder in here)


def test_free_bytes_are_known_only_for_a_disk(tmp_path):
    assert storage.free_bytes(str(tmp_path / "not" / "yet")) > 0
    assert storage.free_bytes("s3://bucket/x") is None


def test_a_scheme_that_cannot_be_opened_is_named():
    with pytest.raises(ValueError, match="path: found 'ftp://x/y', expected .*s3://"):
        storage.exists("ftp://x/y")


def test_broken_json_names_its_file(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        storage.read_json(str(tmp_path / "manifest.json"))


def test_a_missing_file_is_a_file_not_found_error(base):
    for read in (storage.read_bytes, storage.file_size, storage.list_names, storage.sha256_file):
        with pytest.raises(FileNotFoundError):
            read(storage.join(base, "nothing"))


def test_a_folder_goes_through_a_real_s3_server(s3_bucket, tmp_path):
    published = f"{s3_bucket}/checkpoints/step_1"
    storage.publish_folder(write_folder(tmp_path / "step"), published, last="COMPLETE")
    assert storage.list_names(published) == ["COMPLETE", "trainer", "weights"]
    assert (Path(storage.fetch_folder(published)) / "trainer" / "state").read_bytes() == b"s"
    storage.move_folder(published, published + ".superseded", last="COMPLETE")
    assert storage.exists(published + ".superseded/COMPLETE") and not storage.exists(published)


def test_a_full_disk_is_reported_wherever_storage_writes(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "makedirs", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (LocalFileSystem(), str(tmp_path)))
    for write in (
        lambda: storage.write_atomically(str(tmp_path / "new" / "file"), b"data"),
        lambda: storage.move_folder(str(tmp_path / "folder"), str(tmp_path / "new" / "folder"), last="COMPLETE"),
        lambda: storage.fetch_folder("s3://bucket/folder"),
        lambda: hold_folder(str(tmp_path / "new"), on_lost=print).__enter__(),
    ):
        with pytest.raises(StorageFull, match="disk quota exceeded .*run the same command again"):
            write()


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_file, storage.sha256_file, storage.read_json])
def test_devices_and_named_pipes_are_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path / "link", "named pipe"), ("/dev/zero", "device")):
        with pytest.raises(SpecialFile, match=f"{path} is a {kind}, expected a regular file"):
            read(str(path))


def test_a_file_longer_than_its_bound_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(FileTooLarge, match=r"sparse: found 1,099,511,627,776 bytes, expected at most 1,000"):
        storage.read_bytes(str(path), max_bytes=1000)
    os.truncate(path, 1000)
    assert storage.read_bytes(str(path), max_bytes=1000) == bytes(1000)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInput, match=r"deep.json is not valid JSON"):
        storage.read_json(str(tmp_path / "deep.json"))
