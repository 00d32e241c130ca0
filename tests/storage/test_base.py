"""The storage protocol: the same methods for each storage, and a storage registered by another package."""

import errno
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logs
from natgrad.app import run
from natgrad.app.describe import describe_run
from natgrad.app.folder import RunFolder
from natgrad.app.verification import verify_run
from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage import LocalStorage, open_out, open_storage
from natgrad.storage.local import ChunkFile, read_at
from natgrad.store.chunk_objects import ranges_of
from opened import read_results
from processing import Serial

HERE = Path(__file__).parent
ENTRY_POINTS = "[natgrad.storage]\ninmemory = memory_storage:open_memory\n"


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    """Install a distribution that registers a storage in memory; yield a location in it."""
    information = tmp_path / "site" / "memory_storage-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: memory-storage\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(information.parent)
    monkeypatch.syspath_prepend(HERE)
    return f"inmemory://{tmp_path.name}"


@pytest.fixture(params=["local", "in_memory", "url"])
def storage(request, tmp_path):
    """A separate location for each test in each kind of storage."""
    if request.param == "local":
        return LocalStorage(tmp_path / "storage")
    return open_storage(request.getfixturevalue(request.param)) / "storage"


# A storage of another package ------------------------------------------------------------------------------------


def test_a_registered_storage_stores_a_run(in_memory, tmp_path):
    states = logs.with_replicates(logs.random_walk(9))
    log = logs.write_log(tmp_path / "log", states[:6])
    out = f"{in_memory}/out"
    for given_out in (out, tmp_path / "out"):
        run.ingest_run(log, given_out)
        run.analyze_run(given_out, Serial())
    logs.write_log(log, states)
    for given_out in (out, tmp_path / "out"):
        assert run.ingest_run(log, given_out).new_steps == 3
        run.analyze_run(given_out, Serial())
        run.report_run([given_out])
    assert verify_run(out) == []
    assert describe_run(out)["report"] == f"{out}/report.html"
    there, here = open_out(out), open_out(tmp_path / "out")
    # A report names its folder, and verifications are recorded with their times.
    unlike = (".lock", "/verified.json", "report.html")
    names = [name for name in there.walk() if not name.endswith(unlike)]
    assert names == [name for name in here.walk() if not name.endswith(unlike)]
    assert len(names) > 100
    assert there.get_entries(names) == here.get_entries(names)
    found, expected = (read_results(RunFolder.of(o).results)["model"] for o in (out, tmp_path / "out"))
    assert found["angle"].identical(expected["angle"])


def test_a_log_is_read_from_a_registered_storage(in_memory, tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(4))
    for file in log.iterdir():
        (open_storage(in_memory) / "log" / file.name).put(file.read_bytes())
    assert run.ingest_run(f"{in_memory}/log", tmp_path / "out").new_steps == 4


def test_a_url_whose_slashes_were_collapsed_is_repaired(in_memory):
    assert str(open_storage(Path(f"{in_memory}/a"))) == f"{in_memory}/a"


def test_a_storage_in_memory_keeps_no_versions(in_memory):
    with pytest.raises(InputError, match="cannot be an Icechunk repository"):
        open_out(in_memory, kind="icechunk")
    with pytest.raises(InputError, match="a plain store has no versions"):
        open_out(in_memory, version="paper")


# The methods -----------------------------------------------------------------------------------------------------


