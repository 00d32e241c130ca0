"""The trajectory of a run: its logged states, on disk.

A trajectory is one Zarr group::

    trajectory.zarr/
      parameter, gradient, hvp    (step, element)   chunks of whole steps x about a million elements
      replicate_parameter, replicate_hvp   (step, replicate, element)   of a stochastic rule, a replicate a chunk
      replicate_loss              (step, replicate)
      step, attempt, loss, learning_rate   (step)   and what else of `natgrad.schema.names.SCALARS` is logged
      run                         (step)            in the trajectory of a sweep: position in its names of runs
      commits/00000000.json ...   which rows exist, and checksums of all that is in them

Rows are in the order of their commits, and only ever appended. A run that was restarted from an older step goes on
with a new *attempt*: its rows follow those that they supersede, which stay. Two rows that follow each other are
before and after an update where they are of one run and one attempt.

What lies beyond the recorded rows (an interrupted write) is overwritten by the next attempt. The shape of an array
is never ahead of the record: it grows after the commit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import LAYOUT_VERSION, Layout, LedgerChunk
from natgrad.schema.names import (
    ATTEMPT,
    OPTIMIZER_NUMBERS,
    REPLICATE,
    REPLICATE_HVP,
    REPLICATE_LOSS,
    REPLICATE_STATES,
    RUN,
    STATES,
    STEP,
    TENSOR,
    USUAL_SCALARS,
    replicate_vectors,
)
from natgrad.storage import is_url, place
from natgrad.storage.repository import place_of_store, publish
from natgrad.store.group import (
    SCALAR_CHUNK,
    ArrayPlan,
    add_array,
    chunk_path,
    make_group,
    migrate_group,
    open_group,
    read_complete_chunk,
    remove_group,
    require_complete_chunk,
    resize_all,
    with_rows,
)
from natgrad.store.journal import sources_of
from natgrad.store.states import INGEST_AGAIN, States, checksum, state_arrays

__all__ = ["Trajectory"]

_TABLE_CHUNK = 1 << 16  # values in a chunk of an array (step, tensor), about


class Trajectory(States):
    """A run's logged states, on disk, with the numbers of each step.

    Attributes
    ----------
    path, layout, chunk, array_dtypes, replicates, dtypes, journal, rows
        Those of `natgrad.store.states.States`.
    scalars : tuple of str
        Numbers of a step that are stored.
    source : str
        Where the log was.
    sweep : bool
        Whether it holds several runs.
    tables : tuple of str
        Numbers of a step and tensor that are stored, of `natgrad.schema.names.OPTIMIZER_NUMBERS`.
    reading : dict or None
        How its log is read, of `natgrad.ingestion.read_options`; None where an older version made it.

    Notes
    -----
    Readers may be many and never wait; there is one writer at a time (`natgrad.ingestion` holds the lock).
    """

    def __init__(self, path: Path, version: str | None = None) -> None:
        """Open a trajectory at the rows committed so far.

        Parameters
        ----------
        path : Path
        version : str, optional
            Of an Icechunk repository: id, tag or time of the version to read; the newest where not given.

        Raises
        ------
        InputError
            Where there is none, or a newer natgrad wrote it.
        """
        path = place_of_store(path, version)
        attributes = open_group(path, "trajectory", "ingest a run first: natgrad ingest SOURCE OUT")
        super().__init__(
            path,
            attributes["version"],
            Layout.from_json(attributes["layout"]),
            tuple(attributes["chunk"]),
            attributes["dtypes"],
            attributes.get("replicates", 0),
        )
        self.scalars: tuple[str, ...] = tuple(attributes.get("scalars", USUAL_SCALARS))
        self.source: str = attributes["source"]
        self.sweep: bool = attributes.get("sweep", False)
        self.tables: tuple[str, ...] = tuple(attributes.get("tables", ()))
        self.reading: dict[str, Any] | None = attributes.get("reading")
        # A store of version 1 has one attempt at one run.
        self._numbered = (STEP,) if self._version < 2 else (STEP, ATTEMPT, RUN)[: 3 if self.sweep else 2]
        self._runs: tuple[str, ...] = ()
        self._spans: NDArray[np.int64] | None = None
        self._breaks: NDArray[np.int64] = np.empty(0, np.int64)
        self._read: dict[tuple[str, int], NDArray[Any]] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        layout: Layout,
        dtypes: Mapping[str, str],
        chunk: tuple[int, int],
        source: str = "",
        compressors: Mapping[str, Any] | None = None,
        scalars: Sequence[str] = USUAL_SCALARS,
        sweep: bool = False,
        tables: Sequence[str] = (),
        replicates: int = 0,
        reading: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """Create an empty trajectory, in place of one that is there.

        Parameters
        ----------
        path : Path
        layout : Layout
        dtypes : mapping
            Array (``parameter``, ``gradient``, ``hvp``, of replicates, what the optimizer keeps) to logical dtype.
        chunk : (int, int)
            Steps and elements of a chunk.
        source : str, optional
            Where the log was, for provenance.
        compressors : mapping, optional
            Array to Zarr codecs. The others are stored as they are: training state hardly compresses.
        scalars : sequence of str, optional
            Numbers of a step to store, of `natgrad.schema.names.SCALARS`; and ``replicate_loss``.
        sweep : bool
            For several runs.
        tables : sequence of str
            Numbers of a step and tensor to store, of `natgrad.schema.names.OPTIMIZER_NUMBERS`.
        replicates : int
            Of a stochastic rule.
        reading : mapping, optional
            How its log is read.

        Raises
        ------
        InputError
            Where the path holds something else.
        """
        attributes = {
            "source": source,
            "layout": layout.to_json(),
            "chunk": list(chunk),
            "dtypes": dict(dtypes),
            "scalars": list(scalars),
            "sweep": sweep,
            "tables": list(tables),
        }
        if replicates:
            attributes["replicates"] = replicates
        if reading is not None:
            attributes["reading"] = dict(reading)
        arrays = state_arrays(layout, dtypes, chunk, replicates, compressors or {})
        numbered = (STEP, ATTEMPT, RUN) if sweep else (STEP, ATTEMPT)
        for name in (*numbered, *scalars):
            several = name == REPLICATE_LOSS
            arrays[name] = ArrayPlan(
                (STEP, REPLICATE) if several else (STEP,),
                (0, replicates) if several else (0,),
                (max(1, _TABLE_CHUNK // replicates), replicates) if several else (SCALAR_CHUNK,),
                "int64" if name in numbered else "float64",
            )
        width = len(layout.tensors)
        for name in tables:
            rows = max(1, _TABLE_CHUNK // max(1, width))
            arrays[name] = ArrayPlan((STEP, TENSOR), (0, width), (rows, width), "float64")
        make_group(place(path), "trajectory", attributes, arrays)
        return cls(path)

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a trajectory; what is not one is refused (InputError)."""
        remove_group(path, "trajectory")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the arrays (step): those that number the rows, and the scalars; and of those (step, tensor)."""
        return (*self._numbered, *self.scalars, *self.tables)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all Zarr arrays."""
        return (*self.array_dtypes, *self.numbers)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the arrays (step, element) that were logged of the run, and not of its optimizer."""
        replicates = [name for array in REPLICATE_STATES for name in self.replicates_of(array)]
        return tuple(name for name in (*STATES, *replicates) if name in self.dtypes)

    @property
    def replicate_vectors(self) -> tuple[str, ...]:
        """Vectors of the Gram matrix of the replicates; none where there are no replicates."""
        return replicate_vectors(self.replicates, REPLICATE_HVP in self.array_dtypes)

    # Rows ---------------------------------------------------------------------------------------------------

    def scalar(self, name: str) -> NDArray[Any]:
        """Read ``step``, ``attempt`` or ``run`` (int64) or a scalar (float64) of the committed rows, shape (rows,).

        What an optimizer has of each tensor has shape (rows, tensors), and ``replicate_loss`` (rows, R). A scalar
        that the trajectory does not have is NaN at every step.

        Raises
        ------
        InputError
            Where a chunk is missing or too short.
        """
        if name not in self.numbers:
            shape: tuple[int, ...] = (self.n_states,)
            if name in OPTIMIZER_NUMBERS or name == REPLICATE_LOSS:
                shape = (self.n_states, self.replicates if name == REPLICATE_LOSS else len(self.layout.tensors))
            return np.zeros(shape, np.int64) if name in (ATTEMPT, RUN) else np.full(shape, np.nan)
        if (name, self.n_states) in self._read:
            return self._read[name, self.n_states]
        array, paths = self._array(name), self._number_chunks(name, 0, self.n_states)
        chunk = array.chunks, array.dtype, INGEST_AGAIN
        if is_url(self.path):
            for path in paths:
                require_complete_chunk(path, *chunk)
            values = np.asarray(with_rows(array, self.n_states)[:])
        else:
            # A long run has many of them, and Zarr takes longer for each than the disk.
            parts = [
                np.empty((0, *array.shape[1:]), array.dtype),
                *(read_complete_chunk(path, *chunk) for path in paths),
            ]
            values = np.concatenate(parts)[: self.n_states]
        values.flags.writeable = False
        self._read = {key: held for key, held in self._read.items() if key[1] == self.n_states}
        self._read[name, self.n_states] = values
        return values

    def _number_chunks(self, name: str, start: int, stop: int) -> list[Path]:
        """Files of the chunks of rows of an array (step), (step, tensor) or (step, replicate)."""
        rows = self._array(name).chunks[0]
        beside = (0,) if name in self.tables or name == REPLICATE_LOSS else ()
        indices = range(start // rows, -(-stop // rows))
        return [chunk_path(self.path / name, index, *beside) for index in indices]

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs of a sweep, in the order in which they came; of a run by itself, one empty name."""
        if not self.sweep:
            return ("",)
        if len(self._runs) <= int(self.scalar(RUN).max(initial=-1)):
            self._runs = tuple(name for record in self.records() for name in record.get("runs", ()))
        return self._runs

    def spans(self) -> NDArray[np.int64]:
        """Return the updates from each row to the next, shape (rows - 1,); 0 to one of another run or attempt.

        There are states on both sides of such a place, but no update leads from one to the other.
        """
        if self._spans is None or len(self._spans) != max(self.n_states - 1, 0):
            self._spans = np.diff(self.scalar(STEP))
            for name in (ATTEMPT, RUN):
                if name in self.numbers:
                    self._spans[np.diff(self.scalar(name)) != 0] = 0
            self._breaks = np.flatnonzero(self._spans == 0) + 1
        return self._spans

    def _begun(self) -> NDArray[np.int64]:
        """Rows to which no update leads from the row before."""
        self.spans()
        return self._breaks

    def contiguous_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut rows where no update leads from one to the next; what has no update at all is left out.

        Returns
        -------
        list of (first row, stop row)
            Of two rows at least.
        """
        breaks = self._begun()
        inside = breaks[np.searchsorted(breaks, start, "right") : np.searchsorted(breaks, stop)]
        edges = [start, *inside.tolist(), stop]
        return [(low, high) for low, high in itertools.pairwise(edges) if high - low > 1]

    def current(self, attempt: int | None = None) -> NDArray[np.bool_]:
        """Which rows are states of the runs as they stand, shape (rows,): the others were superseded.

        Parameters
        ----------
        attempt : int, optional
            As they stood at this attempt, where later ones are left aside.
        """
        steps, attempts, runs = (self.scalar(name) for name in (STEP, ATTEMPT, RUN))
        chosen = attempts <= (attempts.max(initial=0) if attempt is None else attempt)
        # A new attempt supersedes what its run has from its first step on.
        new = np.unique(runs, return_index=True)[1]
        for begin in np.setdiff1d(self._begun(), new):
            if chosen[begin]:
                older = (runs[:begin] == runs[begin]) & (attempts[:begin] < attempts[begin])
                chosen[:begin] &= ~older | (steps[:begin] < steps[begin])
        return chosen

    def sources(self) -> list[dict[str, Any]]:
        """Return what identifies the source of each row."""
        return [source for record in self.records() for source in sources_of(record)]

    # Commits ------------------------------------------------------------------------------------------------

    def commit(
        self,
        steps: Sequence[int],
        scalars: Mapping[str, Sequence[Any]],
        sources: Sequence[Mapping[str, Any]],
        checksums: Mapping[str, Sequence[Sequence[int]]],
        attempts: Sequence[int] | None = None,
        runs: Sequence[str] = (),
    ) -> None:
        """Make written rows visible, for all arrays together.

        Parameters
        ----------
        steps : sequence of int, length n
            Step numbers of the next n rows.
        scalars : mapping
            Each of `scalars`, n values (of ``replicate_loss`` n times R), and of `tables`, n rows of values; NaN
            where the log has none.
        sources : sequence of mapping, length n
            What identifies each step's source (name, size, time).
        checksums : mapping
            Array name to n rows of one `checksum` per chunk column.
        attempts : sequence of int, length n, optional
            Attempt of each row; the first where not given.
        runs : sequence of str, length n
            In a sweep, the name of each row's run.
        """
        start, stop = self.n_states, self.n_states + len(steps)
        known = dict(zip(self.runs, range(len(self.runs)), strict=True)) if self.sweep else {}
        numbers = {STEP: steps, ATTEMPT: attempts or [0] * len(steps)}
        if self.sweep:
            numbers[RUN] = [known.setdefault(name, len(known)) for name in runs]
        chunks: list[Path] = []
        for name, values in {**numbers, **scalars}.items():
            array = self._array(name)
            with_rows(array, stop)[start:stop] = np.asarray(values, dtype=array.dtype)
            chunks += self._number_chunks(name, start, stop)
        self._settle(chunks)
        record = {"start": start, "stop": stop, "sources": list(sources), "checksums": dict(checksums)}
        record["scalars"] = self._scalar_checksums(start, stop)
        if self.sweep:
            record["runs"] = list(known)[len(self.runs) :]
        self.journal.write(f"{len(self.journal.names()):08d}", record, new=True)
        self.n_states = stop
        self.recover()
        publish(self.path, self._message(steps, attempts or [0]))

    def _message(self, steps: Sequence[int], attempts: Sequence[int]) -> str:
        """Say what a commit added."""
        told = []
        for what, numbers in {"steps": steps, "attempt": attempts}.items():
            low, high = min(numbers, default=0), max(numbers, default=0)
            told.append(f"{what} {low}" + (f" to {high}" if high > low else ""))
        return f"trajectory of {self.path.parent.name}: {', '.join(told)}"

    def recover(self) -> None:
        """Bring the shapes on disk up to the record, should the writer before have stopped between the two.

        A store of an older version becomes one of this.
        """
        self.journal.clear()
        if self._version < LAYOUT_VERSION:
            self._migrate()
        resize_all([self.path / name for name in self.arrays], self.n_states)

    def _scalar_checksums(self, start: int, stop: int) -> dict[str, int]:
        """Checksums of rows of each array (step) as they are on disk, and not committed yet maybe."""
        return {name: checksum(np.asarray(with_rows(self._array(name), stop)[start:stop])) for name in self.numbers}

    def _migrate(self) -> None:
        """Write records anew, with what version 1 did not have (and attempts), and be of this version."""
        if self._version < 2:
            none = np.zeros(self.n_states, np.int64)
            add_array(
                self.path, ATTEMPT, ArrayPlan((STEP,), (self.n_states,), (SCALAR_CHUNK,), "int64", values=none)
            )
            self._numbered = (STEP, ATTEMPT)
        for name in self.journal.names():
            record = self.journal.read(name)
            if self._version < 2:
                record["scalars"] = self._scalar_checksums(record["start"], record["stop"])
            self.journal.write(name, record)
        migrate_group(self.path, "trajectory", self.arrays)
        publish(self.path, f"trajectory of {self.path.parent.name}: layout version {LAYOUT_VERSION}")
        self._version = LAYOUT_VERSION

    # Digests ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Digest of every committed state."""
        every = LedgerChunk(0, self.n_states)
        return self.digests([every])[every]

    def digests(self, chunks: Iterable[LedgerChunk]) -> dict[LedgerChunk, str]:
        """Digest of the states that each ledger chunk of rows is computed from, the halo included."""
        names = self.logged
        begun = np.zeros(self.n_states + 1, "<u4")
        begun[self._begun()] = 1
        hashes = {chunk: hashlib.sha256() for chunk in chunks}
        waiting = sorted(hashes, reverse=True)
        active: list[LedgerChunk] = []
        # Record by record: those of a long run of a large model are not held together.
        for number in self.journal.names():
            record = self.journal.read(number)
            start, stop = record["start"], record["stop"]
            if start >= self.n_states:  # committed since
                break
            words = np.column_stack([*(record["checksums"][name] for name in names), begun[start:stop]])
            while waiting and waiting[-1].start < stop:
                active.append(waiting.pop())
            for chunk in active:
                hashes[chunk].update(words[max(chunk.start - start, 0) : chunk.stop + 1 - start].data)
            active = [chunk for chunk in active if chunk.stop + 1 > stop]
        return {chunk: found.hexdigest() for chunk, found in hashes.items()}
