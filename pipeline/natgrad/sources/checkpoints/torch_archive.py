"""Read the archives that ``torch.save`` writes, without torch and without executing their pickles.

An archive is a zip file of uncompressed members: ``data.pkl``, a pickle that describes the tensors, and one member
with the bytes of each storage. Slices of tensors with any strides are read from the storages by offset.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar, flat_configuration
from natgrad.sources.bounds import Budget, integer, shape_of, shown
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints import pickle_data
from natgrad.sources.checkpoints.pickle_data import Attributes, Global, Record, Skipped
from natgrad.sources.checkpoints.zip_members import open_archive, stored_start
from natgrad.sources.container import Container, Region, UnreadObject, read_errors
from natgrad.sources.steps import LoggedStep, local_file
from natgrad.storage import Storage, open_regular

__all__ = [
    "METADATA_FUNCTIONS",
    "METADATA_VALUES",
    "SCALAR_FUNCTIONS",
    "TORCH_DTYPES",
    "DistributedTensor",
    "NumpyDtype",
    "TorchArchive",
    "TorchFile",
    "TorchTensor",
    "flat_numbers",
    "group_texts",
    "saved_object",
    "to_float",
    "unread_objects",
]

# Number of elements of a strided tensor that are gathered together; largest gap between elements that is read
# through.
_GATHER_LIMIT, _GAP = 1 << 16, 64
_BYTES_LIMIT = 1 << 10
_ARCHIVE_OPERATIONS = 200
_KFAC_OPTIONS = ("/use_exact_damping", "/use_heuristic_damping")
_FORM = "a torch archive"

_CONFIGURATIONS = ("hyper_parameters", "config", "cfg", "configuration", "args", "hparams")
"""Keys under which trainers save the configuration of a run with its state."""

TORCH_DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("float64", 8),
    "float32": ("float32", 4),
    "float16": ("float16", 2),
    "bfloat16": ("bfloat16", 2),
    "int64": ("int64", 8),
    "int32": ("int32", 4),
    "int16": ("int16", 2),
    "int8": ("int8", 1),
    "uint8": ("uint8", 1),
    "uint16": ("uint16", 2),
    "uint32": ("uint32", 4),
    "uint64": ("uint64", 8),
    "bool": ("bool", 1),
    "complex32": ("complex32", 4),
    "complex64": ("complex64", 8),
    "complex128": ("complex128", 16),
    "float8_e4m3fn": ("float8_e4m3fn", 1),
    "float8_e4m3fnuz": ("float8_e4m3fnuz", 1),
    "float8_e5m2": ("float8_e5m2", 1),
    "float8_e5m2fnuz": ("float8_e5m2fnuz", 1),
    "float8_e8m0fnu": ("float8_e8m0fnu", 1),
}
"""Dtypes of torch, with the name of our dtype and the size of an element in bytes."""

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class TorchTensor:
    """A tensor as pickled: the position of its elements in a storage.

    Attributes
    ----------
    storage : str
        Name of the member of the archive.
    dtype : str
    offset : int
        Index of the first element in the storage.
    shape, stride : tuple of int
        Shape and strides, in elements.
    """

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """True if the elements are stored in C order without gaps."""
        expected = 1
        for length, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True


@dataclass(frozen=True)
class DistributedTensor(Skipped):
    """The part of a ``DTensor`` that one rank has. Without the files of the other ranks, it is not read.

    Attributes
    ----------
    local : TorchTensor, optional
        The part.
    shape : tuple of int
        Shape of the complete tensor.
    dimension : int, optional
        Dimension along which the tensor is split over the ranks; None if every rank has all of it.
    """

    local: TorchTensor | None = None
    shape: tuple[int, ...] = ()
    dimension: int | None = None


def _distributed(kind: Skipped, arguments: Any, attributes: Any) -> Skipped:
    """Return the part of a ``DTensor`` if it is split along one dimension or not at all; otherwise skip it."""
    skipped = Skipped(kind.name, kind.unknown, array=True)
    state = attributes[1] if isinstance(attributes, tuple) and len(attributes) == 2 else None
    if not isinstance(arguments, tuple) or len(arguments) < 3 or not isinstance(state, dict):
        return skipped
    local, spec = state.get("_local_tensor"), state.get("_spec")
    placements = spec.get("placements") if isinstance(spec, Record) else None
    if not isinstance(local, TorchTensor) or not isinstance(placements, tuple) or len(placements) != 1:
        return skipped
    (placement,), shape = placements, shape_of(arguments[2], "a distributed tensor")
    if not isinstance(placement, Record) or placement.name not in ("Shard", "Replicate"):
        return skipped
    dimension = placement.get("dim") if placement.name == "Shard" else None
    if dimension is not None and (type(dimension) is not int or not 0 <= dimension < len(shape)):
        return skipped
    return DistributedTensor(kind.name, kind.unknown, True, local, shape, dimension)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str) -> TorchTensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"its pickle has {shown(storage)} as the storage of a tensor")
    offset, shape = integer(offset, "the offset of a tensor"), shape_of(shape, "a tensor")
    if not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError(f"a tensor has {len(shape)} dimensions, but other strides")
    stride = tuple(integer(step, "a stride of a tensor") for step in stride)
    itemsize = TORCH_DTYPES[dtype][1]
    elements = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if elements else offset - 1
    if (last + 1) * itemsize > storage.size:
        raise ValueError(f"a tensor of shape {shape} exceeds the {storage.size} bytes of its storage")
    return TorchTensor(storage.key, dtype, offset, shape, stride)


def _rebuild(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = False, hooks: Any = None, metadata: Any = None
) -> TorchTensor:
    _require_resolved(metadata)
    return _tensor(storage, offset, shape, stride, storage.dtype)


def _rebuild_of_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: _Dtype,
    metadata: Any = None,
) -> TorchTensor:
    _require_resolved(metadata)
    return _tensor(storage, offset, shape, stride, dtype.name)


def _require_resolved(metadata: Any) -> None:
    if metadata:
        keys = ", ".join(map(shown, metadata)) if isinstance(metadata, dict) and len(metadata) < 8 else "flags"
        raise ValueError(f"a tensor with {keys} set must be resolved before it is saved")


def _rebuild_with_attributes(function: Any, kind: Any, arguments: Any, attributes: Any) -> TorchTensor | Skipped:
    """Rebuild a tensor that has Python attributes; the attributes are ignored. Skip it if it has another class."""
    if isinstance(kind, Skipped) and kind.name.startswith("torch.distributed") and kind.name.endswith(".DTensor"):
        return _distributed(kind, arguments, attributes)
    if isinstance(kind, Skipped) and kind not in _PLAIN.values():
        return Skipped(kind.name, kind.unknown, array=True)
    if isinstance(function, Skipped):
        return function
    if not isinstance(function, Global) or not function.name.startswith("torch._utils._rebuild_"):
        raise ValueError("its pickle rebuilds a tensor in an unknown way")
    if kind not in _PLAIN.values():
        raise ValueError(f"its pickle contains a tensor whose class is {shown(kind)}")
    tensor: TorchTensor = _FUNCTIONS[function.name](*arguments)
    return tensor


# The following functions must not amplify memory: a pickle can refer to a long value many times in few bytes.


def _size(shape: Any = ()) -> tuple[Any, ...]:
    return shape_of(shape, "a tensor")


def _encode(text: str, coding: str) -> bytes | Skipped:
    return text.encode("latin1") if coding == "latin1" and len(text) <= _BYTES_LIMIT else Skipped("bytes")


def _numpy_scalar(dtype: Any, words: Any) -> Any:
    if not isinstance(dtype, Record) or not isinstance(words, bytes):
        return Skipped("numpy scalar")
    code = dtype.get("code")
    if not isinstance(code, str) or code not in (
        "f8",
        "f4",
        "f2",
        "i8",
        "i4",
        "i2",
        "i1",
        "u8",
        "u4",
        "u2",
        "u1",
        "b1",
    ):
        return Skipped("numpy scalar")
    order = dtype.state.get("order", "<")
    return np.frombuffer(words, np.dtype(code).newbyteorder(order), count=1)[0].item()


class NumpyDtype(Record):
    """A pickled NumPy dtype: its code, and the byte order from its state."""

    def build(self, state: Any) -> None:
        """Take the byte order from the state."""
        self.state["order"] = ">" if state[1] == ">" else "<"


SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": lambda code, *_: NumpyDtype("numpy.dtype", {"code": code}),
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",
}
"""Functions that rebuild dtypes and numbers of NumPy, and short bytes."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    "torch.Size": _size,
    "torch.device": lambda *_: Skipped("torch.device"),
    "torch.serialization._get_layout": lambda *_: Skipped("torch.layout"),
    "collections.OrderedDict": lambda: {},
    "collections.defaultdict": lambda *_: {},
    **SCALAR_FUNCTIONS,
    "argparse.Namespace": lambda *_: Record("argparse.Namespace"),
    "types.SimpleNamespace": lambda *_: Record("types.SimpleNamespace"),
    "transformers.training_args.TrainingArguments": lambda *_: Record("TrainingArguments"),
    "pytorch_optimizer.optimizer.utils.preconditioner.PreConditioner": lambda: Attributes("PreConditioner"),
}
for _package in ("torch.distributed.tensor", "torch.distributed._tensor"):
    _FUNCTIONS[f"{_package}._dtensor_spec.DTensorSpec"] = lambda *_: Record("DTensorSpec")
    _FUNCTIONS[f"{_package}.placement_types.Shard"] = lambda *_: Record("Shard")
    _FUNCTIONS[f"{_package}.placement_types.Replicate"] = lambda *_: Record("Replicate")

