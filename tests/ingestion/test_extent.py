"""The extent of a trajectory, computed before it is written, equals that of the written trajectory."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natgrad.ingestion import Extent
from natgrad.schema.layout import Layout
from natgrad.store import checksum, open_trajectory
from opened import create_trajectory

pytestmark = pytest.mark.usefixtures("no_wait_for_the_disk")


@st.composite
def restarted_runs(draw):
    """Steps and attempts of a run that is restarted from an older state a few times, in the order of logging."""
    rows, step = [], 0
    for attempt in range(draw(st.integers(1, 4))):
        step = draw(st.integers(0, step)) if attempt else 0
        for _ in range(draw(st.integers(1, 4))):
            rows.append((step, attempt))
            step += 1
    return rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(restarted_runs())
def test_extent_counts_the_updates_of_the_trajectory(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("extent") / "trajectory.zarr"
    dtypes = {"parameter": "float32", "gradient": "float32"}
    trajectory = create_trajectory(path, Layout.from_shapes({"a": ((2,), "float32")}), dtypes, (16, 2))
    states = np.zeros((len(rows), 2), np.uint32)
    for name in dtypes:
        trajectory.write(name, 0, 0, states)
    steps, attempts = map(list, zip(*rows, strict=True))
    numbers = np.ones(len(rows))
    sums = {name: [[checksum(state)] for state in states] for name in dtypes}
    trajectory.commit(steps, {"loss": numbers, "learning_rate": numbers}, [{}] * len(rows), sums, attempts)
    extent = Extent.of(open_trajectory(path))
    assert extent == Extent(tuple(("", *row) for row in rows))
    assert extent.attempts == max(attempts) + 1
    for attempt in (None, *range(extent.attempts)):
        current = trajectory.current(attempt)
        updates = (trajectory.spans() > 0) & current[:-1] & current[1:]
        assert extent.updates(attempt) == updates.sum()


def test_extent_counts_the_longest_run_of_a_sweep():
    extent = Extent((("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("b", 10, 0), ("b", 20, 0)))
    assert (extent.attempts, extent.updates()) == (1, 2)
    assert Extent(()).updates() == 0
