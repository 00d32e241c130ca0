"""OUT and SOURCE in an object store: a real S3 server on this machine."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
import numpy as np
import pandas
import psutil
import pytest
import tensorboard.summary
import xarray as xr
from zarr.codecs import ZstdCodec

import logs
from natgrad.app import cli, run
from natgrad.app import scan as watch
from natgrad.app.describe import describe_run
from natgrad.app.status import status
from natgrad.app.verification import verify_run
from natgrad.compute import executors
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.layout import IngestLimits
from natgrad.sources.container import ObjectRegion
from natgrad.storage import LocalStorage, network_errors, open_storage
from natgrad.storage.objects import ObjectStorage
from natgrad.store import Ledger, Trajectory, open_ledger, open_trajectory
from opened import TIMES, compute_ledger
from processing import Serial
from servers import forget_object_stores, free_port

STEPS = 12
"""Steps of the log; two thirds of them exist at first."""


def content(folder):
    """Relative path to content of all files, except locks, times, and pages, which contain their location."""
    storage = open_storage(folder)
    names = [name for name in storage.walk() if not name.endswith((".lock", ".html", TIMES))]
    return dict(zip(names, storage.get_entries(names), strict=True))


@pytest.fixture(scope="module")
def both(s3_server, tmp_path_factory):
    """A run that was processed, continued and processed again, in a folder and in an object store."""
    folder = tmp_path_factory.mktemp("both")
    states = logs.with_replicates(logs.random_walk(STEPS))
    log = logs.write_log(folder / "log", states[: STEPS * 2 // 3])
    outs = folder / "out", open_storage("s3://bucket/both")
    for out in outs:
        run.ingest_run(log, out)
        compute_ledger(out / "trajectory.zarr", out / "ledger.zarr")
    for number in range(STEPS * 2 // 3, STEPS):
        logs.write_step(log, number, states[number])
    for out in outs:
        assert run.ingest_run(log, out).new_steps == STEPS // 3
        run.analyze_run(out, Serial())
    return outs


def test_all_bytes_equal_those_of_a_folder(both):
    here, there = map(content, both)
    assert len(here) > 100
    assert there == here


def test_zarr_readers_open_the_results(both):
    here, there = (xr.open_datatree(str(out / "results.zarr"), engine="zarr")["model"] for out in both)
    assert there["angle"].identical(here["angle"])


def test_nothing_is_left_locked(both):
    assert not [name for name in both[1].list() if name.endswith(".lock")]


def test_the_commands_take_a_url(both, capsys, monkeypatch):
    # Its log handler would keep writing to the captured stream.
    monkeypatch.setattr(logging.getLogger("natgrad"), "handlers", [])
    for command, message in {
        "info": "s3://bucket/both/trajectory.zarr",
        "verify": "OK: all checksums match",
    }.items():
        cli.app([command, "s3://bucket/both"], standalone_mode=False)
        assert message in capsys.readouterr().out


# Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressors", [None, [ZstdCodec()]], ids=["plain", "compressed"])
def test_the_pass_gives_the_same_bits(url, tmp_path, compressors):
    arrays = logs.walk_arrays(9, 100)
    compressed = {"parameter": compressors} if compressors else None
    books = []
    for out in (tmp_path, url):
        logs.write_trajectory(out / "t.zarr", arrays, {"a": (30,), "b": (7, 10)}, (4, 40), compressed)
        compute_ledger(out / "t.zarr", out / "l.zarr", executor=executors.threads(2))
        books.append(open_ledger(out / "l.zarr").read())
    for here, there in zip(*books, strict=True):
        assert here.tobytes() == there.tobytes()
    states = open_trajectory(url / "t.zarr")
    out = np.zeros((6, 20), np.float32)
    states.read("parameter", 2, 8, 2, out)
    assert np.array_equal(out, arrays["parameter"][2:8, 80:])


def test_processes_read_and_write_a_url(url, tmp_path):
    logs.write_trajectory(url / "trajectory.zarr", logs.walk_arrays(40, 64), {"a": (64,)}, (8, 64))
    stores = url / "trajectory.zarr", url / "ledger.zarr"
    compute_ledger(*stores)
    expected = open_ledger(stores[1]).read()[0]
    Ledger.remove(stores[1])
    compute_ledger(*stores, executor=executors.local(2))
    assert open_ledger(stores[1]).read()[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("damage", ["changed", "short", "missing"])
def test_a_damaged_object_is_named(url, damage):
    store = logs.write_trajectory(url / "t.zarr", logs.walk_arrays(4, 8), {"a": (8,)}, (4, 8))
    chunk = store / "gradient" / "c" / "0" / "0"
    whole = chunk.get()
    if damage == "missing":
        chunk.delete()
    else:
        chunk.put(whole[:-8] if damage == "short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="cannot read a chunk") as refusal:
        compute_ledger(store, url / "l.zarr")
    assert refusal.value.where == str(chunk)


# Writing -----------------------------------------------------------------------------------------------------


def test_one_process_writes(url):
    store = url / "t.zarr"
    with (
        store.lock("trajectory"),
        pytest.raises(Unavailable, match=f"another process is writing this trajectory: process {os.getpid()} on"),
        store.lock("trajectory"),
    ):
        raise AssertionError("two writers")
    with store.lock("trajectory"):
        assert (url / ".t.zarr.lock").exists()
    assert not (url / ".t.zarr.lock").exists()


def start_of_this_process(url):
    """Return the start of this process, as a lock records it."""
    with (url / "own").lock("trajectory"):
        return json.loads((url / ".own.lock").get())["started"]


def left_lock(url, **changes):
    """Write a lock that was not released, by default by this process."""
    signed = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "user": "somebody",
        "since": "2026-11-26T10:00:00+00:00",
        "started": start_of_this_process(url),
        **changes,
    }
    (url / ".t.zarr.lock").put(json.dumps(signed).encode())


def test_a_lock_of_a_dead_process_on_this_machine_is_taken_over(url):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    # No process has its number, or another process that started at another time.
    for changes in ({"process": int(dead.stdout)}, {"started": f"{start_of_this_process(url)}0"}):
        left_lock(url, **changes)
        with (url / "t.zarr").lock("trajectory"):
            assert json.loads((url / ".t.zarr.lock").get())["user"] != "somebody"
    left_lock(url)
    with pytest.raises(Unavailable, match="of user somebody"), (url / "t.zarr").lock("trajectory"):
        raise AssertionError("the process lives")


def test_a_lock_of_another_container_with_the_same_host_name_is_not_taken_over(url):
    boot, namespace, start = start_of_this_process(url).split()
    for started, machine in (
        (f"{boot} pid:[1] {start}", ""),  # a container on this machine
        (f"another-boot {namespace} {start}", "another machine"),
        ("1.0", ""),
    ):
        left_lock(url, process=1 << 22, started=started, machine=machine)
        with (
            pytest.raises(Unavailable, match="of user somebody") as refusal,
            (url / "t.zarr").lock("trajectory"),
        ):
            raise AssertionError("it may live")
        assert "another container" in refusal.value.why


def test_a_lock_is_not_taken_over_after_the_clock_was_set(url, monkeypatch):
    # On Linux, the creation time of a process moves with the clock.
    with (url / "t.zarr").lock("trajectory"):
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) - 3600)
        with pytest.raises(Unavailable, match="another process is writing"), (url / "t.zarr").lock("trajectory"):
            raise AssertionError("two writers hold the lock")


def test_a_lock_of_another_machine_is_not_taken_over(url):
    left_lock(url, host="elsewhere", started=1.0)
    with (
        pytest.raises(Unavailable, match="on elsewhere of user somebody, since 2026-11-26T10:00:00") as refusal,
        (url / "t.zarr").lock("trajectory"),
    ):
        raise AssertionError("it may live")
    assert str(url / ".t.zarr.lock") in refusal.value.remedy


def test_the_second_process_to_take_over_a_lock_is_rejected(url, monkeypatch):
    left_lock(url, started=f"{start_of_this_process(url)}0")
    put_if = ObjectStorage.put_if

    def slow(self, content, tag):
        # Another process takes over the lock after this one has found that its holder is dead.
        (url / ".t.zarr.lock").put(b"another")
        put_if(self, content, tag)

    monkeypatch.setattr(ObjectStorage, "put_if", slow)
    with pytest.raises(Unavailable, match="has just taken over the lock"), (url / "t.zarr").lock("trajectory"):
        raise AssertionError("two writers")
    assert (url / ".t.zarr.lock").get() == b"another"


def test_a_store_without_conditional_writes_is_rejected(url, monkeypatch):
    whole = url.fs.pipe_file
    monkeypatch.setattr(url.fs, "pipe_file", lambda path, value, mode="overwrite": whole(path, value))
    with (
        pytest.raises(InputError, match="ignores conditional writes"),
        (url / "t.zarr").lock("trajectory"),
    ):
        raise AssertionError("two writers were not detected")


def test_a_concurrent_commit_is_rejected(url):
    """If a user removes a lock by hand, a second record with the same number is rejected."""
    store = logs.write_trajectory(url / "t.zarr", logs.walk_arrays(2, 8), {"a": (8,)}, (4, 8))
    late = open_trajectory(store)
    logs.append_states(store, logs.walk_arrays(1, 8, seed=1))
    names = late.journal.names()
    late.journal.names = lambda: names[:1]
    numbers = {"loss": [0.0], "learning_rate": [0.1]}
    with pytest.raises(Unavailable, match="another process has committed in the meantime"):
        late.commit([2], numbers, [{}], {"parameter": [[0]], "gradient": [[0]]})
    record = open_trajectory(store).records()[1]
    late.journal.write("00000001", {key: value for key, value in record.items() if key != "crc32c"}, new=True)


def test_a_chunk_that_cannot_be_put_is_not_committed(url, tmp_path, monkeypatch):
    log = logs.write_log(tmp_path / "log", logs.random_walk(4))
    run.ingest_run(log, url)
    for number, state in enumerate(logs.random_walk(6)[4:], start=4):
        logs.write_step(log, number, state)
    whole = url.fs.pipe_file

    def refuse(path, value, **condition):
        if "/gradient/c/" in path:
            raise PermissionError("Access Denied")
        return whole(path, value, **condition)

    monkeypatch.setattr(url.fs, "pipe_file", refuse)
    with pytest.raises(InputError, match="denies access"):
        run.ingest_run(log, url)
    monkeypatch.undo()
    assert describe_run(url)["steps"] == 4
    assert verify_run(url) == []
    assert run.ingest_run(log, url).new_steps == 2


KILLED = """
import os, signal, sys
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.app import run
from natgrad.schema.layout import IngestLimits
from natgrad.storage import open_storage
from natgrad.storage.objects import ObjectStorage

