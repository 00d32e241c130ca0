"""Measure the overhead of flows: one run with and without a flow, and a scan of 1,000 unchanged runs.

Run as ``python -m benchmarks.scanning [RUNS]``. It starts a Prefect server with SQLite before anything is timed.
The numbers are medians of a few turns. Other load on the machine affects them.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from natgrad.app import run, scan
from natgrad.recording.recorder import Recorder

TURNS = 5
RUNS_OF_A_SCAN = 5
STEPS = 20


def write_log(folder, seed):
    """Log gradient descent on a small quadratic."""
    recorder, theta = Recorder(folder), np.random.default_rng(seed).standard_normal(64)
    for step in range(STEPS):
        recorder.record(
            step,
            parameter={"theta": theta},
            gradient={"theta": theta},
            loss=float(theta @ theta) / 2,
            learning_rate=0.1,
        )
        theta = theta * 0.9
    return folder


@contextlib.contextmanager
def server(folder):
    """Start a Prefect server on a free port, and select it in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/api"
    os.environ |= {
        "PREFECT_API_URL": address,
        "PREFECT_HOME": str(folder),
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                    break
                time.sleep(0.2)
            yield
        finally:
            running.terminate()


def seconds(call, *arguments, **options):
    start = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - start


def spread(times):
    return f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"


def by_hand(log, out):
    run.ingest_run(log, out)
    run.analyze_run(out, run.Analysis(workers=1))
    run.report_run([out])


def main(runs=1000):
    """Run the measurements and print their results."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "prefect"):
        from prefect import flow

        from natgrad_flows.runs import process_run
        from natgrad_flows.scan import scan_runs

        @flow
        def empty():
            return None

        base = Path(folder)
        log = write_log(base / "log", 0)
        # The first run of each kind loads libraries and compiles the kernel, which should not be measured.
        by_hand(log, base / "warm-by-hand")
        process_run(log, base / "warm-flow", workers=1)
        bare = [seconds(empty) for _ in range(TURNS)]
        print("empty flow:", spread(bare))
        extra = [
            seconds(process_run, log, base / f"flow-{turn}", workers=1)
            - seconds(by_hand, log, base / f"hand-{turn}")
            for turn in range(TURNS)
        ]
        print("overhead of a run as a flow:", spread(extra))
        for number in range(RUNS_OF_A_SCAN):
            write_log(base / "few" / f"run-{number}", number)
        beyond = []
        for turn in range(TURNS):
            scanned = seconds(scan_runs, base / "few", base / f"scanned-{turn}", workers=1)
            hand = sum(
                seconds(by_hand, base / "few" / f"run-{number}", base / f"few-{turn}" / str(number))
                for number in range(RUNS_OF_A_SCAN)
            )
            beyond.append((scanned - hand) / RUNS_OF_A_SCAN)
        print(f"overhead of each of the {RUNS_OF_A_SCAN} runs of a scan:", spread(beyond))
        for number in range(runs):
            write_log(base / "logs" / f"group-{number % 10}" / f"run-{number}", number)
        # One run is processed. For the others only the outcome is recorded, because a scan reads nothing else.
        scan_runs(base / "logs" / "group-0" / "run-0", base / "one", workers=1)
        done = json.loads((base / "one" / ".outcome.json").read_text())
        for found in scan.find_runs(base / "logs", base / "out"):
            for path in (found.out / "results.zarr", found.out / "report.html"):
                path.mkdir(parents=True)
            options = {**done["options"], "cluster": None}
            scan.Outcome(str(found.source), scan.listing(found.source), options).record(found.out)
        scans = []
        for _ in range(TURNS):
            scans.append(seconds(lambda: _all_unchanged(scan_runs(base / "logs", base / "out", workers=1), runs)))
        print(f"scan of {runs} unchanged runs:", spread(scans))


def _all_unchanged(answer, runs):
    if answer["unchanged"] != runs:
        raise AssertionError(answer)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
