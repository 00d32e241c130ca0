"""The protocol of a training log: list the steps, describe the tensors, read a slice into a given buffer."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.places import is_url, network_errors, open_object, status, widen
from pipeline.schema import REPLICATE_LOSS, REPLICATE_PARAMETER, REPLICATE_STATES, STATES, InputError, Unavailable

__all__ = [
    "Container",
    "Factor",
    "FactoredMetric",
    "KeptOpen",
    "LoggedStep",
    "LoggedTensor",
    "NotYet",
    "ObjectRegion",
    "OptimizerState",
    "Region",
    "RotatedMetric",
    "Source",
    "StepContent",
    "StepReader",
    "Unreadable",
    "Unshaped",
    "boxes",
    "change_time",
    "changed_lately",
    "complete",
    "factor_array",
    "identity",
    "refused",
    "where",
    "widened",
]

# RuntimeError: an archive member that says it is encrypted, or (NotImplementedError) packed in a way not known.
_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


_NAMED = 24
"""Tensors that a note names."""


# What a log holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class LoggedStep:
    """A step as listed: its number and the files that hold it.

    Attributes
    ----------
    number : int
        Number of updates done before this state.
    path : Path
        File or folder.
    others : tuple of Path
        Further files or folders of the step.
    run : str
        Run of a sweep.
    values : str
        Scalars of the step from logs of many steps, whose sizes and times tell nothing of one step.
    """

    number: int
    path: Path
    others: tuple[Path, ...] = ()
    run: str = ""
    values: str = ""


@dataclass(frozen=True)
class LoggedTensor:
    """A tensor as logged, not loaded."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Factor:
    """A factor of a metric as logged, not loaded.

    Attributes
    ----------
    key : str
        Key in the file.
    shape : tuple of int
        (n, n) of a matrix, (n,) of a diagonal; () of a number.
    dtype : str
    start : int
        First element under the key, where several matrices are stacked.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


@dataclass(frozen=True)
class FactoredMetric:
    """The metric M that an optimizer uses for a tensor, as Kronecker products of factors that it saves.

    With F_i = (S_i + damping_i)^exponent, where S_i is the factor, or Q'Q of a factor Q that is a ``root``, it is
    F_0 (x) F_1 (x) .. + shift on each of its blocks: the first factor is of the first dimension of the tensor.

    Attributes
    ----------
    rule : str
        Name of the rule.
    blocks : tuple of tuple of Factor
        One product, or several where the tensor was parted; a product of no factors is 1.
    exponent, shift : float
    damping : tuple of float
        One for each factor of a product; none where there is no damping.
    balanced : bool
        Damping is divided between the two factors by their mean eigenvalues (Martens and Grosse, 2015, section
        6.3): ``damping`` is that of the product and the least.
    root : bool
    tensors : tuple of str
        Those that share the block, where there are more: weight and bias of a layer, of which the bias is the last
        column.
    follows : bool
        It is the metric of the update from this state, not of that to it.
    rescaled : bool
        The update was multiplied by a positive factor that is not saved: M is known up to it.
    problem : str
        Why the metric is not known; then nothing else is there.
    """

    rule: str
    blocks: tuple[tuple[Factor, ...], ...] = ()
    exponent: float = 1.0
    damping: tuple[float, ...] = ()
    shift: float = 0.0
    balanced: bool = False
    root: bool = False
    tensors: tuple[str, ...] = ()
    follows: bool = False
    rescaled: bool = False
    problem: str = ""


@dataclass(frozen=True)
class RotatedMetric:
    """The metric Q diag(sqrt(v) + epsilon) Q' / bias of SOAP: ``exp_avg_sq`` is v, in the basis of Q.

    Attributes
    ----------
    epsilon, bias : float
        ``bias`` is sqrt(1 - beta2^updates), or 1 where it is not corrected.
    rescaled, problem
        As of `FactoredMetric`.
    """

    epsilon: float = math.nan
    bias: float = math.nan
    rescaled: bool = False
    problem: str = ""


def factor_array(index: int) -> str:
    """Array under which a step gives the factor of a metric, counted through all blocks.

    Examples
    --------
    >>> factor_array(1)
    'metric_factor/1'
    """
    return f"metric_factor/{index}"


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer kept between steps, by tensor.

    Attributes
    ----------
    arrays : mapping
        Some of `pipeline.schema.OPTIMIZER_STATES`, each a mapping of tensor name to `LoggedTensor`.
    numbers : mapping
        Some of `pipeline.schema.OPTIMIZER_NUMBERS`, each a mapping of tensor name to value.
    metrics : mapping
        Tensor name to the metric of a rule whose metric is no diagonal of ``exp_avg_sq``; its factors are read as
        `factor_array` says.
    problem : str
        Why it is not known which tensor an entry belongs to; then nothing else is there.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, FactoredMetric | RotatedMetric] = field(default_factory=dict)
    problem: str = ""

    @property
    def readable(self) -> list[str]:
        """Names of all arrays that a step gives of it."""
        products = [metric.blocks for metric in self.metrics.values() if isinstance(metric, FactoredMetric)]
        most = max((sum(map(len, blocks)) for blocks in products), default=0)
        return [*self.arrays, *map(factor_array, range(most))]


@dataclass(frozen=True)
class StepContent:
    """What a step holds, by the names of the store. A source may give some of it only; see `complete`.

    Attributes
    ----------
    arrays : mapping
        ``parameter``, ``gradient`` and ``hvp`` where logged, each a mapping of tensor name to `LoggedTensor`.
        So are ``replicate_parameter`` and ``replicate_hvp``; their tensors have one dimension more, the first.
    scalars : mapping
        ``loss`` and ``learning_rate`` where logged.
    unused : tuple of str
        Keys that are none of these.
    notes : tuple of str
        What a user should know about these values.
    ties : mapping
        Names of tensors that lie in the memory of another one, to the name of that one.
    untrained : bool
        The parameters are a whole model: buffers and frozen tensors, which have no gradient, are among them.
    optimizer : OptimizerState, optional
        Where it was saved; its arrays are read as the others are.
    replicate_loss : tuple of float
        Losses of the states that the replicates lead to, where logged.
    no_gradient : str
        Why tensors have no gradient, where that is not that they are buffers or frozen; then they are named.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]]
    scalars: Mapping[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    untrained: bool = False
    optimizer: OptimizerState | None = None
    replicate_loss: tuple[float, ...] = ()
    no_gradient: str = ""

    @property
    def replicates(self) -> int:
        """Number R of replicates; 0 where there are none."""
        shapes = [tensor.shape for tensor in self.arrays.get(REPLICATE_PARAMETER, {}).values()]
        return shapes[0][0] if shapes and shapes[0] else 0

    @property
    def numbers(self) -> dict[str, float | tuple[float, ...]]:
        """All numbers of the step: the scalars, and the losses of the replicates."""
        return {**self.scalars, **({REPLICATE_LOSS: self.replicate_loss} if self.replicate_loss else {})}


class StepReader(Protocol):
    """An open step."""

    def content(self) -> StepContent:
        """Describe the step without loading its tensors."""
        ...

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor, flattened in C order, into a buffer.

        Parameters
        ----------
        array, tensor : str
            As in `content`.
        start : int
            First element.
        out : one-dimensional contiguous array
            Written; of the logged dtype, bfloat16 as its bits in uint16.
        """
        ...


@runtime_checkable
class Unshaped(Protocol):
    """A step whose files have neither the names nor the shapes of its tensors: the parameters have."""

    def shaped(self, parameters: Mapping[str, LoggedTensor]) -> StepContent:
        """Describe the step by the names and shapes of parameters, by which it is read from then on.

        Raises
        ------
        InputError
            Where what it holds does not fit them.
        """
        ...


class Source(Protocol):
    """A training log."""

    location: Path

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps, sorted by number; one listing of the folder, no file is opened.

        Raises
        ------
        InputError
            Where there are none, or two files claim one step.
        """
        ...

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step.

        Raises
        ------
        InputError
            Where the file is truncated, unreadable or not of the format.
        """
        ...


class KeptOpen:
    """A log whose step opened last stays open until another one is, or its context ends.

    Steps that lie in one file then follow each other without the file being opened for each.

    Parameters
    ----------
    log : Source
    """

    def __init__(self, log: Source) -> None:
        self.location, self._log = log.location, log
        self._kept = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.close()

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps; see `Source`."""
        return self._log.steps()

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step; see `Source`. It is closed when it is left and another one has been opened."""
        users = 2

        def leave() -> None:
            nonlocal users
            users -= 1
            if not users:
                manager.__exit__(None, None, None)

        manager = self._log.open(step)
        reader = manager.__enter__()
        self._kept.close()
        self._kept.callback(leave)
        try:
            yield reader
        finally:
            leave()


class Container:
    """Open files of a step: tensors and numbers under flat keys, whatever these mean (`pipeline.sources.names`).

    Attributes
    ----------
    step : LoggedStep
        For messages.
    tensors : dict
        Key to `LoggedTensor`. Nested levels of a file are joined by a slash.
    numbers : dict
        Key to value of the plain numbers that are known without reading a tensor.
    ties : dict
        Keys of tensors that lie in the memory of another one, to the key of that one.
    texts : dict
        Key to value of the strings and truth values ("True", "False") among the options of an optimizer: names of
        parameters, for example.
    ordered : bool
        Whether tensors come in the order in which they were saved.
    unread : dict
        Keys of objects that were not read, to the reason.
    """

    ordered = False

    def __init__(self, step: LoggedStep) -> None:
        self.step = step
        self.unread: dict[str, str] = {}
        self.tensors: dict[str, LoggedTensor] = {}
        self.numbers: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.ties: dict[str, str] = {}

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `StepReader.read`."""
        raise NotImplementedError

    def number(self, key: str) -> float | None:
        """Value of a plain number, or of a tensor of one element; None where it is neither."""
        if key in self.numbers:
            return self.numbers[key]
        values = self.vector(key) if math.prod(self.tensors[key].shape) == 1 else ()
        return values[0] if values else None

    def vector(self, key: str) -> tuple[float, ...]:
        """All values of a tensor of numbers; none where it holds something else."""
        logged = self.tensors[key]
        count = math.prod(logged.shape)
        if logged.dtype == "bfloat16":
            words = np.zeros(count, np.uint16)
            self.read(key, 0, words)
            return tuple(widened(words).tolist())
        if not re.fullmatch(r"u?int\d+|float(16|32|64)", logged.dtype):
            return ()
        values = np.zeros(count, logged.dtype)
        self.read(key, 0, values)
        return tuple(map(float, values))

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def widened(bfloat16: NDArray[Any]) -> NDArray[np.float32]:
    """Values of bfloat16 numbers that are given as their bits in uint16; exact."""
    return (bfloat16.astype(np.uint32) << np.uint32(16)).view(np.float32)


# Errors and identity -----------------------------------------------------------------------------------------

SETTLED_SECONDS = 300.0
"""After so long without a change, what cannot be read is not being written any more."""


class Unreadable(InputError):
    """A file that is not of its format, or not yet: truncated, still being written, damaged."""


class NotYet(Unavailable):
    """Nothing is wrong with what is there, but it is not all there yet: run again later."""


def changed_lately(time_ns: int) -> bool:
    """Whether a time of change is so near that a writer may be at work; clocks of machines differ a little."""
    return abs(time.time() - time_ns / 1e9) < SETTLED_SECONDS


def change_time(path: Path) -> int:
    """When a file or object was changed last, in ns."""
    return int(_stat(path, fresh=True)[1])


def where(step: LoggedStep, array: str = "", tensor: str = "") -> str:
    """Place of an error: file, step, and tensor where one is meant."""
    tensor_part = f", {array} of tensor {tensor!r}" if array and tensor else f", {array}" if array else ""
    return f"{step.path}, step {step.number}{tensor_part}"


@contextmanager
def refused(step: LoggedStep, form: str, key: str = "") -> Iterator[None]:
    """Turn what a damaged, hostile or vanished file raises into a refusal.

    Parameters
    ----------
    step : LoggedStep
    form : str
        What the file should have been: "an npz file".
    key : str, optional
        Key that is read.
    """
    array, _, tensor = key.partition("/")
    try:
        with network_errors(step.path):
            yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"cannot read {form}: {error}",
            where=where(step, array, tensor),
            why="the training run removed it while it was read (checkpoint rotation), or it was moved",
            remedy="run again; what was committed is kept",
        ) from error
    except _ERRORS as error:
        raise Unreadable(
            f"cannot read {form}: {error}",
            where=where(step, array, tensor),
            why=f"it is truncated or still being written, damaged, not {form}, or not readable",
            remedy="write the step again (to another name, then rename), or remove the file",
        ) from error


