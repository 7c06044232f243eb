"""Storage on a real S3 server: objects are complete, throttled requests are retried, and a folder has one owner."""

import hashlib
import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileSystem

from cluster import storage
from cluster.storage import files, object_stores, paths
from cluster.storage import lease as leases
from cluster.storage.lease import LEASE_FILE, LeaseOwner, hold_folder
from cluster.storage.object_stores import resolve_in_bucket
from raydit.errors import InUse, InvalidInput, NotFound


def test_a_bucket_has_one_client_for_each_account(s3_bucket, monkeypatch):
    client, inner = storage.resolve(f"{s3_bucket}/a/b%20c/")
    assert inner == f"{s3_bucket.removeprefix('s3://')}/a/b c"
    assert storage.resolve(f"{s3_bucket}/other")[0] is client
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert storage.resolve(f"{s3_bucket}/other")[0] is not client


def test_a_uri_may_hold_an_endpoint_but_no_password(s3_server, s3_bucket, monkeypatch):
    storage.write_atomically(f"{s3_bucket}/file", b"data")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    host = s3_server.removeprefix("http://").replace(":", "%3A")
    uri = f"{s3_bucket}?scheme=http&endpoint_override={host}"
    assert storage.read_bytes(storage.join(uri, "file")) == b"data"
    with pytest.raises(ValueError, match="path: found a URI with a password"):
        storage.read_bytes(storage.join(uri.replace("s3://", "s3://key:secret@"), "file"))


def test_a_throttled_request_is_retried(s3_bucket, throttled):
    throttled.share = 0.3
    for number in range(4):
        storage.write_atomically(f"{s3_bucket}/{number}", b"data")
    assert [storage.read_bytes(f"{s3_bucket}/{number}") for number in range(4)] == [b"data"] * 4
    assert throttled.refused > 0


def test_a_store_that_throttles_every_request_is_an_error_in_the_end(s3_bucket, throttled, monkeypatch):
    monkeypatch.setattr(object_stores, "MAX_RETRIES", 2)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "for a client of its own")
    throttled.share = 1.0
    with pytest.raises(OSError, match="SLOW_DOWN"):
        storage.write_atomically(f"{s3_bucket}/file", b"data")
    assert throttled.refused == 1 + 2


def test_a_process_may_be_throttled_any_number_of_times(s3_bucket, throttled, monkeypatch):
    """The AWS SDK's standard strategy retries a hundred times in the life of a process, and then fails at once."""
    every_second = SimpleNamespace(random=itertools.cycle([0.0, 1.0]).__next__)
    monkeypatch.setattr(throttled, "random", every_second)
    throttled.share = 0.5
    for number in range(160):
        storage.write_atomically(f"{s3_bucket}/{number % 2}", b"data")
    assert throttled.refused == 160


def test_a_throttled_read_of_an_open_file_is_repeated(s3_bucket, throttled, monkeypatch):
    """Arrow gives up where the store's answer is longer than what was asked for (THROTTLED_READ_ERROR)."""
    pauses = []
    monkeypatch.setattr(object_stores.time, "sleep", pauses.append)
    storage.write_atomically(f"{s3_bucket}/file", bytes(range(100)))
    client, inner = storage.resolve(f"{s3_bucket}/file")
    with storage.open_retried(client, inner) as file:
        throttled.share = 0.5
        assert [file.read_at(4, 10 * start) for start in range(10)] == [
            bytes(range(n, n + 4)) for n in range(0, 100, 10)
        ]
        file.seek(-3, os.SEEK_END)
        assert (file.read(), file.read(), file.tell(), file.size()) == (b"abc", b"", 100, 100)
    assert storage.sha256_file(f"{s3_bucket}/file") == hashlib.sha256(bytes(range(100))).hexdigest()
    assert pauses


