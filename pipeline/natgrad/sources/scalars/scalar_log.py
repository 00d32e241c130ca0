"""Read logs of scalars such as loss and learning rate by step, which loggers write in addition to checkpoints."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS
from natgrad.sources.base import StepContent
from natgrad.sources.changes import change_time, changed_lately
from natgrad.sources.container import READ_ERRORS, not_regular, reason_of
from natgrad.sources.steps import LoggedStep, NotYet, Unreadable
from natgrad.storage import NotRegularError, Storage, network_errors

__all__ = ["RUN_KEY", "Kind", "ScalarLog"]

Wanted = Callable[[str], bool]
Decoder = Callable[[Storage, Wanted, list[str]], Iterator[Mapping[str, Any]]]
"""Function of a file, a predicate for wanted keys and a list for notes. Yields records with the wanted keys."""

RUN_KEY = "run_name"
"""Key for the name of the run of a record, in logs that contain several runs."""

_STEP = (
    "trainer global step",
    "train global step",
    "global step",
    "step",
    "iteration",
    "iter",
)
_COMMON_KEYS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "train loss", "training loss", "loss train", "train loss step", "loss step"),
    "learning_rate": ("learning rate", "lr", "train learning rate", "train lr"),
    "loss_time_derivative": ("loss time derivative",),
    "hessian_min_eigenvalue": ("hessian min eigenvalue",),
    "step": _STEP,
}
_LIGHTNING_RATES = re.compile(r"lr-\w+(-\d+)?(/pg\d+)?")
"""Keys of Lightning's LearningRateMonitor, one for each optimizer and parameter group."""

RECORDS_LIMIT = 1 << 24
"""Default limit on the number of values per key."""

KEYS_LIMIT = 1 << 17
"""Maximum number of different keys in a log."""

_KEY_LENGTH = 1 << 12
_SHOWN = 80
_EXACT = 1 << 53
_SINGLE_PRECISION = "this log has single precision: differences of losses have a relative error of 6e-8 of the loss"


@dataclass(frozen=True)
class Kind:
    """A kind of scalar log.

    Attributes
    ----------
    form : str
        Used in messages, such as "a CSV log".
    files : callable
        Function of a location that returns the files of the log in the order written, empty if there are none.
    decode : Decoder
    step : str
        Key of the step, if the format defines one.
    single : bool
        Most writers of this format store single precision.
    """

    form: str
    files: Callable[[Storage], Sequence[Storage]]
    decode: Decoder
    step: str = ""
    single: bool = False


@dataclass
class _Column:
    """The values of one key (at most ``limit``), their record numbers, and the first value that is not a number."""

    limit: int
    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    invalid: tuple[int, str] | None = None

    def append(self, record: int, value: Any) -> None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        number = _number(value)
        if number is None:
            self.invalid = self.invalid or (record, str(value)[:40])
            return
        if len(self.records) >= self.limit:
            raise ValueError(f"it contains more than {self.limit} records")
        self.records.append(record)
        self.values.append(number)


