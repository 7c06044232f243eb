"""WebDataset: samples in tar shards are listed from headers alone and read by a seek."""

import gzip
import io
import os
import pickle
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, square, value_of, write, write_tar

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.images.source_files import Files
from pipelines.images.tar import BlockReader, Member, _parse_number, read_members

PNG = [encoded(square(value)) for value in range(4)]


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


def found_members(folder, name: str) -> list[tuple]:
    with Files(str(folder)).open(name) as file:
        members = [member for member in read_members(BlockReader(file, True)) if isinstance(member, Member)]
        return [(member.name, member.offset, member.size) for member in members]


NAMES = st.text("ab/é.", min_size=1, max_size=120).map(lambda name: name.strip("/") or "a")


@settings(max_examples=40, deadline=None)
@given(files=st.dictionaries(NAMES, st.binary(max_size=1500), max_size=4), kind=st.sampled_from([0, 1, 2]))
def test_headers_are_read_as_tarfile_reads_them(tmp_path_factory, files, kind):
    folder = tmp_path_factory.mktemp("tar")
    try:
        write_tar(folder / "x.tar", files, format=kind)
    except ValueError:  # a name that does not fit the oldest format
        return
    with tarfile.open(folder / "x.tar") as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert found_members(folder, "x.tar") == expected


def test_folders_links_and_global_headers_in_a_tar_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("somewhere")
            info.type, info.linkname = kind, "there"
            archive.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size, info.mtime = len(PNG[0]), 1.5
        archive.addfile(info, io.BytesIO(PNG[0]))
    assert [name for name, _, _ in found_members(tmp_path, "x.tar")] == ["a.png"]