def test_files_are_listed_with_their_sizes_at_any_depth(s3_bucket, tmp_path):
    for base in (s3_bucket, str(tmp_path)):
        for name in ("b/c/deep", "a", "b/.tmp-x", ".tmp-y"):
            storage.write_atomically(storage.join(base, "folder", name), name.encode())
        assert storage.list_files(storage.join(base, "folder")) == {"a": 1}
        found = storage.list_files(storage.join(base, "folder"), recursive=True)
        assert list(found.items()) == [("a", 1), ("b/c/deep", 8)]
        assert storage.list_files(storage.join(base, "none")) == {}


def test_removing_a_file_twice_is_fine(s3_bucket, tmp_path):
    for base in (s3_bucket, str(tmp_path)):
        storage.write_atomically(storage.join(base, "folder", "file"), b"data")
        for _ in range(2):
            storage.remove_file(storage.join(base, "folder", "file"))
        assert storage.list_files(storage.join(base, "folder")) == {}


def test_an_interrupted_move_loses_nothing_and_can_be_repeated(s3_bucket, monkeypatch):
    source, aside = f"{s3_bucket}/latents", f"{s3_bucket}/superseded/latents-1"
    content = {"plan.json": b"{}", "part-0": b"rows", "sub/part-1": b"more rows", "manifest.json": b"complete"}
    for name, data in content.items():
        storage.write_atomically(storage.join(source, name), data)
        time.sleep(1.0 if name == "sub/part-1" else 0.0)  # times have a resolution of one second
    client, _ = storage.resolve(source)
    removed = []

    class Interrupted:
        """The client, which is interrupted before it removes the second file."""

        def __getattr__(self, name):
            return getattr(client, name)

        def delete_file(self, path):
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
            client.delete_file(path)

    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (Interrupted(), resolve_in_bucket(uri)[1]))
    with pytest.raises(KeyboardInterrupt):
        storage.move_folder(source, aside, last="plan.json")
    monkeypatch.setattr(paths, "resolve_in_bucket", resolve_in_bucket)
    assert removed[0].endswith("/manifest.json")  # written last, so that the rest does not count as finished
    assert {name: storage.read_bytes(storage.join(aside, name)) for name in content} == content
    storage.move_folder(source, f"{aside}-rest", last="plan.json")
    assert not storage.exists(source)


def test_a_file_too_large_for_one_copy_goes_through_this_machine(s3_bucket, monkeypatch):
    source, aside = f"{s3_bucket}/step_0000100", f"{s3_bucket}/superseded/step_0000100"
    content = {"checkpoint.json": b"{}", "optimizer.safetensors": bytes(range(256)) * 40, "ema.safetensors": b"small"}
    for name, data in content.items():
        storage.write_atomically(storage.join(source, name), data)
    client, _ = storage.resolve(source)
    copied = []

    class Limited:
        """The client, which copies only small files, as S3 does."""

        def __getattr__(self, name):
            return getattr(client, name)

        def copy_file(self, source, destination):
            assert client.get_file_info(source).size <= 1_000, "S3 refuses this"
            copied.append(source.rpartition("/")[2])
            client.copy_file(source, destination)

    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (Limited(), resolve_in_bucket(uri)[1]))
    monkeypatch.setattr(object_stores, "MAX_COPY_BYTES", 1_000)
    monkeypatch.setattr(object_stores, "COPY_BUFFER_BYTES", 999)
    storage.move_folder(source, aside, last="checkpoint.json")
    assert sorted(copied) == ["checkpoint.json", "ema.safetensors"]
    assert {name: storage.read_bytes(storage.join(aside, name)) for name in content} == content
    assert not storage.exists(source)


@pytest.mark.parametrize("error", [OSError("the network is unreachable"), KeyboardInterrupt()])
def test_a_copy_that_breaks_halfway_leaves_no_truncated_file(s3_bucket, monkeypatch, error):
    """Closing the stream completes the upload; as COMPLETE or optimizer.safetensors, what arrived would look intact."""
    storage.write_atomically(f"{s3_bucket}/step/COMPLETE", bytes(range(256)))
    copy = object_stores.shutil.copyfileobj

    def copy_and_break(read, written, length):
        written.write(read.read(100))
        raise error

    monkeypatch.setattr(object_stores, "MAX_COPY_BYTES", 100)
    monkeypatch.setattr(object_stores.shutil, "copyfileobj", copy_and_break)
    with pytest.raises(type(error)):
        storage.move_folder(f"{s3_bucket}/step", f"{s3_bucket}/superseded/step", last="COMPLETE")
    assert storage.list_files(f"{s3_bucket}/superseded", recursive=True) == {}
    monkeypatch.setattr(object_stores.shutil, "copyfileobj", copy)
    storage.move_folder(f"{s3_bucket}/step", f"{s3_bucket}/superseded/step", last="COMPLETE")
    assert storage.read_bytes(f"{s3_bucket}/superseded/step/COMPLETE") == bytes(range(256))


