"""Test that every executor gives the same bits, even if workers fail, and which executor a pass uses."""

import contextlib
import dataclasses
import functools
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from test_ledger_pass import (
    CHUNK,
    ELEMENTS,
    ROWS,
    SHAPES,
    SHORT_BLOCKS,
    SMALL,
    bits,
    compute_small,
    flip,
    ledger_of,
)
from zarr.codecs import BloscCodec

from lazy import Lazy
from logs import walk_arrays, write_trajectory
from natgrad.compute import clusters, executors, tasks
from natgrad.compute.plan import PlanLimits
from natgrad.compute.work import calls
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE
from natgrad.storage import LocalStorage
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger

distributed = Lazy("distributed")


@pytest.fixture(scope="module")
def cluster():
    with clusters.local_scheduler(2) as address:
        yield address


EXECUTORS = ("serial", "threads", "cluster")


@pytest.fixture(params=EXECUTORS)
def executor(request):
    if request.param == "cluster":
        return executors.existing_cluster(request.getfixturevalue("cluster"))
    return {"serial": executors.serial, "threads": executors.threads(2)}[request.param]


@pytest.mark.parametrize("hvp", [False, True])
@pytest.mark.parametrize("limits", [SMALL, SHORT_BLOCKS], ids=["columns", "short blocks"])
def test_every_executor_gives_the_same_bits(tmp_path, cluster, hvp, limits):
    # The bits depend on the length of read blocks, so worker processes must get the limits of the pass.
    dtypes = {"parameter": "bfloat16", "gradient": "float32"} | ({"hvp": "float32"} if hvp else {})
    arrays = walk_arrays(ROWS, ELEMENTS, dtypes)
    ledger, reference = ledger_of(tmp_path, arrays, limits=limits)
    several = [executors.threads(1), executors.threads(2), executors.existing_cluster(cluster)]
    for number, executor in enumerate(several):
        other = tmp_path / f"{number}.zarr"
        reports = []
        summary = compute_ledger(
            tmp_path / "trajectory.zarr",
            other,
            executor=executor,
            limits=limits,
            progress=lambda done, total, reports=reports: reports.append((done, total)),
        )
        assert summary == reference  # workers are not part of the plan
        assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert bits(other) == bits(ledger)


@pytest.mark.parametrize(
    "chunk", [CHUNK, (3, 123)], ids=["ledger chunks of two tiles", "ledger chunks of one tile"]
)
def test_a_killed_worker_is_replaced_and_the_bits_are_the_same(tmp_path, cluster, chunk):
    from distributed import Client

    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, _ = ledger_of(tmp_path, arrays, chunk)
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        worker = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
        doomed = client.run(os.getpid, workers=[worker])[worker]
        # A stopped process takes tasks and finishes none, so it is killed while it has tasks.
        os.kill(doomed, signal.SIGSTOP)
        assigned = []

        def kill_at_first(done, total):
            if done == 1:
                assigned.extend(client.processing([worker])[worker])
                os.kill(doomed, signal.SIGKILL)

        other = tmp_path / "other.zarr"
        executor = executors.existing_cluster(cluster)
        summary = compute_small(tmp_path / "trajectory.zarr", other, executor=executor, progress=kill_at_first)
    assert assigned
    assert summary.computed_chunks > 2
    assert not psutil.pid_exists(doomed)
    assert bits(other) == bits(ledger)


def test_a_damaged_chunk_is_named_and_the_pass_continues_after_its_repair(tmp_path, executor):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, _ = ledger_of(tmp_path / "whole", arrays)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, CHUNK)
    chunk = trajectory / "gradient/c/3/1"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"is \d+ bytes too short") as caught:
        compute_small(trajectory, tmp_path / "ledger.zarr", executor=executor)
    assert caught.value.where == str(chunk)
    assert caught.value.remedy
    with pytest.raises(InputError, match="incomplete"):
        open_ledger(tmp_path / "ledger.zarr").read()
    chunk.write_bytes(whole)
    compute_small(trajectory, tmp_path / "ledger.zarr", executor=executor)
    assert bits(tmp_path / "ledger.zarr") == bits(ledger)