def identity(step: LoggedStep, *, fresh: bool = False) -> dict[str, Any]:
    """Name, size in bytes and time in ns of the files of a step (of a folder, all files in it), and its ``values``.

    Parameters
    ----------
    step : LoggedStep
    fresh : bool
        Look at each object anew, where else what the listing of the steps said of it is taken. An object has a tag
        of its content too.

    Raises
    ------
    InputError
        Where a file is gone.
    """
    try:
        files = [file for path in (step.path, *step.others) for file in _files(path)]
        stats = [(path, *_stat(path, fresh)) for path in files]
    except OSError as error:
        raise InputError(
            f"the step cannot be found any more: {error.strerror}",
            where=where(step),
            why="the training run removed it while it was read",
            remedy="run again; what was committed is kept",
        ) from error
    found: dict[str, Any] = {
        "name": step.path.name,
        "size": sum(size for _, size, *_ in stats),
        "time": max((time for _, _, time, *_ in stats), default=0),
    }
    if is_url(step.path):
        found["tag"] = stats[0][3]
    if files != [step.path]:
        listing = [(_relative(path, step.path.parent), *facts) for path, *facts in stats]
        found["files"] = hashlib.sha256(repr(sorted(listing)).encode()).hexdigest()
    if step.values:
        found["values"] = step.values
    return found


