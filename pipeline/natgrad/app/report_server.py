"""Open a server of the report page of some runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from natgrad.app.folder import RunFolder
from natgrad.app.run import named_outs, open_trees
from natgrad.reporting.run_results import RunResults
from natgrad.reporting.serving import ReportServer
from natgrad.storage import Location, storage_errors

__all__ = ["served"]


@contextmanager
def served(
    outs: Sequence[Location] | Mapping[str, Location], version: str | None = None, port: int = 0
) -> Iterator[ReportServer]:
    """Yield a server of the report page of one or several runs, whose address is known and which does not run yet.

    Parameters
    ----------
    outs, version
        See `report_run`.
    port : int
        0 for a free one.

    Raises
    ------
    InputError
        If there are no results, or the port cannot be used.
    """
    named = {name: RunFolder.of(out, version=version) for name, out in named_outs(outs).items()}
    with storage_errors(*(folder.storage for folder in named.values())):
        runs = [RunResults.of(name, tree) for name, tree in open_trees(named).items()]
        with ReportServer(runs, port) as server:
            yield server
