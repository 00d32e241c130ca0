"""Compute and store the results of a run, block by block, and reuse the blocks that are complete.

New results are prepared in a staging folder. Workers compute blocks (`natgrad.results.blocks`) and write them
there, each with a record. The blocks of an interrupted computation, and those of the published results, are reused
if everything that determines them is the same. At the end, the staging folder replaces the results atomically.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.results import dataset
from natgrad.results.blocks import (
    BLOCKS,
    Block,
    BlockTask,
    BlockWork,
    Grid,
    effective_of,
    longest_of,
    record_name,
    tasks_of,
)
from natgrad.results.dataset import WITHOUT_DECAY, WITHOUT_DECAY_DESCRIPTION, Request
from natgrad.results.inputs import UpdateTable
from natgrad.results.objective import loss_precision
from natgrad.results.pairs import Aggregation
from natgrad.results.ranking import BLOCK_BYTES, rank
from natgrad.results.stored import COMPUTE_AGAIN, exist, publish, put
from natgrad.results.summary import NEEDED, overview
from natgrad.results.updates import UpdateVariable
from natgrad.results.variables import VARIABLES, registered_variables
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.names import DESCENT, DESCENTS, GAMMA, GROUP, STEP, TENSOR, WINDOW
from natgrad.storage import Storage
from natgrad.store import Ledger
from natgrad.store.checked import recorded_files
from natgrad.store.journal import Journal
from natgrad.store.labelled import ChunkedArray, LabelledGroup, contents_of, read_arrays, read_parts

__all__ = ["Building", "build"]

_log = logger(__name__)

Call = Callable[[BlockWork, Sequence[BlockTask]], Iterable[Any]]
"""Function that calls the work with each task, in any order and on any worker, and yields when one is done."""


@dataclass(frozen=True)
class Building:
    """Outcome of `build`.

    Attributes
    ----------
    summary : dict
        See `natgrad.results.summary.overview`.
    blocks, computed_blocks : int
        Number of blocks, and number of those that were computed; the others were already complete.
    """

    summary: dict[str, Any]
    blocks: int
    computed_blocks: int


def build(
    table: UpdateTable,
    updates: NDArray[np.int64],
    ledger: Storage,
    storage: Storage,
    call: Call,
    *,
    gammas: Sequence[float] | None = None,
    windows: Sequence[int] = (1,),
    provenance: Mapping[str, Any] | None = None,
    additional: Mapping[str, xr.DataTree] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Building:
    """Compute the results of a run, and replace the stored results with them.

    Parameters
    ----------
    table : UpdateTable
        All updates, without the Gram ledger.
    updates : int64 array
        Indices of the updates into the ledger, see `natgrad.results.inputs.update_table`.
    ledger : Storage
    storage : Storage
        Location of the results. The caller must hold its lock.
    call : callable
        Executes tasks.
    gammas, windows, provenance
        See `natgrad.results.dataset.label`.
    additional : mapping of str to DataTree, optional
        Additional groups, which are stored unchanged.
    progress : callable, optional
        Called with the number of tasks done and the total number.

    Raises
    ------
    InputError
        See `natgrad.results.dataset.label`, or if the ledger is incomplete or damaged.
    """
    request = Request.of(table, gammas, windows)
    table = replace(table, with_time=table.extended(), loss_precision=loss_precision(table.loss))
    extensions = registered_variables()
    variables = [*VARIABLES.values(), *(extension.value for extension in extensions)]
    attributes = dataset.root_attributes(table, provenance or {}, extensions)
    # The version of the results stands for that of this package.
    versions = {name: version for name, version in attributes["versions"].items() if name != "natgrad-pipeline"}
    version = json.dumps([attributes["results_version"], attributes["layout_version"], versions], sort_keys=True)
    grid = Grid.of(table, storage.chunk_separator, _steps_per_chunk(storage))
    names, longest = tuple(variable.name for variable in variables), longest_of(table, request)
    with storage.staging() as staging:
        work = BlockWork(ledger, staging, request, names, grid, version)
        blocks = work.digests(table, updates, grid.blocks(table))
        missing = _reuse(blocks, staging, storage)
        tasks = tasks_of(table, updates, grid, missing, longest)
        if len(missing) < len(blocks):
            _log.info("computing %d of %d blocks of the results; the others exist", len(missing), len(blocks))
        for done, _ in enumerate(call(work, tasks), start=1):
            if progress is not None:
                progress(done, len(tasks))
        records = [Journal(staging / BLOCKS).read(record_name(block)) for block in blocks]
        stored = _Stored(table, updates, ledger, request, grid, variables, records, longest)
        groups = {"": LabelledGroup(attributes=attributes)}
        groups |= {path.strip("/"): stored.group(path) for path in _paths(table)}
        if table.weight_decay is not None:
            decay = {"description": WITHOUT_DECAY_DESCRIPTION}
            groups[WITHOUT_DECAY.strip("/")] = LabelledGroup(attributes=decay)
        for path, tree in (additional or {}).items():
            of_tree = dataset.labelled_groups(tree)
            groups |= {f"{path}/{name}".strip("/"): group for name, group in of_tree.items()}
        files = put(staging, contents_of(groups))
        ranked = rank(table.layout.names, _of_tensors(staging, len(table.layout.names)))
        summary = overview(_models(staging, _paths(table), attributes), ranked)
        files |= {name: checksum for record in records for name, checksum in record["files"].items()}
        records_of_blocks = [f"{BLOCKS}/{record_name(block)}.json" for block in blocks]
        files |= {name: crc32c((staging / name).get()) for name in records_of_blocks}
        described = {"options": attributes.get("options", {}), "chunks": grid.chunks}
        publish(storage, staging, files, summary, described)
    return Building(summary, len(blocks), len(missing))


def _paths(table: UpdateTable) -> list[str]:
    paths = ["", *([WITHOUT_DECAY] if table.weight_decay is not None else [])]
    groups = ["/group"] if table.groups else []
    return [f"{path}/{name}" for path in paths for name in ("model", "tensor")] + groups


def _models(storage: Storage, paths: Sequence[str], attributes: Mapping[str, Any]) -> xr.DataTree:
    """Read the part of stored results that an overview needs."""
    groups = {}
    for path in paths:
        if path.endswith("model"):
            arrays = read_arrays(storage, path.strip("/"), NEEDED)
            groups[path] = xr.Dataset({name: (array.dimensions, array.values) for name, array in arrays.items()})
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = dict(attributes)
    return tree


def _of_tensors(storage: Storage, tensors: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Read the status and the angle of tensors from stored results, for the gradient and window 1."""
    first = {DESCENT: 0, WINDOW: 0}
    for status, angle in read_parts(storage, "tensor", ("status", "angle"), first, STEP, BLOCK_BYTES):
        yield status.reshape(-1, tensors), angle.reshape(-1, tensors)