def test_entries_are_put_read_listed_and_deleted(storage):
    assert not storage.exists()
    assert storage.list() == storage.walk() == storage.files() == []
    (storage / "b/c").put(b"content")
    (storage / "a").put(b"")
    assert (storage.list(), storage.walk()) == (["a", "b"], ["a", "b/c"])
    assert storage.files() == [storage / "a"]
    assert (storage / "a").files() == [storage / "a"]
    entry = storage / "b" / "c"
    assert (entry.name, entry.parent, entry.parent.parent) == ("c", storage / "b", storage)
    assert (entry.get(), entry.get_tagged()[0], entry.stat().size) == (b"content", b"content", 7)
    assert entry.get_ranges([(0, 3), (5, 9), (7, 9)]) == [b"con", b"nt", b""]
    assert storage.get_entries(["b/c", "none", "a"]) == [b"content", None, b""]
    assert [location.is_folder() for location in (storage, storage / "b", entry)] == [True, True, False]
    with entry.open() as file:
        file.seek(3)
        assert (file.size, file.read(2), file.tell(), file.read()) == (7, b"te", 5, b"nt")
    entry.delete()
    assert not entry.exists()
    for ask in (entry.get, entry.stat, entry.open, lambda: entry.get_ranges([(0, 1)])):
        with pytest.raises(FileNotFoundError):
            ask()


def test_a_new_entry_is_put_once(storage):
    entry = storage / "record"
    entry.put_new(b"first")
    with pytest.raises(FileExistsError):
        entry.put_new(b"second")
    entry.put_once(b"first")
    with pytest.raises(FileExistsError):
        entry.put_once(b"second")
    assert entry.get() == b"first"
    assert storage.list() == ["record"]


def test_an_entry_changed_by_others_is_not_replaced(storage):
    entry = storage / "lock"
    entry.put(b"first")
    tag = entry.get_tagged()[1]
    if not tag:
        with pytest.raises(NotImplementedError):
            entry.put_if(b"second", tag)
        return
    entry.put_if(b"second", tag)
    with pytest.raises(FileExistsError):
        entry.put_if(b"third", tag)
    assert entry.get() == b"second"


def test_several_entries_are_put(storage):
    contents = {"zarr.json": b"1", "a/c/0": b"2", "a/c/1": memoryview(b"3")}
    storage.put_entries(contents)
    assert dict(zip(contents, storage.get_entries(list(contents)), strict=True)) == contents


def test_a_tree_is_replaced_and_removed(storage):
    for number in range(2):
        with storage.replace_tree("document", b"placeholder") as folder:
            folder.mkdir()
            (folder / "document").write_text(str(number))
            (folder / f"entry {number}").write_text("")
        assert storage.walk() == ["document", f"entry {number}"]
        assert (storage / "document").get() == str(number).encode()
    storage.remove_tree("document", b"placeholder")
    assert storage.walk() == []


def test_a_prepared_tree_replaces_the_old_one_and_takes_over_its_entries(storage):
    storage.put_entries({"zarr.json": b"old", "a/zarr.json": b"a", "a/c/0": b"kept", "b/c/0": b"removed"})
    with storage.staging() as staged:
        staged.adopt(storage, ["a/c/0"])
        staged.put_entries({"zarr.json": b"new", "a/zarr.json": b"a", "a/c/1": b"added"})
    # A prepared tree outlives its preparation, and until it replaces the old one, readers see the old one.
    assert (storage / "zarr.json").get() == b"old"
    with storage.staging() as staged:
        assert staged.walk() == ["a/c/0", "a/c/1", "a/zarr.json", "zarr.json"]
        storage.replace_with(staged, "zarr.json")
        assert not staged.exists()
    assert storage.walk() == ["a/c/0", "a/c/1", "a/zarr.json", "zarr.json"]
    names = ["zarr.json", "a/c/0", "a/c/1"]
    assert storage.get_entries(names) == [b"new", b"kept", b"added"]


def test_segments_of_an_entry_are_written_in_sequence(storage):
    entry, writes = storage / "c/0", storage.writes()
    writes.write_segment(entry, 0, memoryview(b"abc"), 6)
    writes.settle()
    assert entry.get()[:3] == b"abc"
    writes.write_segment(entry, 3, memoryview(b"def"), 6)
    writes.settle([entry])
    assert entry.get() == b"abcdef"
    writes.abandon()


def test_one_writer_holds_the_lock(storage):
    with storage.lock("trajectory") as writing:
        assert writing == storage
        with pytest.raises(Unavailable, match="another process is writing this trajectory") as refusal:
            storage.lock("trajectory").__enter__()
        assert str(os.getpid()) in refusal.value.what
        assert refusal.value.where == str(storage)
    with storage.lock("trajectory"):
        pass


