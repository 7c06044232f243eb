"""Files that were made to harm, or broken by accident, are read, quarantined or refused: quickly, and in little memory.

All of them are read in one process with bounded memory and time (`hostile`), because importing the readers takes longer
than reading the files.
"""

import io
import os
import re
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import read_all
from pictures import encoded, square, write, write_tar
from PIL import Image

PNG = encoded(square(7))
CASES: dict[str, tuple[Callable[[Path], Path | None], str]] = {}
"""For each hostile data set what makes it in a folder, and what must become of it: "read: ..." or "refused: ...".

What makes it returns the path that images.path names, or None for the folder.
"""


def case(name: str, expected: str) -> Callable:
    def add(make: Callable[[Path], Path | None]) -> Callable:
        CASES[name] = (make, expected)
        return make

    return add


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each case, as "read: 1 images, quarantined []"."""
    root = tmp_path_factory.mktemp("hostile")
    paths = {}
    for name, (make, _) in CASES.items():
        folder = root / re.sub(r"\W+", "-", name)
        folder.mkdir()
        paths[name] = make(folder) or folder
    found = read_all("images", list(paths.values()))
    return {name: f"{outcome.kind}: {outcome.detail}" for name, outcome in zip(paths, found, strict=True)}


def sparse(path: Path, num_bytes: int) -> Path:
    """A file that takes no room on the disk, however long it is."""
    path.touch()
    os.truncate(path, num_bytes)
    return path


def special_files(folder: Path, suffix: str) -> list[Path]:
    """A link to a device without end, a named pipe without a writer, a link to it, and a socket."""
    paths = [folder / f"{name}{suffix}" for name in ("device", "pipe", "link", "socket")]
    paths[0].symlink_to("/dev/zero")
    os.mkfifo(paths[1])
    paths[2].symlink_to(paths[1])
    here = os.getcwd()
    os.chdir(folder)  # a socket's address has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(paths[3].name)
    os.chdir(here)
    return paths


# Devices, named pipes and sockets


@case("special files among images", r"read: 6 images, .*the file is a device.*the file is a named pipe")
def _(folder):
    special_files(folder, ".png")
    (folder / "loop.png").symlink_to("loop.png")
    write(folder.parent / "elsewhere.png", PNG)
    (folder / "good.png").symlink_to(folder.parent / "elsewhere.png")


@case("an image longer than any", r"read: 2 images, .*FileTooLarge: the file: found 1,099,511,627,776 bytes")
def _(folder):
    write(folder / "good.png", PNG)
    sparse(folder / "sparse.png", 2**40)


for _suffix in (".tar", ".parquet", ".csv", ".jsonl", ".npz"):
    for _index, _kind in enumerate(("a device", "a named pipe", "a named pipe", "a socket")):

        @case(
            f"{_kind} {_index} {_suffix}", f"refused: SpecialFile: images.path: .* is {_kind}, expected a regular file"
        )
        def _(folder, suffix=_suffix, index=_index):
            return special_files(folder, suffix)[index]


for _name in ("metadata.csv", "metadata.parquet", "state.json", "dataset_dict.json"):

    @case(f"a named pipe {_name}", f"refused: SpecialFile: images.path: .*/{_name} is a named pipe, expected a regular")
    def _(folder, name=_name):
        os.mkfifo(folder / name)


for _name in ("README.md", "dataset_infos.json"):

    @case(f"a named pipe {_name}", f"refused: SpecialFile: images.path: .*/{_name} is a named pipe, expected a regular")
    def _(folder, name=_name):
        pq.write_table(pa.table({"image": [PNG], "kind": ["a"]}), write(folder / "data" / "x.parquet", b""))
        os.mkfifo(folder / name)


# Images


def palette_png(side: int) -> bytes:
    """A square of one bit a pixel, all of it transparent, in a few kilobytes."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 3, 0, 0, 0),
        b"PLTE\x01\x02\x03\x04\x05\x06",
        b"tRNS\x00",
    ]
    chunks += [b"IDAT" + zlib.compress(bytes(side * (1 + -(-side // 8)))), b"IEND"]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@case("the largest square with a palette and transparency", r"read: 1 images, quarantined \[\]$")
def _(folder):
    write(folder / "a.png", palette_png(13_300))


@case(
    "a larger square", r"read: 1 images, .*DecompressionBombError: Image size .196000000 pixels. exceeds limit of 17895"
)
def _(folder):
    write(folder / "a.png", palette_png(14_000))


@case("a JPEG of 5,000 empty scans", "read: 1 images, .*ValueError: found 5,... scans of 16,000,000 pixels, expected")
def _(folder):
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    write(folder / "a.jpg", data[:-2] + last * 5000 + b"\xff\xd9")


@case("a PNM of a million comments", "read: 1 images, .*ValueError: found 1,000,000 comments, expected at most 1,000")
def _(folder):
    write(folder / "a.ppm", b"P3 1000 1000 255\n" + b"# a\n" * 1_000_000 + b"1 " * 3_000_000)


@case(
    "text of 100 MB in a PNG",
    r"read: 1 images, quarantined \[.ValueError: Decompressed data too large for PngImagePlug",
)
def _(folder):
    text = b"zTXta\0\0" + zlib.compress(bytes(10**8))
    framed = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    write(folder / "a.png", PNG[:33] + framed + PNG[33:])


# Cards


def carded(card: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_tar(folder / "data" / ("a" * 100) / "train.tar", {"0.png": PNG})
        write(folder / "README.md", card.encode())

    return make


def merges(levels: int) -> str:
    """Mappings that each merge the one before nine times: nine to the power of `levels` fields."""
    start = "a0: &a0 {x: 1, y: 2}\n"
    return start + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, levels))


def aliases(levels: int) -> str:
    """Lists that each hold the one before nine times."""
    return "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))


def data_files(pattern: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n"


for _name, _card in {
    "newlines": "---" + "\n" * 200_000,
    "newlines in it": "---\n" + "\n" * 200_000 + "x: 1\n---\n",
    "false ends": "---" + "\n---x" * 40_000,
    "aliases": f"---\n{aliases(30)}---\n",
    "many folders": data_files("**/" * 10 + "*.tar"),
}.items():
    case(f"a card with {_name}", r"read: 1 images, quarantined \[\]$")(carded(_card))

for _name, _card in {
    "merges": f"---\n{merges(30)}---\n",
    "depth": "---\n" + "[" * 50_000 + "\n---\n",
    "a number to the base 60": "---\na: " + "1:" * 100_000 + "1\n---\n",
    "no date": "---\na: 2001-99-99\n---\n",
    "no YAML": "---\na: [\n---\n",
    "length": "---\na: " + "x" * 2**21 + "\n---\n",
    "wrong types": "---\nconfigs: [1, [2], null]\n---\n",
    "no files": "---\nconfigs:\n- config_name: default\n  data_files: 5\n---\n",
    "no pattern": data_files("[z-a]*.tar"),
    "a long pattern": data_files("*a" * 5000),
}.items():
    case(f"a card with {_name}", "refused: InvalidInput: images.path: .*card")(carded(_card))

for _index, _content in enumerate([b"[" * 100_000, b"[]", b'{"splits": 5}', b'{"splits": [["a"]]}', b"{", b"\xff"]):
    case(f"no splits {_index}", "refused: InvalidInput: images.path: .*dataset_dict.json: found no ")(
        lambda folder, content=_content: write(folder / "dataset_dict.json", content).parent
    )


case(
    "a split of 80,000 letters",
    "refused: InvalidInput: .*dataset_dict.json: found .* expected names of files in its own",
)(lambda folder: write(folder / "dataset_dict.json", b'{"splits": ["' + b"a" * 80_000 + b'"]}').parent)

# Tar shards


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with any bytes for a length, and the right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(record: bytes) -> bytes:
    """A pax record before an image."""
    image = header("0.png", b"%o" % len(PNG)) + padded(PNG)
    return header("x", b"%o" % len(record), b"x") + padded(record) + image + bytes(1024)


TAR = r"refused: InvalidInput: images.path: .*x.tar: found {}.*, expected a complete archive"
for _name, _content, _found in (
    ("a negative length", header("0.png", b"-1000"), "the length b'-1000"),
    ("a negative binary length", header("0.png", b"\xff" * 12), "a file of .* bytes at byte 512, where 0 follow"),
    ("a binary length of exabytes", header("0.png", b"\x80" + b"\xff" * 11), "a file of .* where 0 follow"),
    ("a length with a prefix", header("0.png", b"0o17"), "the length b'0o17"),
    ("a length beyond the end", header("0.png", b"77777777777") + PNG, "a file of 8,589,934,591 bytes at byte 512"),
    ("a name of 10 GB", header("x", b"\x80" + (10**10).to_bytes(11, "big"), b"L"), "a file of 10,000,000,000 bytes"),
    ("a record of length 0", pax(b"0 path=a.png\n"), "a record without a length at byte 512"),
    ("a record of negative length", pax(b"-9 path=a.png\n"), "a record without a length at byte 512"),
    ("a record longer than itself", pax(b"99999 path=a.png\n"), "a record without a length at byte 512"),
    ("a pax length of -1", pax(b"11 size=-1\n"), "the length b'-1' at byte 512"),
    ("a pax length of 5,000 digits", pax(b"5010 size=" + b"9" * 4999 + b"\n"), "the length b'9+' at byte 512"),
    ("a pax length beyond the end", pax(b"22 size=9999999999999\n"), "a file of 9,999,999,999,999 bytes"),
):

    @case(f"a tar with {_name}", TAR.format(_found))
    def _(folder, content=_content):
        return write(folder / "x.tar", content)


@case("a tar with a long name in a sparse file", TAR.format("a name or record of 8,000,000,000 bytes at byte 512"))
def _(folder):
    write(folder / "x.tar", header("x", b"\x80" + (8 * 10**9).to_bytes(11, "big"), b"L"))
    return sparse(folder / "x.tar", 10**10)


@case("a tar with an image of 5 GB", "read: 1 images, .*FileTooLarge: the file: found 5,000,000,000 bytes")
def _(folder):
    write(folder / "x.tar", header("0.png", b"\x80" + (5 * 10**9).to_bytes(11, "big")))
    return sparse(folder / "x.tar", 10**10)


for _kind in ("cls", "json"):

    @case(
        f"a tar with a .{_kind} of 5 GB", f"refused: FileTooLarge: images.path: .*0.{_kind}: found 5,000,000,000 bytes"
    )
    def _(folder, kind=_kind):
        large = header(f"0.{kind}", b"\x80" + (5 * 10**9).to_bytes(11, "big"))
        write(folder / "x.tar", header("0.png", b"%o" % len(PNG)) + padded(PNG) + large)
        return sparse(folder / "x.tar", 10**10)


@case("a tar with deep JSON", "refused: InvalidInput: images.path: .*x.tar, sample 0: found .* in its .json")
def _(folder):
    return write_tar(folder / "x.tar", {"0.png": PNG, "0.json": b"[" * 100_000})


@case("a tar with many pax records", "read: 1 images, quarantined \\[\\]$")
def _(folder):
    return write(folder / "x.tar", pax(b"5 a=\n" * 300_000))


# Parquet, Arrow, text tables and .npz


def parquet(folder: Path, table: pa.Table, **options) -> Path:
    pq.write_table(table, folder / "x.parquet", **options)
    return folder / "x.parquet"


def repeated(values: list, count: int) -> pa.Array:
    """A column of equal values, which a file holds once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(values))


@case("20 million empty rows", "refused: InvalidInput: images.path: .*found 20,000,000 rows in .* at most 1,000,000")
def _(folder):
    return parquet(folder, pa.table({"image": pa.nulls(20_000_000, pa.binary())}), compression="zstd")


@case("a label of 2 MB in 100,000 rows", "refused: InvalidInput: .*column label: found texts of 200,000,000,000 bytes")
def _(folder):
    table = pa.table({"image": pa.nulls(100_000, pa.binary()), "label": repeated(["x" * 2_000_000], 100_000)})
    return parquet(folder, table, store_schema=False)


@case("an image of 8 MB in 200 rows", r"read: 200 images, quarantined \[.UnidentifiedImageError.*8,000,000 bytes")
def _(folder):
    return parquet(folder, pa.table({"image": repeated([b"x" * 8_000_000], 200)}), store_schema=False)


@case(
    "a table with a name of 2 MB in 100,000 rows", "refused: InvalidInput: .*column file_name: found texts of 200,000,"
)
def _(folder):
    table = pa.table({"file_name": repeated(["x" * 2_000_000], 100_000), "label": ["a"] * 100_000})
    pq.write_table(table, folder / "metadata.parquet", store_schema=False)


@case("Parquet with broken pages", "refused: InvalidInput: images.path: .*found no readable Parquet")
def _(folder):
    path = parquet(folder, pa.table({"image": [PNG] * 9}), compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:44] = b"\xa5" * 40
    return write(path, bytes(data))


def arrow(folder: Path, image: pa.Array) -> None:
    batch = pa.record_batch({"image": image})
    with pa.ipc.new_stream(folder / "data.arrow", batch.schema) as stream:
        stream.write_batch(batch)
    write(folder / "state.json", b'{"_data_files": [{"filename": "data.arrow"}]}')


@case("Arrow offsets out of the file", "refused: InvalidInput: images.path: .*found no readable Arrow stream .*ffset")
def _(folder):
    offsets = np.array([0, 5, 2, 5], np.int32)
    arrow(folder, pa.Array.from_buffers(pa.binary(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"12345")]))
    data = (folder / "data.arrow").read_bytes()
    write(folder / "data.arrow", data.replace(offsets.tobytes(), np.array([0, 2**30, 2**30, 5], np.int32).tobytes()))


@case("Arrow rows without bytes", "refused: InvalidInput: images.path: .*found 2,147,483,647 rows in")
def _(folder):
    arrow(folder, pa.Array.from_buffers(pa.binary(0), 2**31 - 1, [None, pa.py_buffer(b"")]))


@case(
    "JSON Lines nested deeply", "refused: InvalidInput: images.path: .*x.jsonl: found values nested more than 64 deep"
)
def _(folder):
    return write(folder / "x.jsonl", b'{"file_name": "a.png", "label": ' + b"[\n" * 100_000 + b"]" * 100_000 + b"}\n")


@case("JSON Lines with a field for each line", "refused: InvalidInput: images.path: .*: found up to 900,030,000 cells")
def _(folder):
    return write(folder / "x.jsonl", "".join(f'{{"k{index}": 1}}\n' for index in range(30_000)).encode())


@case(
    "a table with a line of 200 kB", "refused: InvalidInput: images.path: .*x.csv: found no readable table .field lar"
)
def _(folder):
    return write(folder / "x.csv", b'"' + b"a" * 200_000 + b'",label\n1,2\n')


def npy(shape: tuple, dtype: str = "|u1", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


PIXEL = npy((1, 1, 1, 3), data=b"abc")
LARGEST = (2**31 - 1).to_bytes(4, "little")
for _name, _arrays, _found in (
    ("more images than bytes", {"arr_0": npy((2**40, 64, 64, 3))}, r"an array of uint8 .1099511627776, 64, 64, 3. in"),
    ("images without pixels", {"arr_0": npy((2**40, 0, 0, 3))}, "arr_0 of uint8 .1099511627776, 0, 0, 3"),
    (
        "more labels than bytes",
        {"arr_0": PIXEL, "arr_1": npy((2**40,), "<i8")},
        r"an array of int64 .1099511627776,. in",
    ),
    ("a label of 2 billion", {"arr_0": PIXEL, "arr_1": npy((1,), "<i4", LARGEST)}, "the label 2147483647, expected"),
    ("pickled labels", {"arr_0": PIXEL, "arr_1": npy((1,), "|O", b"12345678")}, "an array of object"),
    ("no array", {"arr_0": b"abc"}, "no .npz file that can be read"),
):

    @case(f"an .npz with {_name}", f"refused: InvalidInput: images.path: .*found {_found}")
    def _(folder, arrays=_arrays):
        with zipfile.ZipFile(folder / "x.npz", "w") as archive:
            for name, data in arrays.items():
                archive.writestr(f"{name}.npy", data)
        return folder / "x.npz"


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_read_quarantined_or_refused(outcomes, name):
    assert re.match(CASES[name][1], outcomes[name], re.DOTALL), outcomes[name]
