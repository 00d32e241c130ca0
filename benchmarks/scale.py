"""Simulate a pass that is too large for one machine: real plan and scheduler, but a sleep instead of the kernel.

    python -m benchmarks.scale [--parameters 1e9] [--steps 1e4] [--tensors 500] [--workers 4] [--seconds 0]

prints the numbers in `docs/explanation/scale.md`: tasks, bytes sent over the network, throughput and memory of the
scheduler.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import psutil
import typer
from distributed import LocalCluster

from natgrad.compute import executors
from natgrad.compute.plan import Tile, plan_pass
from natgrad.compute.tasks import Job, Tiled
from natgrad.schema.layout import MEBIBYTE, LedgerChunk, chunk_shape
from natgrad.storage import LocalStorage

VECTORS = 5
ITEMSIZES = (4, 4)


def segments_in(tile: Tile, tensors: int, columns: int) -> int:
    """Return the number of segments of a tile, for tensors of equal size, if each column divides one tensor."""
    return (tile.last - tile.first) * max(1, round(tensors / columns)) + (tile.last - tile.first)


@dataclass(frozen=True)
class SleepingJob(Job):
    """A pass that sleeps for the time of a tile, and returns zeros in its shape."""

    tensors: int = 1
    seconds: float = 0.0

    def compute(self, task: Tile) -> Tiled:
        """Sleep instead of computing."""
        time.sleep(self.seconds)
        count, updates = segments_in(task, self.tensors, self.plan.columns), task.stop - task.start
        segments = np.arange(count), np.zeros((updates, count, VECTORS, VECTORS)), np.zeros((updates, count))
        return Tiled(segments, None)

    def finish(self, chunk: LedgerChunk, digest: str, parts: Sequence[Tiled]) -> LedgerChunk:
        """Receive all segments and write nothing."""
        assert sum(len(part.segments[0]) for part in parts) > 0
        return chunk


def main(
    parameters: Annotated[float, typer.Option(help="Number of elements of the model.")] = 1e9,
    steps: Annotated[float, typer.Option(help="Number of logged states.")] = 1e4,
    tensors: Annotated[int, typer.Option(help="Number of tensors of the model.")] = 500,
    workers: Annotated[int, typer.Option(help="Number of workers, which are threads of this process.")] = 4,
    seconds: Annotated[float, typer.Option(help="Seconds that each tile sleeps.")] = 0.0,
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
    items = list(plan.work_items())
    cut = list(itertools.chain.from_iterable(item.tiles for item in items))
    wire = sum(
        segments_in(tile, tensors, plan.columns) * (tile.stop - tile.start) * (VECTORS**2 + 1) * 8 for tile in cut
    )
    print(plan)
    print(f"{len(cut)} tiles of {plan.read_bytes / len(cut) / 1e6:.0f} MB, {len(items)} ledger chunks")
    print(
        f"{wire / 1e9:.2f} GB of segment ledgers sent to the scheduler, {wire / plan.read_bytes:.1e} of the input"
    )
    out = LocalStorage(tempfile.mkdtemp(prefix="natgrad-scale-"))
    of_pass = Job.of(out / "trajectory.zarr", out / "ledger.zarr", plan)
    job = SleepingJob(**vars(of_pass), tensors=tensors, seconds=seconds)
    digests = dict.fromkeys((item.chunk.start for item in items), "")
    process = psutil.Process()
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
    ):
        before = peak = process.memory_info().rss
        begin = time.perf_counter()
        for _ in executors.existing_cluster(cluster.scheduler_address)(job, items, lambda: digests):
            peak = max(peak, process.memory_info().rss)
        took = time.perf_counter() - begin
    tasks = len(cut) + len(items)
    print(f"{tasks} tasks in {took:.0f} s: {tasks / took:.0f} per second")
    memory = f"{peak / MEBIBYTE:.0f} MiB, {before / MEBIBYTE:.0f} before"
    print(f"scheduler, client and {workers} workers in one process: {memory}")


if __name__ == "__main__":
    typer.run(main)
