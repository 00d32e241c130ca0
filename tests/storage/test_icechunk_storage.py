"""OUT as an Icechunk repository (--store icechunk), on a real server with the S3 interface, and its versions."""

import datetime
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr

import logs
import natgrad
from natgrad.app import cli, run
from natgrad.app.describe import describe_run
from natgrad.app.verification import verify_run
from natgrad.compute import executors
from natgrad.compute.plan import PlanLimits
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.layout import IngestLimits
from natgrad.storage import LocalStorage, open_out, open_storage
from natgrad.storage.icechunk_storage import IcechunkStorage
from natgrad.storage.objects import ObjectStorage
from natgrad.store import open_ledger, open_trajectory
from opened import TIMES, compute_ledger, read_results
from processing import Serial


def opened(server, out, authorized=None):
    """The repository in OUT, opened with Icechunk directly."""
    storage = icechunk.s3_storage(
        bucket="bucket",
        prefix=f"{out.key.partition('/')[2]}/stores.icechunk",
        endpoint_url=server.environment["AWS_ENDPOINT_URL"],
        allow_http=True,
        force_path_style=True,
        from_env=True,
    )
    return icechunk.Repository.open(storage, authorize_virtual_chunk_access=authorized)


def content(out):
    """Path below OUT to bytes, of all in its stores except times.

    Names of chunks of the results contain slashes in a repository, and dots elsewhere. The records with the
    checksums of these names are omitted.
    """
    folder = open_out(out)
    names = [name for name in folder.walk() if not name.endswith((".lock", ".html", TIMES))]
    found = dict(zip(names, folder.get_entries(names), strict=True))
    results = {name: found.pop(name) for name in names if name.startswith("results.zarr/")}
    for name, value in results.items():
        if name.endswith("/zarr.json"):
            found[name] = value.replace(b'"separator": "."', b'"separator": "/"')
        elif not name.endswith(".json"):
            found[re.sub(r"/c\.([\d.]+)$", lambda key: "/" + key[0][1:].replace(".", "/"), name)] = value
    return found


def versions(out, last=None):
    return open_out(out).versions(last)


def written(url, rows=8, elements=200, chunk=(4, 200)):
    """A trajectory in a new repository, and its location there."""
    store = open_out(url, kind="icechunk") / "trajectory.zarr"
    with store.lock("trajectory") as writing:
        logs.write_trajectory(writing, logs.walk_arrays(rows, elements), {"a": (elements,)}, chunk)
    return store.latest()


# The same bytes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(s3_server, tmp_path_factory):
    """Process a run in a folder and in a repository, continue it twice, and restart it; also return old states."""
    folder = tmp_path_factory.mktemp("both")
    first = logs.with_replicates(logs.random_walk(12))
    log = logs.write_log(folder / "log", first[:6])
    outs = folder / "out", open_storage("s3://bucket/both")
    kinds = {outs[0]: None, outs[1]: "icechunk"}
    for out in outs:
        run.ingest_run(log, out, store=kinds[out])
        compute_ledger(str(out / "trajectory.zarr"), str(out / "ledger.zarr"))
    for numbers in (range(6, 8), range(8, 12)):
        for number in numbers:
            logs.write_step(log, number, first[number])
        for out in outs:
            run.ingest_run(log, out, store=kinds[out])
    for out in outs:
        run.analyze_run(out, Serial())
    shutil.copytree(outs[0], folder / "before")
    restarted = logs.with_replicates(logs.random_walk(12, seed=1))
    shutil.rmtree(log)
    logs.write_log(log, restarted[5:10], range(5, 10))
    for out in outs:
        assert run.ingest_run(log, out).attempts == 2
        run.analyze_run(out, Serial())
    return *outs, folder / "before"


@pytest.fixture
def before(both):
    """The version before the restart."""
    (found,) = (row for row in versions(both[1]) if row["message"] == "results of both: 11 updates")
    return found["version"]


def test_all_bytes_equal_those_of_a_folder(both):
    here, there = map(content, both[:2])
    assert len(here) > 100
    assert there == here


