"""Read logs of scalars such as loss and learning rate by step, which loggers write in addition to checkpoints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar, flat_configuration
from natgrad.schema.errors import InputError
from natgrad.schema.names import HESSIAN_NUMBERS, SCALARS
from natgrad.sources.base import StepContent
from natgrad.sources.changes import change_time, changed_lately
from natgrad.sources.configured import nearby, read_or_note
from natgrad.sources.container import READ_ERRORS, not_regular, reason_of
from natgrad.sources.names import SCALAR_LOG_QUANTITIES
from natgrad.sources.scalars.columns import (
    LINE_KEY,
    RESTART_KEY,
    RUN_KEY,
    Batch,
    Column,
    Decoded,
    Labels,
    Table,
    each_record,
    in_batches,
    label_text,
    number_of,
)
from natgrad.sources.scalars.series import Conflict, Series, concatenated, counts_within_epochs, merged
from natgrad.sources.steps import LoggedStep, NotYet, Unreadable
from natgrad.storage import NotRegularError, Storage, network_errors

__all__ = ["Decoder", "Kind", "ScalarLog", "Wanted"]

Wanted = Callable[[str], bool]
Integers = NDArray[np.int64]
Decoder = Callable[[Storage, Wanted, list[str]], Decoded]
"""Function of a file, a predicate for wanted keys and a list for notes. Yields records with the wanted keys, or
batches of them."""

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
    **{name: (name.replace("_", " "),) for name in HESSIAN_NUMBERS},
    "decoupled_weight_decay": ("decoupled weight decay", "weight decay"),
    "step": _STEP,
}
_EPOCH = ("epoch", "epochs", "epoch num", "epoch idx", "current epoch", "train epoch", "trainer epoch")
_LABELS = frozenset(
    (
        *("mode", "split", "phase", "stage", "subset", "set", "partition", "dataset", "loader", "fold", "task"),
        *("kind", "type", "event", "tag", "run", "run id", "trial", "seed"),
        *("rank", "local rank", "global rank", "process index", "replica", "worker", "worker id"),
    )
)
"""Keys that tell records of one step apart. If they differ, the records may be of different quantities."""

_CHOICE = re.compile(r"(.+?)((?:\[[^\[\]=]+=[^\[\]]*\])+)")
_CHOSEN = re.compile(r"\[([^\[\]=]+)=([^\[\]]*)\]")
"""``KEY[LABEL=VALUE]`` of a mapping: the records in which LABEL has a value."""

_RUNS_LIMIT = 1 << 16
"""Number of runs whose names are kept."""

_GROUPS_LIMIT = 256
"""Number of groups of records, such as those of ranks, that are compared."""

_LIGHTNING_RATES = re.compile(r"lr-\w+(-\d+)?(/pg\d+)?")
"""Keys of Lightning's LearningRateMonitor, one for each optimizer and parameter group."""

RECORDS_LIMIT = 1 << 24
"""Default limit on the number of values per key."""

KEYS_LIMIT = 1 << 17
"""Maximum number of different keys in a log."""

