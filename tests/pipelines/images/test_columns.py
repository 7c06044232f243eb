"""Images in the columns of Parquet and Arrow files."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, features, image_table, pictures, square, value_of, write

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from raydit.errors import InvalidInput

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


KINDS_OF_LABELS = {
    "integers": [[2, 0], pa.int64(), [1], pa.int32(), [2, 0, 1]],
    "fractions": [[2, 0], pa.uint8(), [1], pa.float64(), [2, 0, 1]],
    "texts": [["x", "z"], pa.string(), ["y"], pa.large_string(), [0, 2, 1]],
    "categories": [["x", "z"], pa.dictionary(pa.int8(), pa.string()), ["y"], pa.string(), [0, 2, 1]],
    "empty": [["x", "z"], pa.string(), [], pa.large_string(), [0, 1]],
}


@pytest.mark.parametrize(("first", "kind", "second", "other", "numbers"), KINDS_OF_LABELS.values(), ids=KINDS_OF_LABELS)
def test_labels_of_two_files_may_have_two_types_of_one_kind(tmp_path, first, kind, second, other, numbers):
    for name, labels in {"a.parquet": pa.array(first).cast(kind), "b.parquet": pa.array(second, other)}.items():
        images = pa.array([encoded(square(1))] * len(labels), pa.binary())
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / name)
    assert source(tmp_path).listing().labels.tolist() == numbers


def test_a_file_with_gaps_among_its_labels_is_refused_for_them(tmp_path):
    for name, labels in {"a.parquet": pa.array([1]), "b.parquet": pa.array([0.0, None])}.items():
        pq.write_table(pa.table({"image": [encoded(square(1))] * len(labels), "label": labels}), tmp_path / name)
    with pytest.raises(ValueError, match="b.parquet: found no label, .*without one: b.parquet#0000001"):
        source(tmp_path).listing()
    pq.write_table(pa.table({"image": [encoded(square(1))], "label": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet: found other labels than in .*a.parquet"):
        source(tmp_path).listing()


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


def test_the_digest_tells_the_image_column_where_another_would_be_read_by_default(tmp_path):
    pictures = [encoded(square(value)) for value in (5, 6)]

    def digest(file, **settings):
        return source(tmp_path / file, **settings).listing().digest

    pq.write_table(pa.table({"image": pictures, "thumb": pictures[::-1]}), tmp_path / "both.parquet")
    usual = digest("both.parquet")
    assert digest("both.parquet", image_column="image") == usual != digest("both.parquet", image_column="thumb")
    assert digest("both.parquet", image_column="thumb", reading="earlier") == usual
    # Where nothing is recognised the column has always had to be named, and recorded digests stay.
    unnamed = {"image": ["a", "b"], "scan": pictures, "thumb": pictures[::-1]}
    pq.write_table(pa.table(unnamed), tmp_path / "named.parquet")
    named = [
        digest("named.parquet", image_column=name, reading=reading)
        for name in ("scan", "thumb")
        for reading in (None, "earlier")
    ]
    assert len(set(named)) == 1


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_listing_tells_the_image_column_where_its_digest_does_not(tmp_path, format):
    pictures, metadata = [encoded(square(value)) for value in (5, 6)], [b"0" * 16] * 2

    def column_of(columns, **settings):
        table = pa.table({**columns, "digest": pa.array(metadata, pa.binary(16)), "caption": ["a", "b"]})
        if format == "arrow":
            write_arrow(tmp_path / "data-00000-of-00001.arrow", table)
            return source(tmp_path, **settings).listing().image_column
        pq.write_table(table, tmp_path / "x.parquet")
        listing = source(tmp_path / "x.parquet", **settings).listing()
        return listing.take([1]).image_column

    two = {"scan": pictures, "thumb": [{"bytes": picture} for picture in pictures]}
    assert [column_of(two, image_column=name) for name in two] == ["scan", "thumb"]
    assert column_of({"scan": pictures}, image_column="scan") == column_of({"image": pictures, "thumb": pictures}) == ""
    if format == "parquet":  # the digest tells these
        assert {
            column_of({"image": pictures, "thumb": pictures}, image_column=name) for name in ("image", "thumb")
        } == {""}


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


def species_table(features: dict | None, **columns) -> pa.Table:
    """Rows whose label column has an unusual name, with what Hugging Face's data sets record about columns."""
    table = pa.table({"image": [encoded(square(1))] * 2, **(columns or {"species": [1, 0]})})
    metadata = None if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


