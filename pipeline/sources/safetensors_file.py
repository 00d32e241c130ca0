"""A step in a safetensors file.

The library validates the file (header, no overlap, nothing missing); tensors are then read by offset, as its
NumPy interface neither reads bfloat16 nor fills a given buffer.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.schema import InputError
from pipeline.sources.base import SCALAR_KEYS, LoggedStep, LoggedTensor, StepContent, sort_content, where

__all__ = ["SafetensorsFile"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALAR_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}


class SafetensorsFile:
    """Reader of one step; a context manager that holds the file open."""

    def __init__(self, step: LoggedStep) -> None:
        """Open and validate.

        Raises
        ------
        InputError
            Where the file cannot be read, or is not a whole safetensors file.
        """
        self._step = step
        path: Path = step.path
        try:
            with safe_open(path, framework="numpy"):
                pass
            self._descriptor = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read a safetensors file: {error}",
                where=where(step),
                why="it is truncated or still being written, not a safetensors file, or not readable",
                remedy="write the step again (to another name, then rename), or remove the file",
            ) from error
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
        header.pop("__metadata__", None)
        self._header, self._data = header, 8 + length

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def content(self) -> StepContent:
        """Describe the step; see `pipeline.sources.base.sort_content` for what is refused."""
        tensors = {
            key: LoggedTensor(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
            for key, entry in self._header.items()
        }
        scalars = {
            key: self._scalar(entry)
            for key, entry in self._header.items()
            if key in SCALAR_KEYS and math.prod(entry["shape"]) == 1 and entry["dtype"] in _SCALAR_DTYPES
        }
        return sort_content(self._step, tensors, scalars)

    def _scalar(self, entry: dict[str, Any]) -> float:
        start, stop = entry["data_offsets"]
        raw = os.pread(self._descriptor, stop - start, self._data + start)
        return float(np.frombuffer(raw, _SCALAR_DTYPES[entry["dtype"]])[0])

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `pipeline.sources.base.StepReader`."""
        offset = self._data + self._header[f"{array}/{tensor}"]["data_offsets"][0] + start * out.itemsize
        view = out.data.cast("B")
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise InputError(
                    f"the file ends {len(view)} bytes early",
                    where=where(self._step, array, tensor),
                    why="it was truncated after it had been opened",
                    remedy="write the step again",
                )
            view, offset = view[count:], offset + count