def _stat(path: Path, fresh: bool) -> tuple[Any, ...]:
    """Size and time of a file; of an object, its tag too."""
    if is_url(path):
        return status(path, fresh=fresh)
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _relative(path: Path, folder: Path) -> str:
    return str(path) if is_url(path) or is_url(folder) else os.path.relpath(path, folder)


def _files(path: Path) -> list[Path]:
    # A folder that is a link is entered where it is the step itself, not below: a link may lead in a circle.
    if is_url(path) or not path.is_dir():
        return [path]
    return [Path(folder) / name for folder, _, names in os.walk(path, onerror=_raise) for name in names]


def _raise(error: OSError) -> None:
    raise error


class Region(io.RawIOBase):
    """A range of bytes of an open file, read by position.

    Parameters
    ----------
    descriptor : int
        Of the open file; not closed here.
    start, length : int
        Range, in bytes; up to the end of the file where no length is given.
    """

    def __init__(self, descriptor: int, start: int = 0, length: int | None = None) -> None:
        size = os.fstat(descriptor).st_size
        length = size - start if length is None else length
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} are claimed, the file has {size}")
        self.descriptor, self.start, self.length = descriptor, start, length
        self._position = 0

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes from an offset on.

        Raises
        ------
        EOFError
            Where the range or the file ends early.
        """
        if not 0 <= offset <= self.length - out.nbytes:
            raise EOFError(f"the data end {offset + out.nbytes - self.length} bytes early")
        view, position = out.data.cast("B"), self.start + offset
        while view:
            count = os.preadv(self.descriptor, [view], position)
            if not count:
                raise EOFError(f"the file ends {len(view)} bytes early: it was truncated after it had been opened")
            view, position = view[count:], position + count

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read anywhere."""
        return True

    def tell(self) -> int:
        """Position, from the start of the range."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes at the position."""
        view = memoryview(buffer).cast("B")[: max(0, self.length - self._position)]
        count = os.preadv(self.descriptor, [view], self.start + self._position) if view else 0
        self._position += count
        return count


