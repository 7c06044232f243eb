"""Read the headers of a tar archive without its content.

Three times as fast as tarfile, and with few requests to an object store. Formats: POSIX.1-1988 (ustar), POSIX.1-2001
(pax: path, linkpath and size), and GNU long names.
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
LINK, FOLDER, CONTIGUOUS = b"1", b"5", b"7"
"""Kinds of members. POSIX lets a reader take a contiguous file for a regular one."""
OTHER_KINDS = {b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "a sparse file"}
_PAX_RECORD = re.compile(rb"([0-9]{1,8}) ")


class TarError(InvalidInput):
    """Raised for a broken, truncated or compressed archive, also for one whose headers claim what cannot be."""


class Member(NamedTuple):
    """A regular file in an archive, or a further name of one."""

    name: str
    offset: int
    """Offset of its first byte in the archive."""
    size: int
    """Length in bytes."""
    stamp: int
    """Hash of its header; for a further name, also of the file's."""


class LeftOut(NamedTuple):
    """A member of an archive that cannot be read as a file."""

    name: str
    reason: str
    """Description of what the member is, such as a link or a device."""


class _Extensions(NamedTuple):
    """What records before a member say about it, because there is no room for it in the member's own header."""

    name: str | None = None
    link: bytes | None = None
    size: int | None = None

    def add(self, kind: bytes, data: bytes, offset: int) -> "_Extensions":
        """Return the extensions with those of a further record. offset: that of the data."""
        if kind == b"L":
            return self._replace(name=_decode_text(data.rstrip(b"\0")))
        if kind == b"K":
            return self._replace(link=data.rstrip(b"\0"))
        fields = _parse_pax(data, offset)
        return _Extensions(
            _decode_text(fields[b"path"]) if b"path" in fields else self.name,
            fields.get(b"linkpath", self.link),
            _parse_pax_size(fields[b"size"], offset) if b"size" in fields else self.size,
        )


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


def read_members(blocks: BlockReader, *, earlier: bool = False) -> Iterator[Member | LeftOut]:
    """Yield the files of an archive in order, and between them what cannot be read as a file, without folders.

    A hard link, by which GNU tar stores each further name of a file, has the content of the file. earlier: yield only
    regular files. Raises TarError if the archive is broken or truncated: the lengths in headers are checked against the
    file's length before any memory is allocated.
    """
    offset, extensions = 0, _Extensions()
    files: dict[str, Member] = {}
    while header := blocks.read(offset, BLOCK):
        if header == bytes(BLOCK):
            return
        _check_header(header, offset)
        kind, content = header[156:157], offset + BLOCK
        size = extensions.size if extensions.size is not None and kind not in b"xgLK" else _parse_size(header, offset)
        if kind == LINK and size and _ends_member(blocks.read(content, BLOCK)):
            size = 0  # some writers state the length of the file, whose content does not follow again
        if size > blocks.end - content or (size > MAX_EXTENSION_BYTES and kind in b"xLK"):
            raise _wrong_size(size, content, blocks.end)
        offset = content + -(-size // BLOCK) * BLOCK
        if kind in b"xLK":
            extensions = extensions.add(kind, blocks.read(content, size), content)
        elif kind != b"g":
            if kind in b"0\0":
                member = Member(extensions.name or _parse_name(header), content, size, make_stamp(header))
                files[member.name] = member
                yield member
            elif not earlier and kind != FOLDER:
                yield from _read_other(header, content, size, extensions, files)
            extensions = _Extensions()
    raise _truncated(f"found the end of the file at byte {min(offset, blocks.end):,} without an end-of-archive marker")


def _read_other(
    header: bytes, content: int, size: int, extensions: _Extensions, files: dict[str, Member]
) -> Iterator[Member | LeftOut]:
    """Yield a member that is no regular file. files: those before it by their names, to which its own is added."""
    kind = header[156:157]
    try:
        name = extensions.name or _parse_name(header)
    except TarError:  # not refused: no file may be lost
        yield LeftOut(header[:100].partition(b"\0")[0].decode(errors="replace"), "a name that is not UTF-8")
        return
    stored = extensions.link or header[157:257].partition(b"\0")[0]
    link = stored.decode(errors="replace")
    if kind == CONTIGUOUS or (kind == LINK and size):  # writers of pax may repeat the content after a link
        files[name] = Member(name, content, size, make_stamp(header))
    elif kind == LINK and link in files:
        _, content, size, stamp = files[link]
        files[name] = Member(name, content, size, make_stamp(header, stamp.to_bytes(8, "little", signed=True)))
    else:
        missing = f"a link to {link}, which is not before it in the archive"
        yield LeftOut(name, missing if kind == LINK else OTHER_KINDS.get(kind, f"of the unknown kind {kind!r}"))
        return
    yield files[name]


def _truncated(found: str) -> TarError:
    return TarError(found, "a complete archive", "it is truncated or still being written: copy or write it again")


def _wrong_size(size: int, content: int, end: int) -> TarError:
    """Return the error for a file that is longer than what is left of the archive, or for a name that is too long."""
    if size > end - content:
        return _truncated(f"found a file of {size:,} bytes at byte {content:,}, where {max(0, end - content):,} follow")
    found = f"found a name or record of {size:,} bytes at byte {content:,}"
    return TarError(found, f"a complete archive with at most {MAX_EXTENSION_BYTES:,}", "write it again")


def _check_header(header: bytes, offset: int) -> None:
    """Raise TarError for a block that is no header."""
    if _has_checksum(header):
        return
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


def _ends_member(block: bytes) -> bool:
    """Return whether a block is no content of a member: the next header, or the end of the archive."""
    return block == bytes(BLOCK) or _has_checksum(block)


def _has_checksum(block: bytes) -> bool:
    """Return whether a block has a header's checksum: the sum of its bytes, the checksum's own eight as spaces."""
    try:
        return len(block) == BLOCK and _parse_number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


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
        # A length of 0 would read the same record forever.
        if match is None or not match.end() < end <= len(data):
            raise TarError(
                f"found a record without a length at byte {offset + begin:,}", "a complete archive", "write it again"
            )
        key, _, value = data[match.end() : end - 1].partition(b"=")
        if key in (b"path", b"linkpath", b"size"):
            fields[key] = value
        begin = end
    return fields


def _parse_pax_size(value: bytes, offset: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise TarError(f"found the length {value[:40]!r} at byte {offset:,}", "a complete archive", "write it again")
    return int(value)
