"""Define the format of a log of ledgers, which a training loop writes one update at a time.

A file ``ledger_<k>.log`` consists of a header and records of one size, in little-endian byte order::

    header    16 bytes of `MAGIC`; length of the description, its complement, and CRC-32 of the description
              (uint32); the description (JSON)
    record    one for each update, with the fields of `LedgerHeader.record`; the last is the CRC-32 of the others

A file is only appended to, so that a reader may use every record whose checksum is correct. The header and a record
are written by one call each, and a process that is killed leaves at most one incomplete record, at the end.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import RECORDED_VECTORS

__all__ = ["SKIPPED", "LedgerHeader", "RecordedTensor", "is_valid", "ledger_names", "packed", "sealed", "unpacked"]

MAGIC = b"natgrad ledgers\n"
VERSION = 1
_MASK = 0xFFFFFFFF

SKIPPED = 1
"""Flag of an update that the optimizer skipped, because a gradient was not finite."""

_FILE = re.compile(r"ledger_(\d+)\.log")

_UPPER = np.triu_indices(len(RECORDED_VECTORS))
"""Products that a record contains of the symmetric matrix of a tensor."""


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor of the model.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype, gradient_dtype : str
        Dtypes of the parameter and the gradient in the training loop.
    group : int
        Parameter group, which has a learning rate.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    gradient_dtype: str
    group: int


@dataclass(frozen=True)
class LedgerHeader:
    """Description of the records of a file.

    Attributes
    ----------
    tensors : tuple of RecordedTensor
    groups : int
        Number of parameter groups.
    evaluation : str
        One of `natgrad.schema.names.EVALUATIONS`.
    vectors : tuple of str
        Vectors of the products.
    """

    tensors: tuple[RecordedTensor, ...]
    groups: int
    evaluation: str = "unknown"
    vectors: tuple[str, ...] = RECORDED_VECTORS

    @cached_property
    def record(self) -> np.dtype[Any]:
        """Dtype of a record.

        ``step`` is the number of updates before the update, and ``span`` the number of steps that it takes, 1.
        ``loss`` and ``rates`` are NaN if they are not known. ``ratio`` and ``gram`` are the ledger of each tensor;
        see `packed`.
        """
        count = len(self.tensors)
        fields = [
            ("step", "<i8"),
            ("span", "<u4"),
            ("flags", "<u4"),
            ("loss", "<f8"),
            ("rates", "<f8", (self.groups,)),
            ("ratio", "<f8", (count,)),
            ("gram", "<f8", (count, len(_UPPER[0]))),
            ("checksum", "<u4"),
        ]
        return np.dtype(fields)

    def to_bytes(self) -> bytes:
        """Return the header of a file."""
        text = json.dumps({"version": VERSION, **asdict(self)}).encode()
        return MAGIC + np.array([len(text), ~len(text) & _MASK, zlib.crc32(text)], "<u4").tobytes() + text

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[LedgerHeader, int] | None:
        """Return the header and its size; None if the data end before it does.

        Raises
        ------
        ValueError
            If the data are not the start of such a file, are damaged, or have another version.
        """
        if not data.startswith(MAGIC[: len(data)]):
            raise ValueError("it does not start like a log of ledgers")
        start = len(MAGIC) + 12
        if len(data) < start:
            return None
        length, complement, checksum = (int(word) for word in np.frombuffer(data, "<u4", 3, len(MAGIC)))
        if length ^ complement != _MASK:  # otherwise a damaged length could look like an incomplete header
            raise ValueError("the length of its header is wrong")
        text = data[start : start + length]
        if len(text) < length:
            return None
        if zlib.crc32(text) != checksum:
            raise ValueError("the checksum of its header is wrong")
        found = json.loads(text)
        if found.pop("version") != VERSION:
            raise ValueError("another version of natgrad wrote it")
        tensors = tuple(RecordedTensor(**{**one, "shape": tuple(one["shape"])}) for one in found.pop("tensors"))
        header = cls(tensors, vectors=tuple(found.pop("vectors")), **found)
        if header.vectors != RECORDED_VECTORS or any(one.group not in range(header.groups) for one in tensors):
            raise ValueError("its header does not describe a log of ledgers")
        return header, start + length


def packed(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the products of symmetric matrices that a record contains: the upper triangle, by rows."""
    return gram[..., *_UPPER]


def unpacked(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric matrices of `packed` products."""
    size = len(RECORDED_VECTORS)
    gram = np.empty((*products.shape[:-1], size, size))
    gram[..., *_UPPER] = gram[..., *_UPPER[::-1]] = products
    return gram


def sealed(record: NDArray[Any]) -> bytes:
    """Return the bytes of one record, with its checksum."""
    data = record.tobytes()[:-4]
    return data + zlib.crc32(data).to_bytes(4, "little")


def is_valid(data: bytes | memoryview) -> bool:
    """Return True if the bytes of one record have its checksum."""
    return zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")


def ledger_names(names: Iterable[str]) -> dict[int, str]:
    """Return the names of the files of a log of ledgers by number, in order, from those of a folder."""
    return dict(sorted((int(match[1]), name) for name in names if (match := _FILE.fullmatch(name))))
