"""Define the measured tasks. Each is prepared in a context, checked once, and timed in every round.

    python -m benchmarks.tasks FOLDER GROUP/NAME

runs one task in its own process, so that its memory can be measured. It prints a line before the task starts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from benchmarks.options import IN_MEMORY, MANY_LOGS
from benchmarks.runs import Files
from natgrad.compute import clusters, executors
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.compute.plan import PlanLimits, read_blocks
from natgrad.compute.tasks import Segments
from natgrad.ingestion import ingest
from natgrad.kernel import ledger_sums, stream
from natgrad.kernel.located import Located
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import ledger_vectors
from natgrad.storage import open_storage
from natgrad.store import exists, open_ledger, open_store, open_trajectory

THREADS = 2
STEPS_OF_A_BLOCK = 16
"""Steps per Dask block: the fastest size for xarray. Blocks with one step take nearly twice as long."""


@dataclass(frozen=True)
class Task:
    """A task to measure.

    Attributes
    ----------
    title : str
    prepare : callable
        Takes the files and returns a context of the function that is timed.
    check : callable
        Takes the files and the result of the function, and raises an error if the result is wrong.
    reads : callable
        Takes the files and returns the paths that the task must read.
    run : str
        Name of the run; see `benchmarks.runs`.
    """

    title: str
    prepare: Callable[[Files], AbstractContextManager[Callable[[], Any]]]
    check: Callable[[Files, Any], None]
    reads: Callable[[Files], Sequence[Path]] = Files.chunks
    run: str = "run"

    def size(self, files: Files) -> int:
        """Return the bytes that the task must read. They determine its rate, even if it reads some bytes twice."""
        return sum(path.stat().st_size for path in self.reads(files))


def in_threads(function: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """Map a function over items in threads, or in the current thread if there is only one."""
    if threads == 1:
        return list(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


# Limit of reads -----------------------------------------------------------------------------------------------


def read_file(path: Path, out: Any) -> int:
    """Read a file to its end into a buffer, and return the number of bytes."""
    view = memoryview(out).cast("B")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = 0
        while count := os.preadv(descriptor, [view[size:]], size):
            size += count
        return size
    finally:
        os.close(descriptor)


@contextmanager
def bare_reads(files: Files, threads: int) -> Iterator[Callable[[], int]]:
    paths = files.chunks()
    # One byte more than the largest file, for the last read, which detects the end of the file.
    buffers = [bytearray(max(path.stat().st_size for path in paths) + 1) for _ in range(threads)]

    def part(index: int) -> int:
        return sum(read_file(path, buffers[index]) for path in paths[index::threads])

    yield lambda: sum(in_threads(part, range(threads), threads))


def check_bytes(files: Files, count: int) -> None:
    assert count == sum(path.stat().st_size for path in files.chunks())


# The bare loop ------------------------------------------------------------------------------------------------


@contextmanager
def bare_loop(files: Files, threads: int, trusting: bool = False) -> Iterator[Callable[[], list[Segments]]]:
    """Open files and run the compiled loop over them, column by column, without a store, plan or ledger.

    The loop computes the checksums of the states, unless it is trusting, but does not compare them.
    """
    states = open_trajectory(files.trajectory)
    updates, steps, count = states.n_states - 1, states.chunk[0], len(ledger_vectors(False))
    block_elements = PlanLimits().read_block_elements
    together = max(1, block_elements // states.chunk[1])
    stride = min(block_elements, states.chunk[1])
    dtypes = {name: storage_dtype(states.dtypes[name]) for name in ("parameter", "gradient")}
    sizes = [dtype.itemsize for dtype in dtypes.values()]
    chunks = range(-(-states.n_states // steps))
    paths = [
        [[f"{states.storage}/{name}/c/{index}/{column}" for index in chunks] for name in dtypes]
        for column in range(states.columns)
    ]
    kept = threading.local()

    def buffer() -> NDArray[np.uint8]:
        if not hasattr(kept, "buffer"):
            kept.buffer = np.empty(stream.buffer_bytes(stride, together, sizes), np.uint8)
        return kept.buffer

    def column(number: int) -> Segments:
        first, last = states.column(number)
        opened = [[os.open(path, os.O_RDONLY) for path in of_array] for of_array in paths[number]]
        located = [
            Located(
                np.repeat(np.array(descriptors, np.int32), steps)[: updates + 1, None],
                (np.arange(updates + 1) % steps * size)[:, None],
                np.array([0, last - first]),
            )
            for descriptors, size in zip(opened, [states.chunk[1] * size for size in sizes], strict=True)
        ]
        segments = [states.layout.segments(*block) for block in read_blocks(first, last, block_elements)]
        cut = [np.array([*(start for _, start, _ in block), block[-1][2]]) - first for block in segments]
        indices = np.array([index for block in segments for index, _, _ in block])
        products, ratio = np.empty((updates, len(indices), count, count)), np.empty((updates, len(indices)))
        leads, shape = np.ones(updates, bool), (stride, together)
        checksums = None if trusting else np.empty((len(dtypes), updates + 1), np.uint32)
        out = products, ratio, checksums
        failed = stream.products(located, list(dtypes.values()), cut, *shape, leads, buffer(), *out)
        assert failed is None
        for descriptor in itertools.chain.from_iterable(opened):
            os.close(descriptor)
        return add_up(indices, products, ratio, len(states.layout.tensors))

    def part(index: int) -> list[Segments]:
        return [column(number) for number in range(index, states.columns, threads)]

    def run() -> list[Segments]:
        parts = in_threads(part, range(threads), threads)
        return [parts[number % threads][number // threads] for number in range(states.columns)]

    yield run


def add_up(
    indices: NDArray[np.int64], products: NDArray[np.float64], ratio: NDArray[np.float64], tensors: int
) -> Segments:
    """Return the ledgers of the tensors of a column from those of its read blocks."""
    present = np.unique(indices)
    gram, ratio = ledger_sums.add_segments(len(present), np.searchsorted(present, indices), products, ratio)
    return present, gram, ratio


def check_segments(files: Files, segments: list[Segments]) -> None:
    """Require bitwise equality with the pass, which runs the same kernel on the same read blocks."""
    reference = open_ledger(files.reference)
    indices, *parts = zip(*segments, strict=True)
    joined = (np.concatenate(arrays, axis=1) for arrays in parts)
    found = ledger_sums.add_segments(len(reference.layout.tensors), np.concatenate(indices), *joined)
    for array, expected in zip(found, reference.read(), strict=True):
        np.testing.assert_array_equal(array, expected)


# The metrics pass ---------------------------------------------------------------------------------------------


@contextmanager
def metrics_pass(files: Files, executor: executors.Executor, trusting: bool = False) -> Iterator[Callable[[], Any]]:
    stores = open_store(files.trajectory), open_store(files.written / "ledger.zarr")
    yield partial(compute_ledger, *stores, executor=executor, trust_states=trusting)


@contextmanager
def pass_in_place(files: Files, executor: executors.Executor) -> Iterator[Callable[[], Any]]:
    """Run the pass over the files of the log. The first round also records the checksums."""
    trajectory = open_store(files.folder / "in_place.zarr")
    if not exists(trajectory):
        ingest([open_storage(files.log)], trajectory, in_place=True)
    yield partial(compute_ledger, trajectory, open_store(files.written / "ledger.zarr"), executor=executor)


@contextmanager
def metrics_pass_on_dask(files: Files, workers: int) -> Iterator[Callable[[], Any]]:
    """Run the pass on existing worker processes, like those of a user's cluster."""
    with (
        dask.config.set(temporary_directory=files.folder),
        clusters.local_scheduler(workers) as address,
        metrics_pass(files, executors.existing_cluster(address)) as run,
    ):
        yield run