def test_each_commit_is_a_version_that_describes_its_changes(both):
    assert [row["message"] for row in versions(both[1])] == [
        "results of both: 8 updates",
        "ledger of both: 1 of 1 chunks computed",
        "trajectory of both: steps 5 to 9, attempt 1",
        "results of both: 11 updates",
        "ledger of both: 1 of 1 chunks computed",
        "trajectory of both: steps 8 to 11, attempt 0",
        "trajectory of both: steps 6 to 7, attempt 0",
        "ledger of both: 1 of 1 chunks computed",
        "trajectory of both: steps 0 to 5, attempt 0",
        "Repository initialized",
    ]
    times = [datetime.datetime.fromisoformat(row["time"]) for row in versions(both[1])]
    assert times == sorted(times, reverse=True)
    assert times[0].tzinfo is not None


def test_an_old_version_does_not_change(both, before):
    then = open_trajectory("s3://bucket/both/trajectory.zarr", before)
    kept = open_trajectory(both[2] / "trajectory.zarr")
    assert (then.n_states, then.fingerprint()) == (12, kept.fingerprint())
    assert open_trajectory("s3://bucket/both/trajectory.zarr").n_states == 17
    books = open_ledger("s3://bucket/both/ledger.zarr", before).read(), open_ledger(both[2] / "ledger.zarr").read()
    for one, other in zip(*books, strict=True):
        assert one.tobytes() == other.tobytes()
    tree = read_results("s3://bucket/both/results.zarr", before)
    xr.testing.assert_identical(tree.load(), read_results(both[2] / "results.zarr").load())
    assert describe_run(both[1], before)["attempts"] == 1
    assert verify_run(both[1], before) == verify_run(both[1]) == []


def test_a_version_is_selected_by_identifier_tag_or_time(s3_server, both, before):
    repository = opened(s3_server, both[1])
    repository.create_tag("paper", before)
    assert {"paper"} == {tag for row in versions(both[1]) if row["version"] == before for tag in row["tags"]}
    time = next(row.written_at for row in repository.ancestry(branch="main") if row.id == before)
    naive = time.astimezone(datetime.UTC).replace(tzinfo=None)
    for version in ("paper", time.isoformat(), naive.isoformat()):
        assert open_trajectory("s3://bucket/both/trajectory.zarr", version).n_states == 12
    for version in ("draft", "1970-01-01", before[:-1] + "*"):
        with pytest.raises(InputError, match="there is no version") as refusal:
            read_results("s3://bucket/both/results.zarr", version)
        assert "natgrad versions OUT" in refusal.value.remedy


def test_an_old_version_is_read_only(both, before):
    path = open_out(both[1], version=before)
    for work in (
        lambda: run.ingest_run("any", path),
        lambda: compute_ledger(path / "trajectory.zarr", path / "ledger.zarr"),
        lambda: run.analyze_run(path, Serial()),
    ):
        with pytest.raises(InputError, match=r"an old version is read-only|no such file or folder"):
            work()
    with pytest.raises(InputError, match="the page of an old version requires a file name"):
        run.report_run([both[1]], version=before)
    with pytest.raises(InputError, match="are read-only"):
        (path / "trajectory.zarr" / "zarr.json").put(b"{}")
    assert not [name for name in both[1].list() if name.endswith(".lock")]


def test_the_commands_accept_versions(both, before, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("natgrad"), "handlers", [])

    def output(*words):
        cli.app([*map(str, words)], standalone_mode=False)
        return capsys.readouterr().out

    out = "s3://bucket/both"
    assert f"{before}  " in output("versions", out)
    assert json.loads(output("versions", out, "--json"))["versions"] == versions(out)
    assert output("versions", out, "--last", 2).count("\n") == 2
    assert json.loads(output("info", out, "--version", before, "--json"))["attempts"] == 1
    assert output("verify", out, "--version", before) == "OK: all checksums match\n"
    output("report", out, "--page", tmp_path / "then.html", "--version", before)
    run.report_run({"both": both[2]}, tmp_path / "kept.html")
    assert (tmp_path / "then.html").read_text() == (tmp_path / "kept.html").read_text()


def test_icechunk_and_zarr_readers_open_a_repository(s3_server, both, before):
    repository = opened(s3_server, both[1])
    for version, folder in (({"branch": "main"}, both[0]), ({"snapshot_id": before}, both[2])):
        store = repository.readonly_session(**version).store
        there = xr.open_zarr(store, group="results.zarr/model", consolidated=False)
        here = xr.open_datatree(folder / "results.zarr", engine="zarr")["model"].to_dataset()
        assert there["angle"].identical(here["angle"])
        states = zarr.open_group(store, path="trajectory.zarr", mode="r")
        kept = zarr.open_group(folder / "trajectory.zarr", mode="r")
        assert np.array_equal(states["parameter"][:], kept["parameter"][:])
        records = zarr.open_array(store, path="trajectory.zarr/commits/documents-8.json", mode="r")[:]
        files = sorted((folder / "trajectory.zarr" / "commits").glob("[0-9]*.json"))
        assert list(records) == [file.read_text() for file in files]