def test_runs_with_the_same_name_on_one_scheduler_are_kept_apart(tmp_path, cluster):
    arrays = walk_arrays(ROWS, ELEMENTS)
    executor = executors.existing_cluster(cluster)
    jobs = []
    for user in ("ada", "emmy"):
        folder = tmp_path / user / "run"
        ledger, summary = ledger_of(folder, arrays, executor=lambda *_: iter(()))
        states = open_trajectory(folder / "trajectory.zarr")
        items = list(summary.plan.work_items())
        digests = states.digests(item.chunk for item in items)
        job = tasks.Job.of(states.storage, LocalStorage(ledger), summary.plan, SMALL)
        by_start = {chunk.start: digest for chunk, digest in digests.items()}
        jobs.append((job, items, lambda by_start=by_start: by_start))
    with contextlib.closing(executor(*jobs[0])) as first:
        next(first)  # the others remain on the cluster until they are requested
        assert len(list(executor(*jobs[1]))) == 4
    assert len(open_ledger(jobs[1][0].ledger).read()[0]) == ROWS - 1


@pytest.mark.parametrize(("width", "ahead"), [(123, 6), (62, 3), (16, 2)])
def test_few_tasks_are_on_the_scheduler_at_a_time(tmp_path, cluster, width, ahead):
    # Three tasks for each worker, and two ledger chunks where one has more tiles than that. ``ahead`` is the number
    # of ledger chunks if both workers have passed their check when the pass starts.
    submitted, in_flight = [], []

    def counted(job, items, digests):
        # An executor requests the digests whenever it schedules a ledger chunk.
        return executors.existing_cluster(cluster)(job, items, lambda: submitted.append(None) or digests())

    ledger, summary = ledger_of(
        tmp_path,
        walk_arrays(ROWS, ELEMENTS),
        (1, width),
        limits=PlanLimits(tile_bytes=1, least_tile_bytes=1, least_updates=1),
        executor=counted,
        progress=lambda done, _: in_flight.append(len(submitted) - done + 1),
    )
    assert summary.chunks == len(submitted) == ROWS - 1
    assert 2 <= max(in_flight) <= ahead
    assert in_flight[-1] == 1
    assert open_ledger(ledger).n_updates == ROWS - 1


def test_the_dashboard_shows_the_stages_and_its_address_is_reported(tmp_path, caplog):
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
        ) as own,
        caplog.at_level("INFO", "natgrad"),
    ):
        executor = executors.existing_cluster(own.scheduler_address)
        run = tmp_path / "momentum"  # a name of letters could be taken for a part of the stage
        run.mkdir()
        ledger_of(run, walk_arrays(ROWS, ELEMENTS), executor=executor)
        assert list(calls(executor, abs, [-1], kind="results", out=LocalStorage(run), task_bytes=1, worker_bytes=1))
        stages = {prefix for prefix in own.scheduler.task_prefixes if prefix.startswith("natgrad")}
        assert stages >= {"natgrad-check", "natgrad-tile", "natgrad-ledger", "natgrad-results"}
        assert f"Dask dashboard: {own.dashboard_link}" in caplog.messages


def test_threads_start_no_ledger_chunk_after_the_one_that_failed(tmp_path, caplog):
    arrays = walk_arrays(ROWS, ELEMENTS)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, (1, 40))
    for chunk in (trajectory / "gradient/c/0").iterdir():
        os.truncate(chunk, 100)
    limits = PlanLimits(tile_bytes=1, least_tile_bytes=1, least_updates=1)
    with caplog.at_level("DEBUG", "natgrad.compute"), pytest.raises(InputError, match="bytes too short"):
        compute_ledger(trajectory, tmp_path / "ledger.zarr", executor=executors.threads(1), limits=limits)
    started = {tuple(record.updates) for record in caplog.records if record.message == "tile starts"}
    # Two of nineteen ledger chunks are in flight.
    assert (0, 1) in started <= {(0, 1), (1, 2)}


@pytest.fixture
def started(cluster, monkeypatch):
    """Record the numbers of threads and processes that `executors.local` starts."""
    found, in_threads = [], executors.threads

    @contextlib.contextmanager
    def scheduler(workers, memory_limit):
        found.append(("processes", workers))
        yield cluster

    def threads(workers):
        found.append(("threads", workers))
        return in_threads(workers)

    monkeypatch.setattr(executors, "local_scheduler", scheduler)
    monkeypatch.setattr(executors, "threads", threads)
    return found


FOUR_TILES = PlanLimits(tile_bytes=1, least_updates=99)
"""Limits for one ledger chunk with four tiles."""


