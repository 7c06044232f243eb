"""The checksums in PyTorch's zip files of weights, which `torch.load` does not verify."""

import zipfile
from pathlib import Path

from raydit.errors import InvalidInput
from raydit.printable import one_line

CHUNK = 2**20
"""Bytes that are read at a time."""


def refuse_damaged_zip(file: Path) -> None:
    """Raise InvalidInput, naming the first wrong part, for a zip file whose content does not match its checksums.

    The file is read once. Other formats pass, as does a part without a checksum: torch.save writes 0 there after
    `torch.serialization.set_crc32_options(False)`. It compresses nothing, and compressed parts are left to the reader.
    """
    if not zipfile.is_zipfile(file):
        return
    name = "its list of parts"
    try:
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.CRC and part.compress_type == zipfile.ZIP_STORED:
                    name = part.filename
                    with archive.open(part) as content:
                        while content.read(CHUNK):
                            pass
    except Exception as error:  # of a malformed zip: anything from BadZipFile to NotImplementedError
        raise InvalidInput(
            f"{file} is damaged: found {one_line(name)[:80]} with bytes that do not match its checksum",
            "the content that was saved",
            "copy the file again",
        ) from error
