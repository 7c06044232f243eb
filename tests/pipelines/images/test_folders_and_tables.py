"""Image files: in class folders, or named by a table."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import CLASSES, encoded, pictures, square, value_of, write, write_class_folders, write_with_table

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.images.text_tables import read_text_table


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path):
    for value, name in enumerate(["zebra/b.png", "ant/deep/er/a.png", "ant/z.JPG", "zebra/a.webp"]):
        write(tmp_path / name, encoded(square(value)))
    write(tmp_path / "ant" / "notes.txt", b"no image")
    listing = source(tmp_path).listing()
    assert listing.keys == ["ant/deep/er/a.png", "ant/z.JPG", "zebra/a.webp", "zebra/b.png"]
    assert listing.class_names == ("ant", "zebra")
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert [image.getpixel((0, 0))[0] for image in source(tmp_path).read(listing.keys[::-1])] == [0, 3, 2, 1]


def test_names_of_class_folders_must_differ_and_columns_are_of_no_effect(tmp_path):
    for name in ("ant/a.png", "zebra/b.png"):
        write(tmp_path / name, encoded(square(1)))
    with pytest.raises(
        ValueError, match="images.class_names: found 'ant' more than once, and folders of .* Remove one"
    ):
        source(tmp_path, class_names=("ant", "zebra", "ant")).listing()
    notes = source(tmp_path, class_names=("zebra", "ant"), image_column="image", subset="plain").listing().notes
    assert [note.split(",")[0] for note in notes] == [
        "images.image_column = 'image' is of no effect",
        "images.subset = 'plain' is of no effect",
    ]


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.png", encoded(square(9)))
    listing = source(tmp_path).listing()
    assert (listing.keys, listing.class_names, listing.labels.tolist()) == (["a.png", "b.png"], (), [0, 0])


def test_class_folders_among_loose_images_are_refused(tmp_path):
    write(tmp_path / "cat" / "a.png", encoded(square(1)))
    write(tmp_path / "loose.png", encoded(square(1)))
    with pytest.raises(ValueError, match="found class folders and loose images such as loose.png in .* Move the loose"):
        source(tmp_path).listing()


def test_linked_class_folders_are_followed_and_dead_links_are_not_dropped(tmp_path):
    write(tmp_path / "store" / "many" / "a.png", encoded(square(7)))
    (tmp_path / "set" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store" / "many")
    (tmp_path / "set" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = source(tmp_path / "set").listing()
    assert (listing.keys, listing.class_names) == (["cat/a.png", "dog/gone.png"], ("cat", "dog"))
    sound, dead = source(tmp_path / "set").read(listing.keys)
    assert value_of(sound) == 7 and isinstance(dead, FileNotFoundError)
    (tmp_path / "set" / "dog" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="dog/again is a link to one of its parent folders. Remove"):
        source(tmp_path / "set").listing()


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    for name in ("cat/a.png", "cat/._a.png", ".ipynb_checkpoints/b.png", "cat/.trash/c.png"):
        write(tmp_path / name, encoded(square(1)))
    assert source(tmp_path).listing().keys == ["cat/a.png"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT))
    with pytest.raises(ValueError, match=r"found the file name b'\\xff.png' in .*, expected UTF-8. Rename the file"):
        source(tmp_path).listing()


def test_the_folder_of_the_wanted_split_holds_the_classes(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "test/cat/d.png"):
        write(tmp_path / name, encoded(square(1)))
    assert source(tmp_path).listing().keys == ["train/cat/a.png", "train/dog/b.png"]
    assert source(tmp_path).listing().class_names == ("cat", "dog")
    assert source(tmp_path, split="validation").listing().keys == ["val/cat/c.png"]
    assert source(tmp_path, split="all").listing().labels.tolist() == [0, 0, 1, 0]
    with pytest.raises(
        ValueError, match="images.split: found 'extra', expected one of the splits .* test, train, valid"
    ):
        source(tmp_path, split="extra").listing()


def test_given_class_names_number_the_folders_and_the_error_names_an_unknown_one(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        write(tmp_path / name, encoded(square(1)))
    listing = source(tmp_path, class_names=("dog", "emu", "cat")).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([2, 0], ("dog", "emu", "cat"))
    with pytest.raises(
        ValueError, match="found the class 'cat', expected one of dog, emu. Add it to images.class_names"
    ):
        source(tmp_path, class_names=("dog", "emu")).listing()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_names_files_and_labels_whatever_its_order(tmp_path, suffix):
    found = pictures(24)[:4]
    write_with_table(tmp_path, found[::-1], suffix)
    write(tmp_path / "images" / "unnamed.png", encoded(square(1)))
    for path in (tmp_path, tmp_path / f"metadata.{suffix}"):
        listing = source(path).listing()
        assert listing.keys == [f"images/{one.stem}.{one.suffix}" for one in found]
        assert listing.labels.tolist() == [one.label for one in found] and listing.class_names == CLASSES
        assert [value_of(image) for image in source(path).read(listing.keys)] == [0, 1, 2, 3]


def table_folder(folder, text: str, name: str = "labels.csv", images=("a.png", "b.png")):
    for value, image in enumerate(images):
        write(folder / image, encoded(square(value)))
    write(folder / name, text.encode())
    return folder


def test_labels_of_a_table_are_numbers_if_all_of_them_are(tmp_path):
    listing = source(table_folder(tmp_path, "file,class\n./b.png,0\na.png,2\n")).listing()
    assert (listing.keys, listing.labels.tolist()) == (["a.png", "b.png"], [2, 0])
    assert listing.class_names == ("0", "1", "2")
    named = source(tmp_path, class_names=("x", "y", "z")).listing()
    assert (named.labels.tolist(), named.class_names) == ([2, 0], ("x", "y", "z"))
    with pytest.raises(ValueError, match="found the label 2, expected integers from 0 to 1"):
        source(tmp_path, class_names=("x", "y")).listing()


def test_columns_can_be_chosen_and_names_of_digits_stay_text(tmp_path):
    table_folder(tmp_path, "id\tkind\tfile_name\n007\tspy\tx\n010\tcook\ty\n", "list.tsv", ("007", "010", "0.png"))
    listing = source(tmp_path, image_column="id", label_column="kind").listing()
    assert (listing.keys, listing.class_names) == (["007", "010"], ("cook", "spy"))
    assert [value_of(image) for image in source(tmp_path).read(listing.keys)] == [0, 1]
    with pytest.raises(ValueError, match="images.label_column: found 'colour', expected one of the columns .*id, kind"):
        source(tmp_path, image_column="id", label_column="colour").listing()


def test_a_parquet_table_keeps_the_names_of_its_classes(tmp_path):
    write(tmp_path / "a.png", encoded(square(1)))
    table = pa.table({"path": ["a.png"], "label": [1]})
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["no", "yes"]}}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "list.parquet")
    listing = source(tmp_path / "list.parquet").listing()
    assert (listing.keys, listing.labels.tolist(), listing.class_names) == (["a.png"], [1], ("no", "yes"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1\nb.png,2\n", "found the columns a.png, 1, expected one of file_name, .*Add a line of column names"),
        ("a,b\n1,2\n", 'columns a, b, .*images.format = "folder" if the table does not name the images'),
        ("file,weight\na.png,1\n", 'columns file, weight, expected one of label, .*images.format = "folder" to do'),
        ("file,label\na.png,\nb.png,1\n", "column label: found no label, expected integers from 0 or class names"),
        (
            "file,label\na.png,0.5\n",
            "column label: found the label 0.5 of type double, expected integers from 0 or class names",
        ),
        ("file,label\na.png,1\na.png,2\n", "found a.png twice, expected each file once. Remove one"),
        ("file,label\n", "found no rows, expected one for each image"),
        ("file,label,label\na.png,1,2\n", "labels.csv: found 2 columns named 'label', expected one. Rename or"),
        ("file,file,label\na.png,b.png,2\n", "labels.csv: found 2 columns named 'file', expected one"),
        ("file,label,split,split\na.png,1,train,test\n", "labels.csv: found 2 columns named 'split', expected one"),
        ("file,label\na.png,1,2\n", "found no readable table .*expected .csv"),
        ("file,label\nx.png,1\n", "names 1 of 1 files that are not in .*: x.png, expected names relative"),
        (
            "file,label\na.png,1\na,1\nb,1\nc,2\nd,2\n",
            r"4 of 5 files .*: a, b, c, ... \(did you mean \"a.png\"\?\),",
        ),
        ("file,label\ndeep/b.png,1\n", r"1 of 1 .*: deep/b.png \(did you mean \"b.png\"\?\)"),
    ],
)
def test_errors_name_what_is_wrong_with_a_table(tmp_path, text, message):
    table_folder(tmp_path, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source(tmp_path).listing()


@pytest.mark.parametrize("name", ["file_name", "label"])
def test_a_parquet_table_with_two_columns_of_one_name_is_refused(tmp_path, name):
    write(tmp_path / "a.png", encoded(square(1)))
    columns = {"file_name": ["a.png"], "label": [1], "more": [None]}
    table = pa.table([*columns.values(), columns[name]], [*columns, name])
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=f"list.parquet: found 2 columns named '{name}', expected one"):
        source(tmp_path, format="table").listing()
    pq.write_table(pa.table([*columns.values(), [None]], [*columns, "more"]), tmp_path / "list.parquet")
    assert source(tmp_path, format="table").listing().keys == ["a.png"]  # columns that are not used may be anything


def test_links_to_a_parent_folder_are_refused_at_once(tmp_path):
    """Followed as far as the system allows, forty of them would be looked at in some 2^40 folders."""
    for name in "ab":
        (tmp_path / name).symlink_to(".")
    with pytest.raises(ValueError, match="a is a link to one of its parent folders. Remove the link"):
        source(tmp_path)


def test_of_several_tables_one_must_be_chosen(tmp_path):
    table_folder(tmp_path, "file,label\na.png,1\n")
    write(tmp_path / "other.csv", b"file,label\nb.png,3\n")
    with pytest.raises(ValueError, match="found labels.csv, other.csv in .* Set images.path to the table itself"):
        source(tmp_path)
    assert source(tmp_path / "other.csv").listing().labels.tolist() == [3]


def test_class_folders_stay_class_folders_next_to_an_unrelated_table(tmp_path):
    write_class_folders(tmp_path, pictures(24))
    write(tmp_path / "notes.csv", b"who,when\nme,now\n")
    assert source(tmp_path).listing().class_names == CLASSES


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("labels.csv", "file,label\na.png,h\u00e9\nb.png,x\n", "utf-8-sig"),
        ("labels.csv", "file,label\na.png,h\u00e9\nb.png,x\n", "utf-16"),
        ("labels.csv", "file,label\na.png,h\u00e9\nb.png,x\n", "utf-16-be"),
        ("labels.csv", "file;label;price\na.png;h\u00e9;1,5\nb.png;x;2,5\n", "utf-8"),
        ("labels.csv", '"file"\t"label"\na.png\th\u00e9\nb.png\tx\n', "utf-8"),
        ("labels.tsv", "file,label\na.png,h\u00e9\nb.png,x\n", "utf-8"),
        ("labels.csv", "file|label\r\na.png|h\u00e9\r\nb.png|x\r\n", "utf-8"),
    ],
)
def test_tables_are_read_whatever_their_separator_and_mark(tmp_path, name, text, encoding):
    table_folder(tmp_path, "", name)
    write(tmp_path / name, text.encode(encoding))
    listing = source(tmp_path).listing()
    assert (listing.keys, listing.class_names) == (["a.png", "b.png"], ("h\u00e9", "x"))


@pytest.mark.parametrize("text", ["file,label\na.png,x\nb.png,h\u00e9\n", "file,label\na.png,x\nh\u00e9.png,y\n"])
def test_a_table_in_latin_1_is_refused_if_that_matters(tmp_path, text):
    table_folder(tmp_path, "")
    write(tmp_path / "labels.csv", text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels.csv: found bytes in line 3 that are not UTF-8, .*iconv"):
        source(tmp_path).listing()
    write(tmp_path / "labels.csv", "file,label,by\na.png,x,Ren\u00e9\nb.png,y,me\n".encode("latin-1"))
    assert source(tmp_path).listing().class_names == ("x", "y")


def test_an_empty_label_in_a_table_is_refused_with_its_file(tmp_path):
    table_folder(tmp_path, "file,label\nb.png,x\na.png,\n")
    with pytest.raises(ValueError, match="column label: found no label, .*without one: a.png"):
        source(tmp_path).listing()
    assert source(tmp_path, reading="earlier").listing().class_names == ("", "x")


def test_files_of_rare_suffixes_are_decoded_or_given_a_reason(tmp_path):
    for name, kind in {"a.tga": "TGA", "b.jpe": "JPEG", "c.pnm": "PPM", "d.dib": "DIB"}.items():
        write(tmp_path / name, encoded(square(100, 16), kind))
    write(tmp_path / "e.jxl", b"\xff\x0a jxl")
    listing = source(tmp_path).listing()
    *images, unknown = source(tmp_path).read(listing.keys)
    assert [value_of(image) for image in images] == [100] * 4 and isinstance(unknown, Exception)
    assert (
        listing.keys[-1] == "e.jxl" and source(tmp_path, split="train", format="folder").listing().keys == listing.keys
    )


def test_pictures_that_are_not_listed_are_counted(tmp_path):
    for name in ("cat/a.png", "cat/a.PSD", "dog/b.png", "dog/b.svg", "dog/c.svg", "dog/notes.txt"):
        write(tmp_path / name, encoded(square(1)))
    listing = source(tmp_path).listing()
    assert listing.keys == ["cat/a.png", "dog/b.png"]
    assert listing.notes == ("left out, because raydit reads no such files: 1 .psd, 2 .svg",)


def test_class_less_folders_with_a_table_inside_say_that_it_is_not_read(tmp_path):
    write(tmp_path / "train" / "a.png", encoded(square(1)))
    write(tmp_path / "train" / "metadata.csv", b"file_name,label\na.png,x\n")
    listing = source(tmp_path).listing()
    assert listing.class_names == () and "train/metadata.csv is not read: set images.path" in listing.notes[0]


def test_cells_with_line_breaks_are_read_in_tables_of_any_length(tmp_path):
    """pyarrow reads a table in blocks of 1 MiB, which must not end within a cell."""
    caption = "a cat\non a mat, " * 20
    rows = "".join(f'{index:05d}.jpg,{index % 10},"{caption}"\n' for index in range(4_000))
    data = f"file_name,label,caption\n{rows}".encode()
    assert len(data) > 2**20
    table = read_text_table(data, ("file_name",), ("label",), ",", "rows.csv")
    assert table.column("file_name").to_pylist() == [f"{index:05d}.jpg" for index in range(4_000)]
    assert table.column("label").to_pylist() == [index % 10 for index in range(4_000)]
    assert set(table.column("caption").to_pylist()) == {caption}


TEXT_TYPES = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.uint32(), pa.large_string()),
}


@pytest.mark.parametrize("kind", TEXT_TYPES.values(), ids=TEXT_TYPES)
def test_names_and_labels_are_read_in_every_type_of_text(tmp_path, kind):
    names, labels = ["b.png", "a.png", "c.png"], ["dog", "cat", "dog"]
    for name in names:
        write(tmp_path / name, encoded(square(1)))
    table = pa.table({"file_name": pa.array(names).cast(kind), "label": pa.array(labels).cast(kind)})
    pq.write_table(table, tmp_path / "metadata.parquet")
    listing = source(tmp_path / "metadata.parquet").listing()
    assert listing.keys == ["a.png", "b.png", "c.png"] and listing.class_names == ("cat", "dog")
    assert listing.labels.tolist() == [0, 1, 1]


def test_a_missing_name_is_refused_in_every_type_of_text(tmp_path):
    for kind in TEXT_TYPES.values():
        names = pa.array(["a.png", None]).cast(kind)
        pq.write_table(pa.table({"file_name": names, "label": ["a", "b"]}), tmp_path / "metadata.parquet")
        with pytest.raises(ValueError, match="column file_name: found a row without a name"):
            source(tmp_path / "metadata.parquet").listing()


@pytest.fixture
def refuse_listing(monkeypatch):
    """Refuse to list folders of some names, as another user's are, whoever runs the test."""

    def refuse(*names: str):
        def scan(folder, scandir=os.scandir):
            if os.path.basename(folder) in names:
                raise PermissionError(13, "Permission denied", folder)
            return scandir(folder)

        monkeypatch.setattr("os.scandir", scan)

    return refuse


def test_a_table_needs_no_folder_but_those_that_it_names(tmp_path, refuse_listing):
    write(tmp_path / "mine" / "a.png", encoded(square(1)))
    write(tmp_path / "private" / "b.png", encoded(square(1)))
    write(tmp_path / "labels.csv", b"file,label\nmine/a.png,x\n")
    refuse_listing("private")
    assert source(tmp_path / "labels.csv").listing().keys == ["mine/a.png"]
    write(tmp_path / "labels.csv", b"file,label\nprivate/b.png,x\n")
    with pytest.raises(FileNotFoundError, match="names 1 of 1 files that are not in"):
        source(tmp_path / "labels.csv").listing()


def test_an_unreadable_class_folder_is_refused_and_lost_and_found_is_none(tmp_path, refuse_listing):
    for name in ("photos/cat/a.png", "photos/dog/b.png", "lost+found/c.png"):
        write(tmp_path / name, encoded(square(1)))
    refuse_listing("lost+found")
    assert source(tmp_path).listing().class_names == ("photos",)
    refuse_listing("dog")
    with pytest.raises(
        ValueError, match=r"images.path: found the folder .*/photos/dog, which may not be read.* Make it read"
    ):
        source(tmp_path).listing()