def test_unchanged_data_create_no_version(both):
    before = versions(both[1])
    run.analyze_run(both[1], Serial())
    assert versions(both[1]) == before


def test_overwriting_starts_from_scratch_and_keeps_old_versions(s3_server, url, tmp_path):
    states = logs.random_walk(9)
    log = logs.write_log(tmp_path / "log", states[:4])
    run.ingest_run(log, url, store="icechunk")
    logs.write_log(log, states[:6])
    run.ingest_run(log, url)
    version = versions(url)[0]["version"]
    for number, state in enumerate(logs.random_walk(9, seed=1)):
        logs.write_step(log, number, state)
    for out in (url, tmp_path / "out"):
        assert run.ingest_run(log, out, overwrite=True).steps == 9
    assert content(url) == content(tmp_path / "out")
    assert open_trajectory(url / "trajectory.zarr", version).n_states == 6
    store = opened(s3_server, url).readonly_session("main").store
    assert zarr.open_array(store, path="trajectory.zarr/commits/documents-8.json", mode="r").shape == (1,)
    # Rejected input changes nothing, even with overwrite.
    (log / "step_3.safetensors").write_bytes(b"no")
    with pytest.raises(InputError):
        run.ingest_run(log, url, overwrite=True)
    assert content(url) == content(tmp_path / "out")


# States in place ---------------------------------------------------------------------------------------------

TENSORS = {"a": (30,), "b": (7, 5), "c": (11,)}
"""Five chunk columns. The last one of the parameter ends after the end of the file of its step."""


@pytest.fixture(scope="module")
def placed(s3_server, tmp_path_factory):
    """Process a log in place in a repository and by copy in a folder; continue both, and remove copied states."""
    folder = tmp_path_factory.mktemp("placed")
    states = logs.random_walk(11, TENSORS)
    log = folder / "my log#%"
    outs, warnings = (open_storage("s3://bucket/placed"), folder / "out"), []
    options = {outs[0]: {"store": "icechunk", "in_place": True}, outs[1]: {}}
    for numbers in (range(6), range(6, 11)):
        logs.write_log(log, [states[number] for number in numbers], numbers)
        for out in outs:
            ingested = run.ingest_run(log, out, limits=IngestLimits(chunk=(2, 16)), **options[out])
            warnings.append(ingested.warnings)
            run.analyze_run(out, Serial())
    return *outs, log, warnings


def prefixes(repository):
    return dict.fromkeys(repository.config.virtual_chunk_containers or {})


def test_chunks_that_are_ranges_of_files_are_virtual(s3_server, placed):
    out, copied, log, warnings = placed
    here, there = (open_trajectory(f"{each}/trajectory.zarr") for each in (copied, out))
    assert there.fingerprint() == here.fingerprint()
    assert describe_run(out)["in_place"] is True
    books = (open_ledger(f"{each}/ledger.zarr").read() for each in (out, copied))
    for one, other in zip(*books, strict=True):
        assert one.tobytes() == other.tobytes()
    assert warnings[0] == [
        "parameter: 6 of 30 new chunks are copied, because they are not one range of a file: a virtual chunk "
        "cannot have several"
    ]
    assert warnings[1] == warnings[3] == []
    assert verify_run(out) == []
    assert natgrad.open_trajectory(str(out)).equals(natgrad.open_trajectory(str(copied)))
    # Any reader with the permission to read the folder of the log.
    containers = prefixes(opened(s3_server, out))
    assert list(containers) == [f"file://{log}/"]
    session = opened(s3_server, out, containers).readonly_session("main")
    assert len(session.all_virtual_chunk_locations()) == 11 * (5 + 4)
    states = zarr.open_group(session.store, path="trajectory.zarr", mode="r")
    kept = zarr.open_group(copied / "trajectory.zarr", mode="r")
    for name in ("parameter", "gradient"):
        assert np.array_equal(states[name][:], kept[name][:])
    denied = opened(s3_server, out).readonly_session("main").store
    with pytest.raises(icechunk.IcechunkError, match="authorize"):
        zarr.open_group(denied, path="trajectory.zarr", mode="r")["gradient"][:]


