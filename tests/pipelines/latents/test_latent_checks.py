"""`raydit latents verify` finds what is wrong with a data set, and `show` draws some of its rows."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import BROKEN
from tiny_encode import encode_here, recipe
from tiny_latents import SHAPE, write_dataset

from pipelines.cli import main as cli
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset, fingerprint_of
from pipelines.latents.records import ShardEntry
from pipelines.latents.show import rows_to_show
from pipelines.latents.verify import verify


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with images, an autoencoder and their latents, horizontal flips included."""
    folder = tmp_path_factory.mktemp("intact")
    with pytest.MonkeyPatch.context() as monkeypatch:
        encode_here(recipe(folder, "encode.flip=true"), monkeypatch)
    return folder


@pytest.fixture
def dataset(intact, tmp_path):
    """A copy of the latents that a test may break."""
    shutil.copytree(intact / "output" / "latents", tmp_path / "latents")
    return LatentDataset.open(tmp_path / "latents")


def wrong(path) -> dict[str, str]:
    return {check.name: check.found for check in verify(LatentDataset.open(path)) if not check.ok}


def edit_manifest(dataset, **changes):
    manifest = {**dataset.manifest, **changes}
    (Path(dataset.path) / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def rewrite(dataset, change, *, shard=0):
    """Change the table of a shard and record its new digest, as another program would."""
    entry = dict(dataset.manifest["shards"][shard])
    table = change(pq.read_table(Path(dataset.path) / entry["file"]))
    data = schema.parquet_bytes(table)
    (Path(dataset.path) / entry["file"]).write_bytes(data)
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": table.num_rows}
    shards = list(dataset.manifest["shards"])
    shards[shard] = entry
    edit_manifest(
        dataset, shards=shards, fingerprint=fingerprint_of(dataset.description, list(map(ShardEntry.from_json, shards)))
    )


def replaced(table, name, values):
    return table.set_column(
        table.column_names.index(name), table.schema.field(name), pa.array(values, table[name].type)
    )


def test_an_intact_data_set_passes_and_is_compared_with_its_images(dataset):
    checks = {check.name: check for check in verify(dataset)}
    assert all(check.ok and not check.do for check in checks.values())
    assert "36 rows + 1 quarantined" in checks["counts"].found
    assert "36 rows decode to " in checks["images"].found and "differ by 0.0" in checks["images"].found


def test_a_flipped_bit_is_found(dataset):
    file = Path(dataset.path) / "part-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = wrong(dataset.path)
    assert found.keys() == {"digests"} and "part-00001.parquet: found " in found["digests"]


def test_a_missing_shard_and_a_surplus_one_are_found(dataset):
    (Path(dataset.path) / "part-00001.parquet").rename(Path(dataset.path) / "part-00077.parquet")
    found = [check.found for check in verify(dataset) if check.name == "digests"]
    assert found == ["part-00001.parquet is missing", "part-00077.parquet is not in the manifest"]


def test_moments_of_another_image_are_found_despite_right_digests(dataset):
    """Rows are compared with what the autoencoder makes of their images."""
    rewrite(dataset, lambda table: replaced(table, "moments", table["moments"].to_pylist()[::-1]))
    assert wrong(dataset.path).keys() == {"images"}


def test_moments_of_an_unflipped_image_are_found(dataset):
    rewrite(dataset, lambda table: replaced(table, "moments_flip", table["moments"].to_pylist()))
    assert wrong(dataset.path).keys() == {"images"}


def test_a_key_with_two_rows_is_found(dataset):
    def twice(table):
        keys = table["key"].to_pylist()
        return replaced(table, "key", [keys[1], *keys[1:]])

    rewrite(dataset, twice)
    found = wrong(dataset.path)
    assert "already has a row" in found["keys"]


def test_a_label_without_a_class_and_an_infinite_moment_are_found(dataset):
    def infinite(table):
        rows = [np.frombuffer(row, "<f2").copy() for row in table["moments_flip"].to_pylist()]
        rows[0][3] = np.inf
        table = replaced(table, "moments_flip", [row.tobytes() for row in rows])
        return replaced(table, "label", [3, *table["label"].to_pylist()[1:]])

    rewrite(dataset, infinite)
    found = [check.found for check in verify(LatentDataset.open(dataset.path)) if check.name == "ranges"]
    assert found == [
        "part-00000.parquet: labels from 0 to 3, expected 0 to 2",
        "part-00000.parquet: 1 rows of moments_flip hold infinity or NaN",
    ]


def test_a_lost_row_is_found(dataset):
    rewrite(dataset, lambda table: table.slice(1))
    found = wrong(dataset.path)
    assert {"counts", "statistics"} <= found.keys()


def test_a_shard_that_needs_far_more_memory_than_it_has_bytes_is_found(tmp_path):
    """Compressed zeros, whose digest and length the manifest lists."""
    dataset = write_dataset(tmp_path / "latents", [np.zeros((20_000, *SHAPE), "<f2")])
    file = tmp_path / "latents" / "part-00000.parquet"
    pq.write_table(pq.read_table(file), file, compression="zstd")
    digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    entry = {"file": file.name, "rows": 1, "bytes": size, "sha256": digest}
    identity = {"images": {"count": 1}}
    edit_manifest(dataset, shards=[entry], rows=1, identity=identity)
    found = wrong(dataset.path)["schema"]
    assert "found 20,000 rows of " in found and f"expected 1 in {size:,}, according to the manifest" in found


def test_wrong_columns_are_found(dataset):
    rewrite(dataset, lambda table: table.drop_columns(["label"]))
    found = wrong(dataset.path)
    assert "expected key string, label int32, moments fixed_size_binary" in found["schema"]


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        ({"rows": 35}, "counts"),
        ({"quarantined": 0}, "counts"),
        ({"latents_std": [9.0, 9.0, 9.0, 9.0]}, "statistics"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"class_names": ["blob", "ring", "strap"]}, "schema"),
    ],
)
def test_a_wrong_manifest_is_found(dataset, change, topic):
    edit_manifest(dataset, **change)
    assert topic in wrong(dataset.path)