class ObjectRegion:
    """The bytes of an object, read by position.

    Parameters
    ----------
    path : Path
        A URL.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_object(path)
        self.length: int = self._file.size

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes from an offset on; see `Region.fill`."""
        if not 0 <= offset <= self.length - out.nbytes:
            raise EOFError(f"the data end {offset + out.nbytes - self.length} bytes early")
        self._file.seek(offset)
        view = out.data.cast("B")
        while view:
            count = self._file.readinto(view)
            if not count:
                raise EOFError(f"the object ends {len(view)} bytes early")
            view = view[count:]

    def widen(self) -> None:
        """Fetch more at a time from now on: what describes the data has been read."""
        widen(self._file)

    def close(self) -> None:
        """Give its blocks back."""
        self._file.close()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of an array that together are its elements ``start`` to ``stop`` in C order, in that order.

    Examples
    --------
    >>> [[(part.start, part.stop) for part in box] for box in boxes((4, 5), 3, 12)]
    [[(0, 1), (3, 5)], [(1, 2), (0, 5)], [(2, 3), (0, 2)]]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    inner = shape[1:]
    if first > last:
        # Within one row.
        for box in boxes(inner, start - last * row, stop - last * row):
            yield (slice(last, last + 1), *box)
        return
    for box in boxes(inner, start - (first - 1) * row, row) if start < first * row else ():
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, length) for length in inner))
    for box in boxes(inner, 0, stop - last * row):
        yield (slice(last, last + 1), *box)