METADATA_FUNCTIONS = {name: _FUNCTIONS[name] for name in ("torch.Size", "torch.serialization._get_layout")}
"""Functions that metadata need. None of them creates a tensor."""

METADATA_VALUES: dict[str, Any] = {f"torch.{name}": _Dtype(name) for name in TORCH_DTYPES}
"""Dtypes of torch, by their pickled names."""

_PLAIN = {name: Skipped(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}
_VALUES = {**METADATA_VALUES, **_PLAIN}
_VALUES |= {f"torch.{name}Storage": _Dtype(dtype) for name, dtype in _STORAGES.items()}
_VALUES |= {"torch.storage.UntypedStorage": _Dtype("uint8"), "torch.UntypedStorage": _Dtype("uint8")}


class TorchArchive:
    """A torch archive in a byte range of a file.

    Parameters
    ----------
    region : Region
    inert : collection of str
        Classes whose objects are skipped; see `natgrad.sources.checkpoints.pickle_data.INERT`.
    budget : Budget, optional
        Budget of the archive. By default, that of a file which contains only the archive.

    Attributes
    ----------
    tree
        Saved object: nested dicts, lists and tuples of numbers, strings, `TorchTensor` and `Skipped`.
    budget : Budget

    Raises
    ------
    ValueError, zipfile.BadZipFile, OSError
        If the region is not such an archive, or if its members do not match the pickle.
    """

    def __init__(self, region: Region, inert: Collection[str] = (), budget: Budget | None = None) -> None:
        self._region = region
        self.budget = budget or Budget(region.length)
        self.budget.spend(_ARCHIVE_OPERATIONS)
        self._starts: dict[str, int] = {}
        start = np.zeros(min(10, region.length), np.uint8)
        region.fill(0, start)
        if start.tobytes()[:1] == b"\x80":
            raise ValueError("it is a bare pickle, as written before torch 1.6: save it again with a newer torch")
        with open_archive(region, region.length) as archive:
            members = archive.infolist()
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it contains {len(pickles)} members data.pkl, but a torch archive has one")
        root = pickles[0].removesuffix("data.pkl")
        # Other members are not part of the object: a name outside of the folder must not replace one in it.
        self._members = {
            member.filename.removeprefix(root): member for member in members if member.filename.startswith(root)
        }
        order = self._bytes("byteorder", 16) if "byteorder" in self._members else b"little"
        if order != b"little":
            raise ValueError(f"its byte order is {order!r}: save it again on a little-endian machine")
        self.tree = pickle_data.load(
            self._bytes("data.pkl", pickle_data.PICKLE_LIMIT),
            functions=_FUNCTIONS,
            values=_VALUES,
            persistent=self._storage,
            inert=inert,
            budget=self.budget,
        )

    def leaves(self) -> list[tuple[str, Any]]:
        """Return the leaves of the tree by their keys; see `pickle_data.flatten`."""
        return list(pickle_data.flatten(self.tree, self.budget))

    def _start(self, name: str) -> int:
        """Return the offset of the bytes of a member, after checking that it is complete and not compressed."""
        if name not in self._starts:
            self._starts[name] = stored_start(self._region, self._members[name])
        return self._starts[name]

    def _bytes(self, name: str, limit: int) -> bytes:
        size = self._members[name].file_size
        start = self._start(name)
        if size > limit:
            raise ValueError(f"its member {name} has {size} bytes, but the limit is {limit}")
        words = np.zeros(size, np.uint8)
        self._region.fill(start, words)
        return words.tobytes()

    def _storage(self, identifier: Any) -> _Storage:
        if not isinstance(identifier, tuple) or len(identifier) != 5:
            raise ValueError(f"its pickle identifies a storage by {shown(identifier)}")
        kind, dtype, key, _, elements = identifier
        name = f"data/{key}" if isinstance(key, str) else ""
        if kind != "storage" or not isinstance(dtype, _Dtype) or name not in self._members:
            raise ValueError(f"its pickle refers to the storage {shown(key)}, which does not exist")
        itemsize, size = TORCH_DTYPES[dtype.name][1], self._members[name].file_size
        claimed = integer(elements, f"the number of elements of storage {shown(key)}") * itemsize
        if not claimed <= size < claimed + itemsize:
            raise ValueError(f"storage {shown(key)} should have {claimed} bytes, but has {size}")
        return _Storage(name, dtype.name, claimed)

    def position(self, tensor: TorchTensor) -> int:
        """Return the offset in bytes of the first element of a tensor in the region."""
        return self._start(tensor.storage) + tensor.offset * TORCH_DTYPES[tensor.dtype][1]

    def offset(self, tensor: TorchTensor) -> int | None:
        """Return the offset in bytes of the first element in the file; None if the elements are not in C order."""
        return self._region.start + self.position(tensor) if tensor.contiguous else None

    def read(self, tensor: TorchTensor, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor, flattened in C order, into a buffer.

        Raises
        ------
        ValueError, EOFError, OSError
            If the archive does not contain the elements.
        """
        if tensor.contiguous:
            self._region.fill(self.position(tensor) + start * out.itemsize, out)
            return
        base = self._start(tensor.storage)
        for first in range(0, out.size, _GATHER_LIMIT):
            part = out[first : first + _GATHER_LIMIT]
            index = np.unravel_index(np.arange(start + first, start + first + part.size), tensor.shape)
            indices = sum((i * s for i, s in zip(index, tensor.stride, strict=True)), np.int64(tensor.offset))
            self._gather(base, np.asarray(indices), part)

    def _gather(self, base: int, indices: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read single elements, with one access for elements that are close to each other."""
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        cuts = np.flatnonzero(np.diff(ascending) > _GAP) + 1
        for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(indices)], strict=True):
            run = ascending[low:high]
            words = np.empty(int(run[-1] - run[0]) + 1, out.dtype)
            self._region.fill(base + int(run[0]) * out.itemsize, words)
            out[order[low:high]] = words[run - run[0]]


