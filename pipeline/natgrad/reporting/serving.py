"""Serve the report page on this machine, with the values of every update of every tensor when they are looked at.

The page itself contains bins (`natgrad.reporting.page_data`). The server answers its requests for the values of
some steps, at most `PageLimits.columns` bins of them, from the stored results. It listens on this machine only,
answers only requests that name this machine, and reads nothing but the results.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from natgrad.reporting.binning import Bins
from natgrad.reporting.page import page_text
from natgrad.reporting.page_data import ROW_VARIABLES, Blob, PageLimits, kinds_of, model_rows
from natgrad.reporting.run_results import RunResults
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT

__all__ = ["ReportServer"]

_ADDRESS = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """A server of the page of some runs.

    Parameters
    ----------
    runs : sequence of RunResults
    port : int
        0 for a free one.

    Raises
    ------
    InputError
        If the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[RunResults], port: int = 0) -> None:
        self.runs = runs
        self.page = page_text(runs, served=True).encode("utf-8", errors="replace")
        self.reading = threading.Lock()
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(
                f"cannot listen on port {port}: {error.strerror}",
                where="option port",
                remedy="choose another port, or omit --port for a free one",
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    def values(self, query: dict[str, str]) -> dict[str, Any]:
        """Return the values of a variable in some steps, as the page reads them.

        Parameters
        ----------
        query : dict of str to str
            ``run`` (its position), ``kind`` (of rows, or ``model``), ``variable``, ``descent``, ``window``, and
            ``start`` and ``stop``, positions of updates.

        Raises
        ------
        KeyError, ValueError, IndexError
            If a value is missing or unknown.
        """
        run = self.runs[int(query["run"])]
        start, stop = int(query["start"]), min(int(query["stop"]), len(run.steps))
        window, descent, variable = int(query["window"]), query["descent"], query["variable"]
        if not 0 <= start < stop or int(query["run"]) < 0:
            raise ValueError("there are no such steps")
        kinds = {rows.kind: rows for rows in (model_rows(run), *kinds_of(run))}
        rows = kinds[query["kind"]]
        known = window in run.windows and descent in run.model[DESCENT].values.tolist()
        if variable not in (*ROW_VARIABLES, "status", "loss") or variable not in rows.dataset or not known:
            raise KeyError(variable)
        blob, bins = Blob(), Bins.of(start, stop, PageLimits().columns)
        with self.reading:
            entry = rows.packed(blob, variable, descent, window, bins, exact=True)
        return {"entry": entry | {"edges": bins.edges.tolist()}, "arrays": blob.compressed().decode()}


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        # A page of another site may have this address under its own name.
        if self.headers.get("Host", "").partition(":")[0] not in (_ADDRESS, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"the report is for this machine only")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif address.path == "/values":
            try:
                found = self.server.values(dict(parse_qsl(address.query)))
            except (KeyError, ValueError, IndexError) as error:
                self._send(HTTPStatus.BAD_REQUEST, "text/plain", f"unknown values: {error}".encode())
                return
            self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found")

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing for each request."""