def check_ledger(files: Files, _: Any) -> None:
    """Require the same bits for every executor."""
    for array, expected in zip(
        open_ledger(files.written / "ledger.zarr").read(), open_ledger(files.reference).read(), strict=True
    ):
        np.testing.assert_array_equal(array, expected)


# The same computation in xarray -------------------------------------------------------------------------------


@contextmanager
def labelled_arrays(files: Files) -> Iterator[Callable[[], xr.DataArray]]:
    """Compute the same quantities with xarray and Dask, as a user would.

    `xarray.dot` was the fastest method. Sums of products, (x * y).sum(), took twice as long and more memory. The
    ratio of the residual is read from the ledger instead of computed, so that the products can be compared.
    """
    layout = open_trajectory(files.trajectory).layout
    _, ratio = open_ledger(files.reference).read()

    def run() -> xr.DataArray:
        with warnings.catch_warnings():
            # The blocks split chunks of the scalars, which are only a few kilobytes.
            warnings.filterwarnings("ignore", "The specified chunks separate the stored chunks", UserWarning)
            data = xr.open_zarr(files.trajectory, consolidated=False, chunks={"step": STEPS_OF_A_BLOCK})
        state = data[["parameter", "gradient"]].astype("float64")
        before, change = state.isel(step=slice(None, -1)), state.diff("step", label="lower")
        tensors = []
        for index, tensor in enumerate(layout.tensors):
            own = {"element": slice(tensor.offset, tensor.stop)}
            parameter, gradient = before.parameter.isel(own), before.gradient.isel(own)
            displacement, gradient_change = change.parameter.isel(own), change.gradient.isel(own)
            residual = gradient - xr.DataArray(ratio[:, index], dims="step") * displacement
            vectors = [parameter, displacement, gradient, gradient_change, residual]
            pairs = itertools.combinations_with_replacement(vectors, 2)
            tensors.append(xr.concat([xr.dot(x, y, dim="element") for x, y in pairs], "pair"))
        return xr.concat(tensors, "tensor").transpose("step", "tensor", "pair").compute()

    with dask.config.set(scheduler="threads", num_workers=THREADS):
        yield run


