"""Read pickles of plain containers with NumPy arrays, as ``pickle.dump`` writes them, without executing anything.

`natgrad.sources.checkpoints.pickle_data` interprets the opcodes. The only functions that are interpreted are those
that rebuild arrays, dtypes and scalars of NumPy, arrays of JAX, and plain dicts. The pickle is held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.sources.bounds import Budget, read_limited, shape_of, shown
from natgrad.sources.checkpoints import pickle_data
from natgrad.sources.checkpoints.pickle_data import Global, Record, Skipped
from natgrad.sources.checkpoints.torch_archive import (
    SCALAR_FUNCTIONS,
    NumpyDtype,
    flat_numbers,
    group_texts,
    unread_objects,
)
from natgrad.sources.container import Container, read_errors
from natgrad.sources.steps import LoggedStep, where

__all__ = ["PickleFile", "is_pickle"]

_FORM = "a pickle"
_CODES = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1", "c8", "c16", "bfloat16"}
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x78\x01": "zlib",
    b"\x78\x5e": "zlib",
    b"\x78\x9c": "zlib",
    b"\x78\xda": "zlib",
    b"\x04\x22\x4d\x18": "lz4",
}
_JOBLIB, _START = b"joblib.numpy_pickle", 1 << 12


class _Array(Record):
    """An array as pickled: its shape, dtype, order and bytes."""

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.shape: tuple[int, ...] = ()
        self.dtype, self.swapped, self.fortran = "", False, False
        self.words: bytes | bytearray | None = None

    def build(self, state: Any) -> None:
        """Take the contents from the pickled state of an array."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError(f"its pickle has {shown(state)} as the state of an array")
        _, shape, dtype, fortran, words = state
        self.fill(words, dtype, shape, fortran=bool(fortran))

    def fill(self, words: Any, dtype: Any, shape: Any, *, fortran: bool) -> None:
        """Set the contents, and check that there are as many bytes as elements."""
        self.shape, self.fortran = shape_of(shape, "an array"), fortran
        code = dtype.get("code") if isinstance(dtype, NumpyDtype) else None
        if isinstance(words, Skipped) and words.name == "bytes":
            raise ValueError("its arrays were pickled with protocol 2 or older: save them with protocol=4 or newer")
        if code not in _CODES or not isinstance(words, bytes | bytearray):
            return  # an array of objects or records, which has no plain bytes
        itemsize = 2 if code == "bfloat16" else int(code[1:])
        if math.prod(self.shape) * itemsize != len(words):
            raise ValueError(f"an array of shape {self.shape} and dtype {code} has {len(words)} bytes")
        self.dtype = code if code == "bfloat16" else np.dtype(code).name
        self.swapped, self.words = dtype.get("order") == ">", words

    def flat(self) -> NDArray[Any]:
        """Return the elements in C order and native byte order."""
        assert self.words is not None
        dtype = storage_dtype(self.dtype)
        values = np.frombuffer(self.words, dtype.newbyteorder(">") if self.swapped else dtype)
        values = values.reshape(self.shape, order="F" if self.fortran else "C")
        return np.ascontiguousarray(values, dtype).reshape(-1)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(words: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(words, dtype, shape, fortran=order == "F")
    return array


def _of_jax(function: Any, arguments: Any, state: Any, *_: Any) -> _Array:
    """Rebuild an array of JAX, which is pickled as the parts of one of NumPy."""
    if not isinstance(function, Global) or _FUNCTIONS.get(function.name) is not _reconstruct:
        raise ValueError("its pickle rebuilds an array of JAX in an unknown way")
    array = _Array()
    array.build(state)
    return array


def _dict(items: Any = ()) -> Any:
    return items if isinstance(items, dict) else {}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **SCALAR_FUNCTIONS,
    "jax._src.array._reconstruct_array": _of_jax,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "flax.core.frozen_dict.FrozenDict": _dict,
}
for _package in ("numpy._core", "numpy.core"):
    _FUNCTIONS[f"{_package}.multiarray._reconstruct"] = _reconstruct
    _FUNCTIONS[f"{_package}.numeric._frombuffer"] = _from_buffer

_VALUES = {"ml_dtypes.bfloat16": "bfloat16"}


def is_pickle(start: bytes) -> bool:
    """Return True if the first bytes of a file are those of a pickle of protocol 2 or newer."""
    return start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")


class PickleFile(Container):
    """One file of ``pickle.dump``.

    Raises
    ------
    InputError
        If the file is not a plain pickle, or its arrays do not match their descriptions.
    """

    ordered = True

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._arrays: dict[str, _Array] = {}
        self._read: tuple[str, NDArray[Any]] = "", np.zeros(0)
        with read_errors(step, _FORM):
            content = read_limited(step.storage, pickle_data.PICKLE_LIMIT)
            _require_plain(step, content)
            self.budget = Budget(len(content))
            trees = [
                *pickle_data.load_all(
                    content, functions=_FUNCTIONS, values=_VALUES, inert=inert, budget=self.budget
                )
            ]
            # Several calls of pickle.dump into one file give a list.
            tree = trees if len(trees) > 1 else trees[0]
            self._describe(list(pickle_data.flatten(tree, self.budget)))

    def _describe(self, leaves: list[tuple[str, Any]]) -> None:
        first: dict[int, str] = {}
        for index, (key, leaf) in enumerate(leaves):
            if not isinstance(leaf, _Array):
                continue
            if leaf.words is None:
                leaves[index] = key, Skipped("numpy.ndarray of objects", array=True)
                continue
            self.add(key, leaf.shape, leaf.dtype)
            self._arrays[key] = leaf
            if math.prod(leaf.shape) and first.setdefault(id(leaf), key) != key:
                self.ties[key] = first[id(leaf)]
        self.numbers |= flat_numbers(leaves)
        self.texts |= group_texts(leaves)
        self.objects |= unread_objects(leaves)

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        if self._read[0] != key:
            self._read = key, self._arrays[key].flat()
        out[:] = self._read[1][start : start + out.size]

    def close(self) -> None:
        """Release the arrays."""
        self._arrays, self._read = {}, ("", np.zeros(0))


def _require_plain(step: LoggedStep, content: bytes) -> None:
    """Refuse compressed files and files of joblib, whose arrays are outside of the pickle."""
    name = next((name for start, name in _COMPRESSIONS.items() if content.startswith(start)), "")
    if content[:2] == b"PK":
        raise InputError(
            "this is a zip archive, not a pickle",
            where=where(step),
            why="torch.save and numpy.savez write such archives",
            remedy="rename the files to .pt or .npz",
        )
    if name or _JOBLIB in content[:_START]:
        raise InputError(
            f"this pickle is compressed with {name}" if name else "this file was written by joblib",
            where=where(step),
            why="pickles are read as data, and only plain ones: nothing in them is executed"
            if name
            else "joblib stores arrays outside of the pickle",
            remedy="load the object, with joblib.load if joblib wrote it, even if compressed, and write it to a "
            "plain file with pickle.dump",
        )