def test_a_changed_file_is_refused_by_every_reader(s3_server, placed, tmp_path):
    out, _, log, _ = placed
    file = log / "step_4.safetensors"
    kept = shutil.copy2(file, tmp_path)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    try:
        assert {damage.path for damage in verify_run(out)} == {str(file)}
        with pytest.raises(InputError, match="it was changed after it was recorded") as refusal:
            natgrad.open_trajectory(str(out))["gradient"].load()
        assert refusal.value.where == str(file)
        later = file.stat().st_mtime + 9
        os.utime(file, (later, later))
        store = opened(s3_server, out, prefixes(opened(s3_server, out))).readonly_session("main").store
        with pytest.raises(icechunk.IcechunkError, match="has changed"):
            zarr.open_group(store, path="trajectory.zarr", mode="r")["gradient"][4]
    finally:
        shutil.copy2(kept, file)
    assert verify_run(out) == []


def test_virtual_chunks_move_with_the_log_and_can_be_copied(s3_server, url, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(4, TENSORS))
    run.ingest_run(log, url, store="icechunk", in_place=True, limits=IngestLimits(chunk=(2, 16)))
    run.analyze_run(url, Serial())
    found = open_trajectory(f"{url}/trajectory.zarr").fingerprint(), open_ledger(f"{url}/ledger.zarr").records()
    log = log.rename(tmp_path / "moved")
    assert {damage.what.rpartition(": ")[2] for damage in verify_run(url)} == {"it is missing"}
    assert run.ingest_run(log, url).new_steps == 0
    assert {*prefixes(opened(s3_server, url))} == {f"file://{tmp_path}/log/", f"file://{log}/"}
    assert verify_run(url) == []
    assert natgrad.materialize(str(url)).bytes == 4 * (76 + 64) * 4
    shutil.rmtree(log)
    assert verify_run(url) == []
    assert (
        open_trajectory(f"{url}/trajectory.zarr").fingerprint(),
        open_ledger(f"{url}/ledger.zarr").records(),
    ) == found
    assert run.analyze_run(url, Serial()).computed_chunks == 0
    assert opened(s3_server, url).readonly_session("main").all_virtual_chunk_locations() == []


def test_states_that_are_partly_copied_are_removed_completely(s3_server, url, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(4, TENSORS))
    run.ingest_run(log, url, store="icechunk", in_place=True, limits=IngestLimits(chunk=(2, 16)))
    run.analyze_run(url, Serial())
    removed = natgrad.slim(str(url))
    assert (removed.states, removed.bytes) == (3, 3 * 12 * 4)
    assert verify_run(url) == []
    logs.write_log(log, logs.random_walk(5, TENSORS)[4:], [4])
    log = log.rename(tmp_path / "moved")
    assert run.ingest_run(log, url).new_steps == 1
    assert run.analyze_run(url, Serial()).computed_updates == 1
    assert len(opened(s3_server, url).readonly_session("main").all_virtual_chunk_locations()) == 2 * 9
    assert natgrad.materialize(str(url)).states == 2
    assert verify_run(url) == []


def test_a_log_in_an_object_store_has_virtual_chunks(s3_server, url, tmp_path):
    log, states = url / "a log#%25", logs.random_walk(4, TENSORS)
    for number, state in enumerate(states):
        path = logs.write_step(tmp_path, number, state)
        (log / path.name).put(path.read_bytes())
    run.ingest_run(log, url / "out", store="icechunk", in_place=True)
    run.ingest_run(tmp_path, tmp_path / "out")
    limits = PlanLimits(tile_bytes=1, least_cluster_bytes=0)
    for out, executor in ((url / "out", executors.local(2)), (tmp_path / "out", executors.serial)):
        compute_ledger(f"{out}/trajectory.zarr", f"{out}/ledger.zarr", executor=executor, limits=limits)
    books = (open_ledger(f"{out}/ledger.zarr").read()[0] for out in (url / "out", tmp_path / "out"))
    assert len({book.tobytes() for book in books}) == 1
    credentials = {
        prefix: icechunk.s3_credentials(from_env=True) for prefix in prefixes(opened(s3_server, url / "out"))
    }
    authorized = icechunk.containers_credentials(credentials)
    store = opened(s3_server, url / "out", authorized).readonly_session("main").store
    there = zarr.open_group(store, path="trajectory.zarr", mode="r")
    here = zarr.open_group(tmp_path / "out/trajectory.zarr", mode="r")
    assert np.array_equal(there["gradient"][:], here["gradient"][:])