# A whole step ------------------------------------------------------------------------------------------------


def complete(step: LoggedStep, content: StepContent, *, optimizer: bool = False) -> StepContent:
    """Return what of a step can be processed: parameters and gradients of the same tensors, in one order.

    The order is that of the names with numbers by value, as no other order survives all formats. A tensor tied to
    another counts once. Tensors of a whole model that have no gradient are left out, with a note. What the
    optimizer keeps is among the arrays where it is asked for; tensors that it has nothing of are not in it.

    Raises
    ------
    InputError
        Where parameters or gradients are missing, or their names or shapes differ, or those of the replicates do;
        where the optimizer is asked for and it is not known which tensors it means.
    """
    arrays = {array: dict(tensors) for array, tensors in content.arrays.items()}
    for array in STATES[:2]:
        if not arrays.get(array):
            raise InputError(
                f"no {array}s in this step",
                where=where(step),
                why=f"found {sorted(content.unused)[:6] or 'nothing else'}; most checkpoints hold no gradients",
                remedy=f"say where they are (--map {array}=KEY), or give the log that has them as a further SOURCE",
            )
    notes = list(content.notes)
    for tensor, kept in content.ties.items():
        # The trainer's gradients say which of the names counts, as they name each memory once.
        drop = kept if tensor in arrays["gradient"] and kept not in arrays["gradient"] else tensor
        if tensor in arrays["parameter"] and kept in arrays["parameter"]:
            for tensors in arrays.values():
                tensors.pop(drop, None)
            stays = tensor if drop == kept else kept
            notes.append(f"{drop!r} lies in the memory of {stays!r}: they count once, under that name")
    if content.untrained:
        left = [tensor for tensor in arrays["parameter"] if tensor not in arrays["gradient"]]
        if len(left) < len(arrays["parameter"]):
            for tensor in left:
                del arrays["parameter"][tensor]
            if left and content.no_gradient:
                shown = ", ".join(map(repr, left[:_NAMED])) + (", ..." if len(left) > _NAMED else "")
                notes.append(
                    f"{len(left)} tensors have no gradient and are left out: {shown}; {content.no_gradient}"
                )
            elif left:
                notes.append(
                    f"{len(left)} tensors without gradient (buffers, frozen) are left out, {left[0]!r} the first"
                )
    for array in STATES[1:]:
        if array in arrays:
            _require_same_tensors(step, array, arrays["parameter"], arrays[array])
    _require_replicates(step, replace(content, arrays=arrays))
    order = sorted(arrays["parameter"], key=_by_number)
    logged = [name for name in (*STATES, *REPLICATE_STATES) if name in arrays]
    kept_arrays = {name: {t: arrays[name][t] for t in order} for name in logged}
    state = content.optimizer if optimizer else None
    if state is not None:
        if state.problem:
            raise InputError(
                f"the state of the optimizer cannot be read: {state.problem}",
                where=where(step),
                why="torch numbers the parameters of an optimizer and keeps no names",
                remedy='write order = ["tensor", ...] in natgrad.toml in the folder of the log, in the order of '
                "model.named_parameters() or as the optimizer was given them, or leave --include optimizer out",
            )
        for name, saved in state.arrays.items():
            kept_arrays[name] = {t: saved[t] for t in order if t in saved}
        lacking = [t for t in order if not any(t in saved for saved in state.arrays.values())]
        if state.arrays and lacking:
            notes.append(
                f"the optimizer has no state of {len(lacking)} tensors, {lacking[0]!r} the first: it is NaN"
            )
    return replace(content, arrays=kept_arrays, notes=tuple(notes), optimizer=state)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorting key of a name: digits by value, "layer.10" behind "layer.9"."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _require_same_tensors(
    step: LoggedStep, array: str, parameters: Mapping[str, LoggedTensor], others: Mapping[str, LoggedTensor]
) -> None:
    for tensor in [*parameters, *others]:
        if tensor not in others or tensor not in parameters:
            lacking = array if tensor not in others else "parameter"
            raise InputError(
                f"tensor {tensor!r} has no {lacking}",
                where=where(step, array, tensor),
                why=f"names differ: parameters {sorted(parameters)[:6]}, {array}s {sorted(others)[:6]}",
                remedy=f"log parameter and {array} under the same names",
            )
        if parameters[tensor].shape != others[tensor].shape:
            raise InputError(
                f"{array} has shape {others[tensor].shape}, its parameter {parameters[tensor].shape}",
                where=where(step, array, tensor),
                remedy="log both in the same shape",
            )