def test_a_pass_of_one_task_starts_nothing(tmp_path, started):
    arrays = walk_arrays(ROWS, ELEMENTS)
    executor = executors.local(8, 512 * MEBIBYTE)
    _, summary = ledger_of(tmp_path, arrays, limits=PlanLimits(), executor=executor)
    assert (summary.plan.tasks, started) == (1, [])


def test_the_number_of_threads_is_limited_by_tasks_and_memory(tmp_path, started):
    arrays = walk_arrays(ROWS, ELEMENTS)
    executor = executors.local(8, 512 * MEBIBYTE)
    ledger, summary = ledger_of(tmp_path / "four", arrays, limits=FOUR_TILES, executor=executor)
    assert (summary.plan.tasks, started) == (4, [("threads", 4)])
    # Threads share the memory of one worker, which is sufficient for two but not for three.
    beyond_idle = summary.plan.projected_bytes - FOUR_TILES.reserved_bytes
    executor = executors.local(8, FOUR_TILES.reserved_bytes + 3 * beyond_idle - 1)
    other, _ = ledger_of(tmp_path / "two", arrays, limits=FOUR_TILES, executor=executor)
    assert started[1:] == [("threads", 2)]
    assert bits(other) == bits(ledger)


@pytest.mark.parametrize(
    ("codec", "together", "most", "kind"),
    [
        (None, 4, 8, "threads"),
        ("lz4", 4, 8, "processes"),  # Zarr needs the interpreter
        (None, 3, 8, "processes"),  # four do not fit into the memory of one worker
        (None, 4, 3, "processes"),
    ],
)
def test_a_long_pass_uses_processes_unless_threads_need_no_interpreter(
    tmp_path, started, codec, together, most, kind
):
    arrays = walk_arrays(ROWS, ELEMENTS)
    codecs = dict.fromkeys(arrays, BloscCodec(cname=codec)) if codec else None
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, CHUNK, codecs)
    plan = compute_ledger(trajectory, tmp_path / "serial.zarr", limits=FOUR_TILES).plan
    limits = dataclasses.replace(FOUR_TILES, least_cluster_bytes=plan.read_bytes, most_threads=most)
    beyond_idle = plan.projected_bytes - limits.reserved_bytes
    executor = executors.local(8, limits.reserved_bytes + together * beyond_idle)
    compute_ledger(trajectory, tmp_path / "ledger.zarr", executor=executor, limits=limits)
    assert started == [(kind, 4)]
    assert bits(tmp_path / "ledger.zarr") == bits(tmp_path / "serial.zarr")


@pytest.mark.usefixtures("cluster")
def test_a_second_cluster_on_one_machine_causes_no_warning():
    with clusters.local_scheduler(0) as address:
        assert address.startswith("tcp://127.0.0.1:")


def test_local_workers_are_bounded_by_the_plan_and_not_paused_below_it(cluster):
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:
        settings = client.run(lambda: __import__("dask").config.get("distributed.worker.memory"))
        threads = client.nthreads()
    assert len(settings) == 2
    assert set(threads.values()) == {1}
    for setting in settings.values():
        assert (setting["target"], setting["spill"], setting["pause"]) == (False, False, False)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:{port}", "tls://127.0.0.1:{port}", "http://127.0.0.1", "host"]
)
def test_a_scheduler_that_does_not_respond_is_named(tmp_path, address):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # in use, but not listening
        address = address.format(port=bound.getsockname()[1])
        executor = executors.existing_cluster(address, connect_seconds=0.2)
        with pytest.raises(InputError, match=r"the Dask scheduler does not respond: \w") as caught:
            ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS), executor=executor)
    assert caught.value.where == address
    assert "--scheduler" in caught.value.remedy


# Checksums of the states ---------------------------------------------------------------------------------------


STORED = ["compiled", "without the instruction", "compressed", "replicates", "hvp"]


def stored(folder, how):
    """Write a trajectory, and return it with the options of a pass that reads it in a certain way."""
    dtypes = {"parameter": "bfloat16", "gradient": "float32"} | ({"hvp": "float32"} if how == "hvp" else {})
    arrays, codecs = walk_arrays(ROWS, ELEMENTS, dtypes), {}
    if how == "replicates":
        arrays |= {f"replicate_parameter/{k}": arrays["parameter"][::-1] for k in range(2)}
    if how == "compressed":
        codecs = {"parameter": BloscCodec(cname="zstd"), "gradient": BloscCodec(cname="zstd")}
    return write_trajectory(folder / "trajectory.zarr", arrays, SHAPES, CHUNK, codecs)


