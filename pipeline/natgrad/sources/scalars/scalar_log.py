"""Logs of scalars: loss, learning rate and their like by step, as loggers write them beside the checkpoints."""

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
from natgrad.sources.steps import LoggedStep, NotYet, Unreadable
from natgrad.storage import Storage, network_errors

__all__ = ["RUN_KEY", "Kind", "ScalarLog"]

Wanted = Callable[[str], bool]
Decoder = Callable[[Storage, Wanted, list[str]], Iterator[Mapping[str, Any]]]
"""File, which keys are wanted, and where to put notes, to the records in the order written, wanted keys alone."""

RUN_KEY = "run_name"
"""Key of the run that a record is of, in logs that hold several."""

_STEP = (
    "trainer global step",
    "train global step",
    "global step",
    "step",
    "iteration",
    "iter",
)
_USUAL: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "train loss", "training loss", "loss train", "train loss step", "loss step"),
    "learning_rate": ("learning rate", "lr", "train learning rate", "train lr"),
    "loss_time_derivative": ("loss time derivative",),
    "hessian_min_eigenvalue": ("hessian min eigenvalue",),
    "step": _STEP,
}
_RATES_OF_LIGHTNING = re.compile(r"lr-\w+(-\d+)?(/pg\d+)?")
"""Keys of its LearningRateMonitor: one for each optimizer and group of parameters."""

RECORDS_LIMIT = 1 << 24
"""Default limit of the values of one key."""

_EXACT = 1 << 53
_SINGLE_PRECISION = "numbers of this log are of single precision: differences of losses are off by 6e-8 of a loss"


@dataclass(frozen=True)
class Kind:
    """One kind of scalar logs.

    Attributes
    ----------
    form : str
        For messages: "a CSV log".
    files : callable
        Location to the files of the log, in the order written; empty where it holds none.
    decode : Decoder
    step : str
        Key of the step, where the format knows one.
    single : bool
        Most of its writers store numbers in single precision.
    """

    form: str
    files: Callable[[Storage], Sequence[Storage]]
    decode: Decoder
    step: str = ""
    single: bool = False


@dataclass
class _Column:
    """The values of one key, at most ``limit``, and their records; the first value that is not a number."""

    limit: int
    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    wrong: tuple[int, str] | None = None

    def append(self, record: int, value: Any) -> None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        number = _number(value)
        if number is None:
            self.wrong = self.wrong or (record, str(value)[:40])
            return
        if len(self.records) >= self.limit:
            raise ValueError(f"it holds more than {self.limit} records")
        self.records.append(record)
        self.values.append(number)


