"""Files that were made to harm, or broken by accident, are read, quarantined or refused: quickly, and in little memory.

All of them are read in one process with bounded memory and time (`hostile`), because importing the readers takes longer
than reading the files.
"""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import read_all
from pictures import encoded, square, write, write_tar

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
    with open(path, "wb") as file:
        file.truncate(num_bytes)
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


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_read_quarantined_or_refused(outcomes, name):
    assert re.match(CASES[name][1], outcomes[name], re.DOTALL), outcomes[name]
