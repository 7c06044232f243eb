"""Images in the columns of Parquet and Arrow files."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, features, image_table, pictures, square, value_of, write

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source

SHARED = Path(os.environ.get("RAYDIT_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
CIFAR10 = SHARED / "data" / "cifar10"


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


def huggingface_table(values, labels, names=("cat", "dog")) -> pa.Table:
    images = pa.array([{"bytes": encoded(square(value)), "path": None} for value in values])
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(features(names))


def test_hugging_faces_parquet_is_read_across_files_and_row_groups(tmp_path):
    pq.write_table(huggingface_table(range(5), [0, 1, 0, 1, 1]), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(huggingface_table(range(5, 8), [1, 1, 0]), tmp_path / "b.parquet")
    listing = source(tmp_path).listing()
    assert listing.keys[4:6] == ["a.parquet#0000004", "b.parquet#0000000"]
    assert listing.class_names == ("cat", "dog")
    assert listing.labels.tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
    order = [7, 0, 4, 2, 3, 5, 1, 6]
    images = source(tmp_path).read([listing.keys[index] for index in order])
    assert [image.getpixel((0, 0))[0] for image in images] == order


def test_parquet_with_a_binary_column_has_numbers_for_class_names(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"jpg": [encoded(square(value)) for value in (3, 4)], "cls": [2, 0]}), file)
    listing = source(file).listing()
    assert (listing.keys, listing.class_names) == (["x.parquet#0000000", "x.parquet#0000001"], ("0", "1", "2"))
    assert [image.getpixel((0, 0))[0] for image in source(file).read(listing.keys)] == [3, 4]


def test_parquet_without_labels_has_no_classes_and_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [encoded(square(3))]}), tmp_path / "x.parquet")
    listing = source(tmp_path).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([0], ())
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"found the columns text \(string\), expected one of image, img, jpg, png"):
        source(tmp_path).listing()


@pytest.mark.parametrize("labels", [[1.5], [None], [-1], [10**6]])
def test_parquet_labels_that_are_not_class_numbers_are_refused(tmp_path, labels):
    pq.write_table(pa.table({"image": [encoded(square(3))], "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: .*label.*expected integers"):
        source(tmp_path).listing()


def test_a_bad_cell_of_parquet_does_not_stop_the_others(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"text", None, encoded(square(4))]}), file)
    first, second, third = source(file).read(source(file).listing().keys)
    assert isinstance(first, Exception) and isinstance(second, Exception)
    assert third.getpixel((0, 0)) == (4, 4, 4)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10 is not at {CIFAR10}; set RAYDIT_SHARED")
def test_cifar10_is_listed_completely_and_read_at_both_ends():
    listing = source(CIFAR10).listing()
    assert len(listing) == len(set(listing.keys)) == 50_000
    assert listing.keys[0] == "train-00000-of-00005.parquet#0000000"
    assert listing.keys[-1] == "train-00004-of-00005.parquet#0009999"
    assert listing.class_names == tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    assert np.bincount(listing.labels).tolist() == [5000] * 10
    images = source(CIFAR10).read([listing.keys[0], listing.keys[-1]])
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 2


def write_tables(folder, tables: dict[str, pa.Table]):
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)
    return folder


@pytest.mark.parametrize("encode", [lambda column: column, lambda column: column.dictionary_encode()])
def test_label_names_are_numbered_in_sorted_order_over_all_files(tmp_path, encode):
    for name, labels in {"a": ["dog", "cat"], "b": ["bee"]}.items():
        column = encode(pa.array(labels))
        pq.write_table(
            pa.table({"image": [encoded(square(1))] * len(labels), "label": column}), tmp_path / f"{name}.parquet"
        )
    listing = source(tmp_path).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([2, 1, 0], ("bee", "cat", "dog"))


def test_files_with_different_classes_are_refused_as_one_data_set(tmp_path):
    tables = {"a.parquet": huggingface_table([1], [0]), "b.parquet": huggingface_table([1], [0], ("dog", "cat"))}
    with pytest.raises(ValueError, match="b.parquet: found other labels than in .*a.parquet, expected the same label"):
        source(write_tables(tmp_path, tables)).listing()


def test_the_wanted_split_is_taken_if_names_name_splits(tmp_path):
    table = huggingface_table([1, 2], [0, 1])
    files = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet")
    write_tables(tmp_path, dict.fromkeys((*files, "extra-00000-of-00001.parquet"), table))
    assert {key.partition("#")[0] for key in source(tmp_path).listing().keys} == set(files[:2])
    assert len(source(tmp_path, split="test").listing()) == len(source(tmp_path, split="extra").listing()) == 2
    assert len(source(tmp_path, split="all").listing()) == 8
    assert len(source(tmp_path / files[2]).listing()) == 2  # the file itself, whatever it is called
    with pytest.raises(ValueError, match="images.split: found 'val', expected one of .*: extra, test, train"):
        source(tmp_path, split="val").listing()
    (tmp_path / files[1]).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"found 1 of 2 files train-\*-of-00002 in .*, expected all",
    ):
        source(tmp_path).listing()


def test_the_image_column_is_marked_by_the_data_set_or_named_by_the_recipe(tmp_path):
    pictures = [encoded(square(value)) for value in (5, 6)]
    table = pa.table({"image": ["a", "b"], "scan": pictures, "thumb": pictures[::-1]})
    pq.write_table(table, tmp_path / "x.parquet")
    metadata = {"huggingface": '{"info": {"features": {"scan": {"_type": "Image"}}}}'}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "y.parquet")
    for file, settings, expected in (("y", {}, [5, 6]), ("x", {"image_column": "thumb"}, [6, 5])):
        chosen = source(tmp_path / f"{file}.parquet", **settings)
        assert [value_of(image) for image in chosen.read(chosen.listing().keys)] == expected
    with pytest.raises(ValueError, match=r"x.parquet: found the columns image \(string\), .* Set images.image_column"):
        source(tmp_path / "x.parquet").listing()


def test_the_error_names_a_truncated_parquet_file(tmp_path):
    pq.write_table(huggingface_table([1], [0]), tmp_path / "x.parquet")
    write(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match="x.parquet: found no readable Parquet .* Copy it again"):
        source(tmp_path).listing()


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    write(path.parent / "state.json", b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')


def test_an_arrow_batch_is_found_by_its_location(tmp_path):
    file = tmp_path / "data-00000-of-00001.arrow"
    write_arrow(file, image_table(pictures(24)))
    listing = source(tmp_path).listing()
    assert listing.keys[23] == "data-00000-of-00001.arrow#0000023"
    assert len(np.unique(listing.locations[:, 0])) == 8 and listing.locations[:, 1].tolist() == [0, 1, 2] * 8
    data = bytearray(file.read_bytes())
    second, third = np.unique(listing.locations[:, 0])[1:3]
    data[second:third] = bytes(third - second)  # only the wanted batch is read
    write(file, bytes(data))
    (image,) = source(tmp_path).read(listing.keys[7:8], listing.locations[7:8])
    assert value_of(image) == 7


@pytest.mark.parametrize("kept", [-1, -8, -300, 100])
def test_the_error_names_a_truncated_arrow_stream(tmp_path, kept):
    file = tmp_path / "data-00000-of-00001.arrow"
    write_arrow(file, image_table(pictures(24)))
    write(file, file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="found no readable Arrow stream .* expected the files that save_to_disk"):
        source(tmp_path).listing()
