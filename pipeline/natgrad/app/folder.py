"""Define the folder OUT of a run, and the names of its stores and files."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.sources.replayed import REPLAY
from natgrad.storage import Location, Storage, open_out
from natgrad.store.recorded import located

__all__ = [
    "RunFolder",
]


@dataclass(frozen=True)
class RunFolder:
    """The folder OUT of a run."""

    storage: Storage

    @classmethod
    def of(cls, out: Location, *, store: str | None = None, version: str | None = None) -> RunFolder:
        """Open the folder of a run, or its Icechunk repository; see `natgrad.storage.open_out`."""
        return cls(open_out(out, kind=store, version=version))

    @property
    def states(self) -> Storage:
        """Trajectory store of a run with states."""
        return self.storage / "trajectory.zarr"

    @property
    def trajectory(self) -> Storage:
        """Trajectory store, or ``steps.zarr`` of a run without states."""
        return located(self.states)

    @property
    def ledger(self) -> Storage:
        """Gram ledger."""
        return self.storage / "ledger.zarr"

    @property
    def replay(self) -> Storage:
        """Folder of the evaluations of an objective."""
        return self.storage / REPLAY

    @property
    def results(self) -> Storage:
        """Labelled results."""
        return self.storage / "results.zarr"

    @property
    def report(self) -> Storage:
        """Report page. It is a file that a browser opens, so it is never part of a version."""
        return self.storage.unversioned() / "report.html"