def without_the_instruction(executor):
    """Return an executor that runs the functions of a processor without an instruction for CRC-32C."""
    return lambda job, *arguments: executor(dataclasses.replace(job, compiled=False), *arguments)


def damaged_state(trajectory, how):
    """Damage the state of step 6, a halo, in the third column; return its file, array and step (a pattern)."""
    if how == "compressed":
        chunk = trajectory / "gradient/c/2/2"
        flip(chunk, chunk.stat().st_size // 2)
        return chunk, "gradient", r"steps? \d"
    array, chunk = ("hvp", "hvp/c/2/2") if how == "hvp" else ("gradient", "gradient/c/2/2")
    if how == "replicates":
        array, chunk = "replicate_parameter/1", "replicate_parameter/c/2/1/2"
    flip(trajectory / chunk, 1)
    return trajectory / chunk, array, "step 6"


# Every pair of an executor, a way of storing and limits, but not every combination.
@pytest.mark.parametrize(
    ("executor", "how", "limits"),
    [
        pytest.param(name, how, (SMALL, SHORT_BLOCKS)[(number + position) % 2], id=f"{name}-{how}")
        for number, name in enumerate(EXECUTORS)
        for position, how in enumerate(STORED)
    ],
    indirect=["executor"],
)
def test_a_damaged_state_is_refused_by_every_executor_until_it_is_restored(tmp_path, executor, how, limits):
    if how == "without the instruction":
        executor = without_the_instruction(executor)
    trajectory = stored(tmp_path, how)
    compute = functools.partial(compute_ledger, trajectory, executor=executor, limits=limits)
    assert compute(tmp_path / "undamaged.zarr").states_verified is not None
    intact = {path: path.read_bytes() for path in trajectory.rglob("*") if path.is_file()}
    chunk, array, steps = damaged_state(trajectory, how)
    ledger = tmp_path / "ledger.zarr"
    message = f"cannot read a chunk of {array}, {steps}.*" + ("" if how == "compressed" else "checksum mismatch")
    for _ in range(2):
        with pytest.raises(InputError, match=message) as caught:
            compute(ledger)
        assert caught.value.where == str(chunk)
        assert "tensors second to third" in caught.value.what
        assert "restore the file, or ingest the run again with --overwrite" in caught.value.remedy
        with pytest.raises(InputError, match="the ledger is incomplete"):
            open_ledger(ledger).read()
    chunk.write_bytes(intact[chunk])
    compute(ledger)
    assert bits(ledger) == bits(tmp_path / "undamaged.zarr")


@pytest.mark.parametrize("how", ["compiled", "without the instruction", "replicates", "hvp"])
def test_a_trusting_pass_does_not_compare_states_and_reports_this(tmp_path, how):
    trajectory = stored(tmp_path, how)
    executor = without_the_instruction(executors.serial) if how == "without the instruction" else executors.serial
    compute = functools.partial(compute_small, trajectory, executor=executor)
    compute(tmp_path / "compared.zarr")
    assert compute(tmp_path / "trusted.zarr", trust_states=True).states_verified is None
    assert bits(tmp_path / "trusted.zarr") == bits(tmp_path / "compared.zarr")
    damaged_state(trajectory, how)
    assert compute(tmp_path / "damaged.zarr", trust_states=True).computed_chunks == 4


def bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("how", ["compiled", "without the instruction"])
def test_no_state_is_read_twice_to_compare_it(tmp_path, how):
    rows, elements = 40, 50_000
    state = walk_arrays(rows, elements)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", state, {"all": (elements,)}, (1, elements))
    executor = without_the_instruction(executors.serial) if how == "without the instruction" else executors.serial
    compute_ledger(trajectory, tmp_path / "first.zarr", executor=executor)
    read = {}
    for trusting in (True, False):
        before = bytes_read()
        compute_ledger(trajectory, tmp_path / f"{trusting}.zarr", executor=executor, trust_states=trusting)
        read[trusting] = bytes_read() - before
    of_states = sum(array.nbytes for array in state.values())
    assert read[True] > of_states
    # The records are read again, but less than the states of one step.
    assert abs(read[False] - read[True]) < of_states / rows
