"""Headers of a tar archive, without its content: three times as fast as tarfile, and by few requests from afar.

Formats: POSIX.1-1988 (ustar), POSIX.1-2001 (pax: path and size), and GNU long names.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from pipelines.images.listing import stamp_of

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class TarError(ValueError):
    """What was found in place of an archive, what was expected, and what to do."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    size: int
    stamp: int


class Blocks:
    """A file read in order but for gaps: in blocks, which serve many small reads that lie side by side."""

    def __init__(self, file: pa.NativeFile, is_local: bool):
        self.file = file
        # A disk gains nothing from bytes that are then skipped; a request to an object store costs 30 ms.
        self.block_bytes = 2**16 if is_local else 2**22
        self.end = file.size()
        self.start, self.block = 0, b""

    def at(self, offset: int, size: int) -> bytes:
        """Bytes from an offset; fewer at the end of the file."""
        size = max(0, min(size, self.end - offset))
        if size and not self.start <= offset <= offset + size <= self.start + len(self.block):
            self.start, self.block = (
                offset,
                self.file.read_at(min(max(size, self.block_bytes), self.end - offset), offset),
            )
        begin = offset - self.start
        return self.block[begin : begin + size]


def members(blocks: Blocks) -> Iterator[Member]:
    """The regular files of an archive, in order. Raises TarError where it is broken or cut off."""
    offset = 0
    name: str | None = None  # of the next file, where it does not fit into the file's own header
    size_of_next: int | None = None
    while header := blocks.at(offset, BLOCK):
        if header == bytes(BLOCK):
            return
        _check(header, offset)
        kind = header[156:157]
        size = size_of_next if size_of_next is not None and kind not in b"xgLK" else _number(header[124:136])
        content = offset + BLOCK
        offset = content + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            name = _text(blocks.at(content, size).rstrip(b"\0"))
        elif kind == b"x":
            fields = _pax(blocks.at(content, size))
            name = fields.get("path", name)
            size_of_next = int(fields["size"]) if "size" in fields else size_of_next
        elif kind not in b"gK":
            if kind in b"0\0":
                yield Member(name or _name(header), content, size, stamp_of(header))
            name = size_of_next = None
    raise TarError(
        f"found the end of the file at {offset:,} bytes without the archive's end mark, so it is cut off or still "
        "being written; expected a whole archive. Copy or write it again"
    )


def _check(header: bytes, offset: int) -> None:
    """A header's checksum: the sum of its bytes, its own eight counted as spaces."""
    try:
        if len(header) == BLOCK and _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return
    except ValueError:
        pass
    for magic, name in COMPRESSED.items():
        if not offset and header.startswith(magic):
            raise TarError(
                f"found a file compressed by {name}, expected a plain tar, which can be read anywhere; unpack it"
            )
    raise TarError(
        f"found no tar header at byte {offset:,}, expected a whole, uncompressed archive; copy or write it again"
    )


def _number(field: bytes) -> int:
    """Octal digits; or a big-endian integer behind a set first bit, for what octal digits cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    return int(field.rstrip(b"\0 ").lstrip() or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100].partition(b"\0")[0])
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix)}/{name}" if prefix else name


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TarError(f"found the name {data!r}, expected UTF-8; write the archive anew") from error


def _pax(data: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record."""
    fields = {}
    while data:
        length, _, rest = data.partition(b" ")
        record, data = rest[: int(length) - len(length) - 2], data[int(length) :]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = _text(value)
    return fields