_RECORDS_LISTED = 1 << 10
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
    configuration : callable
        Function of a file of the log that returns the configuration of each run, by the name in its records.
    of_line : callable, optional
        For text: function of the form of its lines and of the key of the step that returns the decoder to use.
    """

    form: str
    files: Callable[[Storage], Sequence[Storage]]
    decode: Decoder
    step: str = ""
    single: bool = False
    configuration: Callable[[Storage], Mapping[str, Mapping[str, Any]]] = lambda file: {}
    of_line: Callable[[str, str], Decoder] | None = None


class ScalarLog:
    """A log of the scalars of a run.

    A record contains a step number and some quantities. Records of the same step are merged. If the step number
    decreases, the run was restarted, and the values that were logged before for this step and later ones are
    omitted. If a quantity has several different values at a step, or if its records differ in a label such as
    ``mode`` or ``rank``, none is used unless the mapping selects one.

    Parameters
    ----------
    location : Storage
        File or folder of the log.
    kind : Kind
    mapping : mapping, optional
        Quantity, or ``step``, to its key, in which ``*`` matches any single level; ``run`` to the name of the run,
        if the log contains several. ``loss[mode=train]`` selects the records in which ``mode`` is ``train``.
    shift : mapping, optional
        By quantity, the number added to the step at which its values are logged.
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
        known = [name for name in SCALAR_LOG_QUANTITIES if name != "line" or kind.of_line is not None]
        for quantity, key in self._mapping.items():
            if quantity not in known or not isinstance(key, str) or not key:
                raise InputError(
                    f"{quantity}={key} cannot be mapped in {kind.form}",
                    where=str(location),
                    remedy=f"map one of {', '.join(known)}",
                )
        line = self._mapping.pop("line", None)
        if line is not None and kind.of_line is not None:
            self._kind = replace(kind, decode=kind.of_line(line, self._mapping.get("step", "step")))
        self._chosen: dict[str, list[tuple[str, str]]] = {}
        for quantity, key in self._mapping.items():
            choice = _CHOICE.fullmatch(key) if quantity in SCALARS else None
            if choice:
                self._mapping[quantity] = choice[1]
                self._chosen[quantity] = [(label, label_text(value)) for label, value in _CHOSEN.findall(choice[2])]
        self._labels = {label for chosen in self._chosen.values() for label, _ in chosen}
        self._wanted_keys: dict[str, bool] = {}
        self._scalars: _Steps | None = None
        self._notes: list[str] = []

    def steps(self) -> list[LoggedStep]:
        """List the steps that have a scalar. This reads the files.

        Raises
        ------
        InputError
            If the log cannot be read, has none of the scalars, or lacks a key that the user specified.
        """
        scalars = self._read()
        return [scalars[number] for number in sorted(scalars)]

    def numbered(self) -> Mapping[int, LoggedStep]:
        """Return the steps by number; see `steps`. Each is created on access: a run may have far fewer states."""
        return self._read()

    def open(self, step: LoggedStep) -> _Scalars:
        """Open a step; see `natgrad.sources.base.Source`."""
        return _Scalars(StepContent({}, self._read().scalars(step.number), notes=tuple(self._notes)))

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of the run; see `natgrad.sources.configured.Configured`."""
        found = nearby(self.location, step, notes)
        for file in self._files():
            for run, own in read_or_note(partial(self._kind.configuration, file), file, notes).items():
                if self._mapping.get("run", run) == run:
                    found |= flat_configuration(own)
        return found

    def keys(self) -> dict[str, float]:
        """Return the first number under each key; see `natgrad.sources.base.Keyed`. Only some records are read."""
        found: dict[str, float] = {}
        with self._records(self._files()[0], lambda key: True, []) as records:
            for values in itertools.islice(each_record(records), _RECORDS_LISTED):
                for key, value in values.items():
                    number = None if key in (RUN_KEY, RESTART_KEY, LINE_KEY) else number_of(value)
                    if number is not None and len(found) < KEYS_LIMIT:
                        found.setdefault(key, number)
        return found

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

    @contextmanager
    def _records(self, file: Storage, wanted: Wanted, notes: list[str]) -> Iterator[Decoded]:
        with _read_errors(file, self._kind.form):
            records = self._kind.decode(file, wanted, notes)
            try:
                yield records
            finally:
                # The traceback of an error would keep the file or database open.
                if isinstance(records, Generator):
                    records.close()

    def _read(self) -> _Steps:
        if self._scalars is None:
            self._notes = []
            self._scalars = self._by_step(self._table())
        return self._scalars

    def _table(self) -> Table:
        """Read the columns of all keys that may be needed."""
        table = Table()
        runs: dict[str, None] = {}
        chosen = self._mapping.get("run")
        record = 0
        for file in self._files():
            table.restarts.boundaries.append(record + 1)
            with self._records(file, self._wanted, self._notes) as records:
                for values in in_batches(records):
                    if isinstance(values, Batch):
                        self._add_batch(table, record + 1, values, runs)
                        record += values.size
                        continue
                    record += 1
                    run = values.get(RUN_KEY)
                    if run is not None and len(runs) < _RUNS_LIMIT:
                        runs[str(run)] = None
                    if chosen is None or run == chosen:
                        self._add(table, record, values)
        if (chosen is None and len(runs) > 1) or (chosen is not None and chosen not in runs):
            raise InputError(
                f"the log contains the runs {', '.join(run[:_SHOWN] for run in list(runs)[:8]) or '(none)'}"
                + (f", not {chosen}" if chosen is not None else ""),
                where=str(self.location),
                remedy="select one with --map run=NAME, or in a run file",
            )
        return table

    def _add(self, table: Table, record: int, values: Mapping[str, Any]) -> None:
        """Add the values of a record to their columns."""
        if RESTART_KEY in values:
            step = values[RESTART_KEY]
            if step is None:
                table.restarts.boundaries.append(record)
            else:
                table.restarts.marks.append((record, step))
            return
        line = values.get(LINE_KEY)
        for key, value in values.items():
            columns = table.of_key.get(key)
            if columns is None:
                columns = table.of_key[key] = self._columns(table, key)
            labels, column = columns
            if labels is not None:
                labels.append(record, value)
            if column is not None:
                column.append(record, value, line)

    def _add_batch(self, table: Table, record: int, batch: Batch, runs: dict[str, None]) -> None:
        """Add the values of several records to their columns; ``record`` is the number of the first one."""
        chosen = self._mapping.get("run")
        found = dict.fromkeys(batch.columns.get(RUN_KEY, [None]))
        runs.update(dict.fromkeys(str(run) for run in found if run is not None and len(runs) < _RUNS_LIMIT))
        if chosen is not None and list(found) != [chosen]:
            for number, one in enumerate(batch.records() if chosen in found else (), record):
                if one.get(RUN_KEY) == chosen:
                    self._add(table, number, one)
            return
        for key, values in batch.columns.items():
            labels, column = self._columns(table, key)
            if labels is not None:
                labels.extend(record, values)
            if column is not None:
                column.extend(record, values, batch.lines)

    def _columns(self, table: Table, key: str) -> tuple[Labels | None, Column | None]:
        """Return the columns to which the values of a key are added."""
        if key in (RUN_KEY, LINE_KEY):
            return None, None
        labels = table.labels.setdefault(key, Labels()) if self._is_label(key) else None
        column = table.columns.setdefault(key, Column(self._records_limit)) if self._is_number(key) else None
        return labels, column

    def _is_label(self, key: str) -> bool:
        return key in self._labels or _normal(key) in _LABELS

    def _is_number(self, key: str) -> bool:
        matched = any(_matches(q, key, self._mapping.get(q)) for q in (*SCALARS, "step"))
        return matched or _normal(key) in _EPOCH

    def _wanted(self, key: str) -> bool:
        known = self._wanted_keys.get(key)
        if known is None:
            if len(self._wanted_keys) >= KEYS_LIMIT or len(key) > _KEY_LENGTH:
                raise ValueError(
                    f"it has more than {KEYS_LIMIT} different keys, or one of more than {_KEY_LENGTH} characters"
                )
            known = key == RUN_KEY or self._is_label(key) or self._is_number(key)
            self._wanted_keys[key] = known
        return known

    def _keys(self, quantity: str, columns: Mapping[str, Column]) -> list[str]:
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

    def _missing(self, what: str, columns: Mapping[str, Column]) -> InputError:
        kind = NotYet if self.growing() else InputError
        keys = ", ".join(sorted(key for key in columns if _normal(key) not in _EPOCH)) or "none of the common ones"
        return kind(
            what,
            where=str(self.location),
            why=f"the candidate keys are {keys}",
            remedy="specify the keys with --map loss=KEY, learning_rate=KEY, step=KEY",
        )

    def _by_step(self, table: Table) -> _Steps:
        """Return the scalars of each step."""
        columns = table.columns
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
        records, steps = self._numbers(step_keys[0], columns.get(step_keys[0], Column(0)))
        series = {
            key: self._series(key, columns[key], records, steps)
            for key in dict.fromkeys(key for keys in found.values() for key in keys)
        }
        # A step at which no value is used is logged nevertheless: it is not waited for.
        logged: list[Integers] = []
        values: dict[str, Series] = {}
        for quantity, keys in found.items():
            of_keys: list[Series] = []
            for key in keys:
                known, ambiguous = self._values(quantity, key, series, table)
                logged += [known.steps, ambiguous]
                of_keys.append(known)
            values[quantity], unequal = merged(concatenated(of_keys))
            if unequal is not None:
                self._notes.append(
                    f"{quantity} differs between {', '.join(keys)} at {len(unequal.steps)} steps: no value is used "
                    "there"
                )
            if keys and keys != [quantity] and quantity not in self._mapping:
                self._notes.append(f"{quantity} is read from {', '.join(keys)}")
        if self._kind.single and all(_is_single(own.values) for own in values.values()):
            self._notes.append(_SINGLE_PRECISION)
        return _Steps(self.location, _union(logged), values)

    def _numbers(self, key: str, column: Column) -> tuple[Integers, Integers]:
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

    def _require_numbers(self, key: str, column: Column) -> None:
        if column.invalid is not None:
            raise InputError(
                f"{column.invalid[1]!r} is not a number",
                where=f"{self.location}, {key}, {column.invalid[0]}",
                why="the file is corrupt, this key contains other values, or they are not plain numbers",
                remedy="write numbers as 0.5 (not as tensor(0.5) or 0,5), or select another key with --map",
            )

    def _series(self, key: str, column: Column, records: Integers, steps: Integers) -> Series:
        """Return the values of a key that have a step."""
        self._require_numbers(key, column)
        own_records, values = np.frombuffer(column.records, np.int64), np.frombuffer(column.values)
        if np.array_equal(own_records, records):
            return Series(own_records, steps, values)
        indices = np.minimum(np.searchsorted(records, own_records), len(records) - 1)
        known = records[indices] == own_records if len(records) else np.zeros(len(own_records), bool)
        if not known.all():
            self._notes.append(f"{(~known).sum()} records of {key} have no step and are omitted")
        return Series(own_records[known], steps[indices[known]] if len(steps) else own_records[:0], values[known])

    def _values(
        self, quantity: str, key: str, all_series: Mapping[str, Series], table: Table
    ) -> tuple[Series, Integers]:
        """Return the value of a key at each step that was not abandoned, and the steps at which it is ambiguous."""
        series = all_series[key]
        # If every record of the key contains another key as well, the steps of the latter show all restarts.
        sharing = [other for other in all_series.values() if _contains(other.records, series.records)]
        reference = max([series, *sharing], key=lambda other: len(other.records))
        series, reference = (self._select(quantity, key, each, table.labels) for each in (series, reference))
        labels = [name for name, column in table.labels.items() if len(np.unique(column.of(series.records))) > 1]
        codes, reference_codes = (
            np.array([table.labels[name].of(s.records) for name in labels]).reshape(len(labels), len(s.records))
            for s in (series, reference)
        )
        distinct = np.unique(codes, axis=1).T if labels else np.zeros((1, 0), np.int64)
        groups = [
            self._current(
                key,
                series.where((codes == group[:, None]).all(axis=0)),
                reference.where((reference_codes == group[:, None]).all(axis=0)),
                table,
            )
            for group in distinct[:_GROUPS_LIMIT]
        ]
        found, conflict = merged(concatenated(groups))
        ambiguous = found.steps[:0] if conflict is None else conflict.steps
        # Records of one quantity, such as the learning rate of each rank, agree at the steps that they share.
        agree = conflict is None and len(distinct) <= _GROUPS_LIMIT
        shared = sum(len(np.unique(group.steps)) for group in groups if labels) - len(ambiguous)
        agree = agree and shared > len(found.steps)
        if labels and not agree:
            self._notes.append(self._differing(quantity, key, labels, table.labels, groups, conflict))
            found, ambiguous = found.where(np.zeros(len(found.steps), bool)), _union([found.steps, ambiguous])
        elif conflict is not None:
            self._notes.append(
                f"{key} has different values at {len(conflict.steps)} steps, {conflict.first[1]!r} and "
                f"{conflict.second[1]!r} at step {conflict.steps[0]}, the first of them: no value is used there; "
                "log one record for each step, or a key that tells them apart, such as split"
            )
        shift = self._shift.get(quantity, 0)
        if not shift:
            return found, ambiguous
        found, ambiguous = replace(found, steps=found.steps + shift), ambiguous + shift
        negative = int((found.steps < 0).sum() + (ambiguous < 0).sum())
        if negative:
            self._notes.append(f"{negative} records of {key} are omitted: their shifted steps are negative")
        return found.where(found.steps >= 0), ambiguous[ambiguous >= 0]

    def _select(self, quantity: str, key: str, series: Series, labels: Mapping[str, Labels]) -> Series:
        """Return the records of a key that the mapping selects."""
        for label, text in self._chosen.get(quantity, []):
            column = labels.get(label, Labels())
            code = column.texts.get(text)
            mask = column.of(series.records) == (-1 if code is None else code)
            if not mask.any():
                kind = NotYet if self.growing() else InputError
                known = ", ".join(sorted(filter(None, column.texts))[:8])
                raise kind(
                    f"no record of {key} has {label}={text}",
                    where=str(self.location),
                    why=f"the values of {label} are {known}" if known else f"no record has the key {label}",
                    remedy=f"select a value that exists: --map {quantity}={key}[{label}=VALUE]",
                )
            series = series.where(mask)
        return series

    def _current(self, key: str, series: Series, reference: Series, table: Table) -> Series:
        """Return the values that no restart abandoned. A step that counts within epochs is refused."""
        falls = table.restarts.falls(reference)
        epoch_keys = [name for name in table.columns if _normal(name) in _EPOCH]
        epochs = None
        if epoch_keys:
            column = table.columns[epoch_keys[0]]
            values = np.frombuffer(column.values)
            epochs = Series(np.frombuffer(column.records, np.int64), np.zeros(len(values), np.int64), values)
        index = counts_within_epochs(reference, falls, epochs)
        if index is not None:
            raise InputError(
                f"the step of {key} repeatedly falls from {reference.steps[index - 1]} to "
                f"{reference.steps[index]}: it counts within each epoch"
                if epochs is None
                else f"the step of {key} falls from {reference.steps[index - 1]} to {reference.steps[index]} where "
                "the epoch rises: it counts within each epoch",
                where=f"{self.location}, record {reference.records[index]}",
                why="a value can be used only if the number of updates before it is known",
                remedy="log the number of updates since the start of the run, and name its key with --map step=KEY",
            )
        current = table.restarts.current(series, reference)
        if not current.all():
            times = "once" if len(falls) == 1 else f"{len(falls)} times"
            decreases = (
                f"the step of {key} decreases {times}, first from {reference.steps[falls[0] - 1]} to "
                f"{reference.steps[falls[0]]}: the run was restarted"
                if len(falls)
                else f"the log states that the run was restarted, first at step {table.restarts.marks[0][1]}"
            )
            self._notes.append(
                f"{decreases}, and {(~current).sum()} values that were logged before, at and after the step of a "
                "restart, are omitted"
            )
        return series.where(current)

    def _differing(
        self,
        quantity: str,
        key: str,
        labels: Sequence[str],
        columns: Mapping[str, Labels],
        groups: Sequence[Series],
        conflict: Conflict | None,
    ) -> str:
        """Return the note on a quantity whose records differ in labels, which states how to select one of them."""

        def label_of(record: int) -> str:
            codes = {label: columns[label].of(np.array([record]))[0] for label in labels}
            texts = {label: list(columns[label].texts)[code] for label, code in codes.items()}
            return "".join(f"[{label}={text}]" for label, text in texts.items())

        pair = (
            [(int(group.records[0]), float(group.values[0])) for group in groups if len(group.records)][:2]
            if conflict is None
            else [conflict.first, conflict.second]
        )
        shown = " and ".join(f"{value!r} of {key}{label_of(record)}" for record, value in pair)
        at = "at different steps" if conflict is None else f"at step {conflict.steps[0]}"
        return (
            f"{quantity} is not used: the records of {key} differ in {', '.join(labels)}, and it is unknown which "
            f"of them are meant, for example {shown} {at}; select with --map '{quantity}={key}"
            f"{label_of(pair[0][0])}', or with map in a run file"
        )


def _union(parts: Sequence[Integers]) -> Integers:
    """Return the different elements of arrays, sorted."""
    different: list[Integers] = []
    for part in parts:
        # Most quantities have the same steps, and sorting them takes longer than comparing them.
        if len(part) and not any(np.array_equal(part, other) for other in different[-1:]):
            different.append(part)
    # A stable sort merges sorted parts, which is faster than the hash table of np.unique.
    found = np.sort(np.concatenate([np.zeros(0, np.int64), *different]), kind="stable")
    return found[np.diff(found, prepend=-1) > 0]


def _is_single(values: NDArray[np.float64]) -> bool:
    """Return True if numbers have single precision."""
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float32), values, equal_nan=True)


def _contains(records: Integers, others: Integers) -> bool:
    """Return True if all elements of one array are in another one."""
    return np.array_equal(records, others) or bool(np.isin(others, records).all())


class _Steps(Mapping[int, LoggedStep]):
    """The steps of a log of scalars, and the values of each quantity by step.

    A run may log millions of steps: they are kept in arrays.
    """

    def __init__(self, location: Storage, numbers: Integers, values: Mapping[str, Series]) -> None:
        self._location, self._numbers = location, numbers
        self._values = values

    def scalars(self, number: int) -> dict[str, float]:
        """Return the scalars of a step."""
        found = {}
        for quantity, own in self._values.items():
            index = _find(own.steps, number)
            if index is not None:
                found[quantity] = float(own.values[index])
        return found

    def __getitem__(self, number: int) -> LoggedStep:
        if number not in self:
            raise KeyError(number)
        values = " ".join(f"{name}={value!r}" for name, value in sorted(self.scalars(number).items()))
        return LoggedStep(number, self._location, values=values)

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and _find(self._numbers, number) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)


def _find(steps: Integers, step: int) -> int | None:
    """Return the index of a number in increasing ones, or None."""
    if not 0 <= step < _EXACT:
        return None
    index = int(np.searchsorted(steps, step))
    return index if index < len(steps) and steps[index] == step else None


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
    """Return True if a key may refer to a quantity."""
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
