"""A safetensors file.

The library validates the file (header, no overlap, nothing missing); tensors are then read by offset, as its
NumPy interface neither reads bfloat16 nor fills a given buffer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.sources.base import Container, LoggedStep, LoggedTensor, Region, refused

__all__ = ["SafetensorsFile"]

_FORM = "a safetensors file"
_DTYPES = {"BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"F{bits}": f"float{bits}" for bits in (64, 32, 16)}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)}
_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)}


class SafetensorsFile(Container):
    """One safetensors file.

    Parameters
    ----------
    step : LoggedStep
    path : Path, optional
        The file, where it is not the step's.

    Raises
    ------
    InputError
        Where the file cannot be read, or is not a whole safetensors file.
    """

    def __init__(self, step: LoggedStep, path: Path | None = None) -> None:
        super().__init__(step)
        path = step.path if path is None else path
        with refused(step, _FORM):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            self._descriptor = os.open(path, os.O_RDONLY)
            region = Region(self._descriptor)
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
        header.pop("__metadata__", None)
        self._region, self._data = region, 8 + length
        self._offsets = {key: entry["data_offsets"][0] for key, entry in header.items()}
        self.tensors = {
            key: LoggedTensor(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
            for key, entry in header.items()
        }

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `pipeline.sources.base.StepReader`."""
        with refused(self.step, _FORM, key):
            self._region.fill(self._data + self._offsets[key] + start * out.itemsize, out)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