def check_products(files: Files, found: xr.DataArray) -> None:
    """Require the entries x.y of the ledger up to a multiple of |x||y|.

    The multiple is `natgrad.kernel.ledger_sums.roundoff_bound` for the compensated sums of the ledger, and n u / (1
    - n u) for the sums of n terms in xarray (Higham, Accuracy and Stability, section 3.1). A smaller bound would
    not hold for these: if products of similar size and sign are added one by one, their rounding errors are not
    independent. Displacement and gradient change are the same difference on both sides, rounded once. A residual is
    a difference that is rounded once or twice, so its error is at most u (|g| + 2 |c d|), which is less than n u
    times the sum of the two norms.
    """
    expected, ratio = open_ledger(files.reference).read()
    sizes = np.array([tensor.size for tensor in open_trajectory(files.trajectory).layout.tensors])
    norms = np.sqrt(np.einsum("...ii->...i", expected))
    position = {name: index for index, name in enumerate(ledger_vectors(False))}
    norms[..., position["residual"]] = (
        norms[..., position["gradient"]] + abs(ratio) * norms[..., position["displacement"]]
    )
    first, second = np.triu_indices(len(position))
    roundoff = sizes * 2.0**-53
    multiple = np.array([ledger_sums.roundoff_bound(size) for size in sizes]) + roundoff / (1 - roundoff)
    bounds = multiple[:, None] * norms[..., first] * norms[..., second]
    assert (abs(found.values - expected[..., first, second]) <= bounds).all()


# Ingest -------------------------------------------------------------------------------------------------------


@contextmanager
def ingest_log(files: Files, sweep: bool = False, in_place: bool = False) -> Iterator[Callable[[], Any]]:
    trajectory = open_store(files.written / "trajectory.zarr")
    yield partial(ingest, [open_storage(files.log)], trajectory, sweep=sweep, in_place=in_place)


def check_trajectory(files: Files, _: Any) -> None:
    written = open_trajectory(files.written / "trajectory.zarr")
    assert written.fingerprint() == open_trajectory(files.trajectory).fingerprint()


def check_states(files: Files, _: Any) -> None:
    """Require the same number of states; a pass has not read them yet."""
    written = open_trajectory(files.written / "trajectory.zarr")
    assert written.n_states == open_trajectory(files.trajectory).n_states


@contextmanager
def copy_log(files: Files, flush: bool) -> Iterator[Callable[[], None]]:
    def run() -> None:
        for path in files.logged():
            copy = files.written / path.name
            shutil.copyfile(path, copy)
            if flush:
                with copy.open("rb") as file:
                    os.fsync(file.fileno())

    yield run