def test_an_upload_whose_reading_breaks_halfway_leaves_no_truncated_file(s3_bucket, tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"data" * 100)

    def copy_and_break(source, target, local, remote):
        """As pyarrow does when the disk fails: what was read until then is uploaded."""
        with remote.open_output_stream(target) as stream:
            stream.write(Path(source).read_bytes()[:100])
        raise OSError("Input/output error")

    monkeypatch.setattr(files, "copy_files", copy_and_break)
    with pytest.raises(OSError, match="Input/output error"):
        storage.upload_file(str(tmp_path / "weights"), f"{s3_bucket}/step/weights")
    assert not storage.exists(f"{s3_bucket}/step/weights")


@pytest.mark.parametrize("key", ["model/../../../escaped.txt", "model/unet/../../../../escaped/"])
def test_a_key_that_leads_out_of_its_folder_is_not_downloaded(s3_bucket, tmp_path, key):
    import boto3

    bucket = s3_bucket.removeprefix("s3://")
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"")
    storage.write_atomically(f"{s3_bucket}/model/config.json", b"{}")
    with pytest.raises(InvalidInput, match=r"/model: found '[unet/.]*escaped.* among the files .*, expected names of"):
        storage.fetch_folder(f"{s3_bucket}/model")
    assert not [file for file in tmp_path.rglob("*") if file.is_file() or file.name.startswith("escaped")]
    with (
        pytest.raises(InvalidInput, match=r"found '\.\.' among the files"),
        storage.local_copy(f"{s3_bucket}/model/.."),
    ):
        pass