class TorchFile(Container):
    """One file of ``torch.save``.

    Raises
    ------
    InputError
        If the file is not a torch archive, or its pickle contains names other than tensors and plain containers.
    """

    ordered = True

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._tensors: dict[str, TorchTensor] = {}
        self._descriptor = -1
        with read_errors(step, _FORM):
            self._descriptor = open_regular(step.path)
            try:
                self._archive = TorchArchive(Region(self._descriptor), inert)
                self.budget = self._archive.budget
                self._describe()
            except BaseException:
                self.close()
                raise

    def _describe(self) -> None:
        first_keys: dict[TorchTensor, str] = {}
        leaves = self._archive.leaves()
        for key, leaf in leaves:
            if isinstance(leaf, TorchTensor):
                self.add(key, leaf.shape, leaf.dtype)
                self._tensors[key] = leaf
                if math.prod(leaf.shape) and first_keys.setdefault(leaf, key) != key:
                    self.ties[key] = first_keys[leaf]
        self.numbers |= flat_numbers(leaves)
        self.texts |= group_texts(leaves)
        self.objects |= unread_objects(leaves)

    @property
    def tree(self) -> Any:
        """The saved object; see `TorchArchive`."""
        return self._archive.tree

    def leaves(self) -> list[tuple[str, Any]]:
        """Return the leaves of the saved object by their keys; see `TorchArchive`."""
        return self._archive.leaves()

    def configuration(self) -> dict[str, Scalar]:
        """Return the configuration of the run, if it is saved with the state."""
        tree = self.tree if isinstance(self.tree, dict) else {}
        found: dict[str, Scalar] = {}
        for name in _CONFIGURATIONS:
            found = flat_configuration(_attributes(tree.get(name))) | found
        return found

    def read_part(self, tensor: TorchTensor, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor from `leaves` into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._archive.read(tensor, start, out)

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self.read_part(self._tensors[key], key, start, out)

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return self.ranges_of(self._tensors[key], key)

    def ranges_of(self, tensor: TorchTensor, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor from `leaves` are; see `natgrad.sources.base.Ranged`."""
        with read_errors(self.step, _FORM, key):
            offset = self._archive.offset(tensor)
            return None if offset is None else [ByteRange(self.step.storage, offset, math.prod(tensor.shape))]

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def saved_object(file: Storage) -> Any:
    """Return the attributes or the items of an object in a file of ``torch.save``, such as ``training_args.bin``.

    Raises
    ------
    ValueError, zipfile.BadZipFile, OSError
        If the file is not a torch archive, or not local.
    """
    descriptor = open_regular(local_file(file))
    try:
        return _attributes(TorchArchive(Region(descriptor)).tree)
    finally:
        os.close(descriptor)


def _attributes(item: Any) -> Any:
    return item.state if isinstance(item, Record) else item


def flat_numbers(leaves: Iterable[tuple[str, Any]], known: Collection[str] = ()) -> dict[str, float]:
    """Return the plain numbers among the leaves of a tree by their keys, except the keys in ``known``.

    Raises
    ------
    ValueError
        If two numbers have the same key.
    """
    found: dict[str, float] = {}
    for key, leaf in leaves:
        if isinstance(leaf, int | float) and not isinstance(leaf, bool) and key not in known:
            if key in found:
                raise ValueError(f"it contains {shown(key)} twice")
            found[key] = to_float(leaf)
    return found


def group_texts(leaves: Iterable[tuple[str, Any]], prefix: str = "") -> dict[str, str]:
    """Return the strings and Booleans in optimizer parameter groups and in the options of K-FAC, by their keys."""
    return {
        key: str(leaf)
        for path, leaf in leaves
        if isinstance(leaf, str | bool)
        and ("param_groups/" in (key := f"{prefix}{path}") or key.rstrip("/").endswith(_KFAC_OPTIONS))
    }


def unread_objects(leaves: Iterable[tuple[str, Any]], prefix: str = "") -> dict[str, UnreadObject]:
    """Return the leaves, and attributes of leaves, that were not read because of their class, by their keys."""
    found = {}
    for key, leaf in leaves:
        state = leaf.state if isinstance(leaf, Record) and isinstance(leaf.state, dict) else {}
        for name, item in ((key, leaf), *((f"{key}/{attribute}", value) for attribute, value in state.items())):
            if isinstance(item, Skipped) and (item.unknown or item.array):
                found[f"{prefix}{name}"] = UnreadObject(item.name, item.array, known=not item.unknown)
    return found


def to_float(number: float) -> float:
    """Return a number from a file as a float; an infinite one for an integer that is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