def check_copies(files: Files, _: Any) -> None:
    for path in files.logged():
        assert (files.written / path.name).read_bytes() == path.read_bytes()


def _pass(
    title: str, run: str = "run", executor: executors.Executor = executors.serial, trusting: bool = False
) -> Task:
    return Task(title, partial(metrics_pass, executor=executor, trusting=trusting), check_ledger, run=run)


def _loop(title: str, run: str = "run", threads: int = 1, trusting: bool = False) -> Task:
    return Task(title, partial(bare_loop, threads=threads, trusting=trusting), check_segments, run=run)


def _pass_on_dask(workers: int) -> Task:
    title = f"metrics pass, {workers} Dask process{'es' if workers > 1 else ''}"
    return Task(title, partial(metrics_pass_on_dask, workers=workers), check_ledger)


_READS = {
    "read": Task("bare reads, 1 thread", partial(bare_reads, threads=1), check_bytes),
    "read_threads": Task(f"bare reads, {THREADS} threads", partial(bare_reads, threads=THREADS), check_bytes),
}
_LOOPS = {
    "loop": _loop("bare loop, 1 thread"),
    "loop_threads": _loop(f"bare loop, {THREADS} threads", threads=THREADS),
}
_PASSES = {
    "pass": _pass("metrics pass, serial"),
    "pass_threads": _pass(f"metrics pass, {THREADS} threads", executor=executors.threads(THREADS)),
    "pass_dask": _pass_on_dask(THREADS),
}
# The same without comparing the states with their checksums.
_TRUSTING = {
    "loop_trusting": _loop("bare loop without checksums, 1 thread", trusting=True),
    "loop_threads_trusting": _loop(
        f"bare loop without checksums, {THREADS} threads", threads=THREADS, trusting=True
    ),
    "pass_trusting": _pass("metrics pass without checksums, serial", trusting=True),
    "pass_threads_trusting": _pass(
        f"metrics pass without checksums, {THREADS} threads", executor=executors.threads(THREADS), trusting=True
    ),
}
_LOOPS_AND_PASSES = {**_LOOPS, **_PASSES, "pass_dask_single": _pass_on_dask(1)}
_RATIOS_TO_THE_LOOP = [
    ("pass", "loop"),
    ("pass_threads", "loop_threads"),
    ("pass_dask", "loop_threads"),
    ("pass_dask_single", "loop"),
    ("pass_threads", "pass"),
    ("pass_dask", "pass_dask_single"),
    ("loop_threads", "loop"),
]
_COPY = Task("copy of the log", partial(copy_log, flush=False), check_copies, Files.logged)
_INGEST = Task("ingest of the log", ingest_log, check_trajectory, Files.logged)


@dataclass(frozen=True)
class Group:
    """Tasks that run in turns: each turn runs all tasks of the group once.

    Attributes
    ----------
    tasks : dict of str to Task
    ratios : list of (str, str)
        Pairs of tasks whose rates are compared within each turn.
    """

    tasks: dict[str, Task]
    ratios: list[tuple[str, str]]


def _size(size: float) -> Group:
    """Return the pass and the bare loop on a run of a size in gigabytes."""
    tasks = {
        name: replace(task, title=f"{task.title}, {size:g} GB", run=f"size_{size:g}")
        for name, task in _LOOPS_AND_PASSES.items()
    }
    return Group(tasks, _RATIOS_TO_THE_LOOP)


