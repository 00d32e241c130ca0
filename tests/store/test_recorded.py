"""Test that runs without states are consistent after every write, and the digests of their ledgers."""

import shutil

import numpy as np
import pytest

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, LedgerChunk
from natgrad.schema.names import RECORDED_VECTORS
from natgrad.storage import open_storage
from natgrad.store import Ledger, Trajectory
from natgrad.store.recorded import append_updates, create_run, located, require_ledger

LAYOUT = Layout.from_shapes({"w": ((2, 3), "float32"), "b": ((), "float32")})
DTYPES = {"parameter": "float32", "gradient": "float32"}


def create(folder, *, updates_per_chunk=3):
    options = {"read_options": {"step_span": 1}, "gradient_source": "recorded", "evaluation": "batch"}
    storage = open_storage(folder / "trajectory.zarr")
    return create_run(
        storage, LAYOUT, DTYPES, RECORDED_VECTORS, updates=0, updates_per_chunk=updates_per_chunk, **options
    )


def products(steps, seed=0):
    """Return the products of the updates from some steps."""
    values = [np.random.default_rng([step, seed]).standard_normal((2, 17)) for step in steps]
    stacked = np.reshape(values, (-1, 2, 17))
    return stacked[..., :16].reshape(-1, 2, 4, 4), stacked[..., 16]


def append(run, first, stop, *, seed=0, attempt=0):
    """Append the updates from some steps, which lead to the step ``stop``."""
    steps = [*range(first, stop + 1)]
    gram, ratio = products(steps[:-1], seed)
    append_updates(
        run,
        steps=steps,
        gram=gram,
        ratio=ratio,
        scalars={"loss": [*map(float, steps)], "learning_rate": [0.1] * len(steps)},
        sources=[{"folder": "log", "name": str(step)} for step in steps],
        lacking=[*[()] * (len(steps) - 1), ("gradient",)],
        attempts=[attempt] * len(steps),
    )


def opened(folder):
    return Trajectory(located(open_storage(folder / "trajectory.zarr")))


def require_updates(folder, first, stop, seed=0):
    """Require that the run has these updates, and no others."""
    run = opened(folder)
    ledger = require_ledger(run)
    count = run.n_states - 1
    assert run.scalar("step").tolist() == [*range(first, stop + 1)]
    gram, ratio = products(range(first, stop), seed)
    np.testing.assert_array_equal(ledger.read_updates(np.arange(count)), gram)
    np.testing.assert_array_equal(ledger.read_ratios(np.arange(count)), ratio)


@pytest.mark.parametrize("size", [1, 3, 5, 20])
def test_updates_are_appended_from_the_provisional_step(tmp_path, size):
    run = create(tmp_path, updates_per_chunk=size)
    assert (run.evaluation, run.gradient_source, run.shape.vectors) == ("batch", "recorded", RECORDED_VECTORS)
    for first, stop in ((0, 0), (0, 4), (4, 4), (4, 5), (5, 12)):
        append(run, first, stop)
        assert run.provisional == ("gradient",)
        require_updates(tmp_path, 0, stop)


def test_no_update_leads_from_one_attempt_to_the_next(tmp_path):
    run = create(tmp_path)
    append(run, 0, 4)
    gram, ratio = products(range(4, 7), 1)
    append_updates(
        run,
        steps=[4, 2, 3, 4],
        gram=gram,
        ratio=ratio,
        scalars={"loss": [0.0] * 4, "learning_rate": [0.1] * 4},
        sources=[{"folder": "log", "name": "0"}] * 4,
        lacking=[("gradient",), (), (), ("gradient",)],
        attempts=[0, 1, 1, 1],
    )
    ledger = require_ledger(opened(tmp_path))
    found = ledger.read_updates(np.arange(7))
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(found[5:], gram[1:])
    assert ledger.steps()[1].tolist() == [1, 1, 1, 1, 0, 1, 1]


def test_a_last_step_with_a_gradient_is_refused(tmp_path):
    run = create(tmp_path)
    gram, ratio = products([0])
    with pytest.raises(ValueError, match="must lack its gradient"):
        append_updates(run, steps=[0, 1], gram=gram, ratio=ratio, scalars={}, sources=[], lacking=[(), ()])


def test_a_run_is_consistent_after_every_write(tmp_path):
    # Files are replaced atomically, so that a process that is killed leaves those that it has written.
    append(create(tmp_path / "before"), 0, 4)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    append(opened(tmp_path / "after"), 4, 8)
    files = [path for path in (tmp_path / "after").rglob("*") if path.is_file()]
    older = {path: tmp_path / "before" / path.relative_to(tmp_path / "after") for path in files}
    written = [path for path in files if not older[path].exists() or older[path].read_bytes() != path.read_bytes()]
    written.sort(key=lambda path: path.stat().st_mtime_ns)
    names = [path.name for path in written]
    assert len(written) > 10
    assert "00000001.json" in names  # the record of the steps
    visible = 4
    for count in range(len(written) + 1):
        killed = tmp_path / f"killed_{count}"
        shutil.copytree(tmp_path / "before", killed)
        for path in written[:count]:
            target = killed / path.relative_to(tmp_path / "after")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        # The provisional step is part of the next record until its own record is replaced.
        provisional = "provisional.json" in names[:count]
        if "00000001.json" in names[:count]:
            visible = 8 if provisional else 7
        require_updates(killed, 0, visible)
        # The next writer starts at the first step that is not fixed.
        run = opened(killed)
        append(run, run.n_fixed, 9)
        require_updates(killed, 0, 9)


def test_the_digest_of_a_ledger_chunk_is_that_of_the_steps(tmp_path):
    run = create(tmp_path)
    append(run, 0, 7)
    ledger = Ledger(open_storage(tmp_path / "ledger.zarr"))
    digests = run.digests([LedgerChunk(record["start"], record["stop"]) for record in ledger.records()])
    assert {record["digest"] for record in ledger.records()} == {*digests.values()}
    assert len(digests) == 3


def test_a_ledger_of_another_run_or_none_is_refused(tmp_path):
    append(create(tmp_path / "one"), 0, 4)
    append(create(tmp_path / "two"), 0, 4, seed=1)
    shutil.rmtree(tmp_path / "one" / "ledger.zarr")
    with pytest.raises(InputError, match="the ledger of the run is missing"):
        require_ledger(opened(tmp_path / "one"))
    shutil.copytree(tmp_path / "two" / "ledger.zarr", tmp_path / "one" / "ledger.zarr")
    with pytest.raises(InputError, match="does not belong to the steps of the run") as refusal:
        require_ledger(opened(tmp_path / "one"))
    assert "--overwrite" in refusal.value.remedy
