"""Read the headers of a tar archive without its content.

Three times as fast as tarfile, and with few requests to an object store. Formats: POSIX.1-1988 (ustar), POSIX.1-2001
(pax: path and size), and GNU long names.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from pipelines.images.listing import make_stamp
from raydit.errors import InvalidInput

BLOCK = 512
"""Bytes of a tar block; headers and contents start at multiples of it."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
"""Names of compression formats by their first bytes."""
MAX_EXTENSION_BYTES = 2**24
"""Longest name or pax record. Systems allow names of 4,096 bytes; pax records also hold attributes of files."""
_PAX_RECORD = re.compile(rb"([0-9]{1,8}) ")


class TarError(InvalidInput):
    """Raised for a broken, truncated or compressed archive, also for one whose headers claim what cannot be."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Offset of its first byte in the archive."""
    size: int
    """Length in bytes."""
    stamp: int
    """Hash of its header."""


class BlockReader:
    """Reads a file from front to back in large blocks, which serve many small reads close to each other."""

    def __init__(self, file: pa.NativeFile, is_local: bool):
        self.file = file
        # Reading bytes that are then skipped gains nothing on a disk; a request to an object store takes 30 ms.
        self.block_bytes = 2**16 if is_local else 2**22
        self.end = file.size()
        self.start, self.block = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; fewer at the end of the file."""
        size = max(0, min(size, self.end - offset))
        if size and not self.start <= offset <= offset + size <= self.start + len(self.block):
            self.start, self.block = (
                offset,
                self.file.read_at(min(max(size, self.block_bytes), self.end - offset), offset),
            )
        begin = offset - self.start
        return self.block[begin : begin + size]


def read_members(blocks: BlockReader) -> Iterator[Member]:
    """Yield the regular files of an archive in order. Raises TarError if the archive is broken or truncated.

    Every length that a header claims is held against the bytes that follow before anything of it is read.
    """
    offset = 0
    name: str | None = None  # name of the next file, if it does not fit into the file's own header
    size_of_next: int | None = None
    while header := blocks.read(offset, BLOCK):
        if header == bytes(BLOCK):
            return
        _check_header(header, offset)
        kind = header[156:157]
        size = size_of_next if size_of_next is not None and kind not in b"xgLK" else _parse_size(header, offset)
        content = offset + BLOCK
        if size > blocks.end - content or (size > MAX_EXTENSION_BYTES and kind in b"xL"):
            raise _wrong_size(size, content, blocks.end)
        offset = content + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            name = _decode_text(blocks.read(content, size).rstrip(b"\0"))
        elif kind == b"x":
            fields = _parse_pax(blocks.read(content, size), content)
            name = _decode_text(fields[b"path"]) if b"path" in fields else name
            size_of_next = _parse_pax_size(fields[b"size"], content) if b"size" in fields else size_of_next
        elif kind not in b"gK":
            if kind in b"0\0":
                yield Member(name or _parse_name(header), content, size, make_stamp(header))
            name = size_of_next = None
    raise _truncated(f"found the end of the file at byte {offset:,} without an end-of-archive marker")


def _truncated(found: str) -> TarError:
    return TarError(found, "a complete archive", "it is truncated or still being written: copy or write it again")


def _wrong_size(size: int, content: int, end: int) -> TarError:
    """Return the error for a file that is longer than what is left of the archive, or for a name that is too long."""
    if size > end - content:
        return _truncated(f"found a file of {size:,} bytes at byte {content:,}, where {max(0, end - content):,} follow")
    found = f"found a name or record of {size:,} bytes at byte {content:,}"
    return TarError(found, f"a complete archive with at most {MAX_EXTENSION_BYTES:,}", "write it again")


def _check_header(header: bytes, offset: int) -> None:
    """Raise TarError unless the checksum is right: the sum of the header's bytes, its own eight counted as spaces."""
    try:
        if len(header) == BLOCK and _parse_number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return
    except ValueError:
        pass
    for magic, name in COMPRESSED.items():
        if not offset and header.startswith(magic):
            raise TarError(
                f"found a file compressed with {name}",
                "an uncompressed tar, which allows random access",
                "decompress it",
            )
    raise TarError(
        f"found no tar header at byte {offset:,}", "a complete, uncompressed archive", "copy or write it again"
    )


def _parse_size(header: bytes, offset: int) -> int:
    try:
        return _parse_number(header[124:136])
    except ValueError:
        raise TarError(
            f"found the length {header[124:136]!r} in the header at byte {offset:,}",
            "a complete archive",
            "copy it again",
        ) from None


def _parse_number(field: bytes) -> int:
    """Parse octal digits, or a big-endian integer after a set first bit, for numbers that octal digits cannot hold.

    Raises ValueError for anything else, such as a sign.
    """
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip(b" ") or b"0"
    if not digits.isdigit():  # int takes signs, underscores and prefixes as well
        raise ValueError(f"no octal digits: {field!r}")
    return int(digits, 8)


def _parse_name(header: bytes) -> str:
    name = _decode_text(header[:100].partition(b"\0")[0])
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return f"{_decode_text(prefix)}/{name}" if prefix else name


def _decode_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TarError(f"found the name {data!r}", "UTF-8", "write the archive again") from error


def _parse_pax(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Parse records "LENGTH KEY=VALUE\\n", in which LENGTH counts the entire record. offset: that of the data."""
    fields, begin = {}, 0
    while begin < len(data) and data[begin]:  # some writers fill the block with zeros
        match = _PAX_RECORD.match(data, begin)
        end = begin + int(match[1]) if match else 0
        # A length of 0 would read the same record for ever.
        if match is None or not match.end() < end <= len(data):
            raise TarError(
                f"found a record without a length at byte {offset + begin:,}", "a complete archive", "write it again"
            )
        key, _, value = data[match.end() : end - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key] = value
        begin = end
    return fields


def _parse_pax_size(value: bytes, offset: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise TarError(f"found the length {value[:40]!r} at byte {offset:,}", "a complete archive", "write it again")
    return int(value)