def _number(value: Any) -> float | None:
    """Return the value of a number or numeric string, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | np.number):
        return None
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


class ScalarLog:
    """A log of the scalars of a run.

    A record contains a step number and some quantities. Records of the same step are merged. If the step number
    decreases, the run was restarted, and the last value written for a step is used.

    Parameters
    ----------
    location : Storage
        File or folder of the log.
    kind : Kind
    mapping : mapping, optional
        Quantity, or ``step``, to its key, in which ``*`` matches any single level; ``run`` to the name of the run,
        if the log contains several.
    shift : mapping, optional
        Quantity to the number added to the step at which its values are logged.
    records_limit : int
        Maximum number of values per key. A log with more values is refused.

    Raises
    ------
    InputError
        If the mapping contains a quantity that is not a scalar.
    """

    def __init__(
        self,
        location: Storage,
        kind: Kind,
        mapping: Mapping[str, str] | None = None,
        shift: Mapping[str, int] | None = None,
        *,
        records_limit: int = RECORDS_LIMIT,
    ) -> None:
        self.location, self._kind, self._records_limit = location, kind, records_limit
        self._mapping, self._shift = dict(mapping or {}), dict(shift or {})
        for quantity, key in self._mapping.items():
            if quantity not in (*SCALARS, "step", "run") or not isinstance(key, str) or not key:
                raise InputError(
                    f"{quantity}={key} cannot be mapped in a log of scalars",
                    where=str(location),
                    remedy=f"map one of {', '.join(SCALARS)}, step, run",
                )
        self._wanted_keys: dict[str, bool] = {}
        self._scalars: dict[int, dict[str, float]] | None = None
        self._notes: list[str] = []

    def steps(self) -> list[LoggedStep]:
        """List the steps that have a scalar. This reads the files.

        Raises
        ------
        InputError
            If the log cannot be read, has none of the scalars, or lacks a key that the user specified.
        """
        scalars = self._read()
        return [
            LoggedStep(
                number,
                self.location,
                values=" ".join(f"{name}={value!r}" for name, value in sorted(scalars[number].items())),
            )
            for number in sorted(scalars)
        ]

    def open(self, step: LoggedStep) -> _Scalars:
        """Open a step; see `natgrad.sources.base.Source`."""
        return _Scalars(StepContent({}, self._read().get(step.number, {}), notes=tuple(self._notes)))

    def growing(self) -> bool:
        """Return True if the log was modified recently, so that it may still grow."""
        return any(changed_lately(change_time(file)) for file in self._files())

    def _files(self) -> Sequence[Storage]:
        try:
            with network_errors(self.location):
                files = self._kind.files(self.location)
        except OSError as error:
            raise InputError(f"cannot list the log: {error.strerror}", where=str(self.location)) from error
        if not files:
            raise InputError(
                f"this is not {self._kind.form}",
                where=str(self.location),
                remedy="see natgrad formats for the formats that can be read",
            )
        return files

    def _read(self) -> dict[int, dict[str, float]]:
        if self._scalars is None:
            self._notes = []
            columns = self._columns()
            self._scalars = self._by_step(columns)
        return self._scalars

    def _columns(self) -> dict[str, _Column]:
        """Read the columns of all keys that may be needed."""
        columns: dict[str, _Column] = {}
        runs: dict[str, None] = {}
        chosen = self._mapping.get("run")
        record = 0
        for file in self._files():
            with _read_errors(file, self._kind.form):
                for values in self._kind.decode(file, self._wanted, self._notes):
                    record += 1
                    run = values.get(RUN_KEY)
                    if run is not None and len(runs) < 1 << 16:
                        runs[str(run)] = None
                    if chosen is not None and run != chosen:
                        continue
                    for key, value in values.items():
                        if key != RUN_KEY:
                            columns.setdefault(key, _Column(self._records_limit)).append(record, value)
        if (chosen is None and len(runs) > 1) or (chosen is not None and chosen not in runs):
            raise InputError(
                f"the log contains the runs {', '.join(run[:_SHOWN] for run in list(runs)[:8]) or '(none)'}"
                + (f", not {chosen}" if chosen is not None else ""),
                where=str(self.location),
                remedy="select one with --map run=NAME, or in a run file",
            )
        return columns

    def _wanted(self, key: str) -> bool:
        known = self._wanted_keys.get(key)
        if known is None:
            if len(self._wanted_keys) >= KEYS_LIMIT or len(key) > _KEY_LENGTH:
                raise ValueError(
                    f"it has more than {KEYS_LIMIT} different keys, or one of more than {_KEY_LENGTH} characters"
                )
            known = key == RUN_KEY or any(_matches(q, key, self._mapping.get(q)) for q in (*SCALARS, "step"))
            self._wanted_keys[key] = known
        return known

    def _keys(self, quantity: str, columns: Mapping[str, _Column]) -> list[str]:
        """Return the keys of a quantity: those that the user specified, or the first common ones that exist."""
        mapped_key = self._mapping.get(quantity)
        if mapped_key is not None:
            found = [key for key in columns if _matches(quantity, key, mapped_key)]
            if not found:
                raise self._missing(f"there is no {quantity} under the key {mapped_key!r}", columns)
            return found
        if quantity == "step" and self._kind.step:
            return [self._kind.step]
        for common_key in _COMMON_KEYS[quantity]:
            found = [key for key in columns if _normal(key) == common_key]
            if found:
                return found
        return [key for key in columns if quantity == "learning_rate" and _LIGHTNING_RATES.fullmatch(key)]

    def _missing(self, what: str, columns: Mapping[str, _Column]) -> InputError:
        kind = NotYet if self.growing() else InputError
        keys = ", ".join(sorted(columns)) or "none of the common ones"
        return kind(
            what,
            where=str(self.location),
            why=f"the candidate keys are {keys}",
            remedy="specify the keys with --map loss=KEY, learning_rate=KEY, step=KEY",
        )

    def _by_step(self, columns: Mapping[str, _Column]) -> dict[int, dict[str, float]]:
        """Return the scalars of each step."""
        found = {quantity: self._keys(quantity, columns) for quantity in SCALARS}
        if not any(found.values()):
            raise self._missing("there is no known scalar in this log", columns)
        step_keys = self._keys("step", columns)
        if len(step_keys) != 1:
            what = (
                f"the step is ambiguous: the log has {', '.join(step_keys)}"
                if step_keys
                else "this log has no step numbers"
            )
            raise self._missing(what, columns)
        records, steps = self._numbers(step_keys[0], columns[step_keys[0]])
        scalars: dict[int, dict[str, float]] = {}
        for quantity, keys in found.items():
            merged: dict[int, float] = {}
            unequal: set[int] = set()
            for key in keys:
                for step, value in self._series(quantity, key, columns[key], records, steps).items():
                    before = merged.setdefault(step, value)
                    if before != value and not (math.isnan(before) and math.isnan(value)):
                        unequal.add(step)
            if unequal:
                self._notes.append(
                    f"{quantity} differs between {', '.join(keys)} at {len(unequal)} steps: no value is used there"
                )
            if keys and keys != [quantity] and quantity not in self._mapping:
                self._notes.append(f"{quantity} is read from {', '.join(keys)}")
            for step, value in merged.items():
                if step not in unequal:
                    scalars.setdefault(step, {})[quantity] = value
        values = np.array([value for at_step in scalars.values() for value in at_step.values()])
        if self._kind.single and np.array_equal(values.astype(np.float32), values, equal_nan=True):
            self._notes.append(_SINGLE_PRECISION)
        return scalars

    def _numbers(self, key: str, column: _Column) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the record numbers, and the step number of each record."""
        self._require_numbers(key, column)
        values = np.frombuffer(column.values)
        valid = (values == np.floor(values)) & (values >= 0) & (values < _EXACT)
        if not valid.all():
            raise InputError(
                f"{key!r} contains {values[~valid][0]:g}, which is not a step number",
                where=str(self.location),
                remedy="specify the key of the number of updates with --map step=KEY",
            )
        return np.frombuffer(column.records, np.int64), values.astype(np.int64)

    def _require_numbers(self, key: str, column: _Column) -> None:
        if column.invalid is not None:
            raise InputError(
                f"{column.invalid[1]!r} is not a number",
                where=f"{self.location}, {key}, record {column.invalid[0]}",
                why="the file is corrupt, or this key contains other values",
                remedy="repair the file, or select another key with --map",
            )

    def _series(
        self, quantity: str, key: str, column: _Column, records: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> dict[int, float]:
        """Return the value of a key at each step; the last one written if there are several."""
        self._require_numbers(key, column)
        own_records, values = np.frombuffer(column.records, np.int64), np.frombuffer(column.values)
        indices = np.minimum(np.searchsorted(records, own_records), len(records) - 1)
        known = records[indices] == own_records
        if not known.all():
            self._notes.append(f"{(~known).sum()} records of {key} have no step and are left out")
        numbers, values = steps[indices[known]], values[known]
        back = np.flatnonzero(np.diff(numbers) < 0)
        if len(back):
            times = "once" if len(back) == 1 else f"{len(back)} times"
            self._notes.append(
                f"the step of {key} decreases {times}, first from {numbers[back[0]]} to {numbers[back[0] + 1]}: "
                "the run was restarted, and the later of two values of a step is used"
            )
        numbers = numbers + self._shift.get(quantity, 0)
        if (numbers < 0).any():
            self._notes.append(
                f"{(numbers < 0).sum()} records of {key} are left out: their shifted steps are negative"
            )
        return {n: v for n, v in zip(numbers.tolist(), values.tolist(), strict=True) if n >= 0}


class _Scalars:
    """Reader of the scalars of one step."""

    def __init__(self, content: StepContent) -> None:
        self._content = content

    def __enter__(self) -> _Scalars:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        return self._content

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Raise KeyError: a log of scalars has no tensors."""
        raise KeyError(f"{array}/{tensor}")


def _normal(key: str) -> str:
    """Return a key in lower case, with its words separated by spaces."""
    return re.sub(r"[\s._/-]+", " ", key.lower()).strip()


def _matches(quantity: str, key: str, mapped_key: str | None) -> bool:
    """Return True if a key may be that of a quantity."""
    if mapped_key is not None:
        return re.fullmatch("[^/]+".join(map(re.escape, mapped_key.split("*"))), key) is not None
    if quantity == "learning_rate" and _LIGHTNING_RATES.fullmatch(key):
        return True
    return _normal(key) in _COMMON_KEYS[quantity]


@contextmanager
def _read_errors(file: Storage, form: str) -> Iterator[None]:
    """Convert the exceptions that corrupt or malicious files raise to InputError."""
    try:
        with network_errors(file):
            yield
    except InputError:
        raise
    except NotRegularError as error:
        raise not_regular(error, form, str(file)) from error
    except READ_ERRORS as error:
        raise Unreadable(
            f"cannot read {form}: {reason_of(error)}",
            where=str(file),
            why=f"the file is corrupt, not {form}, or not readable",
            remedy="repair the file, specify its format (--format), or omit it",
        ) from error
