"""Divide the updates of a run into blocks, and compute and store the results of some blocks in one task.

A block is the updates of one chunk of every result variable. Its results depend on its updates, and on the updates
after it that its windows reach. They do not depend on the other blocks, so blocks can be computed in any order, by
any worker, and kept when a run grows. The numbers are those of `natgrad.results.dataset.label`, to the bit.

Without a sweep, blocks divide the steps. The blocks of a sweep contain complete runs, or some steps of one run.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.results.dataset import Column, Request, aggregated, columns
from natgrad.results.inputs import Optimizer, UpdateTable
from natgrad.results.recovery import Recovery
from natgrad.results.sizes import LEAST_UPDATES, most_updates
from natgrad.results.updates import Updates, UpdateVariable
from natgrad.results.variables import VARIABLES, registered_variables
from natgrad.schema.errors import InputError
from natgrad.schema.layout import chunk_capacity
from natgrad.schema.names import DESCENT, DESCENTS, RUN, STEP
from natgrad.storage import Storage
from natgrad.store import Ledger
from natgrad.store.journal import Journal
from natgrad.store.labelled import CHUNK_ENCODING, encoded_chunk
from natgrad.theory.windows import WindowTerms, effective_lengths, joined, longest_tried

__all__ = [
    "BLOCKS",
    "Block",
    "BlockTask",
    "BlockWork",
    "Grid",
    "effective_of",
    "longest_of",
    "record_name",
    "tasks_of",
]

BLOCKS = "blocks"
"""Folder of the records of finished blocks, in the results."""

_TASK_UPDATES = 1024
"""Approximate number of updates of a task. It also computes the pairs of up to 255 updates after them."""

_GROWTH = 16
"""Number of blocks above which a run gets larger blocks."""


# The grid ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Updates whose results are in one chunk of each variable.

    Attributes
    ----------
    start, stop : int
        Positions in the table.
    index : tuple of int
        Position of the chunk along (step,), or along (run, step).
    digest : str
        Digest of everything that determines the results.
    """

    start: int
    stop: int
    index: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class Grid:
    """The leading dimensions of all result variables with steps, and their division into chunks.

    Attributes
    ----------
    dimensions : tuple of str
        (step,), or (run, step) for a sweep.
    shape, chunks : tuple of int
    separator : str
        See `natgrad.storage.Storage.chunk_separator`.
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    separator: str

    @classmethod
    def of(cls, table: UpdateTable, separator: str, earlier: int | None = None) -> Grid:
        """Return the grid of a table.

        Parameters
        ----------
        table : UpdateTable
        separator : str
        earlier : int, optional
            Number of steps in a chunk of existing results, which are kept unless it is too small.
        """
        most = most_updates(len(table.layout.tensors))
        if not table.runs:
            updates = len(table.steps)
            size = min(chunk_capacity(updates, LEAST_UPDATES), most)
            if earlier is not None and earlier <= most and updates <= _GROWTH * earlier:
                size = earlier
            return cls((STEP,), (updates,), (size,), separator)
        steps = len(np.unique(table.steps))
        chunks = (1, most) if steps > most else (min(most // steps, len(table.runs)), steps)
        return cls((RUN, STEP), (len(table.runs), steps), chunks, separator)

    def blocks(self, table: UpdateTable) -> list[Block]:
        """Return the blocks, in the order of the table."""
        if not table.runs or table.run is None:
            size = self.chunks[0]
            stops = range(size, len(table.steps) + size, size)
            return [Block(stop - size, min(stop, len(table.steps)), (stop // size - 1,)) for stop in stops]
        run, step = self._chunk_of(table)
        key = run * (step.max() + 1) + step
        starts = [0, *(np.flatnonzero(np.diff(key)) + 1).tolist()]
        return [
            Block(start, stop, (int(run[start]), int(step[start])))
            for start, stop in zip(starts, [*starts[1:], len(key)], strict=True)
        ]

    def _chunk_of(self, table: UpdateTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        run, slot = self.positions(table)
        return run // self.chunks[0], slot // self.chunks[1]

    def positions(self, table: UpdateTable) -> tuple[NDArray[np.int64], ...]:
        """Return the position of each update along the dimensions."""
        if table.run is None:
            return (np.arange(len(table.steps)),)
        return table.run, np.searchsorted(np.unique(table.steps), table.steps)


def record_name(block: Block) -> str:
    """Return the name of the record of a block."""
    return "-".join(f"{index:08d}" for index in block.index)


# Tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockTask:
    """Consecutive blocks, which a worker computes and stores.

    Attributes
    ----------
    table : UpdateTable
        Updates of the blocks and updates after them that windows reach, without the Gram ledger.
    updates : int64 array
        Indices of these updates into the ledger.
    positions : tuple of int64 array
        Positions of these updates along the leading dimensions of results.
    blocks : tuple of Block
        Blocks with positions in this table.
    longest : mapping of int to int
        For each run, the longest window in the search for the smallest one.
    """

    table: UpdateTable
    updates: NDArray[np.int64]
    positions: tuple[NDArray[np.int64], ...]
    blocks: tuple[Block, ...]
    longest: Mapping[int, int]


def longest_of(table: UpdateTable, request: Request) -> dict[int, int]:
    """Return the longest window in the search for the smallest one, for each run."""
    return {
        run: longest_tried(updates.stop - updates.start, request.windows[-1]) if updates.stop > updates.start else 0
        for run, updates in enumerate(table.run_slices())
    }


def tasks_of(
    table: UpdateTable, updates: NDArray[np.int64], grid: Grid, blocks: Sequence[Block], longest: Mapping[int, int]
) -> list[BlockTask]:
    """Divide blocks into tasks of consecutive blocks.

    Parameters
    ----------
    table : UpdateTable
        All updates, without the Gram ledger.
    updates : int64 array
        Indices of all updates into the ledger.
    grid : Grid
    blocks : sequence of Block
        Blocks to compute, in order.
    longest : mapping of int to int
        See `longest_of`.
    """
    groups: list[list[Block]] = []
    for block in blocks:
        group = groups[-1] if groups else []
        if group and group[-1].stop == block.start and block.stop - group[0].start <= _TASK_UPDATES:
            group.append(block)
        else:
            groups.append([block])
    positions, reach = grid.positions(table), max(longest.values())
    found = []
    for group in groups:
        start = group[0].start
        rows = slice(start, _reached(table, group[-1].stop, reach))
        part = table.part(rows)
        runs = set() if part.run is None else set(part.run.tolist())
        found.append(
            BlockTask(
                part,
                updates[rows],
                tuple(axis[rows] for axis in positions),
                tuple(replace(block, start=block.start - start, stop=block.stop - start) for block in group),
                {run: longest[run] for run in runs or longest},
            )
        )
    return found


def _reached(table: UpdateTable, stop: int, reach: int) -> int:
    """Return the end of the updates of windows that start before an update. Windows end with their run."""
    end = len(table.steps) if table.run is None else int(np.searchsorted(table.run, table.run[stop - 1], "right"))
    return min(stop + reach - 1, end)


@dataclass(frozen=True)
class BlockWork:
    """The function that computes and stores blocks. It is sent to workers, and contains no arrays.

    Attributes
    ----------
    ledger, staging : Storage
        Ledger, and location of the new results.
    request : Request
    variables : tuple of str
        Names of all variables, including those of other packages.
    grid : Grid
    version : str
        Versions of the packages that determine the results.
    """

    ledger: Storage
    staging: Storage
    request: Request
    variables: tuple[str, ...]
    grid: Grid
    version: str

    def digests(self, table: UpdateTable, updates: NDArray[np.int64], blocks: Sequence[Block]) -> list[Block]:
        """Return blocks with their digests.

        Parameters
        ----------
        table, updates
            All updates, see `tasks_of`.
        blocks : sequence of Block
        """
        longest = longest_of(table, self.request)
        settings = {
            "version": self.version,
            "request": [self.request.gammas, self.request.windows, self.request.tensor_family],
            "variables": self.variables,
            "chunks": [self.grid.chunks, self.grid.separator, CHUNK_ENCODING],
            "layout": table.layout.to_json(),
            "runs": table.runs,
            "steps": self.grid.shape[-1] if table.runs else 0,
        }
        common = json.dumps(settings).encode()
        checksums = Ledger(self.ledger).gram_checksums(updates)
        positions = self.grid.positions(table)
        found = []
        for block in blocks:
            reach = longest[0 if table.run is None else int(table.run[block.stop - 1])]
            rows = slice(block.start, _reached(table, block.stop, reach))
            part = table.part(rows)
            digest = hashlib.sha256(common)
            for name, value in sorted(vars(part).items()):
                digest.update(name.encode())
                digest.update(_bytes_of(value))
            for array in (checksums[rows], *(axis[rows] for axis in positions), np.array([reach])):
                digest.update(np.ascontiguousarray(array).tobytes())
            found.append(replace(block, digest=digest.hexdigest()))
        return found

    def __call__(self, task: BlockTask) -> None:
        """Compute and store the blocks of a task, and record each when all its windows are known."""
        ledger, variables = Ledger(self.ledger), _variables(self.variables)
        journal = Journal(self.staging / BLOCKS)
        pieces: list[dict[str, WindowTerms]] = []
        records: list[tuple[Block, dict[str, Any]]] = []
        first = begin = 0  # the first update in `pieces`
        ends = [block.stop for block in task.blocks]
        size = max(block.stop - block.start for block in task.blocks)
        ends += range(min(ends[-1] + size, len(task.updates)), len(task.updates) + size, size)
        for position, end in enumerate(min(end, len(task.updates)) for end in ends):
            if end > begin:
                block = task.blocks[position] if position < len(task.blocks) else None
                record, terms = self._computed(ledger, variables, task, begin, end, block)
                pieces.append(terms)
                if block is not None:
                    records.append((block, record))
            begin = end
            while records and (
                begin == len(task.updates) or begin >= records[0][0].stop + max(task.longest.values()) - 1
            ):
                block, record = records.pop(0)
                record["effective"] = _effective(task, block, pieces, first)
                journal.write(record_name(block), record)
                while pieces and first + _length(pieces[0]) <= block.stop:
                    first += _length(pieces.pop(0))

    def _computed(
        self,
        ledger: Ledger,
        variables: Mapping[str, UpdateVariable],
        task: BlockTask,
        start: int,
        stop: int,
        block: Block | None,
    ) -> tuple[dict[str, Any], dict[str, WindowTerms]]:
        """Store the results of a block, and return its record and the terms of its windows.

        Without a block, only the terms are computed.
        """
        reach = 0 if block is None else self.request.windows[-1] - 1
        rows = slice(start, min(stop + reach, len(task.updates)))
        table = task.table.part(rows, ledger.read_updates(task.updates[rows]))
        record: dict[str, Any] = {"files": {}, "arrays": {}, "comments": {}}
        if block is not None:
            record |= {"digest": block.digest, "chunks": list(self.grid.chunks)}
        terms: dict[str, WindowTerms] = {}
        of_gradient: dict[str, dict[int, Updates]] = {}
        of_model: dict[str, list[Column]] = {}
        with np.errstate(all="ignore"):
            for descent, groups in aggregated(table):
                contents: dict[str, bytes] = {}
                for group, aggregation in groups.items():
                    terms[f"{group} {descent}"] = aggregation.window_terms(slice(0, stop - start))
                    if block is None:
                        continue
                    name = group.rpartition("/")[2]
                    found = columns(
                        self.request.chosen(list(variables.values()), table, name),
                        table,
                        aggregation,
                        descent,
                        self.request,
                        of_gradient.setdefault(group, {}),
                    )
                    for own, column in found.items():
                        path = f"{group}/{own}".strip("/")
                        if name == "model":  # a few numbers, so all estimates share a chunk
                            of_model.setdefault(path, []).append(column)
                        else:
                            at = DESCENTS.index(descent)
                            contents |= self._encoded(path, variables[own], [column], at, task, block, record)
                self._put(contents, record)
            contents = {}
            for path, of_each in of_model.items():
                variable = variables[path.rpartition("/")[2]]
                contents |= self._encoded(path, variable, of_each, 0, task, block, record)
            self._put(contents, record)
        return record, terms

    def _put(self, contents: Mapping[str, bytes], record: dict[str, Any]) -> None:
        if contents:
            self.staging.put_entries(contents)
            record["files"] |= {name: crc32c(content) for name, content in contents.items()}

    def _encoded(
        self,
        path: str,
        variable: UpdateVariable,
        of_each: Sequence[Column],
        descent: int,
        task: BlockTask,
        block: Block | None,
        record: dict[str, Any],
    ) -> dict[str, bytes]:
        """Return the chunk of a variable for some estimates of the gradient, from the first of them on."""
        if block is None:
            return {}
        column, updates = of_each[0], block.stop - block.start
        values = column.values[:updates]
        if DESCENT in column.dimensions:
            values = np.stack([each.values[:updates] for each in of_each], column.descent_axis)
        kind, *_ = record["arrays"].setdefault(path, [values.dtype.name, column.dimensions, values.shape[1:]])
        values = values.astype(kind, copy=False)
        if column.comment:
            record["comments"][path] = column.comment
        chunks, index = [*self.grid.chunks, *values.shape[1:]], [*block.index, *(0 for _ in values.shape[1:])]
        if DESCENT in column.dimensions:
            index[len(block.index) - 1 + column.descent_axis] = descent
        if task.table.runs:
            values = self._spread(values, variable, task, block)
        found = encoded_chunk(values, chunks, index, self.grid.separator)
        return {} if found is None else {f"{path}/{found[0]}": found[1]}

    def _spread(
        self, values: NDArray[Any], variable: UpdateVariable, task: BlockTask, block: Block
    ) -> NDArray[Any]:
        """Return the values of a sweep with the dimensions (run, step); see `dataset.split_by_run`."""
        origin = [index * size for index, size in zip(block.index, self.grid.chunks, strict=True)]
        shape = [
            min(size, total - first)
            for size, total, first in zip(self.grid.chunks, self.grid.shape, origin, strict=True)
        ]
        fill = {"f": np.nan, "b": False, "i": 0}[values.dtype.kind] if variable.absent is None else variable.absent
        spread = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        rows = slice(block.start, block.stop)
        spread[tuple(axis[rows] - first for axis, first in zip(task.positions, origin, strict=True))] = values
        return spread


def _variables(names: tuple[str, ...]) -> dict[str, UpdateVariable]:
    every = dict(VARIABLES)
    if not every.keys() >= set(names):  # finding the entry points of all packages takes longer than a small run
        every |= {each.value.name: each.value for each in registered_variables()}
    missing = [name for name in names if name not in every]
    if missing:
        raise InputError(
            f"result variables are not installed: {', '.join(missing)}",
            why="the client has a package with the entry points natgrad.variables that this worker lacks",
            remedy="install the same packages on all workers",
        )
    return {name: every[name] for name in names}


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, Optimizer | Recovery):
        return b"".join(_bytes_of(array) for array in vars(value).values())
    return b"" if hasattr(value, "tensors") else repr(value).encode()


# Windows -----------------------------------------------------------------------------------------------------


def _length(terms: Mapping[str, WindowTerms]) -> int:
    return len(next(iter(terms.values())).learning_rate)


def _effective(
    task: BlockTask, block: Block, pieces: Sequence[Mapping[str, WindowTerms]], first: int
) -> dict[str, dict[str, str]]:
    """Return for each group and estimate, and each run, which lengths of windows are effective, as text."""
    follows = task.table.follows()
    run = np.zeros(len(task.updates), np.int64) if task.table.run is None else task.table.run
    found: dict[str, dict[str, str]] = {}
    bounds = [block.start, *(np.flatnonzero(np.diff(run[block.start : block.stop])) + 1 + block.start), block.stop]
    for key in pieces[0]:
        terms = joined([piece[key] for piece in pieces])
        for start, stop in itertools.pairwise(bounds):
            longest = task.longest[int(run[start])]
            last = min(stop + longest - 1, first + len(terms.learning_rate))
            lengths = effective_lengths(
                terms.part(slice(start - first, last - first)), follows[start : last - 1], stop - start, longest
            )
            packed = zlib.compress(np.packbits(lengths).tobytes())
            found.setdefault(key, {})[str(int(run[start]))] = base64.b64encode(packed).decode()
    return found


def effective_of(
    records: Sequence[Mapping[str, Any]], group: str, longest: Mapping[int, int], rows: int
) -> dict[str, list[NDArray[np.bool_]]]:
    """Return for each estimate of the gradient, and each run, which lengths of windows are effective.

    Parameters
    ----------
    records : sequence of mapping
        Records of all blocks.
    group : str
        Path of the group.
    longest : mapping of int to int
        See `longest_of`.
    rows : int
        Number of tensors, or of groups of tensors; 0 for the model.
    """
    found: dict[str, list[NDArray[np.bool_]]] = {}
    inner = (rows,) if rows else ()
    for descent in DESCENTS:
        lengths = [np.ones((longest[run], *inner), bool) for run in sorted(longest)]
        for record in records:
            for run, text in record["effective"][f"{group} {descent}"].items():
                of_run = lengths[int(run)]
                bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
                of_run &= np.unpackbits(bits, count=of_run.size).reshape(of_run.shape).astype(bool)
        found[descent] = lengths
    return found