def _require_replicates(step: LoggedStep, content: StepContent) -> None:
    """Refuse replicates that are not R of every tensor, one shape after the other."""
    count, logged = content.replicates, [array for array in REPLICATE_STATES if content.arrays.get(array)]
    logged += [REPLICATE_LOSS] if content.replicate_loss else []
    if logged and not count:
        raise InputError(
            f"{' and '.join(logged)} without {REPLICATE_PARAMETER}, or of none",
            where=where(step, logged[0]),
            remedy=f"log the states that the replicates lead to as {REPLICATE_PARAMETER}, replicates first",
        )
    for array in logged[: len(logged) - bool(content.replicate_loss)]:
        parameters = content.arrays["parameter"]
        expected = {name: replace(tensor, shape=(count, *tensor.shape)) for name, tensor in parameters.items()}
        for name, tensor in content.arrays[array].items():
            if name in expected and tensor.shape != expected[name].shape:
                raise InputError(
                    f"{array} has shape {tensor.shape}, {count} replicates of its parameter {expected[name].shape}",
                    where=where(step, array, name),
                    remedy="log as many replicates of every tensor, along a first dimension of their own",
                )
        _require_same_tensors(step, array, expected, content.arrays[array])
    if content.replicate_loss and len(content.replicate_loss) != count:
        raise InputError(
            f"{len(content.replicate_loss)} values of {REPLICATE_LOSS} for {count} replicates",
            where=where(step, REPLICATE_LOSS),
            remedy="log one for each replicate",
        )
