"""The latent data set keeps its contract: readable without raydit, and refused unless complete."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_latents import SHAPE, description, make_moments, shard, write_dataset

from pipelines.latents.dataset import LatentDataset
from raydit.errors import InvalidInput


@pytest.mark.parametrize("flip", [False, True])
def test_a_shard_is_read_by_plain_pyarrow_as_the_contract_says(tmp_path, flip):
    moments = make_moments(6)
    file = tmp_path / "part-00000.parquet"
    file.write_bytes(shard(moments, flip))
    table = pq.read_table(file)
    names = ["key", "label", "moments"] + ["moments_flip"] * flip
    binary = pa.binary(2 * int(np.prod(SHAPE)))
    assert table.column_names == names
    assert table.schema.types == [pa.string(), pa.int32(), binary, binary][: len(names)]
    assert table["label"].to_pylist() == [0, 1, 0, 1, 0, 1]
    for row, expected in zip(table.to_pylist(), moments, strict=True):
        found = np.frombuffer(row["moments"], "<f2").reshape(SHAPE)
        assert found.tobytes() == expected.tobytes()
        if flip:
            flipped = np.frombuffer(row["moments_flip"], "<f2").reshape(SHAPE)
            np.testing.assert_array_equal(flipped, expected[..., ::-1])
    said = json.loads(pq.read_schema(file).metadata[b"raydit"])
    assert said == description(flip).to_json()
    assert (said["format"], said["version"], said["moments_dtype"]) == ("raydit.latents", 1, "<f2")
    group = pq.ParquetFile(file).metadata.row_group(0)
    for column in map(group.column, range(len(names))):
        assert column.compression == "UNCOMPRESSED"
        assert not column.has_dictionary_page and "RLE_DICTIONARY" not in column.encodings


def read_polars(pattern):
    import polars

    return polars.read_parquet(pattern).to_dicts()


def read_duckdb(pattern):
    import duckdb

    relation = duckdb.sql(f"select * from '{pattern}' order by key")
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def read_pandas(pattern):
    import pandas

    return pandas.read_parquet(Path(pattern).parent).to_dict("records")


def read_datasets(pattern):
    import datasets

    cache = str(Path(pattern).parent.with_name("cache"))
    return list(datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=cache))


@pytest.mark.parametrize("read", [read_polars, read_duckdb, read_pandas, read_datasets])
def test_other_tools_read_the_shards(tmp_path, read):
    """Without raydit, as docs/reference/latents.md shows for pyarrow."""
    parts = [make_moments(rows, seed=rows) for rows in (3, 4)]
    path = Path(write_dataset(tmp_path / "latents", parts, flip=True).path)
    for other in ("quarantine.parquet", "manifest.json"):
        (path / other).unlink()
    rows = read(str(path / "part-*.parquet"))
    assert [row["key"] for row in rows] == [f"k{index}" for index in range(7)]
    assert [int(row["label"]) for row in rows] == [0, 1, 0, 0, 1, 0, 1]
    for row, expected in zip(rows, np.concatenate(parts), strict=True):
        np.testing.assert_array_equal(np.frombuffer(row["moments"], "<f2").reshape(SHAPE), expected)
        np.testing.assert_array_equal(np.frombuffer(row["moments_flip"], "<f2").reshape(SHAPE), expected[..., ::-1])


def test_equal_rows_make_equal_bytes():
    assert shard(make_moments(3)) == shard(make_moments(3)) != shard(make_moments(3, seed=1))


def test_moments_are_read_back_bit_for_bit_from_shards_of_any_length(tmp_path):
    parts = [make_moments(rows, seed=rows) for rows in (3, 0, 1, 4)]
    dataset = LatentDataset.open(write_dataset(tmp_path, parts, flip=True).path)
    expected = np.concatenate(parts)
    assert len(dataset) == 8 and dataset.latent_shape == (2, 3, 5) and dataset.class_names == ("cat", "dog")
    assert dataset.arrays.moments.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(dataset.arrays.moments_flip, expected[..., ::-1])
    assert dataset.arrays.labels.tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert dataset.arrays.labels.dtype == np.int64


def test_a_data_set_without_flips_has_no_flipped_moments(tmp_path):
    assert write_dataset(tmp_path, [make_moments(2)]).arrays.moments_flip is None


def test_a_data_set_without_usable_images_opens(tmp_path):
    dataset = write_dataset(tmp_path, [make_moments(0)], quarantined=["a"])
    assert len(dataset) == 0 and dataset.arrays.moments.shape == (0, *SHAPE)


def test_the_manifest_counts_rows_and_quarantine(tmp_path):
    dataset = write_dataset(tmp_path, [make_moments(3), make_moments(2)], quarantined=["x", "y"])
    assert (dataset.manifest["rows"], dataset.manifest["quarantined"]) == (5, 2)
    assert pq.read_table(tmp_path / "quarantine.parquet").to_pylist() == [
        {"key": "x", "error": "bad"},
        {"key": "y", "error": "bad"},
    ]
    for entry in dataset.manifest["shards"]:
        data = (tmp_path / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_statistics_are_those_of_draws_from_the_posteriors(tmp_path):
    parts = [make_moments(rows, seed=rows) for rows in (3, 0, 4)]
    manifest = write_dataset(tmp_path, parts).manifest
    mean, log_variance = np.split(np.concatenate(parts).astype(np.float64), 2, axis=1)
    np.testing.assert_allclose(manifest["latents_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 2, 3)) + np.exp(log_variance).mean((0, 2, 3))  # of a mixture of Gaussians
    np.testing.assert_allclose(manifest["latents_std"], np.sqrt(variance), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7, 30.3, 1000.5])
def test_statistics_of_latents_that_never_vary_are_finite(tmp_path, value):
    moments = np.full((7, *SHAPE), -60, "<f2")
    moments[:, :2] = value
    std = write_dataset(tmp_path, [moments]).manifest["latents_std"]
    assert np.isfinite(std).all() and max(std) <= 1e-6 * max(1, value)


def test_the_fingerprint_depends_on_content_and_not_on_the_folder(tmp_path):
    first = write_dataset(tmp_path / "a", [make_moments(3)])
    elsewhere = write_dataset(tmp_path / "b", [make_moments(3)])
    assert first.fingerprint == elsewhere.fingerprint
    others = [
        write_dataset(tmp_path / "c", [make_moments(3, seed=1)]),
        write_dataset(tmp_path / "d", [make_moments(3)], flip=True),
        write_dataset(tmp_path / "e", [make_moments(2), make_moments(1)]),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(("exists", "words"), [(True, "is not finished"), (False, "does not exist")])
def test_a_folder_without_a_manifest_is_refused(tmp_path, exists, words):
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=f"{words}.*Run `raydit encode`"):
        LatentDataset.open(folder)


@pytest.mark.parametrize("change", [{"format": "other"}, {"version": 2}])
def test_a_foreign_manifest_is_refused(tmp_path, change):
    manifest = write_dataset(tmp_path, [make_moments(1)]).manifest
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=r"manifest.json: found format .* expected 'raydit.latents' version 1"):
        LatentDataset.open(tmp_path)


@pytest.mark.parametrize("fingerprint", ["/tmp/elsewhere", "../" + "0" * 61, "0" * 63, "0" * 64 + "\n", None, 3])
def test_a_fingerprint_that_is_no_digest_is_refused(tmp_path, fingerprint):
    """Training names its cache by it."""
    manifest = write_dataset(tmp_path, [make_moments(1)]).manifest
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint}))
    with pytest.raises(InvalidInput, match=r"manifest.json: found fingerprint .* expected 64 hexadecimal digits"):
        LatentDataset.open(tmp_path)


@pytest.mark.parametrize("cut", [True, False])
def test_the_error_names_a_truncated_or_missing_shard(tmp_path, cut):
    dataset = write_dataset(tmp_path, [make_moments(2), make_moments(2)])
    file = tmp_path / "part-00001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:-7]) if cut else file.unlink()
    found = f"{len(data) - 7} bytes" if cut else "nothing"
    with pytest.raises(ValueError, match=rf"part-00001.parquet: found {found}, expected {len(data)} bytes"):
        _ = dataset.arrays


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"manifest.json: found .*, expected a JSON object"):
        LatentDataset.open(tmp_path)