def test_without_images_the_rest_is_checked_and_the_reason_is_given(dataset):
    recipe = {**dataset.manifest["recipe"], "images": {**dataset.manifest["recipe"]["images"], "path": "/nowhere"}}
    edit_manifest(dataset, recipe=recipe)
    last = list(verify(LatentDataset.open(dataset.path)))[-1]
    assert last.ok and last.found.startswith("not compared: images.path: found nothing at /nowhere")


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["raydit", "latents", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
        raise SystemExit(0)
    return ended.value.code, capsys.readouterr().out


def test_the_command_exits_with_1_if_something_is_wrong_and_lists_it_in_json(dataset, monkeypatch, capsys):
    code, out = call(monkeypatch, capsys, "verify", dataset.path)
    assert code == 0 and all(line.startswith("ok ") for line in out.splitlines())
    (Path(dataset.path) / "part-00000.parquet").unlink()
    code, out = call(monkeypatch, capsys, "verify", dataset.path, "--json")
    said = json.loads(out)
    assert code == 1 and said["ok"] is False
    assert {"name": "digests", "ok": False, "found": "part-00000.parquet is missing"}.items() <= said["checks"][
        0
    ].items()


def test_a_folder_without_a_data_set_is_bad_input(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "verify", tmp_path)[0] == 2


def test_show_draws_some_rows_of_each_class(dataset, tmp_path, monkeypatch, capsys):
    code, out = call(monkeypatch, capsys, "show", dataset.path, "--out", tmp_path / "grid.png", "--json")
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and said["fingerprint"] == dataset.fingerprint
    assert said["classes"] == "3: blob, ring, stripe" and said["quarantined"] == "1"
    # Other programs read the key; people read the word that everything else uses.
    (std,) = (line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("std "))
    assert said["deviation"] == std and "std" not in said
    assert not any(line.startswith("deviation") for line in out.splitlines())
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 8 * 64 and grid.height > 3 * 64
    shown = dataset.arrays.labels[rows_to_show(dataset)]
    assert np.bincount(shown).tolist() == [8, 8, 8]


def test_the_broken_image_is_the_quarantined_one(dataset):
    assert [image.key for image in dataset.read_quarantine()] == [BROKEN]
