"""Check the table of a zip archive: its size, and that members are distinct, complete and do not overlap."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from natgrad.sources.bounds import EXPANDED_BYTES, EXPANSION, shown
from natgrad.sources.container import Region, first_bytes

__all__ = ["TABLE_BYTES", "TABLE_SHARE", "first_member", "open_archive", "stored_start"]

TABLE_BYTES, TABLE_SHARE = 1 << 23, 10
"""Maximum size of the table of members: bytes for any archive, and one byte more for this number of its bytes."""

_LOCAL_HEADER, _LOCAL_MAGIC = 30, b"PK\x03\x04"
_LONGEST_NAME = 1 << 16


class _LimitedFile:
    """A file whose single reads are limited, because `zipfile` reads the table of an archive in one read."""

    def __init__(self, file: Any, limit: int | None) -> None:
        self.file, self.limit = file, limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.limit is not None and size > self.limit:
            raise ValueError(f"its table of members would have {size} bytes, but the limit is {self.limit}")
        return cast(bytes, self.file.read(size))


def open_archive(file: Any, size: int) -> zipfile.ZipFile:
    """Open a zip archive and check its members.

    Parameters
    ----------
    file : binary file
        Closing the archive does not close it.
    size : int
        Its size in bytes.

    Raises
    ------
    zipfile.BadZipFile, ValueError
        If it is not a zip archive, its table is too long, two members have the same name or overlap, or the members
        expand to more than any real log does.
    """
    limited = _LimitedFile(file, TABLE_BYTES + size // TABLE_SHARE)
    archive = zipfile.ZipFile(cast(IO[bytes], limited))
    limited.limit = None
    members = archive.infolist()
    names = {member.filename for member in members}
    if len(names) != len(members):
        repeated = next(name for name in names if sum(member.filename == name for member in members) > 1)
        raise ValueError(f"it contains {shown(repeated)} twice")
    ends = sorted(
        (member.header_offset, member.header_offset + _LOCAL_HEADER + member.compress_size) for member in members
    )
    if any(start < end for (_, end), (start, _) in pairwise(ends)) or (ends and ends[-1][1] > size):
        raise ValueError("its members overlap or exceed the file")
    if sum(member.file_size for member in members) > EXPANDED_BYTES + EXPANSION * size:
        raise ValueError(
            f"its members would have more than {EXPANSION} times the size of the archive and {EXPANDED_BYTES} bytes"
        )
    return archive


def first_member(path: Path) -> str:
    """Return the name of the first member of a zip archive; empty if the file is none."""
    start = first_bytes(path, _LOCAL_HEADER + _LONGEST_NAME)
    length = int.from_bytes(start[26:28], "little") if start[:4] == _LOCAL_MAGIC else 0
    return start[_LOCAL_HEADER : _LOCAL_HEADER + length].decode(errors="replace")


def stored_start(region: Region, member: zipfile.ZipInfo) -> int:
    """Return the offset of the bytes of a member that is not compressed.

    Raises
    ------
    ValueError, EOFError
        If the member is compressed or incomplete, or its header differs from the table.
    """
    name = shown(member.filename)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"its member {name} is compressed or encrypted")
    raw = np.zeros(_LOCAL_HEADER, np.uint8)
    region.fill(member.header_offset, raw)
    header = raw.tobytes()
    name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    stored_name = np.zeros(name_length, np.uint8)
    region.fill(member.header_offset + _LOCAL_HEADER, stored_name)
    encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
    if header[:4] != _LOCAL_MAGIC or stored_name.tobytes() != member.orig_filename.encode(encoding, "replace"):
        raise ValueError(f"its member {name} is not at the offset in the table")
    start = member.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + member.file_size > region.length or member.file_size != member.compress_size:
        raise ValueError(f"its member {name} should have {member.file_size} bytes and is truncated")
    return start