SPECIES = {"species": {"_type": "ClassLabel", "names": ["ant", "bee"]}}


@pytest.mark.parametrize("where", ["schema", "infos", "card"])
def test_a_class_label_of_any_name_is_the_label(tmp_path, where):
    pq.write_table(species_table(SPECIES if where == "schema" else None), tmp_path / "x.parquet")
    if where == "infos":
        write(tmp_path / "dataset_infos.json", json.dumps({"default": {"features": SPECIES}}).encode())
    if where == "card":
        names = "        names:\n          '0': ant\n          '1': bee\n"
        feature = f"  - name: species\n    dtype:\n      class_label:\n{names}"
        write(tmp_path / "README.md", f"---\ndataset_info:\n  features:\n{feature}---\n".encode())
    listing = source(tmp_path).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([1, 0], ("ant", "bee"))
    earlier = source(tmp_path, reading="earlier").listing()
    assert (earlier.labels.tolist(), earlier.class_names) == ([0, 0], ())


def test_a_class_label_in_a_saved_data_set_is_the_label(tmp_path):
    write_arrow(tmp_path / "data-00000-of-00001.arrow", species_table(SPECIES))
    assert source(tmp_path).listing().class_names == ("ant", "bee")


def test_of_several_class_labels_one_must_be_chosen_and_a_usual_name_wins(tmp_path):
    features = SPECIES | {"sex": {"_type": "ClassLabel", "names": ["f", "m"]}}
    pq.write_table(species_table(features, species=[0, 1], sex=[1, 1]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="found the class labels species, sex, .* Set images.label_column to one"):
        source(tmp_path).listing()
    assert source(tmp_path, label_column="sex").listing().class_names == ("f", "m")
    assert len(list(source(tmp_path).read(["x.parquet#0000000"]))) == 1  # workers read without choosing
    pq.write_table(species_table(features, species=[0, 1], sex=[1, 1], label=[4, 0]), tmp_path / "x.parquet")
    assert source(tmp_path).listing().labels.tolist() == [4, 0]


def test_without_labels_the_summary_names_the_other_columns(tmp_path):
    pq.write_table(species_table(None, weight=[0.5, 1.5]), tmp_path / "x.parquet")
    assert source(tmp_path).listing().summary() == "2 images without classes (no label among weight)"
    assert source(tmp_path, image_column="image").listing().columns == ("weight",)


def test_an_empty_label_is_refused_with_its_key(tmp_path):
    for labels, key in ((["a", " "], "#0000001"), (["", "b"], "#0000000"), ([None, "b"], "#0000000")):
        pq.write_table(species_table(None, label=labels), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=rf"x.parquet: found no label, expected .*: x.parquet{key}"):
            source(tmp_path).listing()


def test_whole_numbers_stored_as_floats_are_class_numbers(tmp_path):
    pq.write_table(species_table(None, label=[3.0, 0.0]), tmp_path / "x.parquet")
    assert source(tmp_path).listing().labels.tolist() == [3, 0]


PICTURES = [encoded(square(value)) for value in (5, 6)]
BYTES = {
    "binary": pa.array(PICTURES, pa.binary()),
    "large_binary": pa.array(PICTURES, pa.large_binary()),
    "binary_view": pa.array(PICTURES, pa.binary_view()),
    "fixed_size_binary": pa.array(PICTURES, pa.binary(len(PICTURES[0]))),
    "list": pa.array([list(data) for data in PICTURES], pa.list_(pa.uint8())),
    "large_list": pa.array([list(data) for data in PICTURES], pa.large_list(pa.uint8())),
    "struct of lists": pa.array(
        [{"bytes": list(data)} for data in PICTURES], pa.struct({"bytes": pa.list_(pa.uint8())})
    ),
    "null": pa.array([*PICTURES[:1], None], pa.large_binary()),
}


@pytest.mark.parametrize("kind", BYTES)
def test_images_are_bytes_of_any_type(tmp_path, kind):
    assert len(PICTURES[0]) == len(PICTURES[1])
    table = pa.table({"image": BYTES[kind], "label": [0, 1]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "saved").mkdir()
    write_arrow(tmp_path / "saved" / "data-00000-of-00001.arrow", table)
    for path in (tmp_path / "x.parquet", tmp_path / "saved"):
        chosen = source(path)
        listing = chosen.listing()
        first, second = chosen.read(listing.keys, listing.locations)
        assert value_of(first) == 5
        assert value_of(second) == 6 if kind != "null" else isinstance(second, ValueError)
    lengths = [len(PICTURES[0]), 0 if kind == "null" else len(PICTURES[1])]
    assert source(tmp_path / "saved").listing().stamps.tolist() == lengths


def test_images_as_numbers_are_refused_in_one_short_sentence(tmp_path):
    numbers = pa.array([np.zeros(100_000, np.int64).tolist()])
    for name in ("image", "file_name"):
        pq.write_table(pa.table({name: numbers, "label": [0]}), tmp_path / "x.parquet")
        for settings in ({}, {"format": "table"}):
            with pytest.raises(ValueError, match="found") as caught:
                source(tmp_path / "x.parquet", **settings).listing()
            assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_table_of_files_beside_digests_stays_a_table(tmp_path):
    write(tmp_path / "a.png", encoded(square(3)))
    digests = pa.array([b"0123456789abcdef"], pa.binary(16))
    pq.write_table(pa.table({"file_name": ["a.png"], "md5": digests, "label": [0]}), tmp_path / "x.parquet")
    assert source(tmp_path / "x.parquet").listing().keys == ["a.png"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["x.parquet", "x.tar", "x.npz", "metadata.csv", "data-00000-of-00001.arrow", "train-00000-of-00001.parquet"]
)
def test_a_git_lfs_pointer_is_named_in_one_sentence(tmp_path, name):
    write(tmp_path / name, POINTER)
    if name.endswith(".arrow"):
        write(tmp_path / "state.json", json.dumps({"_data_files": [{"filename": name}]}).encode())
    path = tmp_path / name if name == "x.npz" else tmp_path
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, expected .*git lfs pull"):
        source(path).listing()


@pytest.mark.parametrize("name", ["../private/x.arrow", "/etc/passwd", "a/../../x.arrow"])
def test_what_save_to_disk_lists_stays_in_its_folder(tmp_path, name):
    """As `splits` and as files: both would be read from elsewhere."""
    folder = tmp_path / "data"
    write(tmp_path / "private" / "x.arrow", b"secret")
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name}]}).encode())
    with pytest.raises(InvalidInput, match=r"state.json: found .* expected names of files in its own folder"):
        source(folder).listing()
    write(folder / "dataset_dict.json", json.dumps({"splits": [name]}).encode())
    with pytest.raises(InvalidInput, match=r"dataset_dict.json: found .* expected names of files in its own folder"):
        source(folder).listing()


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64(), pa.int8(), pa.float32()])
def test_labels_are_read_in_every_type_of_number(tmp_path, kind):
    image = encoded(square(1))
    pq.write_table(pa.table({"image": [image, image], "label": pa.array([2, 0]).cast(kind)}), tmp_path / "a.parquet")
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert listing.labels.tolist() == [2, 0] and listing.class_names == ("0", "1", "2")


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.uint32(), pa.large_string())])
def test_labels_beside_images_are_read_in_every_type_of_text(tmp_path, kind):
    image = encoded(square(1))
    table = pa.table({"image": [image, image], "label": pa.array(["dog", "cat"]).cast(kind)})
    pq.write_table(table, tmp_path / "images.parquet")
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert listing.labels.tolist() == [1, 0] and listing.class_names == ("cat", "dog")
