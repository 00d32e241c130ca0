"""A pass too large for this machine: the real plan on the real scheduler, with the kernel replaced by a sleep.

    python -m benchmarks.scale [--parameters 1e9] [--steps 1e4] [--tensors 500] [--workers 4] [--seconds 0]

It prints what `docs/scale.md` tells: tasks, bytes over the wire, what the scheduler sustains and takes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import psutil
import typer
from distributed import Client, LocalCluster

from natgrad.compute import ledger_pass as compute
from natgrad.compute import tasks as tiles
from natgrad.schema.blocks import MEBIBYTE, LedgerChunk, Tile, chunk_shape, plan_pass

VECTORS = 5
ITEMSIZES = (4, 4)


def segments_in(tile: Tile, tensors: int, columns: int) -> int:
    """Segments of a tile, where tensors are of one size: those it holds, and one more where it cuts one."""
    return (tile.last - tile.first) * max(1, round(tensors / columns)) + (tile.last - tile.first)


def slept_tile(job: tiles.Job, tile: Tile, *, tensors: int, columns: int, seconds: float) -> tiles.Segments:
    """In place of `natgrad.compute.tasks.tile_segments`: the time and the answer of a tile, but not its numbers."""
    time.sleep(seconds)
    count, rows = segments_in(tile, tensors, columns), tile.stop - tile.start
    return np.arange(count), np.zeros((rows, count, VECTORS, VECTORS)), np.zeros((rows, count))


def slept_band(job: tiles.Job, chunk: LedgerChunk, digest: str, parts: list[tiles.Segments]) -> LedgerChunk:
    """In place of `natgrad.compute.tasks.write_chunk`: all segments arrive, and none is written."""
    assert sum(len(indices) for indices, _, _ in parts) > 0
    return LedgerChunk(chunk.start, chunk.stop, ())


def main(
    parameters: Annotated[float, typer.Option(help="Elements of the model.")] = 1e9,
    steps: Annotated[float, typer.Option(help="Logged states.")] = 1e4,
    tensors: Annotated[int, typer.Option(help="Tensors of the model.")] = 500,
    workers: Annotated[int, typer.Option(help="Workers, threads of this process.")] = 4,
    seconds: Annotated[float, typer.Option(help="How long a tile sleeps.")] = 0.0,
) -> None:
    """Simulate a pass and print its tasks, bytes, time and memory."""
    elements, states = int(parameters), int(steps)
    chunk = chunk_shape(states, elements)
    plan = plan_pass(
        states=states,
        elements=elements,
        chunk=chunk,
        itemsizes=ITEMSIZES,
        tensors=tensors,
        vectors=VECTORS,
        memory_limit=512 * MEBIBYTE,
    )
    chunks = list(plan.chunks())
    cut = list(itertools.chain.from_iterable(chunk.tiles for chunk in chunks))
    wire = sum(
        segments_in(tile, tensors, plan.columns) * (tile.stop - tile.start) * (VECTORS**2 + 1) * 8 for tile in cut
    )
    print(plan)
    print(f"{len(cut)} tiles of {plan.read_bytes / len(cut) / 1e6:.0f} MB, {len(chunks)} ledger chunks")
    print(f"{wire / 1e9:.2f} GB of segment ledgers over the wire, {wire / plan.read_bytes:.1e} of what is read")
    job = tiles.Job.of(Path("trajectory"), Path("ledger"), plan)
    tile_segments = partial(slept_tile, tensors=tensors, columns=plan.columns, seconds=seconds)
    process = psutil.Process()
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        mock.patch.object(compute, "tile_segments", tile_segments),
        mock.patch.object(compute, "write_chunk", slept_band),
    ):
        before = peak = process.memory_info().rss
        begin = time.perf_counter()
        for _ in finished(client, job, chunks):
            peak = max(peak, process.memory_info().rss)
        took = time.perf_counter() - begin
    tasks = len(cut) + len(chunks)
    print(f"{tasks} tasks in {took:.0f} s: {tasks / took:.0f} a second")
    memory = f"{peak / MEBIBYTE:.0f} MiB, {before / MEBIBYTE:.0f} before"
    print(f"scheduler, client and {workers} workers in one process: {memory}")


def finished(client: Client, job: tiles.Job, chunks: list[LedgerChunk]) -> Iterator[LedgerChunk]:
    """Run the ledger chunks as the pass does on an existing cluster."""
    digests = dict.fromkeys((chunk.start for chunk in chunks), "")
    return compute._run_on(client, job, chunks, lambda: digests)


if __name__ == "__main__":
    typer.run(main)
