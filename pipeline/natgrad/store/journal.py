"""Read and write the commit records, which list the visible states or updates, their checksums and their sources.

A record is one JSON document. The checksums and sources of its states or updates are stored as strings, so that
JSON does not parse them one by one: the checksums as base64 of their bytes, and the sources compressed, because
only ingest reads them.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.logs import logger
from natgrad.storage import Storage

__all__ = ["Journal", "sources_of"]

_log = logger(__name__)

_VERIFICATION = "verified"
"""Name of the record of times. It is not a commit record: records of equal data stay equal."""

_PROVISIONAL = "provisional"
"""Name of the record of a provisional state, which the next commit replaces."""

_CONFIGURATION = "configuration"
"""Name of the record of the configurations of the runs."""

_DROPPED = "dropped"
"""Name of the record of states whose elements were removed."""

_SEAL = '{"crc32c":"%08x",'
_SEAL_BYTES = len(_SEAL % 0)


def _seal(name: str, body: bytes) -> bytes:
    """Return the start of a record. Its checksum includes the name, so that no record can replace another."""
    return (_SEAL % crc32c(body, crc32c(name.encode()))).encode()


def _pack(checksums: ArrayLike) -> str:
    """Encode checksums as base64."""
    return base64.b64encode(np.asarray(checksums, "<u4").tobytes()).decode()


def _unpack(checksums: str, groups: int) -> NDArray[np.uint32]:
    """Decode checksums, shape (groups of states or updates, chunk columns)."""
    found = np.frombuffer(base64.b64decode(checksums, validate=True), "<u4")
    return found.reshape(groups, found.size // max(groups, 1))


def sources_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the identity of the source of each state of a record."""
    return json.loads(zlib.decompress(base64.b64decode(record["sources"])))  # type: ignore[no-any-return]  # JSON


class Journal:
    """The commit records of a store, each a small JSON file that starts with its checksum.

    Parameters
    ----------
    folder : Storage
    remedy : str
        Advice for a record that cannot be read, for the error message.
    """

    def __init__(self, folder: Storage, remedy: str = "") -> None:
        self.folder, self._remedy = folder, remedy

    def names(self) -> list[str]:
        """Return the names of the records, in order."""
        found = self.folder.list()
        return [name.removesuffix(".json") for name in found if name[0].isdigit() and name.endswith(".json")]

    def has(self, name: str) -> bool:
        """Return True if there is a record of this name."""
        return self._entry(name).exists()

    def _entry(self, name: str) -> Storage:
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """Read a record.

        Returns
        -------
        dict
            ``start`` and ``stop`` are the range of states or updates. ``checksums`` maps each array to a uint32
            array, shape (groups, chunk columns). ``checksum_rows`` maps an array to the number of states or
            updates in a group, 1 by default. Other entries are returned as written. `sources_of` decodes the
            sources.

        Raises
        ------
        InputError
            If the record cannot be read.
        """
        entry = self._entry(name)
        try:
            content = entry.get()
            if content[:_SEAL_BYTES] != _seal(name, content[_SEAL_BYTES:]):
                raise ValueError("checksum mismatch")
            record: dict[str, Any] = json.loads(content)
            if "checksums" in record:
                count, covered = record["stop"] - record["start"], record.get("checksum_rows", {})
                record["checksums"] = {
                    key: _unpack(sums, math.ceil(count / covered.get(key, 1)))
                    for key, sums in record["checksums"].items()
                }
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, OSError) and entry.local_path is None and not isinstance(error, FileNotFoundError):
                raise  # an object store denies access, for example
            raise InputError(
                f"cannot read a commit record: {error}",
                where=str(entry),
                why="records are written atomically, so the file was changed, or the disk failed",
                remedy=self._remedy,
            ) from error
        return record

    def write(self, name: str, record: Mapping[str, Any], new: bool = False) -> None:
        """Add or replace a record; it is durable on return.

        Parameters
        ----------
        name : str
        record : mapping
            As returned by `read`; ``sources`` may be a list of mappings.
        new : bool
            Do not replace an existing record. Its absence proves that no other process has committed.

        Raises
        ------
        Unavailable
            If ``new`` is True and the record exists with different content.
        """
        written = {key: value for key, value in record.items() if key != "crc32c"}
        if "checksums" in written:
            written["checksums"] = {key: _pack(sums) for key, sums in written["checksums"].items()}
        if not isinstance(written.get("sources", ""), str):
            text = json.dumps(written["sources"], separators=(",", ":")).encode()
            written["sources"] = base64.b64encode(zlib.compress(text)).decode()
        body = json.dumps(written, separators=(",", ":")).encode()[1:]
        entry, content = self._entry(name), _seal(name, body) + body
        if not new:
            entry.put(content)
            return
        try:
            entry.put_once(content)
        except FileExistsError as error:
            raise Unavailable(
                "another process has committed in the meantime",
                where=str(entry),
                why="the lock of this process was removed while it was writing",
                remedy="ensure that only one process writes, run natgrad verify OUT, and run again",
            ) from error

    def write_verification(self, record: Mapping[str, Any]) -> None:
        """Record when data was compared with its checksums."""
        self.write(_VERIFICATION, record)

    def read_verification(self) -> dict[str, Any]:
        """Return the record of `write_verification`; an empty one if there is none, or if it is damaged."""
        if not self.has(_VERIFICATION):
            return {}
        try:
            return self.read(_VERIFICATION)
        except InputError as error:
            _log.warning("%s (%s): the time of the last verification is unknown", error.what, error.where)
            return {}

    def read_provisional(self) -> dict[str, Any]:
        """Return the record of a provisional state; an empty one if there is none."""
        if not self.has(_PROVISIONAL):
            return {}
        try:
            return self.read(_PROVISIONAL)
        except InputError:
            if not self.has(_PROVISIONAL):  # the state was completed in the meantime
                return {}
            raise

    def write_provisional(self, record: Mapping[str, Any]) -> None:
        """Add or replace the record of a provisional state; remove it if the new one is empty."""
        if record:
            self.write(_PROVISIONAL, record)
        elif self.has(_PROVISIONAL):
            self.remove(_PROVISIONAL)

    def write_dropped(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Record ranges of states whose elements were removed."""
        self.write(_DROPPED, {"states": [list(each) for each in ranges]})

    def read_dropped(self) -> list[tuple[int, int]]:
        """Return the ranges of `write_dropped`."""
        if not self.has(_DROPPED):
            return []
        return [(int(start), int(stop)) for start, stop in self.read(_DROPPED)["states"]]

    def write_configurations(self, configurations: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the configuration of each run."""
        self.write(_CONFIGURATION, {"runs": configurations})

    def read_configurations(self) -> dict[str, dict[str, Any]]:
        """Return the configuration of each run that has one."""
        return dict(self.read(_CONFIGURATION)["runs"]) if self.has(_CONFIGURATION) else {}

    def clear(self) -> None:
        """Remove incomplete records that a killed writer left."""
        self.folder.clear_leftovers()

    def remove(self, name: str) -> None:
        """Remove a record."""
        self._entry(name).delete()
