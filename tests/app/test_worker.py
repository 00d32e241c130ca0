"""Test calls in another process that hang, crash or exhaust memory, with real processes."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading

import psutil
import pytest

from natgrad.app import worker
from natgrad.schema.errors import InputError
from servers import wait_for

pytestmark = pytest.mark.timeout(300)

CALLS = """
import ctypes, logging, os, signal, subprocess, sys, time
from natgrad.schema.errors import InputError

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def pid(progress): return os.getpid()
def add(a, b, progress): return a + b
def sleep(path, progress):
    with open(path, "a") as file: print(os.getpid(), file=file)
    time.sleep(1000)
def sleep_in_c(path, progress):
    with open(path, "a") as file: print(os.getpid(), file=file)
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter lock
def spawn_and_sleep(path, progress):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(path, "a") as file: print(child.pid, file=file)
    time.sleep(1000)
def slow(steps, seconds, progress):
    for step in range(steps):
        time.sleep(seconds)
        progress("ingest", step + 1, steps)
    return steps
def end(status, progress): os._exit(status)
def kill(number, progress): os.kill(os.getpid(), number)
def crash(progress): ctypes.string_at(0)
def allocate(size, progress): return len(bytearray(size))
def refuse(progress): raise InputError("what", where="where", why="why", remedy="remedy")
def fail(progress): raise OSError(28, "no space")
def odd(progress): raise Odd("first", "second")
def warn(progress): logging.getLogger("natgrad.somewhere").warning("beware of %s", "steps")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Return a module whose functions the other process can import."""
    (tmp_path / "calls_of_worker.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("calls_of_worker", None)
    import calls_of_worker

    return calls_of_worker


@pytest.fixture
def one():
    made = worker.Worker(stall_timeout=60, memory=4 << 30)
    yield made
    made.close()


def test_calls_share_a_process_and_its_errors_are_raised_here(calls, one, caplog):
    first = one.call(calls.pid, where="a")
    assert first != os.getpid()
    assert one.call(calls.add, 1, 2, where="a") == 3
    with pytest.raises(InputError, match="what\n  where: where\n  why:   why\n  do:    remedy"):
        one.call(calls.refuse, where="a")
    with pytest.raises(OSError, match="no space") as refusal:
        one.call(calls.fail, where="a")
    assert "in fail" in refusal.value.__notes__[0]
    # An error that cannot be sent is sent as text.
    with pytest.raises(RuntimeError, match="Odd: first"):
        one.call(calls.odd, where="a")
    with caplog.at_level(logging.WARNING, "natgrad"):
        one.call(calls.warn, where="a")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("natgrad.somewhere", "beware of steps")
    ]
    assert one.call(calls.pid, where="a") == first


def test_a_process_that_dies_is_an_error_and_is_replaced(calls, one):
    first = one.call(calls.pid, where="a")
    for function, arguments, what in (
        (calls.kill, (signal.SIGKILL,), r"killed by signal 9 \(SIGKILL\)"),
        (calls.crash, (), r"killed by signal 11 \(SIGSEGV\)"),
        (calls.end, (3,), "ended with status 3"),
        (calls.end, (0,), "ended with status 0"),
        (calls.allocate, (5 << 30,), "out of memory"),
    ):
        with pytest.raises(worker.ProcessLost, match=what) as lost:
            one.call(function, *arguments, where="the run")
        assert lost.value.where == "the run"
    assert one.call(calls.allocate, 1 << 20, where="a") == 1 << 20
    assert one.call(calls.pid, where="a") != first


def test_a_call_without_progress_is_stopped_with_all_its_processes(calls, one, tmp_path):
    with pytest.raises(worker.ProcessLost, match="timeout: no progress for 5 s"):
        one.call(calls.spawn_and_sleep, tmp_path / "pids", where="a", timeout=5)
    child = int((tmp_path / "pids").read_text())
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    # The limit applies to progress: this takes longer than the limit.
    seen = []
    one.call(calls.pid, where="a")
    assert one.call(calls.slow, 8, 1.0, where="a", progress=lambda *numbers: seen.append(numbers), timeout=6) == 8
    assert seen[-1] == ("ingest", 8, 8)


def test_an_error_of_the_callback_ends_the_call(calls, one):
    def failing(stage, done, total):
        raise ValueError("no server")

    first = one.call(calls.pid, where="a")
    with pytest.raises(ValueError, match="no server"):
        one.call(calls.slow, 3, 0.3, where="a", progress=failing)
    # A result of that call is not mistaken for one of this call.
    assert one.call(calls.add, 1, 2, where="a") == 3
    assert one.call(calls.pid, where="a") != first


def test_closing_ends_a_call_of_another_thread(calls, one, tmp_path):
    errors = []

    def call():
        try:
            one.call(calls.sleep, tmp_path / "pids", where="a")
        except worker.ProcessLost as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: (tmp_path / "pids").exists())
    one.close()
    thread.join(30)
    assert len(errors) == 1
    with pytest.raises(worker.ProcessLost):
        one.call(calls.pid, where="a")


@pytest.mark.parametrize("name", ["sleep", "sleep_in_c", "spawn_and_sleep"])
def test_a_process_ends_with_a_caller_that_is_killed(calls, tmp_path, name):
    code = f"""
    import sys; sys.path.insert(0, {str(tmp_path)!r})
    import calls_of_worker
    from natgrad.app.worker import Worker
    Worker(60, 4 << 30).call(calls_of_worker.{name}, {str(tmp_path / "pids")!r}, where="a")
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as caller:
        wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
        pid = int((tmp_path / "pids").read_text())
        os.kill(caller.pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30)


def test_a_script_without_a_guard_can_call(calls, tmp_path):
    # multiprocessing would run the script again in the other process.
    script = tmp_path / "script.py"
    script.write_text(
        "import calls_of_worker\nfrom natgrad.app.worker import Worker\n"
        "print(Worker(60, 4 << 30).call(calls_of_worker.add, 1, 2, where='a'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