# Workers -----------------------------------------------------------------------------------------------------


def test_worker_processes_read_the_version_that_is_computed(url, tmp_path):
    limits = PlanLimits(tile_bytes=1, least_cluster_bytes=0)
    store = written(url, rows=9, elements=64, chunk=(2, 16))
    ledgers = store.parent / "ledger.zarr", LocalStorage(tmp_path / "ledger.zarr")
    for ledger, executor in zip(ledgers, (executors.local(2), executors.serial), strict=True):
        summary = compute_ledger(store, ledger, executor=executor, limits=limits)
        assert summary.plan.tasks > summary.computed_chunks > 0
    one, other = (open_ledger(ledger.latest()).read()[0] for ledger in ledgers)
    assert one.tobytes() == other.tobytes()
    assert versions(url)[0]["message"].startswith("ledger of ")


def test_a_reader_sees_new_commits(url):
    store = written(url, rows=2)
    reader = open_trajectory(store)
    with store.lock("trajectory") as path:
        writer = open_trajectory(path)
        assert writer.n_states == 2
        writer.journal.write("00000001", {"stop": 99}, new=True)
        assert open_trajectory(path).n_states == 99
        reader.refresh()
        assert (reader.n_states, open_trajectory(store.latest()).n_states) == (2, 2)
    with store.lock("trajectory") as path:
        assert open_trajectory(path).n_states == 2
        logs.append_states(path, logs.walk_arrays(3, 200, seed=1))
    assert (reader.n_states, open_trajectory(store).n_states) == (2, 2)
    reader.refresh()
    assert reader.n_states == 5
    assert len(reader.scalar("step")) == 5


# Processes that end, and several -----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from natgrad.app import run
from natgrad.storage.icechunk_storage import RepositoryFiles
from natgrad.schema.layout import IngestLimits

whole, left = RepositoryFiles.pipe_file, int(sys.argv[3])

def pipe_file(files, path, value, **options):
    global left
    whole(files, path, value, **options)
    left -= "/commits/" in path
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

RepositoryFiles.pipe_file = pipe_file
limits = IngestLimits(chunk=(8, 17), commit_bytes=1)
run.ingest_run(sys.argv[1], sys.argv[2], store="icechunk", limits=limits, in_place=len(sys.argv) > 4)
"""


def test_a_killed_run_in_place_is_resumed(url, tmp_path):
    """Killed when the record of new states is written, and before it is committed."""
    states = logs.random_walk(9, TENSORS)
    log = logs.write_log(tmp_path / "log", states[:5])
    run.ingest_run(log, url, store="icechunk", in_place=True)
    logs.write_log(log, states[5:], range(5, 9))
    done = subprocess.run([sys.executable, "-c", KILLED, str(log), str(url), "1", "in place"], check=False)
    assert done.returncode == -9
    assert open_trajectory(str(url / "trajectory.zarr")).n_states == 5
    assert verify_run(url) == []
    for out in (url, tmp_path / "out"):
        run.ingest_run(log, out)
        run.analyze_run(out, Serial())
    there, here = (open_trajectory(f"{out}/trajectory.zarr") for out in (url, tmp_path / "out"))
    assert there.fingerprint() == here.fingerprint()
    assert verify_run(url) == []


def test_a_killed_run_is_resumed(url, tmp_path):
    """Killed when the second record is written, and before it is committed."""
    log = logs.write_log(tmp_path / "log", logs.random_walk(20))
    done = subprocess.run([sys.executable, "-c", KILLED, str(log), str(url), "2"], check=False)
    assert done.returncode == -9
    assert open_trajectory(str(url / "trajectory.zarr")).n_states == 8
    assert [row["message"].rpartition(": ")[2] for row in versions(url)][:1] == ["steps 0 to 7, attempt 0"]
    assert verify_run(url) == []
    for out in (url, tmp_path / "out"):
        run.ingest_run(log, out, limits=IngestLimits(chunk=(8, 17), commit_bytes=1))
    assert len(open_trajectory(str(url / "trajectory.zarr")).records()) == 3
    assert content(url) == content(tmp_path / "out")


WAITING_WRITER = """
import sys
from natgrad.app import run
from natgrad.storage.icechunk_storage import IcechunkStorage

