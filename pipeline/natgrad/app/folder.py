"""The folder OUT of a run, and the names of the stores and files in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from natgrad.storage.repository import outside, place_of_run

__all__ = [
    "RunFolder",
]


@dataclass(frozen=True)
class RunFolder:
    """The folder OUT of a run and the names in it."""

    path: Path

    @classmethod
    def of(cls, out: str | Path, *, store: str | None = None, version: str | None = None) -> RunFolder:
        """Open the folder of a run, or its Icechunk repository; see `natgrad.storage.repository.place_of_run`."""
        return cls(place_of_run(out, store=store, version=version))

    @property
    def trajectory(self) -> Path:
        """Trajectory store."""
        return self.path / "trajectory.zarr"

    @property
    def ledger(self) -> Path:
        """Gram ledger."""
        return self.path / "ledger.zarr"

    @property
    def results(self) -> Path:
        """Labelled results."""
        return self.path / "results.zarr"

    @property
    def report(self) -> Path:
        """Report page: a file that a browser opens, so it is never in a repository."""
        return outside(self.path) / "report.html"