def write_links(path, files: dict[str, bytes | str], kind=tarfile.LNKTYPE, **options):
    """A tar of files, and of links, whose content is the name of another file. Returns its path."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


LONG = "folder/" * 20 + "0.png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_in_a_tar_is_a_further_name_of_an_earlier_file(tmp_path, form):
    target = "folder/0.png" if form == tarfile.USTAR_FORMAT else LONG
    files = {target: PNG[2], "1.cls": b"7", "1.png": target, "2.png": "1.png", "2.cls": "1.cls", "./3.png": PNG[0]}
    file = write_links(tmp_path / "x.tar", files | {target.replace("png", "cls"): b"5", "./3.cls": b"5"}, format=form)
    with tarfile.open(file) as archive:
        found = [archive.getmember(archive.getmember(name).linkname or name) for name in (target, "1.png")]
        expected = {(member.offset_data, member.size) for member in found}
    listing = source(file).listing()
    assert listing.keys == [f"x.tar/{target[:-4]}", "x.tar/1", "x.tar/2", "x.tar/./3"] and not listing.notes
    assert {tuple(location) for location in listing.locations[:3].tolist()} == expected
    assert [value_of(image) for image in source(file).read(listing.keys, listing.locations)] == [2, 2, 2, 0]
    assert [listing.class_names[label] for label in listing.labels] == ["5", "7", "7", "5"]
    assert len(set(listing.stamps.tolist())) == 4
    other = write_links(tmp_path / "x.tar", files | {target: PNG[2] + b"!"}, format=form)
    with Files(str(tmp_path)).open(other.name) as archive:
        stamps = {member.name: member.stamp for member in read_members(BlockReader(archive, True))}
    assert stamps["2.png"] not in listing.stamps.tolist()  # changes with the file, whose name it is


def test_a_hard_link_may_state_the_length_of_its_file_and_may_repeat_it(tmp_path):
    def entry(name, kind, content=b""):
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(PNG[0]), kind, "0.png"
        return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)

    first, end = entry("0.png", tarfile.REGTYPE, PNG[0]), bytes(1024)
    for second in (entry("1.png", tarfile.LNKTYPE), entry("1.png", tarfile.LNKTYPE, PNG[0])):
        write(tmp_path / "x.tar", first + second + entry("2.png", tarfile.CONTTYPE, PNG[0]) + end)
        listing = source(tmp_path / "x.tar").listing()
        assert listing.keys == ["x.tar/0", "x.tar/1", "x.tar/2"]
        assert [value_of(image) for image in source(tmp_path).read(listing.keys, listing.locations)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, r"a link to none.png, which is not before it in the archive"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.FIFOTYPE, "a named pipe"),
    ],
)
def test_members_of_a_tar_that_are_no_files_are_said_to_be_left_out(tmp_path, kind, reason):
    write_links(tmp_path / "x.tar", {"a.png": PNG[0], "b.png": "none.png", "c.png": "none.png", "d": "a.png"}, kind)
    listing = source(tmp_path).listing()
    assert listing.keys == ["x.tar/a"]
    assert listing.notes == (f"left out: 2 of the members of tar files, such as x.tar/b.png ({reason})",)
    earlier = source(tmp_path, reading="earlier").listing()
    assert earlier.digest == listing.digest and earlier.notes == ()
    write_links(tmp_path / "x.tar", {"b.png": "none.png"}, kind)
    with pytest.raises(ValueError, match=rf"x.tar: found no images but b.png \({reason}\), expected"):
        source(tmp_path).listing()


def test_a_folder_that_is_named_like_a_tar_file_is_refused(tmp_path):
    write_tar(tmp_path / "set" / "many.tar" / "x.tar", {"a.png": PNG[0]})
    write_tar(tmp_path / "set" / "y.tar", {"b.tar/a.png": PNG[0]})
    with pytest.raises(ValueError, match="many.tar/x.tar, in a folder whose name ends in .tar, .*Rename the folder"):
        source(tmp_path / "set").listing()
    for path, key in ((tmp_path / "set" / "many.tar", "x.tar/a"), (tmp_path / "set" / "y.tar", "y.tar/b.tar/a")):
        assert source(path).listing().keys == [key] and value_of(next(source(path).read([key]))) == 0


@pytest.mark.parametrize("reading", [None, "earlier"])
def test_a_label_with_half_of_a_surrogate_pair_is_refused(tmp_path, reading):
    write_tar(tmp_path / "x.tar", {"a.png": PNG[0], "a.json": rb'{"label": "\ud800"}'})
    with pytest.raises(ValueError, match=r"x.tar: found the label '\\ud800', expected an integer or a class name"):
        source(tmp_path / "x.tar", reading=reading).listing()
    write_tar(tmp_path / "x.tar", {"a.png": PNG[0], "a.json": rb'{"label": "\ud83d\ude00"}'})
    assert source(tmp_path / "x.tar", reading=reading).listing().class_names == ("\U0001f600",)


def test_lengths_of_eight_gigabytes_and_more_are_binary_in_a_header():
    for number in (8**11, 2**40 + 5):
        info = tarfile.TarInfo("x")
        info.size = number
        assert _parse_number(info.tobuf(tarfile.GNU_FORMAT)[124:136]) == number


def test_samples_are_files_of_one_stem_in_the_order_of_the_tar(tmp_path):
    files = {"b/2.png": PNG[2], "b/2.cls": b"1", "b/2.txt": b"words", "a.cls": b"0\n", "a.PNG": PNG[0], ".hidden": b""}
    write_tar(tmp_path / "set" / "x.tar", files)
    write_tar(tmp_path / "set" / "deep" / "y.tar", {"a.seg.png": PNG[1], "a.png": PNG[3], "a.cls": b"3"})
    listing = source(tmp_path / "set").listing()
    assert listing.keys == ["deep/y.tar/a", "x.tar/b/2", "x.tar/a"]
    assert (listing.labels.tolist(), listing.class_names) == ([3, 1, 0], ("0", "1", "2", "3"))
    images = source(tmp_path / "set").read(listing.keys, listing.locations)
    assert [value_of(image) for image in images] == [3, 2, 0]
    assert source(tmp_path / "set" / "x.tar").listing().keys == ["x.tar/b/2", "x.tar/a"]
    other = source(tmp_path / "set" / "deep", image_column="seg.png")
    assert [value_of(image) for image in other.read(other.listing().keys)] == [1]


def test_an_image_is_read_by_a_seek_to_its_location(tmp_path):
    file = write_tar(tmp_path / "x.tar", {f"{value}.png": PNG[value] for value in range(4)})
    listing = source(tmp_path).listing()
    offset, size = listing.locations[2]
    write(file, bytes(offset) + file.read_bytes()[offset : offset + size])  # all else is gone
    (image,) = source(tmp_path).read(listing.keys[2:3], listing.locations[2:3])
    assert value_of(image) == 2


def test_labels_are_names_or_a_field_of_json(tmp_path):
    write_tar(tmp_path / "names.tar", {"a.png": PNG[0], "a.cls": b"dog", "b.png": PNG[1], "b.cls": b"7"})
    listing = source(tmp_path / "names.tar").listing()
    assert (listing.labels.tolist(), listing.class_names) == ([1, 0], ("7", "dog"))
    write_tar(tmp_path / "json.tar", {"a.png": PNG[0], "a.json": b'{"label": 2, "kind": "cat"}'})
    assert source(tmp_path / "json.tar").listing().labels.tolist() == [2]
    assert source(tmp_path / "json.tar", label_column="kind").listing().class_names == ("cat",)
    write_tar(tmp_path / "none.tar", {"a.png": PNG[0], "a.json": b'{"width": 2}'})
    assert source(tmp_path / "none.tar").listing().class_names == ()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"x", "a.cls": b"1"}, "x.tar: found no images but cls, txt, expected samples such as 0001.jpg"),
        ({}, "x.tar: found no images but nothing"),
        ({"a.png": PNG[0], "a.jpg": PNG[0]}, r"found 2 images in the sample a \(png, jpg\), expected one. Set"),
        ({"a.png": PNG[0], "a.cls": b"1", "b.png": PNG[1]}, "found the sample b without a label among others"),
        ({"a.png": PNG[0], "a.PNG": PNG[0]}, "found a.PNG twice, expected each name once"),
        ({"a.png": PNG[0], "a.json": b"{"}, "x.tar, sample a: found .* in its .json, expected JSON. Correct the file"),
        ({"a.png": PNG[0], "a.cls": b"-1"}, "found the label -1, expected integers from 0"),
        ({"a.png": PNG[0], "a.cls": b"1"} | {"b.png": PNG[0], "b.json": b'{"label": null}'}, "the sample b without"),
    ],
)
def test_errors_name_what_is_wrong_with_a_tar(tmp_path, files, message):
    write_tar(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=message):
        source(tmp_path).listing()


@pytest.mark.parametrize("kept", [700, 1024, 1100, 3000])
def test_a_truncated_tar_is_refused(tmp_path, kept):
    file = write_tar(tmp_path / "x.tar", {"a.png": PNG[0], "b.png": PNG[1]})
    assert len(PNG[0]) < 512  # so that both files end at 2048 bytes, where the end mark begins
    write(file, file.read_bytes()[:2048][:kept])
    with pytest.raises(ValueError, match="x.tar: found .* expected a complete") as refused:
        source(tmp_path).listing()
    numbers = [int(number.replace(",", "")) for number in re.findall(r"at byte ([\d,]+)", str(refused.value))]
    assert len(numbers) == 1 and numbers[0] <= kept  # the file has no other bytes


def test_compressed_tars_and_other_files_are_refused(tmp_path):
    file = write_tar(tmp_path / "x.tar", {"a.png": PNG[0]})
    write(file, gzip.compress(file.read_bytes()))
    with pytest.raises(
        ValueError, match="found a file compressed with gzip, expected an uncompressed tar, .* Decompress"
    ):
        source(tmp_path).listing()
    write(file, b"plain text" * 100)
    with pytest.raises(ValueError, match="found no tar header at byte 0, expected a complete"):
        source(tmp_path).listing()
    (tmp_path / "x.tar").unlink()
    with pytest.raises(FileNotFoundError, match="no tar files in .*, expected files ending in .tar"):
        source(tmp_path, format="webdataset").listing()


def test_labels_in_only_one_shard_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": PNG[0], "a.cls": b"1"})
    write_tar(tmp_path / "b.tar", {"a.png": PNG[0]})
    with pytest.raises(ValueError, match="b.tar and .*a.tar: found labels in one and none in the other"):
        source(tmp_path).listing()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.cls": pickle.dumps(3)}, "sample a: found a pickled label in a.cls, .*can run code"),
        ({"a.cls": pickle.dumps(3, 0)}, "found a pickled label in a.cls"),
        ({"a.cls": "h\u00e9".encode("latin-1")}, "found a label that is not UTF-8 in a.cls"),
        ({"a.cls": b" \n"}, "x.tar: found no label, expected .*without one: a$"),
        ({"a.json": b'{"label": ""}'}, "x.tar: found no label"),
        ({"a.json": b'{"label": [3]}'}, r"x.tar: found the label \[3\], expected an integer or a class name"),
        ({"a.json": b'{"label": true}'}, "found the label True"),
        ({"a.json": b'{"label": NaN}'}, "found the label nan"),
        ({"a.json": b'{"label": 1e400}'}, "found the label inf"),
    ],
)
def test_labels_that_are_no_text_and_no_number_are_refused(tmp_path, files, message):
    write_tar(tmp_path / "x.tar", {"a.png": PNG[0], **files})
    with pytest.raises(ValueError, match=message):
        source(tmp_path).listing()


def test_whole_numbers_of_json_are_class_numbers(tmp_path):
    files = {"a.png": PNG[0], "a.json": b'{"label": 3.0}', "b.png": PNG[1], "b.json": b'{"label": 2}'}
    write_tar(tmp_path / "x.tar", files)
    assert source(tmp_path).listing().labels.tolist() == [3, 2]
    assert source(tmp_path, reading="earlier").listing().class_names == ("2", "3.0")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "deep/x.tar.gz"])
def test_compressed_shards_are_refused_by_their_names(tmp_path, name):
    write(tmp_path / name, b"anything")
    for path in {tmp_path, tmp_path / name}:
        with pytest.raises(ValueError, match=rf"found the compressed tar \S*{name[-5:]} in .*, expected uncompressed"):
            source(path).listing()


def test_compressed_shards_beside_others_are_said_to_be_left_out(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": PNG[0]})
    write(tmp_path / "y.tar.gz", b"anything")
    assert source(tmp_path).listing().notes == ("left out: the compressed tar y.tar.gz",)
    write(tmp_path / "folders" / "cat" / "a.png", PNG[0])
    write(tmp_path / "folders" / "download.tar.gz", b"anything")
    assert source(tmp_path / "folders").listing().class_names == ("cat",)


@pytest.mark.parametrize("labels", [("1_2", "12"), ("\u0663", "4"), ("7", "8 9")])
def test_labels_are_numbers_only_if_all_are_decimal_digits(tmp_path, labels):
    files = {
        f"{index}.{kind}": data
        for index, label in enumerate(labels)
        for kind, data in (("png", encoded(square(1))), ("cls", label.encode()))
    }
    write_tar(tmp_path / "a.tar", files)
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert listing.class_names == tuple(sorted(labels))
    assert [listing.class_names[label] for label in listing.labels] == list(labels)


def test_labels_that_only_python_takes_for_numbers_stay_so_in_older_outputs(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": encoded(square(1)), "0.cls": b"0_1"})
    listing = open_source(ImagesConfig(path=str(tmp_path), reading="earlier")).listing()
    assert (listing.class_names, listing.labels.tolist()) == (("0", "1"), [1])


def test_a_replaced_tar_is_searched_anew(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": PNG[0]})
    images = source(tmp_path)
    for number, names in enumerate(["ab", "ba"]):
        write_tar(tmp_path / "x.tar", {f"{name}.png": PNG[position] for position, name in enumerate(names)})
        os.utime(tmp_path / "x.tar", (number, number))
        assert [value_of(image) for image in images.read(["x.tar/a", "x.tar/b"])] == [number, 1 - number]