def test_handles_are_pickled_compared_and_sorted(storage):
    entry = storage / "a"
    assert pickle.loads(pickle.dumps(entry)) == entry
    assert hash(pickle.loads(pickle.dumps(entry))) == hash(entry)
    assert sorted([storage / "b", entry]) == [entry, storage / "b"]
    assert entry != LocalStorage("a")


def test_only_one_of_several_threads_puts_a_new_file(tmp_path):
    entry, outcomes, barrier = LocalStorage(tmp_path / "record"), [], threading.Barrier(8)

    def put(content):
        barrier.wait()
        try:
            entry.put_new(content)
            outcomes.append(content)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=put, args=(bytes([number]) * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [outcome for outcome in outcomes if outcome is not None]
    assert entry.get() == won


def test_a_file_system_without_links_keeps_existing_files(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    entry = LocalStorage(tmp_path / "record")
    entry.put_new(b"first")
    with pytest.raises(FileExistsError):
        entry.put_new(b"second")
    assert (entry.get(), entry.parent.list()) == (b"first", ["record"])


# Ranges ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 100), st.integers(1, 5))
def test_ranges_cover_the_states_once_and_stay_within_the_limits(states, state_bytes, range_bytes, at_once):
    groups = list(ranges_of(states, state_bytes, range_bytes=range_bytes, at_once=at_once))
    assert [index for group in groups for low, high in group for index in range(low, high)] == list(range(states))
    for low, high in itertools.chain(*groups):
        assert high - low == 1 or (high - low) * state_bytes <= range_bytes
    assert all(0 < len(group) <= at_once for group in groups)


# Systems with fewer calls ----------------------------------------------------------------------------------------

LINUX_ONLY = ("posix_fadvise", "preadv", "RWF_NOWAIT", "POSIX_FADV_WILLNEED")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100), offset=st.integers(0, 100), size=st.integers(0, 100))
def test_bytes_are_read_without_linux_calls(tmp_path, content, offset, size):
    (tmp_path / "file").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        for name in LINUX_ONLY:
            patch.delattr(os, name)
        file, out = ChunkFile(str(tmp_path / "file")), np.zeros(size, np.uint8)
        try:
            assert not file.read_ahead()
            missing = file.read(offset, out.data)
            part = bytearray(size)
            assert read_at(file.descriptor, memoryview(part), offset) == size - missing
        finally:
            file.close()
    expected = content[offset : offset + size]
    assert (size - missing, bytes(out[: size - missing]), bytes(part[: size - missing])) == (
        len(expected),
        expected,
        expected,
    )


WITHOUT_LINUX = """
import ctypes, os, sys
for name in ("posix_fadvise", "preadv", "RWF_NOWAIT", "POSIX_FADV_WILLNEED", "pwritev", "posix_fallocate"):
    delattr(os, name)

class System:
    pass

ctypes.CDLL = lambda *_, **__: System()
from natgrad.ingestion import ingest
from natgrad.storage import LocalStorage
from natgrad.store import open_trajectory
from natgrad.store.verify import verify_trajectory

store = LocalStorage(sys.argv[2])
assert ingest([LocalStorage(sys.argv[1])], store).new_steps == 4
assert ingest([LocalStorage(sys.argv[1])], store, overwrite=True).new_steps == 4
assert list(verify_trajectory(store)) == []
print(open_trajectory(store).fingerprint())
"""


def test_a_log_is_stored_without_linux_calls(tmp_path):
    log = logs.write_log(tmp_path / "log", logs.random_walk(4))
    command = [sys.executable, "-c", WITHOUT_LINUX, log, tmp_path / "trajectory.zarr"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run.ingest_run(log, tmp_path / "out")
    assert done.stdout.strip() == logs.open_trajectory(tmp_path / "out" / "trajectory.zarr").fingerprint()
