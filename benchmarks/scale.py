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

from pipeline import compute, tiles
from pipeline.blocks import MEBIBYTE, Band, Tile, chunk_shape, plan_pass

VECTORS = 5
ITEMSIZES = (4, 4)


def segments_in(tile: Tile, tensors: int, columns: int) -> int:
    """Segments of a tile, where tensors are of one size: those it holds, and one more where it cuts one."""
    return (tile.last - tile.first) * max(1, round(tensors / columns)) + (tile.last - tile.first)


def slept_tile(job: tiles.Job, tile: Tile, *, tensors: int, columns: int, seconds: float) -> tiles.Segments:
    """In place of `pipeline.tiles.tile_segments`: the time and the answer of a tile, but not its numbers."""
    time.sleep(seconds)
    count, rows = segments_in(tile, tensors, columns), tile.stop - tile.start
    return np.arange(count), np.zeros((rows, count, VECTORS, VECTORS)), np.zeros((rows, count))


def slept_band(job: tiles.Job, band: Band, digest: str, parts: list[tiles.Segments]) -> Band:
    """In place of `pipeline.tiles.write_band`: all segments arrive, and none is written."""
    assert sum(len(indices) for indices, _, _ in parts) > 0
    return Band(band.start, band.stop, ())


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
    bands = list(plan.bands())
    cut = list(itertools.chain.from_iterable(band.tiles for band in bands))
    wire = sum(
        segments_in(tile, tensors, plan.columns) * (tile.stop - tile.start) * (VECTORS**2 + 1) * 8 for tile in cut
    )
    print(plan)
    print(f"{len(cut)} tiles of {plan.read_bytes / len(cut) / 1e6:.0f} MB, {len(bands)} bands")
    print(f"{wire / 1e9:.2f} GB of segment ledgers over the wire, {wire / plan.read_bytes:.1e} of what is read")
    job = tiles.Job.of(Path("trajectory"), Path("ledger"), plan)
    tile_segments = partial(slept_tile, tensors=tensors, columns=plan.columns, seconds=seconds)
    process = psutil.Process()
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        mock.patch.object(compute, "tile_segments", tile_segments),
        mock.patch.object(compute, "write_band", slept_band),
    ):
        before = peak = process.memory_info().rss
        begin = time.perf_counter()
        for _ in finished(client, job, bands):
            peak = max(peak, process.memory_info().rss)
        took = time.perf_counter() - begin
    tasks = len(cut) + len(bands)
    print(f"{tasks} tasks in {took:.0f} s: {tasks / took:.0f} a second")
    memory = f"{peak / MEBIBYTE:.0f} MiB, {before / MEBIBYTE:.0f} before"
    print(f"scheduler, client and {workers} workers in one process: {memory}")


def finished(client: Client, job: tiles.Job, bands: list[Band]) -> Iterator[Band]:
    """Run the bands as the pass does on an existing cluster."""
    digests = dict.fromkeys((band.start for band in bands), "")
    return compute._run_on(client, job, bands, lambda: digests)


if __name__ == "__main__":
    typer.run(main)