# Reuse -------------------------------------------------------------------------------------------------------


def _steps_per_chunk(storage: Storage) -> int | None:
    """Return the number of steps in a chunk of the stored results; None if there are no current results."""
    try:
        return int(recorded_files(storage, COMPUTE_AGAIN)["chunks"][-1]) if exist(storage) else None
    except (InputError, LookupError):
        return None


def _reuse(blocks: Sequence[Block], staging: Storage, published: Storage) -> list[Block]:
    """Move complete blocks to the staging folder, remove everything else from it, and return the other blocks."""
    wanted = {record_name(block): block for block in blocks}
    staged = _complete(staging, wanted)
    allowed = {f"{BLOCKS}/{name}.json" for name in staged}.union(*(record["files"] for record in staged.values()))
    if staged:
        staging.delete_entries([name for name in staging.walk() if name not in allowed])
    elif staging.exists():
        staging.remove_tree("zarr.json", b"")
    others = {name: block for name, block in wanted.items() if name not in staged}
    adopted = _complete(published, others) if others and exist(published) else {}
    for name, record in adopted.items():
        staging.adopt(published, record["files"])
        Journal(staging / BLOCKS).write(name, record)
    return [block for name, block in others.items() if name not in adopted]


def _complete(storage: Storage, wanted: Mapping[str, Block]) -> dict[str, dict[str, Any]]:
    """Return the records of blocks whose inputs are the same, and whose files match their checksums."""
    journal, found = Journal(storage / BLOCKS), {}
    names = journal.names() if (storage / BLOCKS).exists() else []
    for name in wanted.keys() & set(names):
        try:
            record = journal.read(name)
        except InputError as error:
            _log.warning("%s (%s): this block of the results is computed again", error.what, error.where)
            continue
        if record.get("digest") == wanted[name].digest and _is_intact(storage, record["files"]):
            found[name] = record
    return found