def test_the_workers_of_a_machine_share_one_download(s3_bucket, s3_app):
    for number in range(5):
        storage.write_atomically(f"{s3_bucket}/folder/{number}", b"data")
    folders, before = [], s3_app.count
    threads = [
        threading.Thread(target=lambda: folders.append(storage.fetch_folder(f"{s3_bucket}/folder"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(list(Path(folders[0]).iterdir())) == 5
    assert s3_app.count - before < 4 * 5


def test_a_folder_goes_through_google_storage_where_no_folder_is_marked(gs_bucket, tmp_path):
    bucket, uri_of = gs_bucket
    for name in ("COMPLETE", "trainer/state", "weights"):
        (tmp_path / "step" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step" / name).write_bytes(name.encode())
    published, aside = uri_of("output/step_1"), uri_of("output/superseded/steps-1")
    storage.publish_folder(str(tmp_path / "step"), published, last="COMPLETE")
    assert storage.list_names(published) == ["COMPLETE", "trainer", "weights"]
    storage.move_folder(published, aside, last="COMPLETE")
    assert storage.list_names(uri_of("output/superseded")) == ["steps-1"]
    assert storage.list_names(uri_of("")) == ["output"]
    assert storage.read_bytes(storage.join(aside, "trainer/state")) == b"trainer/state"
    for _ in range(2):
        storage.remove_folder(aside)
    assert not storage.exists(aside) and not [path for path in bucket.rglob("*") if path.is_file()]
    storage.remove_file(storage.join(published, "COMPLETE"))
    for read in (storage.list_names, storage.read_bytes, storage.file_size, storage.sha256_file):
        with pytest.raises(NotFound):
            read(published)


@pytest.mark.parametrize("name", ["a b", "ü", "50%", "a%20b", "a+b", "[1]", "{x}", 'a|"b"', "a\\b"])
def test_other_tools_open_a_uri_that_is_quoted(s3_bucket, name):
    uri = f"{s3_bucket}/{name}/file"
    storage.write_atomically(uri, b"content")
    filesystem, path = FileSystem.from_uri(storage.quoted(f"{uri}?region=us-east-1"))
    assert path == storage.resolve(uri)[1]
    assert storage.quoted(storage.quoted(uri)) == storage.quoted(uri)


def test_a_folder_with_a_blank_can_be_a_uri(tmp_path):
    (tmp_path / "a b").mkdir()
    storage.write_atomically(f"file://{tmp_path}/a b/file", b"content")
    assert (tmp_path / "a b" / "file").read_bytes() == b"content"
    assert storage.quoted(str(tmp_path / "a b")) == str(tmp_path / "a b")


@pytest.mark.parametrize("name", ["run#1", "50%41", "what?", "a b"])
def test_names_in_a_bucket_may_hold_what_a_uri_escapes(s3_bucket, name):
    folder = storage.join(s3_bucket, name)
    for file in ("a.json", "sub/b.json"):
        storage.write_atomically(storage.join(folder, file), file.encode())
    assert storage.list_names(s3_bucket) == [name]
    assert storage.list_files(folder, recursive=True) == {"a.json": 6, "sub/b.json": 10}
    assert storage.read_bytes(storage.join(folder, "a.json")) == b"a.json"


@pytest.fixture
def settles(monkeypatch):
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 0.1)


def hold(folder):
    return hold_folder(folder, on_lost=lambda reason: None, wait_seconds=0.0)


def elsewhere(number: int) -> LeaseOwner:
    """Return an owner on another machine."""
    return replace(LeaseOwner.this_process(), id=str(number), machine=f"machine-{number}", host=f"node-{number}")


def test_a_folder_in_a_bucket_has_an_owner_until_it_is_released_or_dead(s3_bucket, settles):
    folder = f"{s3_bucket}/output"
    with hold(folder) as earlier:
        assert earlier is None
        assert storage.read_json(f"{folder}/{LEASE_FILE}")["expires"] > time.time()
    assert storage.read_json(f"{folder}/{LEASE_FILE}")["expires"] == 0
    owner = elsewhere(7)
    storage.write_atomically(f"{folder}/{LEASE_FILE}", leases._encode(owner, expires=time.time() + 60))
    with pytest.raises(InUse, match=rf"{folder} is in use by .*on node-7") as refused:
        hold(folder).__enter__()
    assert "kill -INT" in str(refused.value)
    storage.write_atomically(f"{folder}/{LEASE_FILE}", leases._encode(owner, expires=time.time() - 1))
    with hold(folder) as earlier:
        assert earlier.host == "node-7"


def test_a_released_folder_in_a_bucket_is_held_again_by_the_same_process(s3_bucket, monkeypatch):
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    file = f"{s3_bucket}/output/{LEASE_FILE}"
    ids = set()
    for _ in range(2):
        with hold(f"{s3_bucket}/output"):
            record = storage.read_json(file)
            ids.add(record["id"])
            assert record["expires"] > time.time()
        assert storage.read_json(file)["expires"] == 0
    assert len(ids) == 2


def test_one_of_several_simultaneous_processes_gets_a_folder_in_a_bucket(s3_bucket, monkeypatch):
    """All find the folder free before the first has written its lease; then they write one after the other."""
    found_free, won, write = threading.Barrier(4), [], leases.write_atomically
    written = [threading.Event() for _ in range(4)]

    def write_in_turn(path, data):
        number = int(json.loads(data)["id"])
        found_free.wait()
        if number:
            written[number - 1].wait()
            time.sleep(0.1)
        write(path, data)
        written[number].set()

    monkeypatch.setattr(leases, "write_atomically", write_in_turn)

    def contend(number):
        try:
            leases._acquire(f"{s3_bucket}/output/{LEASE_FILE}", elsewhere(number), 0.0)
        except InUse:
            return
        won.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [3]


def test_a_missing_bucket_is_named(s3_bucket):
    with pytest.raises(OSError, match=r"no-such-bucket"):
        hold("s3://no-such-bucket/output").__enter__()