original = IcechunkStorage.publish

def publish(storage, message):
    print("written", flush=True)
    sys.stdin.readline()
    original(storage, message)

IcechunkStorage.publish = publish
try:
    print(run.ingest_run(sys.argv[1], sys.argv[2]).steps, "steps")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def waiting_writer(url, tmp_path):
    """A process that has written four more steps of a run and waits before it commits them."""
    log = logs.write_log(tmp_path / "log", logs.random_walk(8)[:4])
    run.ingest_run(log, url, store="icechunk")
    # If the first four files were written again, their new identities would be a separate version.
    logs.write_log(log, logs.random_walk(8)[4:], range(4, 8))
    command = [sys.executable, "-c", WAITING_WRITER, str(log), str(url)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "written\n"
            yield process, log
        finally:
            process.kill()


def test_two_writers_of_a_trajectory(waiting_writer, url):
    process, log = waiting_writer
    assert describe_run(url)["steps"] == 4
    with pytest.raises(Unavailable, match=f"another process is writing this trajectory: process {process.pid} on"):
        run.ingest_run(log, url)
    # If a user removes the lock by hand, Icechunk rejects the second commit of the same states.
    (url / ".trajectory.zarr.lock").delete()
    assert run.ingest_run(log, url).new_steps == 4
    answer = process.communicate("\n")[0]
    assert answer.startswith("Unavailable another process has committed in the meantime")
    assert describe_run(url)["steps"] == 8
    assert verify_run(url) == []
    assert run.ingest_run(log, url).new_steps == 0


def test_a_ledger_is_written_while_a_trajectory_is_written(waiting_writer, url, tmp_path):
    process, log = waiting_writer
    stores = str(url / "trajectory.zarr"), str(url / "ledger.zarr")
    assert compute_ledger(*stores).n_updates == 3
    assert process.communicate("\n")[0] == "8 steps\n"
    assert [row["message"].partition(" ")[0] for row in versions(url, 2)] == ["trajectory", "ledger"]
    assert compute_ledger(*stores).n_updates == 7
    run.ingest_run(log, tmp_path / "out")
    compute_ledger(tmp_path / "out" / "trajectory.zarr", tmp_path / "out" / "ledger.zarr")
    there, here = (open_ledger(out).read()[0] for out in (stores[1], tmp_path / "out" / "ledger.zarr"))
    assert there.tobytes() == here.tobytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("changed", "checksum mismatch"), ("missing", "it is missing"), ("short", "bytes too short")],
)
def test_a_damaged_object_is_found(url, damage, message):
    store = written(url)
    chunk = (store / "gradient" / "c" / "1" / "0").get()
    folder = url / "stores.icechunk" / "chunks"
    (found,) = (folder / name for name in folder.list() if (folder / name).get() == chunk)
    if damage == "missing":
        found.delete()
    else:
        found.put(chunk[:-8] if damage == "short" else chunk[:40] + bytes([chunk[40] ^ 1]) + chunk[41:])
    (found,) = verify_run(url)
    assert message in found.what
    assert (found.array, found.path) == ("gradient", f"{url}/trajectory.zarr/gradient/c/1/0")
    with pytest.raises(InputError, match="cannot read a chunk"):
        compute_ledger(store, store.parent / "ledger.zarr")


# Keys --------------------------------------------------------------------------------------------------------


def test_documents_have_the_names_of_files(url):
    """Icechunk stores documents of any name as arrays."""
    store = written(url, rows=1)
    documents = {"00000007.json": b"{}", "00000007.sums": bytes(range(256)), "12.json": b"[]", "notes.txt": b""}
    with store.lock("trajectory") as path:
        folder = path / "commits"
        there = set(folder.list())
        for name, content in documents.items():
            (folder / name).put_new(content)
            with pytest.raises(FileExistsError):
                (folder / name).put_new(b"other")
        (folder / "12.json").put(documents["12.json"] * 2)
        documents["12.json"] *= 2
        assert set(folder.list()) == there | set(documents)
        path.publish("documents")
        for look in (folder, store.latest() / "commits"):
            assert {name: (look / name).get() for name in documents} == documents
            assert [(look / name).stat().size for name in documents] == [2, 256, 4, 0]
            assert (look / "00000007.sums").get_ranges([(250, 254)]) == [bytes(range(250, 254))]
            assert set(look.list()) == there | set(documents)
        (folder / "12.json").delete()
        assert "12.json" not in folder.list()
        assert not (folder / "12.json").exists()
        with pytest.raises(FileNotFoundError):
            (folder / "00000008.json").get()