log, out = sys.argv[1:3]

class Counted(ObjectStorage):
    def put(self, content):
        super().put(content)
        self.count()

    def put_new(self, content):
        super().put_new(content)
        self.count()

    def count(self):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

# Each process dies after a different request, and continues where the previous one stopped.
for count in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        left, plain = count, open_storage(out)
        folder = Counted(plain.fs, plain.scheme, plain.key)
        run.ingest_run(log, folder, limits=IngestLimits(chunk=(8, 17), commit_bytes=1))
        compute_ledger(folder / "trajectory.zarr", folder / "ledger.zarr")
        print(left, file=sys.stderr)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_killed_run_is_resumed(url, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(20))
    counts = (3, 8, 5, 4, 1000)
    command = [sys.executable, "-c", KILLED, str(log), str(url), *map(str, counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["-9"] * 4 + ["0"], done.stderr
    run.ingest_run(log, tmp_path / "out", limits=IngestLimits(chunk=(8, 17), commit_bytes=1))
    compute_ledger(tmp_path / "out" / "trajectory.zarr", tmp_path / "out" / "ledger.zarr")
    assert len(open_trajectory(url / "trajectory.zarr").records()) == 3
    assert content(url) == content(tmp_path / "out")


# Logs --------------------------------------------------------------------------------------------------------


def put_log(folder, states, container):
    for number, state in enumerate(states):
        put_step(folder, number, state, container)
    return folder


def put_step(folder, number, state, container):
    with tempfile.TemporaryDirectory() as here:
        file = logs.write_step(Path(here), number, state, container)
        (folder / file.name).put(file.read_bytes())


@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_a_log_is_read_in_place(url, tmp_path, container):
    # The header is longer than a block, and the tensors end within blocks.
    states = logs.random_walk(3, {f"tensor.{number}": (1501,) for number in range(700)})
    here = logs.write_log(tmp_path / "log", states[:2], container=container)
    there = put_log(url / "log", states[:2], container)
    for log, out in ((here, tmp_path / "here"), (there, tmp_path / "there")):
        assert run.ingest_run(log, out).new_steps == 2
    assert run.ingest_run(str(there), tmp_path / "there").new_steps == 0
    logs.write_step(here, 2, states[2], container)
    put_step(there, 2, states[2], container)
    digests = []
    for log, out in ((here, tmp_path / "here"), (there, tmp_path / "there")):
        assert run.ingest_run(log, out).new_steps == 1
        digests.append(open_trajectory(out / "trajectory.zarr").fingerprint())
    assert digests[0] == digests[1]
    assert open_trajectory(tmp_path / "there" / "trajectory.zarr").source == str(there)


def test_an_unchanged_log_costs_one_listing(url, tmp_path, monkeypatch):
    log = put_log(url / "log", logs.random_walk(5), "safetensors")
    run.ingest_run(log, tmp_path / "out")
    monkeypatch.setattr(url.fs, "info", lambda *_, **__: pytest.fail("an object is looked at"))
    monkeypatch.setattr(url.fs, "open", lambda *_, **__: pytest.fail("an object is opened"))
    monkeypatch.setattr("natgrad.ingestion.new_updates.changed_lately", lambda time: False)
    assert run.ingest_run(log, tmp_path / "out").new_steps == 0


@pytest.mark.parametrize(("content", "message"), [(b"", None), (b"#" * ((1 << 22) + 1), "more than 4194304 bytes")])
def test_a_mapping_file_may_be_empty_but_not_too_long(url, tmp_path, content, message):
    log = put_log(url / "log", logs.random_walk(2), "safetensors")
    (log / "natgrad.toml").put(content)
    if message is None:
        assert run.ingest_run(log, tmp_path / "out").new_steps == 2
    else:
        with pytest.raises(InputError, match=message):
            run.ingest_run(log, tmp_path / "out")


def test_objects_of_another_process_are_found(url, tmp_path):
    states = logs.random_walk(4)
    log = put_log(url / "log", states[:3], "safetensors")
    run.ingest_run(log, tmp_path / "out")
    step = logs.write_step(tmp_path, 3, states[3])
    with contextlib.closing(boto3.client("s3")) as another:
        key = f"{log.key.removeprefix('bucket/')}/{step.name}"
        another.put_object(Bucket="bucket", Key=key, Body=step.read_bytes())
    assert run.ingest_run(log, tmp_path / "out").new_steps == 1


class WithinASecond(ObjectStorage):
    """Objects that all were put within the same second."""

    def stat(self, *, fresh=True):
        return super().stat(fresh=fresh)._replace(time=0)


def test_a_rewritten_step_has_a_new_identity(url, tmp_path):
    # The object has the same size and is written within the same second.
    states = logs.random_walk(5)
    log = put_log(WithinASecond(url.fs, url.scheme, f"{url.key}/log"), states[:4], "safetensors")
    run.ingest_run(log, tmp_path / "out")
    put_step(log, 1, states[4], "safetensors")
    with pytest.raises(InputError, match="step 1 is already ingested, with loss"):
        run.ingest_run(log, tmp_path / "out")


def test_a_prefix_with_the_same_contents_elsewhere_continues_and_another_run_is_refused(url, tmp_path):
    states = logs.random_walk(6)
    places = [WithinASecond(url.fs, url.scheme, f"{url.key}/{name}") for name in ("log", "moved", "other")]
    log, moved = (put_log(place, states[:4], "safetensors") for place in places[:2])
    other = put_log(places[2], logs.random_walk(4, seed=1), "safetensors")
    run.ingest_run(log, tmp_path / "out")
    assert run.ingest_run(moved, tmp_path / "out").new_steps == 0
    sources = open_trajectory(tmp_path / "out" / "trajectory.zarr").sources()
    assert {source["folder"] for source in sources} == {str(moved)}
    put_step(moved, 4, states[4], "safetensors")
    assert run.ingest_run(moved, tmp_path / "out").new_steps == 1
    with pytest.raises(InputError, match="step 0 is already ingested, with loss") as refusal:
        run.ingest_run(other, tmp_path / "out")
    assert str(other) in refusal.value.where
    assert f"it was ingested from {moved}/step_0.safetensors" in refusal.value.why


def test_an_open_object_is_one_object(url):
    step = put_log(url, logs.random_walk(1), "safetensors") / "step_0.safetensors"
    region, out = ObjectRegion(step), np.empty(8, np.uint8)
    put_step(url, 0, logs.random_walk(1, seed=1)[0], "safetensors")
    with pytest.raises(Unavailable, match="the object changed while it was being read"), network_errors(step):
        region.fill(0, out)
    region.close()


def test_a_step_that_changes_while_it_is_read_is_left(url, tmp_path, monkeypatch):
    """A step that is put again after it has been described, and before it is opened to be read."""
    states = logs.random_walk(5)
    log = put_log(url / "log", states[:4], "safetensors")
    whole = Trajectory.create

    def slow(*arguments, **options):
        put_step(log, 1, states[4], "safetensors")
        return whole(*arguments, **options)

    monkeypatch.setattr(Trajectory, "create", slow)
    with pytest.raises(Unavailable, match="changed while it was read") as refusal:
        run.ingest_run(log, tmp_path / "out")
    assert refusal.value.where.startswith(str(log / "step_1.safetensors"))
    assert not (tmp_path / "out" / "trajectory.zarr").exists()


@pytest.mark.parametrize(
    ("container", "message"), [("safetensors", "header.*not fully covered"), ("npz", "not a zip")]
)
def test_an_object_that_is_cut_off_is_named(url, tmp_path, container, message):
    log = put_log(url / "log", logs.random_walk(3), container)
    step = log / f"step_1.{container}"
    step.put(step.get()[:-40])
    with pytest.raises(InputError, match=f"cannot read an? {container} file: .*{message}") as refusal:
        run.ingest_run(log, tmp_path / "out")
    assert refusal.value.where.startswith(f"{step}, step 1")


def test_logs_of_a_sweep_and_a_run_file(url, tmp_path):
    states = logs.random_walk(3)
    for name in ("a", "b"):
        put_log(url / "sweep" / name, states, "npz")
    assert run.ingest_run(url / "sweep", tmp_path / "sweep", sweep=True).new_steps == 6
    file = tmp_path / "run.toml"
    file.write_text(f'[[source]]\npath = "{url}/sweep/a"\n')
    assert run.ingest_run(file, tmp_path / "file").new_steps == 3


# Logs of scalars ---------------------------------------------------------------------------------------------

VALUES = [(step, np.pi / (step + 1), 0.5**step) for step in range(8)]


def frame(values):
    return pandas.DataFrame(values, columns=["step", "loss", "lr"])


def write_csv(folder, values):
    frame(values).to_csv(folder / "metrics.csv", index=False)
    return "metrics.csv"


def write_json_lines(folder, values):
    rows = [{"step": step, "train": {"loss": loss, "lr": rate}} for step, loss, rate in values]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "log.jsonl"


def write_parquet(folder, values):
    frame(values[:3]).to_parquet(folder / "0.parquet")
    frame(values[3:]).to_parquet(folder / "1.parquet")
    return ""


def write_events(folder, values):
    with contextlib.closing(tensorboard.summary.Writer(str(folder))) as writer:
        for step, loss, rate in values:
            writer.add_scalar("loss", np.float64(loss), step)
            writer.add_scalar("lr", np.float64(rate), step)
    return ""


def put_scalars(url, write, values):
    """Replace a log with the output of a writer, and return the SOURCE."""
    with tempfile.TemporaryDirectory() as here:
        name = write(Path(here), values)
        for old in url.files():
            old.delete()
        for file in Path(here).iterdir():
            (url / file.name).put(file.read_bytes())
    return url / name if name else url


def put_without_scalars(url, steps):
    states = logs.random_walk(steps)
    return put_log(url, [{k: v for k, v in s.items() if "/" in k} for s in states], "npz")


def scalars_of(out):
    states = open_trajectory(out / "trajectory.zarr")
    return list(zip(*(states.scalar(name).tolist() for name in ("step", "loss", "learning_rate")), strict=True))


@pytest.mark.parametrize("write", [write_csv, write_json_lines, write_parquet, write_events])
def test_scalars_and_tensors_grow_together(url, tmp_path, write):
    log = put_without_scalars(url / "log", 5)
    source = put_scalars(url / "scalars", write, VALUES[:4])
    # The last state lacks its scalars.
    assert run.ingest_run([log, source], tmp_path / "out").new_steps == 5
    put_without_scalars(url / "log", 8)
    assert put_scalars(url / "scalars", write, VALUES) == source
    summary = run.ingest_run([log, source], tmp_path / "out")
    assert (summary.new_steps, summary.completed_steps) == (3, 1)
    expected = VALUES
    if write is write_events:  # in single precision, as TensorBoard stores numbers
        expected = [(step, *np.float32(values).tolist()) for step, *values in VALUES]
    assert scalars_of(tmp_path / "out") == expected


def test_scalars_are_found_in_their_folder_and_by_the_format_that_is_named(url, tmp_path):
    log = put_without_scalars(url / "log", 3)
    put_scalars(url / "scalars", write_csv, VALUES[:3])
    (url / "scalars" / "hparams.yaml").put(b"any: 1")
    run.ingest_run([log, url / "scalars"], tmp_path / "found", mapping={"loss": "lr"})
    assert scalars_of(tmp_path / "found") == [(step, rate, rate) for step, _, rate in VALUES[:3]]
    (url / "odd").put((url / "scalars" / "metrics.csv").get())
    file = tmp_path / "run.toml"
    file.write_text(f'[[source]]\npath = "{log}"\n\n[[source]]\npath = "{url}/odd"\nformat = "csv"\n')
    run.ingest_run(file, tmp_path / "named")
    assert scalars_of(tmp_path / "named") == VALUES[:3]
    with pytest.raises(InputError, match="a log of scalars does not contain any tensors"):
        run.ingest_run(url / "scalars" / "metrics.csv", tmp_path / "alone")


def test_unfinished_records_wait_and_damaged_ones_are_named(url, tmp_path):
    log = put_without_scalars(url / "log", 4)
    source = put_scalars(url / "scalars", write_csv, VALUES[:4])
    whole = source.get()
    source.put(whole[:-4])
    summary = run.ingest_run([log, source], tmp_path / "out")
    assert (summary.new_steps, summary.last_step_lacks) == (4, ["loss", "learning_rate"])
    assert any("the last line of metrics.csv has no newline" in warning for warning in summary.warnings)
    source.put(whole)
    summary = run.ingest_run([log, source], tmp_path / "out")
    assert (summary.new_steps, summary.completed_steps) == (0, 1)
    events = put_scalars(url / "events", write_events, VALUES[:4])
    (file,) = events.files()
    file.put(file.get()[:-30] + bytes(30))
    with pytest.raises(InputError, match=r"checksum mismatch in the .*record at byte") as refusal:
        run.ingest_run([log, events], tmp_path / "damaged")
    assert refusal.value.where == str(file)


class PutAgain(ObjectStorage):
    """An object that is replaced after it has been opened."""

    def open(self):
        file = super().open()
        self.put(self.get() + b"3,0,0\n")
        return file


def test_a_log_of_scalars_that_is_put_again_while_it_is_read_is_left_for_later(url, tmp_path):
    log = put_without_scalars(url / "log", 3)
    source = put_scalars(url / "scalars", write_csv, VALUES[:3])
    with pytest.raises(Unavailable, match="the object changed while it was being read"):
        run.ingest_run([log, PutAgain(source.fs, source.scheme, source.key)], tmp_path / "out")


def test_formats_that_need_local_files_are_rejected(url, tmp_path):
    (url / "log" / "model-1.pt").put(b"any")
    for format in (None, "torch"):
        with pytest.raises(InputError, match="copy the log to a local folder first"):
            run.ingest_run(url / "log", tmp_path / "out", format=format)
    with pytest.raises(InputError, match="no such object or folder"):
        run.ingest_run(url / "nothing", tmp_path / "out")


# Errors ------------------------------------------------------------------------------------------------------


def test_paths_and_urls(tmp_path):
    assert open_storage(tmp_path) == open_storage(str(tmp_path)) == LocalStorage(tmp_path)
    assert open_storage("file:///a%20b/c") == open_storage(Path("file:/a%20b/c")) == LocalStorage("/a b/c")
    # The command line and Prefect pass URLs through pathlib, which collapses slashes.
    found = [
        open_storage(location) for location in (Path("s3://bucket/run"), "s3://bucket/run/", "s3://bucket/run")
    ]
    assert {str(storage) for storage in found} == {"s3://bucket/run"}
    assert len(set(found)) == 1
    with pytest.raises(InputError, match="unknown URL scheme ftp://") as refusal:
        open_storage("ftp://host/run")
    assert "schemes file://, gs://, s3://" in refusal.value.remedy


def test_folders_of_many_runs_must_be_local(tmp_path):
    for look in (
        lambda: watch.find_runs("s3://bucket/logs", tmp_path),
        lambda: watch.find_runs(tmp_path, "s3://bucket/runs"),
        lambda: status("s3://bucket/runs"),
    ):
        with pytest.raises(InputError, match="must be a folder on this machine"):
            look()


def test_a_missing_bucket_is_reported(s3_server, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(3))
    with pytest.raises(
        InputError, match="not found in the object store: The specified bucket does not exist"
    ) as refusal:
        run.ingest_run(log, "s3://nowhere/run")
    assert not isinstance(refusal.value, Unavailable)
    assert "create the bucket" in refusal.value.remedy


def test_a_failed_write_names_the_object(s3_server):
    folder = open_storage("s3://nowhere/run")
    for write, where in (
        (lambda: (folder / "a").put(b"1"), "s3://nowhere/run/a"),
        (lambda: (folder / "a").put_new(b"1"), "s3://nowhere/run/a"),
        (lambda: folder.put_entries({"b": b"1"}), "s3://nowhere/run/b"),
        (lambda: folder.put_entries({"b": b"1", "c": b"2"}), "one of 2 objects in s3://nowhere/run"),
    ):
        with pytest.raises(InputError, match="not found in the object store") as refusal:
            write()
        assert refusal.value.where == where


@pytest.fixture
def newly_opened(s3_server):
    """Open object stores with the environment of the test, and afterwards with the usual one again."""
    forget_object_stores()
    yield type(open_storage("s3://bucket/any").fs)
    forget_object_stores()


def test_a_store_that_does_not_respond_is_a_temporary_error(newly_opened, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(newly_opened, "retries", 1)
    with pytest.raises(Unavailable, match="the object store does not respond: EndpointConnectionError") as refusal:
        describe_run("s3://bucket/run")
    assert refusal.value.where == "s3://bucket/run"
    assert watch.error_parts(refusal.value)["heals"]


def test_missing_credentials_are_reported(newly_opened, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    log = logs.write_log(tmp_path / "log", logs.random_walk(3))
    with pytest.raises(InputError, match="denies access: Unable to locate credentials") as refusal:
        run.ingest_run(log, "s3://bucket/run")
    assert not watch.error_parts(refusal.value)["heals"]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match="the library for s3:// is not installed") as refusal:
        open_storage("s3://bucket/run")
    assert refusal.value.remedy == "pip install 'natgrad-pipeline[s3]'"


@pytest.mark.parametrize("command", [describe_run, verify_run, run.analyze_run])
def test_an_object_store_without_a_run(url, command):
    with pytest.raises(InputError, match="no trajectory here"):
        command(url)
