"""Store the trajectory of a run: its logged states.

A trajectory is one Zarr group::

    trajectory.zarr/
      parameter, gradient, hvp    (step, element)   chunks of complete steps x about a million elements
      replicate_parameter, replicate_hvp   (step, replicate, element)   of a stochastic rule; one replicate a chunk
      replicate_loss              (step, replicate)
      step, attempt, loss, learning_rate   (step)   and other logged scalars of `natgrad.schema.names.SCALARS`
      run                         (step)            only for a sweep: index into the names of its runs
      commits/00000000.json ...   the existing states, and the checksums of their data

A run without states (`natgrad.store.recorded`) has the same group as ``steps.zarr``, without the first three lines.

States are stored in the order of their commits and are only appended. A run that was restarted from an older step
continues as a new *attempt*: its states follow those that they supersede, which are kept. Two consecutive states
are the states before and after an update if they belong to the same run and the same attempt.

Data beyond the recorded states come from an interrupted write; the next writer overwrites them. The shape of an
array never exceeds the recorded states, because it grows after the commit.

The last state may lack what the log does not contain yet, such as its gradient. It is then provisional
(`natgrad.store.states`): its own record, ``commits/provisional.json``, also has its numbers, and the next commit
replaces it. A state that still lacks something when others follow it (the last of a run or attempt) keeps NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, LedgerChunk, TrajectoryShape
from natgrad.schema.logs import logger
from natgrad.schema.names import (
    ATTEMPT,
    OPTIMIZER_NUMBERS,
    RECOVERY,
    REPLICATE_LOSS,
    RUN,
    STATES,
    STEP,
    USUAL_SCALARS,
)
from natgrad.schema.summary import summary_html
from natgrad.storage import Storage
from natgrad.store.attempts import current_states, spans_between
from natgrad.store.gone import changed_states, missing_states
from natgrad.store.group import (
    INGEST_AGAIN,
    StoredArray,
    create_group,
    is_plain,
    number_chunks,
    open_group,
    read_documents,
    remove_group,
    resize_all,
)
from natgrad.store.journal import sources_of
from natgrad.store.numbers import StateNumbers, number_arrays
from natgrad.store.references import StateReference, encode
from natgrad.store.states import States, state_arrays
from natgrad.store.virtual_chunks import virtual_chunks

__all__ = ["Trajectory"]

_log = logger(__name__)


class Trajectory(States):
    """The logged states of a run in a storage, and the numbers logged at each step.

    Attributes
    ----------
    storage, layout, chunk, array_dtypes, replicates, dtypes, journal, n_states
        See `natgrad.store.states.States`.
    scalars : tuple of str
        Names of the stored numbers per step.
    source : str
        Location of the log.
    sweep : bool
        True if the trajectory contains several runs.
    tables : tuple of str
        Names of the stored numbers per step and tensor, from `natgrad.schema.names.OPTIMIZER_NUMBERS`.
    evaluation : str
        Data that loss and gradient are evaluated on, one of `natgrad.schema.names.EVALUATIONS`, as far as the log
        declares it.
    read_options : dict or None
        Options for reading the log, see `natgrad.ingestion.read_options`; None if `create` received none.
    stored_numbers : StateNumbers
        The numbers per step in the storage. `scalar` adds those of a provisional state.

    Notes
    -----
    Readers never wait. There is one writer at a time, which holds the lock of the storage.
    """

    def __init__(self, storage: Storage) -> None:
        """Open a trajectory at the states committed so far.

        Parameters
        ----------
        storage : Storage
            `natgrad.store.open_trajectory` opens a path or URL.

        Raises
        ------
        InputError
            If there is no trajectory, another version of natgrad wrote it, or its metadata or records are damaged.
        """
        attributes = open_group(storage, "trajectory", "ingest a run first: natgrad ingest SOURCE OUT")
        self.scalars: tuple[str, ...] = tuple(attributes["scalars"])
        self._first_source: str = attributes["source"]
        self.sweep: bool = attributes["sweep"]
        self.tables: tuple[str, ...] = tuple(attributes["tables"])
        self.read_options: dict[str, Any] | None = attributes.get("read_options")
        self._numbered = (STEP, ATTEMPT, RUN) if self.sweep else (STEP, ATTEMPT)
        self._fixed_runs: tuple[str, ...] = ()
        self._spans: NDArray[np.int64] | None = None
        self._breaks: NDArray[np.int64] = np.empty(0, np.int64)
        self._visible: dict[str, NDArray[Any]] = {}
        dtypes: dict[str, str] = attributes["dtypes"]
        # The shapes are read before the records, because a writer extends them after its record.
        recorded = tuple(attributes.get("recorded", ()))
        # An objective that is replayed is fixed.
        self.evaluation: str = attributes.get("evaluation", "unknown")
        self._gradient_source: str = attributes.get("gradient_source", "logged")
        stored = () if recorded else tuple(dtypes)
        documents = read_documents(storage, "trajectory", (*stored, *self.numbers), attributes["arrays"])
        arrays = {name: StoredArray.of(documents[name]) for name in self.numbers}
        self.stored_numbers = StateNumbers(self, arrays)
        super().__init__(
            storage,
            Layout.from_json(attributes["layout"]),
            tuple(attributes["chunk"]),
            dtypes,
            attributes.get("replicates", 0),
            (name for name in stored if not is_plain(documents[name])),
            attributes.get("in_place", False),
            recorded,
        )
        self._require_records({name: document["shape"][0] for name, document in documents.items()})

    def _require_records(self, lengths: Mapping[str, int]) -> None:
        """Raise an error if a record is missing, or an array is longer: arrays grow after a record was written."""
        names = self.journal.names()
        expected = [f"{number:08d}" for number in range(len(names) + 1)]
        gap = next(index for index, name in enumerate([*names, ""]) if name != expected[index])
        longer = [name for name, length in lengths.items() if length > self.n_states]
        if gap < len(names) or len(longer) == len(lengths):
            found = self.journal.folder / f"{expected[gap]}.json"
            # The record of a provisional state may be the missing one.
            one = gap == len(names) and {*lengths.values()} == {self.n_fixed + 1}
            raise InputError(
                "a commit record is missing",
                where=f"{found} or provisional.json" if one else str(found),
                why="it was removed, or the disk failed: later states were committed",
                remedy=INGEST_AGAIN,
            )
        if longer:
            raise InputError(
                f"the array has {lengths[longer[0]]} states, but {self.n_states} are recorded",
                where=str(self.storage / longer[0] / "zarr.json"),
                why="the file was changed, or the newest commit record was removed",
                remedy=INGEST_AGAIN,
            )

    @classmethod
    def create(
        cls,
        storage: Storage,
        layout: Layout,
        dtypes: Mapping[str, str],
        chunk: tuple[int, int],
        source: str = "",
        compressors: Mapping[str, Any] | None = None,
        scalars: Sequence[str] = USUAL_SCALARS,
        sweep: bool = False,
        tables: Sequence[str] = (),
        replicates: int = 0,
        read_options: Mapping[str, Any] | None = None,
        in_place: bool = False,
        recorded: Sequence[str] = (),
        gradient_source: str = "logged",
        evaluation: str = "unknown",
    ) -> Trajectory:
        """Create an empty trajectory, replacing an existing one.

        Parameters
        ----------
        storage : Storage
        layout : Layout
        dtypes : mapping
            Array (``parameter``, ``gradient``, ``hvp``, arrays of replicates and of the optimizer state) to logical
            dtype.
        chunk : (int, int)
            Steps and elements of a chunk.
        source : str, optional
            Location of the log, for provenance.
        compressors : mapping, optional
            Array to Zarr codecs. Other arrays are not compressed, because training state hardly compresses.
        scalars : sequence of str, optional
            Numbers to store per step: names from `natgrad.schema.names.SCALARS`, and ``replicate_loss``.
        sweep : bool
            Create a trajectory of several runs.
        tables : sequence of str
            Numbers to store per step and tensor, from `natgrad.schema.names.OPTIMIZER_NUMBERS`.
        replicates : int
            Number of replicates of a stochastic rule.
        read_options : mapping, optional
            Options for reading the log.
        in_place : bool
            States are read from the files of the log; see `natgrad.store.references`.
        recorded : sequence of str
            Vectors of the inner products that were recorded instead of states; see `natgrad.store.recorded`. The
            dtypes are then those of the states in the training loop.
        gradient_source : str
            Origin of the gradients, for provenance.
        evaluation : str
            See the attribute.

        Raises
        ------
        InputError
            If the location contains something else.
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
        if in_place:
            attributes["in_place"] = True
        if recorded:
            attributes["recorded"] = list(recorded)
        if gradient_source != "logged":
            attributes["gradient_source"] = gradient_source
        if evaluation != "unknown":
            attributes["evaluation"] = evaluation
        if read_options is not None:
            attributes["read_options"] = dict(read_options)
        arrays = state_arrays(layout, {} if recorded else dtypes, chunk, replicates, compressors or {})
        numbered = (STEP, ATTEMPT, RUN) if sweep else (STEP, ATTEMPT)
        arrays |= number_arrays(layout, numbered, scalars, tables, replicates)
        folders = ("commits", "commits/reads") if in_place else ("commits",)
        create_group(storage, "trajectory", attributes, arrays, folders=folders)
        return cls(storage)

    @classmethod
    def remove(cls, storage: Storage) -> None:
        """Remove a trajectory; raise InputError if the location contains anything else."""
        remove_group(storage, "trajectory")

    def __repr__(self) -> str:
        return (
            f"<Trajectory {self.storage}: {self.n_states} states of {self.layout.elements} elements in "
            f"{len(self.layout.tensors)} tensors>"
        )

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the arrays with one number per step (identifiers and scalars) or per step and tensor."""
        return (*self._numbered, *self.scalars, *self.tables)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all Zarr arrays."""
        return (*(() if self.recorded else self.array_dtypes), *self.numbers)

    @property
    def has_gradient(self) -> bool:
        """False if no state of the run has a gradient. The products of the gradient in the ledger are then NaN."""
        return STATES[1] in self.array_dtypes

    @property
    def gradient_source(self) -> str:
        """Origin of the gradients: ``logged``, ``recorded``, ``recovered``, ``replayed`` or ``none``."""
        if not self.has_gradient:
            return "none"
        return "recovered" if {*RECOVERY} <= {*self.tables} else self._gradient_source

    @property
    def replicate_vectors(self) -> tuple[str, ...]:
        """Vectors of the Gram matrix of the replicates; empty without replicates."""
        return self.shape.replicate_vectors

    @property
    def shape(self) -> TrajectoryShape:
        """Properties that determine the plan of a pass."""
        return TrajectoryShape(
            states=self.n_states,
            layout=self.layout,
            chunk=self.chunk,
            dtypes={} if self.recorded else self.array_dtypes,
            replicates=self.replicates,
            partial_reads=all(map(self.allows_partial_reads, self.dtypes and self.logged)),
            keeps_versions=self.storage.keeps_versions,
            recorded=self.recorded,
        )

    def describe(self) -> dict[str, Any]:
        """Return plain values that describe the trajectory: steps, model and options of the log."""
        steps = self.scalar(STEP)[self.current()]
        return {
            "trajectory": str(self.storage),
            "source": self.source,
            "steps": len(steps),
            "first_step": int(steps.min()) if self.n_states else None,
            "last_step": int(steps.max()) if self.n_states else None,
            "attempts": int(self.scalar(ATTEMPT).max(initial=0)) + 1,
            **({"runs": len(self.runs)} if self.sweep else {}),
            "elements": self.layout.elements,
            "dtypes": self.array_dtypes,
            **({"replicates": self.replicates} if self.replicates else {}),
            **({"last_step_lacks": list(self.provisional)} if self.provisional else {}),
            **({"in_place": True, "states_gone": missing_states(self)} if self.in_place else {}),
            **({"states_removed": len(self.dropped)} if self.dropped else {}),
            **({"states": "none"} if self.recorded else {}),
            **({"gradient_source": self.gradient_source} if self.gradient_source != "logged" else {}),
            **{name: value for name, value in (self.read_options or {}).items() if value and name != "several"},
            "tensors": {tensor.name: list(tensor.shape) for tensor in self.layout.tensors},
        }

    @property
    def unfinished(self) -> str:
        """Sentence for users that names what the last state lacks; empty if it lacks nothing.

        A run of recorded updates lacks nothing: no update needs its last state, which is that after the last one.
        """
        if not self.provisional or self.recorded:
            return ""
        lacks = ", ".join(self.provisional)
        return (
            f"step {self.scalar(STEP)[-1]}, the last, has no {lacks}: results of the last update that need it are "
            "NaN, unless a longer log is ingested"
        )

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows."""
        return summary_html("Trajectory", self.describe() | {"tensors": len(self.layout.tensors)})

    # Numbers ------------------------------------------------------------------------------------------------

    def scalar(self, name: str) -> NDArray[Any]:
        """Read the numbers of all committed states.

        Parameters
        ----------
        name : str
            ``step``, ``attempt``, ``run``, a scalar, or an optimizer number per tensor.

        Returns
        -------
        int64 or float64 array
            Shape (states,): int64 for ``step``, ``attempt`` and ``run``, float64 otherwise. Optimizer numbers per
            tensor have shape (states, tensors), and ``replicate_loss`` has shape (states, R). A scalar that is not
            stored is NaN at every step.

        Raises
        ------
        InputError
            If a chunk is missing or too short.
        """
        if name not in self.numbers:
            shape: tuple[int, ...] = (self.n_states,)
            if name in OPTIMIZER_NUMBERS or name == REPLICATE_LOSS:
                shape = (self.n_states, self.replicates if name == REPLICATE_LOSS else len(self.layout.tensors))
            return np.zeros(shape, np.int64) if name in (ATTEMPT, RUN) else np.full(shape, np.nan)
        if name not in self._visible:
            values, _ = self._fixed_numbers(name)
            if self._provisional:
                # Chunks may already contain the numbers of the completed state.
                last = np.asarray(self._provisional["numbers"][name], values.dtype)
                values = np.concatenate([values, last.reshape(1, *values.shape[1:])])
                values.flags.writeable = False
            self._visible[name] = values
        return self._visible[name]

    def _fixed_numbers(self, name: str) -> tuple[NDArray[Any], int]:
        """Return the numbers of all fixed states, and their checksum."""
        return self.stored_numbers.verified(name, self._newest.get("scalars", {}))

    def _load_records(self) -> None:
        super()._load_records()
        self._visible, self._spans = {}, None

    def named(self, start: int, stop: int) -> str:
        """Return the steps of a range of states, for messages, or their indices if the steps are damaged."""
        try:
            steps = self.scalar(STEP)[start:stop].tolist()
        except InputError:
            return self.numbered(start, stop)
        return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs of a sweep, in the order of their first commits; one empty name for a single run."""
        if not self.sweep:
            return ("",)
        return (*self._named_runs(), *self._provisional.get("runs", ()))

    def _named_runs(self) -> tuple[str, ...]:
        """Return the names of the runs of a sweep that have a fixed state."""
        if len(self._fixed_runs) <= int(self._fixed_numbers(RUN)[0].max(initial=-1)):
            fixed = (record for record in self.each_record() if record["stop"] <= self.n_fixed)
            self._fixed_runs = tuple(name for record in fixed for name in record.get("runs", ()))
        return self._fixed_runs

    @property
    def step_span(self) -> int:
        """Number of steps between connected states; 0 if each state is connected to the next."""
        span: int = (self.read_options or {}).get("step_span", 0)
        return span

    def spans(self) -> NDArray[np.int64]:
        """Return the number of updates from each state to the next, shape (states - 1,).

        The number is 0 if the next state belongs to another run or attempt, or if the states are not connected.
        """
        if self._spans is None or len(self._spans) != max(self.n_states - 1, 0):
            self._spans = spans_between([*map(self.scalar, (STEP, ATTEMPT, RUN))], self.step_span)
            self._breaks = np.flatnonzero(self._spans == 0) + 1
        return self._spans

    def _starts(self) -> NDArray[np.int64]:
        """Return the indices of the states to which no update leads from the previous state."""
        self.spans()
        return self._breaks

    def contiguous_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Divide a range of states into contiguous ranges, in which an update leads from each state to the next.

        Returns
        -------
        list of (first state, stop state)
            Ranges of at least two states. Single states are omitted.
        """
        breaks = self._starts()
        inside = breaks[np.searchsorted(breaks, start, "right") : np.searchsorted(breaks, stop)]
        edges = [start, *inside.tolist(), stop]
        return [(low, high) for low, high in itertools.pairwise(edges) if high - low > 1]

    def current(self, attempt: int | None = None) -> NDArray[np.bool_]:
        """Return a mask of the states that are not superseded by a later attempt, shape (states,).

        Parameters
        ----------
        attempt : int, optional
            Ignore attempts after this one; by default all attempts count.
        """
        return current_states([*map(self.scalar, (STEP, ATTEMPT, RUN))], self._starts(), attempt)

    @property
    def source(self) -> str:
        """Folder of the log, where its first step was last found: a log may move between two ingests."""
        names = self.journal.names() if self.n_states else []
        return str(sources_of(self.journal.read(names[0]))[0]["folder"]) if names else self._first_source

    def sources(self) -> list[dict[str, Any]]:
        """Return the identity of the source of each state."""
        return [source for record in self.each_record() for source in sources_of(record)]

    def replace_sources(
        self,
        sources: Mapping[int, Mapping[str, Any]],
        references: Mapping[int, StateReference | None],
        copies: Mapping[str, Mapping[tuple[int, int], int]],
    ) -> None:
        """Replace the identities of the sources of committed states, whose contents are the same.

        Parameters
        ----------
        sources : mapping
            New identity of the source by state.
        references : mapping
            Where states are in the files of their sources.
        copies : mapping
            By array, the checksum of each state and column that is copied now, and was in the files of the log.
        """
        self._settle()
        for name in self.journal.names():
            record = self.journal.read(name)
            new = {state: sources[state] for state in range(record["start"], record["stop"]) if state in sources}
            if new:
                kept = enumerate(sources_of(record), record["start"])
                record |= {"sources": [new.get(state, source) for state, source in kept]}
                if "references" in record:
                    states = range(record["start"], record["stop"])
                    located = [references.get(state, self.references.state(state)) for state in states]
                    record = self.checksums.with_copies(record, copies) | {"references": encode(located)}
                self.journal.write(name, record)
        self._load_records()
        self.storage.refer(*virtual_chunks(self, references, sources))
        self.storage.publish(f"trajectory of {self.storage.parent.name}: new identities of {len(sources)} sources")

    def mark_gone(self) -> list[int]:
        """Record which states of older attempts are no longer in their files, and return the new ones.

        A restarted run overwrites its files. Their states are then neither read nor expected, and the updates that
        a pass has computed from them are kept.
        """
        superseded = np.flatnonzero(~self.current()).tolist() if self.references.files else []
        gone = changed_states(self.references, set(superseded) - self.gone)
        for name in self.journal.names() if gone else []:
            record = self.journal.read(name)
            new = [state for state in gone if record["start"] <= state < record["stop"]]
            if new:
                self.journal.write(name, record | {"gone": sorted([*record.get("gone", ()), *new])})
        if gone:
            self._load_records()
        return gone

    def forget_references(self, checksums: Mapping[str, Mapping[tuple[int, int], int]]) -> None:
        """Record that states from the files of the log are now copied. Their chunks have been written.

        Parameters
        ----------
        checksums : mapping
            By array, the checksum of each state and column. States that are `gone` are omitted.
        """
        self._settle()

        def copied(record: dict[str, Any]) -> dict[str, Any]:
            start, stop = record["start"], record["stop"]
            kept = [self.references.state(state) if state in self.gone else None for state in range(start, stop)]
            changed = self.checksums.with_copies(record, checksums)
            changed.pop("references", None)
            return changed | ({"references": encode(kept)} if any(kept) else {})

        for name in self.journal.names():
            self.journal.write(name, copied(self.journal.read(name)))
        if self._provisional:
            self.journal.write_provisional(copied(self._provisional))
        self._load_records()

    # Configurations -----------------------------------------------------------------------------------------

    def configurations(self) -> dict[str, dict[str, Any]]:
        """Return the plain values of the logged configuration by key, for each run that has one.

        The name of the only run of a trajectory that is not a sweep is empty.
        """
        return self.journal.read_configurations()

    def record_configurations(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the configurations of runs. A run without a new one keeps that of its previous attempt."""
        known = self.configurations()
        new = known | {run: dict(values) for run, values in found.items() if values}
        if new != known:
            self.journal.write_configurations(new)

    # Verification -------------------------------------------------------------------------------------------

    def record_verification(self, time: str) -> None:
        """Record that all committed states match their checksums; see `natgrad.schema.times.now`."""
        described = {"states": self.n_states, "fixed": self.n_fixed, "provisional": self._provisional_seal}
        self.journal.write_verification({**described, "time": time})

    def verification(self) -> tuple[int, str]:
        """Return how many states, from the first on, were verified together, and when; (0, "") if none were."""
        record = self.journal.read_verification()
        # A state that was provisional then may have been written again since.
        same = record.get("provisional") == self._provisional_seal
        return record.get("states" if same else "fixed", 0), record.get("time", "")

    @property
    def _provisional_seal(self) -> str | None:
        """Checksum of the record of the provisional state, None if there is none."""
        return self._provisional.get("crc32c")

    # Commits ------------------------------------------------------------------------------------------------

    def commit(
        self,
        steps: Sequence[int],
        scalars: Mapping[str, Sequence[Any]],
        sources: Sequence[Mapping[str, Any]],
        checksums: Mapping[str, Sequence[Sequence[int]]],
        attempts: Sequence[int] | None = None,
        runs: Sequence[str] = (),
        lacking: Sequence[Sequence[str]] = (),
        *,
        provisional: bool = False,
        references: Sequence[StateReference | None] = (),
    ) -> None:
        """Make written states visible in all arrays together. They replace a provisional state.

        Parameters
        ----------
        steps : sequence of int, length n
            Step numbers of the next n states.
        scalars : mapping
            n values for each name in `scalars` (n times R for ``replicate_loss``), and n sequences of values for
            each name in `tables`. NaN marks values that the log does not contain.
        sources : sequence of mapping, length n
            Identity of the source of each state; see `natgrad.sources.changes.identity`.
        checksums : mapping
            Array name to n sequences of one `checksum` per chunk column, 0 if a pass will record it.
        attempts : sequence of int, length n, optional
            Attempt of each state, 0 by default.
        runs : sequence of str, length n
            Name of the run of each state, for a sweep.
        lacking : sequence of sequence of str, length n, optional
            Names of the arrays and numbers that each state lacks; their values are NaN. Default: none.
        provisional : bool
            The last of these states is provisional, because of what it lacks.
        references : sequence of StateReference or None, length n, optional
            Location of each state in the files of the log. The arrays that its reference contains were not written.
        """
        start, stop = self.n_fixed, self.n_fixed + len(steps)
        fixed = stop - provisional
        known = {name: index for index, name in enumerate(self._named_runs())} if self.sweep else {}
        named = len(known)
        numbers = {STEP: steps, ATTEMPT: attempts or [0] * len(steps)}
        if self.sweep:
            for name in runs:
                known.setdefault(name, len(known))
            numbers[RUN] = [known[name] for name in runs]
        chunks: dict[str, bytes | memoryview] = {}
        sums: dict[str, int] = {}
        last: dict[str, Any] = {}
        for name, values in {**numbers, **scalars}.items():
            array = self.stored_numbers.arrays[name]
            new = np.asarray(values, dtype=array.dtype).reshape(len(steps), *array.shape[1:])
            before, found = self._fixed_numbers(name)
            chunks |= number_chunks(array, name, before, new)
            # The checksum covers the numbers of all states, so that a reader needs one record to verify them.
            sums[name] = crc32c(new[: fixed - start].tobytes(), found)
            last |= {name: new[-1].tolist()} if provisional else {}
        for folder in {name.rpartition("/")[0] for name in chunks}:
            (self.storage / folder).clear_leftovers()
        self._writes.start(self.storage.put_entries, chunks)
        self._settle()
        virtual = virtual_chunks(self, dict(enumerate(references, start)), dict(enumerate(sources, start)))
        self.storage.refer(*virtual)

        def record(first: int, end: int) -> dict[str, Any]:
            described: dict[str, Any] = {"start": first, "stop": end}
            described["sources"] = list(sources[first - start : end - start])
            described["checksums"] = {
                name: list(found[first - start : end - start])
                for name, found in checksums.items()
                if any(map(any, found[first - start : end - start]))
            }
            lacks = {str(start + state): list(names) for state, names in enumerate(lacking) if names}
            lacks = {state: names for state, names in lacks.items() if first <= int(state) < end}
            described |= {"lacking": lacks} if lacks else {}
            if any(references[first - start : end - start]):
                described["references"] = encode(references[first - start : end - start])
            if self.sweep:
                before = named + len({*runs[: first - start]} - {*list(known)[:named]})
                described["runs"] = [name for name in list(known)[before:] if name in runs[: end - start]]
            return described

        if fixed > start:
            name = f"{len(self.journal.names()):08d}"
            self.journal.write(name, record(start, fixed) | {"scalars": sums}, new=True)
        self.journal.write_provisional(record(fixed, stop) | {"numbers": last} if provisional else {})
        self._load_records()
        self.recover()
        self.storage.publish(self._message(steps, attempts or [0]))

    def _message(self, steps: Sequence[int], attempts: Sequence[int]) -> str:
        """Return the description of a commit."""
        parts = []
        for noun, numbers in {"steps": steps, "attempt": attempts}.items():
            low, high = min(numbers, default=0), max(numbers, default=0)
            parts.append(f"{noun} {low}" + (f" to {high}" if high > low else ""))
        return f"trajectory of {self.storage.parent.name}: {', '.join(parts)}"

    def recover(self) -> None:
        """Set the shapes of the arrays to the recorded length, in case a writer stopped before it did so."""
        self.journal.clear()
        resize_all(self.storage, self.arrays, self.n_states)

    # Digests ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return one digest of all committed states that a pass reads.

        Raises
        ------
        InputError
            If the checksum of a state is not known, because no pass has read it yet.
        """
        found = self._digest_of_all()
        if not found:
            raise InputError(
                "the checksums of the states are still unknown",
                where=str(self.storage),
                why="the states are in the files of the log (--in-place), and no pass has read all of them",
                remedy="run natgrad analyze OUT",
            )
        return found

    def _digest_of_all(self) -> str:
        all_states = LedgerChunk(0, max(self.n_states - 1, 0))
        return self.digests([all_states])[all_states]

    @property
    def was_read(self) -> bool:
        """False if the checksum of a state is not known, because no pass has read it yet."""
        return not self.in_place or bool(self._digest_of_all())

    def digests(self, chunks: Iterable[LedgerChunk]) -> dict[LedgerChunk, str]:
        """Return the digest of the states from which each ledger chunk is computed, including the halo.

        The digest is empty if the checksum of a state is not known, because no pass has read it yet.
        """
        return self.checksums.digests(chunks, self._starts())