def groups(sizes: Sequence[float]) -> dict[str, Group]:
    """Return all tasks, in groups.

    Tasks that evict the page cache come last. Pages that are read back from the disk are cached in smaller units
    than pages that were written, and reading them takes twice as long.
    """
    return {
        "throughput": Group(
            {**_READS, **_TRUSTING, **_LOOPS_AND_PASSES, "pass_dask_four": _pass_on_dask(4)},
            [
                *((name.removesuffix("_trusting"), name) for name in _TRUSTING),
                ("pass_trusting", "loop_trusting"),
                ("pass_threads_trusting", "loop_threads_trusting"),
                ("pass", "read"),
                ("pass_threads", "read_threads"),
                ("pass_dask", "read_threads"),
                ("loop", "read"),
                ("loop_threads", "read_threads"),
                ("read_threads", "read"),
                *_RATIOS_TO_THE_LOOP,
                ("pass_dask_four", "pass_dask_single"),
            ],
        ),
        "shapes": Group(
            {
                "pass": _pass("metrics pass, for tall and wide"),
                "tall": _pass("metrics pass, tall", "tall"),
                "wide": _pass("metrics pass, wide", "wide"),
                "tall_loop": _loop("bare loop, tall", "tall"),
                "wide_loop": _loop("bare loop, wide", "wide"),
                "pass_threads": _pass(
                    "metrics pass, for tall and wide, 2 threads", executor=executors.threads(THREADS)
                ),
                "tall_threads": _pass("metrics pass, tall, 2 threads", "tall", executors.threads(THREADS)),
                "wide_threads": _pass("metrics pass, wide, 2 threads", "wide", executors.threads(THREADS)),
            },
            [
                ("tall", "pass"),
                ("wide", "pass"),
                ("tall", "tall_loop"),
                ("wide", "wide_loop"),
                ("tall_threads", "pass_threads"),
                ("wide_threads", "pass_threads"),
            ],
        ),
        "storage": Group(
            {
                "pass": _pass("metrics pass, plain float32"),
                "zstd": _pass("metrics pass, zstd and shuffle", "zstd"),
                "lz4": _pass("metrics pass, lz4 and shuffle", "lz4"),
                "bfloat16": _pass("metrics pass, bfloat16", "bfloat16"),
            },
            [("zstd", "pass"), ("lz4", "pass"), ("bfloat16", "pass")],
        ),
        "in_place": Group(
            {
                "pass": _pass("metrics pass over copies"),
                "in_place": Task(
                    "metrics pass in place",
                    partial(pass_in_place, executor=executors.serial),
                    check_ledger,
                    Files.logged,
                ),
                "ingest": _INGEST,
                "ingest_in_place": replace(
                    _INGEST,
                    title="ingest in place",
                    prepare=partial(ingest_log, in_place=True),
                    check=check_states,
                ),
            },
            [("in_place", "pass"), ("ingest_in_place", "ingest")],
        ),
        # Both tasks read the log from the page cache, and neither waits for a disk.
        IN_MEMORY: Group(
            {
                "copy": replace(_COPY, title="copy of the log, to memory", run=IN_MEMORY),
                "ingest": replace(_INGEST, title="ingest of the log, to memory", run=IN_MEMORY),
            },
            [("ingest", "copy")],
        ),
        "sweep": Group(
            {
                "sweep": _pass("metrics pass, sweep", "sweep"),
                "one_run": _pass("metrics pass, one run of the same size", "one_run"),
            },
            [("sweep", "one_run")],
        ),
        MANY_LOGS: Group(
            {
                "sweep": replace(
                    _INGEST,
                    title="ingest of a sweep",
                    prepare=partial(ingest_log, sweep=True),
                    run="logged_sweep",
                ),
                "one_run": replace(_INGEST, title="ingest of one run of the same size", run="logged_one_run"),
            },
            [("sweep", "one_run")],
        ),
        "ingest": Group(
            {
                "copy": _COPY,
                "copy_flushed": replace(
                    _COPY, title="copy of the log, flushed to disk", prepare=partial(copy_log, flush=True)
                ),
                "ingest": _INGEST,
            },
            [("ingest", "copy"), ("ingest", "copy_flushed")],
        ),
        **{f"size_{size:g}": _size(size) for size in sizes},
        "xarray": Group(
            {"xarray": Task(f"xarray and Dask, {THREADS} threads", labelled_arrays, check_products), **_PASSES},
            [(name, "xarray") for name in _PASSES],
        ),
    }


def find(name: str) -> Task:
    """Return the task with the name GROUP/TASK."""
    group, _, task = name.partition("/")
    sizes = [float(group.removeprefix("size_"))] if group.startswith("size_") else []
    return groups(sizes)[group].tasks[task]


if __name__ == "__main__":
    with find(sys.argv[2]).prepare(Files(Path(sys.argv[1]))) as run:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        run()
