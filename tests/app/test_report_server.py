"""Start the command that serves a report, open the page in a browser, and end the command."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np

from browsers import browser
from commands import NATGRAD
from natgrad.app import run

__all__ = ["browser"]  # a fixture


def test_a_browser_shows_raw_values_of_tensors_until_the_command_is_interrupted(tmp_path, browser):
    run.ingest_run(Path(__file__).parents[2] / "data" / "linear_system", tmp_path / "out")
    run.analyze_run(tmp_path / "out", run.Analysis(workers=1, windows=(1, 5)))
    command = [NATGRAD, "report", tmp_path / "out", "--serve", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = json.loads(process.stdout.readline())["serving"]
        page = browser.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_function("window.report?.zoomed")
        page.select_option("#window", "5")
        page.wait_for_function("report.zoomed && report.window === 5")
        page.click("#zoom-in")
        page.wait_for_function("report.zoomed.cells['angle|gradient|5']?.edges[0] === report.positionAt()")
        found = page.evaluate("Array.from(report.cells('angle').median.subarray(0, 3))")
        first = page.evaluate("report.cells('angle').edges[0]")
        page.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert complaints == []
    (tree,) = run.open_trees({"run": run.RunFolder.of(tmp_path / "out")}).values()
    angle = tree["tensor"]["angle"].sel(descent="gradient", window=5).isel(tensor=0).values
    np.testing.assert_array_equal(np.float32(found), angle[first : first + 3].astype(np.float32))
