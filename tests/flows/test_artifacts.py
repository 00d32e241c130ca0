"""Test the keys, links and pages of runs in Prefect without a server, and in the browser with one."""

import contextlib
import http.server
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browsers import browser
from lazy import Lazy
from logs import random_walk, write_log
from servers import PrefectServer, wait_for

ROOT = Path(__file__).parents[2]

__all__ = ["browser"]  # a fixture

shown = Lazy("natgrad_flows.artifacts")

HOSTILE = "</td><img src=x onerror=alert(1)>|`**"


@given(st.lists(st.text("abAB ./-é", min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_different_paths_have_different_valid_keys(names):
    paths = [shown.full_path(f"/runs/{name}") for name in names]
    keys = [shown.key_of("report", path) for path in paths]
    assert all(re.fullmatch("[a-z0-9-]+", key) for key in keys)
    assert (keys[0] == keys[1]) == (paths[0] == paths[1])


@pytest.mark.parametrize(
    ("out", "report_url", "link"),
    [
        ("/data/runs/a b", "/data/runs=http://lab:8000", "http://lab:8000/a%20b/report.html"),
        ("/data/runs/a", "/data=https://lab/x/", "https://lab/x/runs/a/report.html"),
        ("/other/a", "/data=https://lab/x/", None),
        ("/data/runs/a", None, None),
    ],
)
def test_links_follow_from_the_folder_and_the_url(out, report_url, link):
    assert shown.report_link(out, report_url) == link


def test_a_page_without_angles_says_so_and_escapes_names():
    summary = {"status": {"unverifiable": 3}, "gradient_source": "none", "report": HOSTILE, "angle": None}
    page = shown.results_markdown(HOSTILE, summary, None)
    assert "**3 updates**; no update has an angle" in page
    assert "# &lt;/td&gt;&lt;img src=x" in page
    assert "![" not in page


@pytest.fixture
def served(tmp_path):
    """Serve the folder of the results, and return the option with its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *values):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{tmp_path}=http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def chat():
    """Receive the messages of automations: a web server of this process."""
    messages = []

    class Chat(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            messages.append(content["text"].strip())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *values):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}/hook", messages=messages)
        server.shutdown()


PROCESS = """
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID
from natgrad_flows.runs import process_run
process_run(sys.argv[1], sys.argv[2], workers=1, alert_angle=0.01, report_url=sys.argv[3])
"""

SETTINGS = {"PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "true", "PREFECT_SERVER_UI_ENABLED": "true"}


@pytest.mark.timeout(600)
def test_a_run_is_shown_in_the_browser_and_automations_send_messages(tmp_path, browser, chat, served):
    log = write_log(tmp_path / "log", random_walk(8, {HOSTILE: (3, 2), "bias": ()}))
    out = tmp_path / "exp" / "run0"
    with PrefectServer(tmp_path / "server", settings=SETTINGS) as server:

        def run(code, *arguments):
            command = [sys.executable, "-c", code, *map(str, arguments)]
            environment = {**os.environ, **server.environment}
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        # The program of the guide, with another address.
        guide = (ROOT / "docs" / "howto" / "many_runs.md").read_text()
        program = guide.partition("### Automations")[2].partition("```python\n")[2].partition("```")[0]
        done = run(program.replace("https://chat.example.org/hook", chat.address))
        assert done.returncode == 0, done.stderr
        done = run(PROCESS, log, out, served)
        assert done.returncode == 0, done.stderr
        assert run(PROCESS, tmp_path / "missing", tmp_path / "exp" / "bad", served).returncode != 0
        messages = wait_for(lambda: len(chat.messages) == 2 and sorted(chat.messages), 120)
        assert messages == [f"A run failed: process-run {tmp_path / 'exp' / 'bad'}", f"An angle is large: {out}"]
        with contextlib.closing(sqlite3.connect(server.home / "prefect.db")) as database:
            key = shown.key_of("analyzed", out)
            ((identifier,),) = database.execute("select id from artifact where key = ?", (key,)).fetchall()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/artifacts/artifact/{UUID(str(identifier))}")
        picture = page.locator("img[src^='data:image/svg']")
        picture.first.wait_for(timeout=60_000)
        assert picture.first.evaluate("image => image.naturalWidth") > 0
        text = page.locator("body").inner_text()
        assert "updates are effective" in text
        assert HOSTILE.replace("`", "'") in text
        assert page.locator("img[src='x']").count() == 0
        # The link leads to the report, in this tab or in a new one.
        link = page.get_by_role("link", name="Open the report")
        context = page.context

        def opened():
            found = next((one for one in context.pages if one.url.endswith("/report.html")), None)
            if found is None and link.count():  # a click while Prefect draws the page again has no effect
                link.click()
            return found

        report = wait_for(opened, 60)
        report.wait_for_selector("html[data-ready]", timeout=60_000)
        assert "run0" in report.title()
        assert HOSTILE in report.locator("#rows-table").inner_text()
        page.close()
