"""Compare a run that continues, restarts and is ingested by processes that die with states in memory."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from logs import write_step
from natgrad.schema.layout import IngestLimits
from natgrad.store import open_trajectory
from opened import ingest, verify_trajectory

SHAPE = (3, 5)
LIMITS = IngestLimits(chunk_elements=30, commit_bytes=1)  # two steps per chunk
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


class Killed(BaseException):
    """Simulates SIGKILL: afterwards no file is changed, not even by clean-up code."""


class Reaper:
    """Allows a number of file changes, and prevents all later ones."""

    left = None

    def count(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def hear(self, event, arguments):
        opened_to_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        if self.left is not None and (event in CHANGES or opened_to_write):
            self.count()


reaper = Reaper()
sys.addaudithook(reaper.hear)  # An audit hook cannot be removed, so it acts only while a process is to die.


@pytest.fixture(autouse=True)
def _writes_that_are_counted(monkeypatch):
    pwrite = os.pwrite

    def counted(*arguments):
        reaper.count()
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", counted)


def state(version):
    """A state that is identified by its loss."""
    values = np.random.default_rng(version).standard_normal((2, *SHAPE)).astype(np.float32)
    return {
        "parameter/weight": values[0],
        "gradient/weight": values[1],
        "loss": np.float64(version),
        "learning_rate": np.float64(0.1),
    }


class Run(RuleBasedStateMachine):
    """The log contains one version of each step; the model contains each committed state."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.log, self.store = self.folder / "log", self.folder / "out" / "trajectory.zarr"
        self.logged = {}
        self.rows = []
        self.versions = 0

    def teardown(self):
        reaper.left = None
        shutil.rmtree(self.folder)

    def write(self, step):
        self.versions += 1
        self.logged[step] = self.versions
        write_step(self.log, step, state(self.versions))

    def to_come(self):
        """States that an ingest adds to the model."""
        view, attempt = {}, 0
        for step, number, version in self.rows:
            if number > attempt:
                attempt, view = number, {kept: row for kept, row in view.items() if kept < step}
            view[step] = version
        differing = [step for step, version in view.items() if self.logged[step] != version]
        begin = min(differing, default=max(view, default=-1) + 1)
        attempt += bool(differing)
        return [(step, attempt, version) for step, version in sorted(self.logged.items()) if step >= begin]

    @rule(steps=st.integers(1, 4))
    def append(self, steps):
        for _ in range(steps):
            self.write(len(self.logged))

    @precondition(lambda self: self.logged)
    @rule(data=st.data(), more=st.integers(0, 2))
    def rewind(self, data, more):
        begin = data.draw(st.integers(0, len(self.logged) - 1), "from step")
        for step in range(begin, len(self.logged) + more):
            self.write(step)

    @precondition(lambda self: self.logged)
    @rule()
    def ingest(self):
        new = self.to_come()
        assert ingest(self.log, self.store, limits=LIMITS).new_steps == len(new)
        self.rows += new
        assert open_trajectory(self.store).n_states == len(self.rows)
        assert ingest(self.log, self.store, limits=LIMITS).new_steps == 0

    @precondition(lambda self: self.logged)
    @rule(changes=st.integers(0, 50))
    def ingest_and_die(self, changes):
        whole = self.rows + self.to_come()
        reaper.left = changes
        try:
            ingest(self.log, self.store, limits=LIMITS)
        except Killed:
            pass
        finally:
            reaper.left = None
        committed = open_trajectory(self.store).n_states if self.store.exists() else 0
        assert len(self.rows) <= committed <= len(whole)
        self.rows = whole[:committed]

    @invariant()
    def the_store_is_the_model(self):
        if not self.rows:
            return
        trajectory = open_trajectory(self.store)
        steps, attempts, versions = (trajectory.scalar(name).tolist() for name in ("step", "attempt", "loss"))
        assert list(zip(steps, attempts, versions, strict=True)) == self.rows
        for name in ("parameter", "gradient"):
            stored = np.zeros((len(self.rows), trajectory.chunk[1]), np.float32)
            trajectory.read(name, 0, len(self.rows), 0, stored)
            for row, (_, _, version) in zip(stored[:, : np.prod(SHAPE)], self.rows, strict=True):
                assert row.tobytes() == state(version)[f"{name}/weight"].tobytes()

    @invariant()
    def nothing_is_damaged(self):
        assert not self.rows or list(verify_trajectory(self.store)) == []


Run.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestRun = Run.TestCase