def _is_intact(storage: Storage, files: Mapping[str, int]) -> bool:
    for name, checksum in files.items():
        (content,) = storage.get_entries([name])
        if content is None or crc32c(content) != checksum:
            _log.warning("a file of the results is damaged (%s): its block is computed again", storage / name)
            return False
    return True


# Metadata ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """The groups of the results, whose variables with steps are stored by blocks."""

    table: UpdateTable
    updates: NDArray[np.int64]
    ledger: Storage
    request: Request
    grid: Grid
    variables: Sequence[UpdateVariable]
    records: Sequence[Mapping[str, Any]]
    longest: Mapping[int, int]

    def group(self, path: str) -> LabelledGroup:
        """Return a group: the metadata of variables with steps, and all others with their values."""
        name = path.rpartition("/")[2]
        chosen = self.request.chosen(self.variables, self.table, name)
        leading = (STEP,) if name == "model" else (STEP, name)
        labels = xr.Dataset({}, dataset.coordinates(self.table, self.request, leading))
        if self.table.runs:
            labels = dataset.split_by_run(labels, self.table, [])
        labels = dataset.with_attributes(labels.assign(self._run_values(path, chosen, leading)), chosen)
        per_run = dataset.labelled_group(labels)
        arrays = {
            variable.name: self._array(f"{path}/{variable.name}".strip("/"), variable)
            for variable in chosen
            if STEP in variable.dimensions
        }
        return LabelledGroup({**arrays, **per_run.arrays}, per_run.coordinates)

    def _array(self, path: str, variable: UpdateVariable) -> ChunkedArray:
        described = {json.dumps(record["arrays"][path]) for record in self.records}
        if len(described) > 1:
            raise InputError(
                f"the values of the result variable {variable.name!r} differ in type or shape between updates",
                where=path,
                why=f"found {', '.join(sorted(described))}",
                remedy="make the function of the variable always return arrays with the same dtype and dimensions",
            )
        kind, dimensions, chunks = self.records[0]["arrays"][path]
        comments = [record["comments"][path] for record in self.records if path in record["comments"]]
        sizes = {
            TENSOR: len(self.table.layout.tensors),
            GROUP: len(self.table.groups),
            DESCENT: len(DESCENTS),
            WINDOW: len(self.request.windows),
            GAMMA: len(self.request.gammas),
        }
        inner = [sizes[axis] for axis in dimensions[1:]]
        return ChunkedArray(
            (*self.grid.dimensions, *dimensions[1:]),
            (*self.grid.shape, *inner),
            (*self.grid.chunks, *(max(size, 1) for size in chunks)),
            kind,
            variable.attributes() | ({"comment": comments[0]} if comments else {}),
            self.grid.separator,
        )

    def _run_values(
        self, path: str, variables: Sequence[UpdateVariable], leading: tuple[str, ...]
    ) -> dict[str, xr.Variable]:
        rows = {TENSOR: len(self.table.layout.tensors), GROUP: len(self.table.groups)}.get(leading[-1], 0)
        effective = effective_of(self.records, path, self.longest, rows)
        table, aggregations = self.table, dict.fromkeys(DESCENTS, Aggregation.without_updates(leading, rows))
        if any(STEP not in variable.dimensions and variable.name not in VARIABLES for variable in variables):
            # A variable of another package may need the pairs of all updates.
            table = self.table.part(slice(None), Ledger(self.ledger).read_updates(self.updates))
            with np.errstate(all="ignore"):
                aggregations = {descent: groups[path] for descent, groups in dataset.aggregated(table)}
        return dataset.run_values(variables, table, aggregations, self.request.windows[-1], effective)
