"""The records that make data visible: which rows there are, the checksums of what is in them, and where it is from.

A record is one JSON document. Checksums and sources, of which there is one for every row, are text in it that need
not be parsed: the numbers as they lie in memory, and the sources compressed, as only ingest looks at them.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage import delete, is_url, names, put, read, seen
from natgrad.storage.disk import flush, replace_file

__all__ = ["Journal", "sources_of"]

_SEAL = '{"crc32c":"%08x",'
_SEAL_BYTES = len(_SEAL % 0)


def _seal(body: bytes) -> bytes:
    return (_SEAL % crc32c(body)).encode()


def _packed(checksums: ArrayLike) -> str:
    return base64.b64encode(np.asarray(checksums, "<u4").tobytes()).decode()


def _unpacked(checksums: str | list[Any], groups: int) -> NDArray[np.uint32]:
    """Checksums (groups of rows, columns); before version 3 they were numbers in lists."""
    if isinstance(checksums, str):
        found = np.frombuffer(base64.b64decode(checksums, validate=True), "<u4")
    else:
        found = np.asarray(checksums, "<u4")
    return found.reshape(groups, found.size // max(groups, 1))


def sources_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what identifies the source of each row of a record."""
    sources: str | list[dict[str, Any]] = record["sources"]
    if isinstance(sources, str):
        sources = json.loads(zlib.decompress(base64.b64decode(sources)))
    return sources  # type: ignore[return-value]


class Journal:
    """Records that make data visible: one small JSON file each, under the checksum of its bytes.

    Parameters
    ----------
    folder : Path
    sealed : bool
        Whether a record without checksum is refused: the first version of the layout had none.
    """

    def __init__(self, folder: Path, sealed: bool = True) -> None:
        self.folder, self._sealed = folder, sealed

    def names(self) -> list[str]:
        """Names of the records, in order."""
        found = names(self.folder)
        return [name.removesuffix(".json") for name in found if name[0].isdigit() and name.endswith(".json")]

    def read(self, name: str) -> dict[str, Any]:
        """Read a record.

        Returns
        -------
        dict
            With ``start`` and ``stop``, its rows; ``checksums``, array to uint32 array (groups, chunk columns), of
            groups of ``checksum_rows`` rows (array to number), of single rows where the record does not say;
            and what else was written. `sources_of` reads its sources.

        Raises
        ------
        InputError
            Where it cannot be read.
        """
        path = self.folder / f"{name}.json"
        try:
            content = read(path)
            if content[:_SEAL_BYTES] != _seal(content[_SEAL_BYTES:]) and (
                self._sealed or content.startswith(b'{"crc32c"')
            ):
                raise ValueError("it has another checksum than its bytes")
            record: dict[str, Any] = json.loads(content)
            if "checksums" in record:
                rows, covered = record["stop"] - record["start"], record.get("checksum_rows", {})
                record["checksums"] = {
                    key: _unpacked(sums, math.ceil(rows / covered.get(key, 1)))
                    for key, sums in record["checksums"].items()
                }
        except (OSError, ValueError, LookupError) as error:
            raise InputError(
                f"cannot read a commit record: {error}",
                where=str(path),
                why="records are renamed into place whole, so the file was changed or the disk failed",
                remedy="ingest again with --overwrite",
            ) from error
        return record

    def write(self, name: str, record: Mapping[str, Any], new: bool = False) -> None:
        """Add a record, or replace it: on return it is on disk.

        Parameters
        ----------
        name : str
        record : mapping
            As it is read; ``sources`` may be a list of mappings.
        new : bool
            In an object store, do not replace one: that none is there proves that nobody else wrote meanwhile.

        Raises
        ------
        Unavailable
            Where there is another record of a new name.
        """
        written = {key: value for key, value in record.items() if key != "crc32c"}
        if "checksums" in written:
            written["checksums"] = {key: _packed(sums) for key, sums in written["checksums"].items()}
        if not isinstance(written.get("sources", ""), str):
            text = json.dumps(written["sources"], separators=(",", ":")).encode()
            written["sources"] = base64.b64encode(zlib.compress(text)).decode()
        body = json.dumps(written, separators=(",", ":")).encode()[1:]
        path, content = self.folder / f"{name}.json", _seal(body) + body
        if new and is_url(path):
            self._add(path, content)
            return
        replace_file(path, content)
        flush(self.folder)

    def _add(self, path: Path, content: bytes) -> None:
        try:
            put(path, content, new=True)
        except FileExistsError as error:
            # A request whose answer was lost is sent again by the library, and then meets its own record.
            found = seen(path)
            if found is None or found[0] != content:
                raise Unavailable(
                    "another process has committed meanwhile",
                    where=str(path),
                    why="the lock of this one was removed while it was writing",
                    remedy="see that one process writes, look with natgrad verify OUT, and run again",
                ) from error

    def clear(self) -> None:
        """Remove what a writer that was killed left aside."""
        if is_url(self.folder):
            return
        for aside in self.folder.glob(".*.tmp"):
            aside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Forget a record."""
        path = self.folder / f"{name}.json"
        if is_url(path):
            delete(path)
            return
        path.unlink()
        flush(self.folder)
