"""Read safetensors files.

The safetensors library validates the file (header, no overlaps, no gaps). Tensors are then read by offset, because
the NumPy interface of the library does not support bfloat16 and cannot fill an existing buffer.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from natgrad.sources.bounds import Budget, integer, parse_json, parse_json_at, shown
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.container import Container, ObjectRegion, Region, read_errors
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import Storage, open_regular, require_regular

__all__ = ["SafetensorsFile"]

_FORM = "a safetensors file"
_NUMBER = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+|inf|nan)(e[-+]?[0-9]+)?\s*", re.IGNORECASE)
_METADATA = '{"__metadata__":'
_LONGEST_HEADER = 100_000_008
"""Maximum length of a header that the library accepts."""
_DTYPES = {"BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"F{bits}": f"float{bits}" for bits in (64, 32, 16)}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)}
_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)}


class _Tensors(NamedTuple):
    """Descriptions of the tensors in a header, the offsets of their data, and the end of the last one."""

    tensors: dict[str, LoggedTensor]
    offsets: dict[str, int]
    end: int


_HEADERS_KEPT, _HEADER_KEPT = 4, 1 << 20
"""Number of headers that are kept, and maximum length of each."""

_KNOWN: dict[str, _Tensors] = {}
"""The last headers that were read, without metadata. Most files of a log differ in their metadata only."""


class SafetensorsFile(Container):
    """One safetensors file.

    The numbers in its metadata, which are texts, are numbers of the step. A name in the metadata whose text is the
    name of a tensor is another name of it: libraries store tied tensors once.

    Parameters
    ----------
    step : LoggedStep
    file : Storage, optional
        File to read. By default, the file of the step.

    Raises
    ------
    InputError
        If the file cannot be read, or is not a complete safetensors file.
    """

    def __init__(self, step: LoggedStep, file: Storage | None = None) -> None:
        super().__init__(step)
        self._file = file = step.storage if file is None else file
        self._descriptor: int | None = None
        self._region: Region | ObjectRegion
        with read_errors(step, _FORM):
            if file.local_path is None:
                self._region = ObjectRegion(file)
                head = _head(self._region)
                _require_complete(head, self._region.length)
                self._region.widen()
            else:
                require_regular(file.local_path)
                _require_valid(file.local_path)
                self._descriptor = open_regular(file.local_path)
                self._region = Region(self._descriptor)
                head = _head(self._region)
        try:
            with read_errors(step, _FORM):
                self._describe(head)
        except BaseException:
            self.close()
            raise

    def _describe(self, head: bytes) -> None:
        self.budget = Budget(self._region.length)
        self._data = len(head)
        text = head[8:].decode("utf-8")
        metadata, tensors = _divided(text)
        known = _KNOWN.get(tensors)
        if known is None or known.end > self._region.length - self._data:
            header: dict[str, Any] = parse_json(text, "the header", self.budget)
            metadata = header.pop("__metadata__", None) or {}
            known = self._parsed(header)
            if len(tensors) <= _HEADER_KEPT:
                for oldest in list(_KNOWN)[: 1 - _HEADERS_KEPT]:
                    _KNOWN.pop(oldest, None)
                _KNOWN[tensors] = known
        self.tensors, self._offsets = dict(known.tensors), known.offsets
        for key, text in metadata.items():
            if key in self.tensors:
                continue
            self.texts[key] = str(text)
            if text in self.tensors:
                self.aliases[key] = str(text)
            elif _NUMBER.fullmatch(str(text)):
                self.numbers[key] = float(text)

    def _parsed(self, header: Mapping[str, Any]) -> _Tensors:
        """Check and return the descriptions of the tensors."""
        offsets, end = {}, 0
        for key, entry in header.items():
            first, last = (integer(offset, f"an offset of {shown(key)}") for offset in entry["data_offsets"])
            if not first <= last <= self._region.length - self._data:
                raise ValueError(f"the data of {shown(key)} exceed the file")
            self.add(key, entry["shape"], _DTYPES.get(entry["dtype"], entry["dtype"]))
            offsets[key], end = first, max(end, last)
        return _Tensors(self.tensors, offsets, end)

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._region.fill(self._data + self._offsets[key] + start * out.itemsize, out)

    def ranges(self, key: str) -> list[ByteRange]:
        """Return where the elements of a tensor are: the format stores them in C order, little-endian."""
        return [ByteRange(self._file, self._data + self._offsets[key], math.prod(self.tensors[key].shape))]

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is None:
            self._region.close()
        else:
            os.close(self._descriptor)


def _head(region: Region | ObjectRegion) -> bytes:
    """Read the length of the header, and the header."""
    length = np.empty(8, np.uint8)
    region.fill(0, length)
    size = 8 + int(length.view("<u8")[0])
    if size > min(region.length, _LONGEST_HEADER):
        raise ValueError(f"the header should have {size} bytes, but the file has {region.length}")
    head = np.empty(size, np.uint8)
    region.fill(0, head)
    return head.tobytes()


def _divided(text: str) -> tuple[dict[str, str], str]:
    """Divide a header, which the library has validated, into its metadata and the text of all other entries."""
    if not text.startswith(_METADATA):
        return {}, text
    metadata, end = parse_json_at(text, len(_METADATA), "the header")
    # JSON may contain a name twice.
    return (metadata or {}, text[end:]) if _METADATA[1:] not in text[end:] else ({}, text)


def _require_valid(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _require_complete(head: bytes, size: int) -> None:
    """Validate the header of a remote file with the library, in a local sparse file of the same size."""
    with tempfile.NamedTemporaryFile(prefix="natgrad-") as hollow:
        hollow.write(head)
        hollow.truncate(size)
        hollow.flush()
        _require_valid(Path(hollow.name))