def _number(value: Any) -> float | None:
    """Value of a number or of text that is one."""
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

    A record has the number of its step and some quantities; records of one step add up. Where the step falls back
    the run was restarted: of the values of one step the last one written counts.

    Parameters
    ----------
    location : Storage
        File or folder.
    kind : Kind
    mapping : mapping, optional
        Quantity, or ``step``, to the key that it stands under, ``*`` any one level of it; ``run`` to the name of
        the run, where the log holds several.
    shift : mapping, optional
        Quantity to what is added to the step that its values are logged at.
    records_limit : int
        Number of values of one key above which the log is refused.

    Raises
    ------
    InputError
        Where the mapping names what a log of scalars has not.
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
                    f"{quantity}={key} is not in a log of scalars",
                    where=str(location),
                    remedy=f"map one of {', '.join(SCALARS)}, step, run",
                )
        self._scalars: dict[int, dict[str, float]] | None = None
        self._notes: list[str] = []

    def steps(self) -> list[LoggedStep]:
        """List the steps of which there is a scalar; the files are read.

        Raises
        ------
        InputError
            Where the log cannot be read, has none of the scalars, or one under a key that is not there.
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
        """Whether somebody wrote to it lately, so that more may come."""
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
                remedy="natgrad formats lists what can be read",
            )
        return files

    def _read(self) -> dict[int, dict[str, float]]:
        if self._scalars is None:
            self._notes = []
            columns = self._columns()
            self._scalars = self._by_step(columns)
        return self._scalars

    def _columns(self) -> dict[str, _Column]:
        """Columns of all keys that may be meant."""
        columns: dict[str, _Column] = {}
        runs: dict[str, None] = {}
        chosen = self._mapping.get("run")
        record = 0
        for file in self._files():
            with _refused(file, self._kind.form):
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
                f"the log holds the runs {', '.join(list(runs)[:8]) or 'of nobody'}"
                + (f", not {chosen}" if chosen is not None else ""),
                where=str(self.location),
                remedy="say which one is meant: --map run=NAME, or in a run file",
            )
        return columns

    def _wanted(self, key: str) -> bool:
        return key == RUN_KEY or any(_matches(q, key, self._mapping.get(q)) for q in (*SCALARS, "step"))

    def _keys(self, quantity: str, columns: Mapping[str, _Column]) -> list[str]:
        """Keys of a quantity: those the user gave, or the first usual ones that are there."""
        given = self._mapping.get(quantity)
        if given is not None:
            found = [key for key in columns if _matches(quantity, key, given)]
            if not found:
                raise self._missing(f"no {quantity} under the key {given!r}", columns)
            return found
        if quantity == "step" and self._kind.step:
            return [self._kind.step]
        for usual in _USUAL[quantity]:
            found = [key for key in columns if _normal(key) == usual]
            if found:
                return found
        return [key for key in columns if quantity == "learning_rate" and _RATES_OF_LIGHTNING.fullmatch(key)]

    def _missing(self, what: str, columns: Mapping[str, _Column]) -> InputError:
        kind = NotYet if self.growing() else InputError
        keys = ", ".join(sorted(columns)) or "none of the usual ones"
        return kind(
            what,
            where=str(self.location),
            why=f"keys that may be meant are {keys}",
            remedy="say where it is: --map loss=KEY, learning_rate=KEY, step=KEY",
        )

    def _by_step(self, columns: Mapping[str, _Column]) -> dict[int, dict[str, float]]:
        """Scalars of each step."""
        found = {quantity: self._keys(quantity, columns) for quantity in SCALARS}
        if not any(found.values()):
            raise self._missing("no scalar is in this log", columns)
        step_keys = self._keys("step", columns)
        if len(step_keys) != 1:
            what = f"the step is under {', '.join(step_keys)}" if step_keys else "no step is in this log"
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
                    f"{quantity} is not the same under {', '.join(keys)}: at {len(unequal)} steps none is taken"
                )
            if keys and keys != [quantity] and quantity not in self._mapping:
                self._notes.append(f"{quantity} is what the log calls {', '.join(keys)}")
            for step, value in merged.items():
                if step not in unequal:
                    scalars.setdefault(step, {})[quantity] = value
        values = np.array([value for of_step in scalars.values() for value in of_step.values()])
        if self._kind.single and np.array_equal(values.astype(np.float32), values, equal_nan=True):
            self._notes.append(_SINGLE_PRECISION)
        return scalars

    def _numbers(self, key: str, column: _Column) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the records, and the number of the step of each."""
        self._require_numbers(key, column)
        values = np.frombuffer(column.values)
        whole = (values == np.floor(values)) & (values >= 0) & (values < _EXACT)
        if not whole.all():
            raise InputError(
                f"{key!r} is {values[~whole][0]:g}, not the number of a step",
                where=str(self.location),
                remedy="say with --map step=KEY where the number of updates stands",
            )
        return np.frombuffer(column.records, np.int64), values.astype(np.int64)

    def _require_numbers(self, key: str, column: _Column) -> None:
        if column.wrong is not None:
            raise InputError(
                f"{column.wrong[1]!r} is no number",
                where=f"{self.location}, {key}, record {column.wrong[0]}",
                why="the file is damaged, or something else stands under this key",
                remedy="mend the file, or say with --map which key is meant",
            )

    def _series(
        self, quantity: str, key: str, column: _Column, records: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> dict[int, float]:
        """Value of a key at each step, the last one written."""
        self._require_numbers(key, column)
        mine, values = np.frombuffer(column.records, np.int64), np.frombuffer(column.values)
        places = np.minimum(np.searchsorted(records, mine), len(records) - 1)
        known = records[places] == mine
        if not known.all():
            self._notes.append(f"{(~known).sum()} records of {key} have no step and are left out")
        numbers, values = steps[places[known]], values[known]
        back = np.flatnonzero(np.diff(numbers) < 0)
        if len(back):
            times = "once" if len(back) == 1 else f"{len(back)} times"
            self._notes.append(
                f"the step of {key} falls back {times}, from {numbers[back[0]]} to {numbers[back[0] + 1]} first: "
                "the run was restarted, and of two values of a step the later one counts"
            )
        numbers = numbers + self._shift.get(quantity, 0)
        if (numbers < 0).any():
            self._notes.append(f"{(numbers < 0).sum()} records of {key} are shifted before step 0 and left out")
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
        """Refuse: there are no tensors (KeyError)."""
        raise KeyError(f"{array}/{tensor}")


def _normal(key: str) -> str:
    """Key in lower case, its words parted by spaces."""
    return re.sub(r"[\s._/-]+", " ", key.lower()).strip()


def _matches(quantity: str, key: str, given: str | None) -> bool:
    """Whether a key may be that of a quantity."""
    if given is not None:
        return re.fullmatch("[^/]+".join(map(re.escape, given.split("*"))), key) is not None
    if quantity == "learning_rate" and _RATES_OF_LIGHTNING.fullmatch(key):
        return True
    return _normal(key) in _USUAL[quantity]


@contextmanager
def _refused(file: Storage, form: str) -> Iterator[None]:
    """Turn what a damaged or hostile file raises into a refusal."""
    try:
        with network_errors(file):
            yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError, EOFError) as error:
        raise Unreadable(
            f"cannot read {form}: {error}",
            where=str(file),
            why=f"it is damaged, not {form}, or not readable",
            remedy="mend the file, say of which format it is (--format), or leave it out",
        ) from error
