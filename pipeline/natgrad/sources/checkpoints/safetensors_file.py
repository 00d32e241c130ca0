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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from natgrad.sources.bounds import Budget, integer, parse_json, parse_json_at, shown
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.container import Container, ObjectRegion, Region, read_errors
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import Storage, open_regular

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
    """Descriptions of the tensors in a header, the offsets of their data, and the size of all data."""

    tensors: dict[str, LoggedTensor]
    offsets: dict[str, int]
    size: int


_HEADERS_KEPT, _HEADER_KEPT = 4, 1 << 20
"""Number of headers that are kept, and maximum length of each."""

_KNOWN: dict[str, _Tensors] = {}
"""The last headers that were read, without metadata. Most files of a log differ in their metadata only."""


class SafetensorsFile(Container):
    """One safetensors file.

    The numbers in its metadata, which are stored as text, are numbers of the step. If the value of a name in the
    metadata is the name of a tensor, both names refer to this tensor: libraries store tied tensors once.

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
            else:
                self._descriptor = open_regular(file.local_path)
                self._region = Region(self._descriptor)
        try:
            with read_errors(step, _FORM):
                self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        self.budget = Budget(self._region.length)
        head = _head(self._region)
        self._data = len(head)
        text = head[8:].decode("utf-8", "surrogateescape")
        metadata, tensors = _divided(text)
        known = _KNOWN.get(tensors)
        # If the library has validated a header with these tensors, only the metadata and the size can be invalid.
        if metadata is None or known is None or known.size != self._region.length - self._data:
            _require_valid(self._file, self._region, head)
            header: dict[str, Any] = parse_json(text, "the header", self.budget)
            divided, metadata = metadata, header.pop("__metadata__", None) or {}
            known = self._parsed(header)
            if divided == metadata and len(tensors) <= _HEADER_KEPT:
                for oldest in list(_KNOWN)[: 1 - _HEADERS_KEPT]:
                    _KNOWN.pop(oldest, None)
                _KNOWN[tensors] = known
        if isinstance(self._region, ObjectRegion):
            self._region.widen()
        self._known, self.tensors = known, dict(known.tensors)
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
            self._region.fill(self._data + self._known.offsets[key] + start * out.itemsize, out)

    def ranges(self, key: str) -> list[ByteRange]:
        """Return where the elements of a tensor are: the format stores them in C order, little-endian."""
        return [ByteRange(self._file, self._data + self._known.offsets[key], math.prod(self.tensors[key].shape))]

    def placement(self) -> Placement:
        """Return where the ranges of all tensors begin; see `natgrad.sources.base.Ranged`."""
        return Placement(self._known, (self._file,), (self._data,))

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


def _divided(text: str) -> tuple[dict[str, str] | None, str]:
    """Divide a header into its metadata, None if they are not valid, and the text of all other entries.

    Metadata is found only if it is the first entry.
    """
    tensors = text.rstrip(" ")
    if not text.startswith(_METADATA):
        return {}, tensors
    try:
        metadata, end = parse_json_at(tensors, len(_METADATA), "the header")
        # All are strings without surrogates.
        "".join([*metadata, *metadata.values()]).encode("utf-8")
    except (ValueError, TypeError, AttributeError):
        return None, tensors
    return metadata, tensors[end:]


def _require_valid(file: Storage, region: Region | ObjectRegion, head: bytes) -> None:
    """Validate a file with the library: the header of a remote file in a local sparse file of the same size."""
    try:
        if file.local_path is not None:
            with safe_open(file.local_path, framework="numpy"):
                return
        with tempfile.NamedTemporaryFile(prefix="natgrad-") as hollow:
            hollow.write(head)
            hollow.truncate(region.length)
            hollow.flush()
            with safe_open(hollow.name, framework="numpy"):
                pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