def test_the_size_of_a_commit_does_not_grow_with_the_run(url):
    """A manifest lists some chunks, though the array has more: those of 64 random float32 are stored in it."""
    rows, elements = 600, 64
    store = written(url, rows=rows, elements=elements, chunk=(1, elements))
    folder = url / "stores.icechunk" / "manifests"
    before = set(folder.list())
    with store.lock("trajectory") as path:
        for number in range(1, 4):
            logs.append_states(path, logs.walk_arrays(1, elements, seed=number))
    added = [(folder / name).stat().size for name in folder.list() if name not in before]
    assert len(added) >= 3
    assert max(added) < rows * elements * 4 / 2
    assert len(open_trajectory(store.latest()).records()) == 4
    assert verify_run(url) == []


# Refusals ----------------------------------------------------------------------------------------------------


def test_a_folder_cannot_be_a_repository(tmp_path):
    with pytest.raises(InputError, match="a folder cannot be an Icechunk repository") as refusal:
        run.ingest_run("any", tmp_path / "out", store="icechunk")
    assert "804 and 1494" in refusal.value.why
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="unknown storage kind 'zip'") as refusal:
        run.ingest_run("any", tmp_path / "out", store="zip")
    assert "plain, icechunk" in refusal.value.remedy


def test_another_kind_of_store_is_rejected(url, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(3))
    run.ingest_run(log, url / "plain", store="plain")
    run.ingest_run(log, url / "versions", store="icechunk")
    with pytest.raises(InputError, match="this is a plain store"):
        run.ingest_run(log, url / "plain", store="icechunk")
    with pytest.raises(InputError, match="this is an Icechunk repository"):
        run.ingest_run(log, url / "versions", store="plain")
    assert run.ingest_run(log, url / "versions", store="icechunk").new_steps == 0
    for out in (url / "plain", tmp_path / "out"):
        for ask in (versions, lambda out: verify_run(out, "paper")):
            with pytest.raises(InputError, match="a plain store has no versions") as refusal:
                ask(out)
            assert "--store icechunk" in refusal.value.remedy
            assert "attempts" in refusal.value.why


def test_rejected_input_creates_no_repository(url, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(3))
    (log / "step_1.safetensors").write_bytes(b"no")
    with pytest.raises(InputError):
        run.ingest_run(log, url, store="icechunk")
    assert url.list() == []


def test_a_location_with_unrelated_objects_is_rejected(url, tmp_path):
    """Leave the objects of a process that was killed while it created a repository."""
    log = logs.write_log(tmp_path / "log", logs.random_walk(3))
    (url / "stores.icechunk" / "snapshots" / "any").put(b"any")
    with pytest.raises(InputError, match="cannot create a repository here") as refusal:
        run.ingest_run(log, url)
    assert refusal.value.where == str(url / "stores.icechunk")


def test_the_library_is_an_extra(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "icechunk", None)
    monkeypatch.delitem(sys.modules, "natgrad.storage.icechunk_storage")
    monkeypatch.delattr("natgrad.storage.icechunk_storage")
    for ask in (
        lambda: describe_run(both[1]),
        lambda: run.ingest_run("any", "s3://bucket/new", store="icechunk"),
    ):
        with pytest.raises(InputError, match="the library for Icechunk is not installed") as refusal:
            ask()
        assert refusal.value.remedy == "pip install 'natgrad-pipeline[icechunk]'"


def test_locations_in_a_repository_are_shown_as_urls(both):
    folder = open_out(both[1])
    assert isinstance(folder, IcechunkStorage)
    assert str(folder / "ledger.zarr") == "s3://bucket/both/ledger.zarr"
    assert str((folder / "a").unversioned()) == str(both[1] / "a")
    assert type((folder / "a").unversioned()) is ObjectStorage
