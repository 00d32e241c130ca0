"""Compare the pass with complete vectors in exact arithmetic, on every executor, with kills and bad disks."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from zarr.codecs import BloscCodec

from logs import append_states, walk_arrays, write_trajectory
from natgrad.compute import executors, ledger_pass
from natgrad.compute.plan import PlanLimits
from natgrad.kernel import stream
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, chunk_shape
from natgrad.schema.names import VECTORS
from natgrad.storage import LocalStorage
from natgrad.store import Ledger, Trajectory, open_ledger, open_trajectory
from natgrad.store.verify import verified_since
from opened import compute_ledger
from reference import assert_gram_close, exact_gram, exact_vectors

SHAPES = {"first": (37,), "second": (5, 9), "none": (0,), "third": (40,), "scalar": ()}
ELEMENTS = 37 + 45 + 0 + 40 + 1
ROWS = 20
CHUNK = (3, 40)
"""Four chunk columns: the boundaries divide the second and the third tensor, and the last column is partial."""

RESIDUAL = VECTORS.index("residual")

SMALL = PlanLimits(
    least_tile_bytes=1,
    tile_bytes=4000,
    tasks_of_small_run=1,
    read_block_elements=80,
    complete_chunk_bytes=1000,
    least_read_states=1,
    least_updates=5,
)
"""Limits that divide twenty states of a hundred elements like the defaults divide a large run."""

SHORT_BLOCKS = dataclasses.replace(SMALL, read_block_elements=7)

compute_small = functools.partial(compute_ledger, limits=SMALL)


def bits(ledger):
    """Return the complete contents of a ledger."""
    return [array.tobytes() for array in (*open_ledger(ledger).read(), *open_ledger(ledger).steps())]


def ledger_of(folder, arrays, chunk=CHUNK, shapes=SHAPES, limits=SMALL, **options):
    """Compute the ledger of arrays, and return it with the summary of the pass."""
    trajectory = write_trajectory(folder / "trajectory.zarr", arrays, shapes, chunk)
    return folder / "ledger.zarr", compute_ledger(trajectory, folder / "ledger.zarr", limits=limits, **options)


def tensor_slices():
    stops = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    return [slice(stop - int(np.prod(shape)), stop) for stop, shape in zip(stops, SHAPES.values(), strict=True)]


def assert_is_ledger_of(ledger, arrays):
    """Compare with the definition: complete vectors of every update and tensor, in exact arithmetic."""
    gram, ratio = open_ledger(ledger).read()
    assert gram.shape[:2] == (len(arrays["parameter"]) - 1, len(SHAPES))
    for row, (tensor, part) in itertools.product(range(len(gram)), enumerate(tensor_slices())):
        parameter, gradient = (arrays[name][row : row + 2, part] for name in ("parameter", "gradient"))
        hvp = arrays["hvp"][row, part] if "hvp" in arrays else None
        vectors = exact_vectors(*parameter, *gradient, ratio[row, tensor], hvp)
        # Forming d, e and r, and bringing the residuals of two parts to one ratio: up to four roundings.
        assert_gram_close(gram[row, tensor], exact_gram(vectors), part.stop - part.start, slack=4.0)


# The numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [CHUNK, (64, 40), (7, 123), (1, 1000)])
def test_the_ledger_is_that_of_complete_vectors_for_every_division(tmp_path, chunk):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, summary = ledger_of(tmp_path, arrays, chunk)
    plan = summary.plan
    assert summary.chunks > 1
    assert plan.updates_per_chunk > plan.read_states
    assert plan.columns == -(-ELEMENTS // chunk[1])
    assert_is_ledger_of(ledger, arrays)


def test_the_small_run_of_these_tests_has_several_of_everything(tmp_path):
    _, summary = ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS))
    plan, items = summary.plan, list(summary.plan.work_items())
    assert (len(items), plan.columns, {len(item.tiles) for item in items}) == (4, 4, {2})
    assert plan.updates_per_chunk == 2 * CHUNK[0] == 3 * plan.read_states
    assert items[-1].n_updates == 1  # the last ledger chunk is not a complete one
    assert summary.computed_chunks == summary.chunks == 4
    assert summary.n_updates == ROWS - 1


# Each combination is compiled, which takes seconds. `tests/kernel/test_gram.py` compares more of them.
@pytest.mark.parametrize(
    ("parameter", "gradient", "hvp"),
    [
        ("float16", "float16", None),
        ("float32", "float32", None),
        ("float64", "float64", "float32"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_ledger_is_exact_from_every_stored_dtype(tmp_path, parameter, gradient, hvp):
    dtypes = {"parameter": parameter, "gradient": gradient} | ({"hvp": hvp} if hvp else {})
    arrays = walk_arrays(8, ELEMENTS, dtypes)
    ledger, summary = ledger_of(tmp_path, arrays)
    assert summary.chunks > 1
    assert open_ledger(ledger).vectors == VECTORS[: None if hvp else -1]
    assert_is_ledger_of(ledger, arrays)


def halo_repeated(located, boundaries):
    """Version of `Trajectory.locate` that returns the last row of a ledger chunk instead of the halo."""

    def mutant(self, name, start, stop, column):
        found = located(self, name, start, stop, column)
        if stop - 1 in boundaries:
            found.descriptors[-1], found.offsets[-1] = found.descriptors[-2], found.offsets[-2]
        return found

    return mutant


def shifted(located, array):
    """Version of `Trajectory.locate` that returns one array one step late."""

    def mutant(self, name, start, stop, column):
        late = name == array and start > 0
        return located(self, name, start - late, stop - late, column)

    return mutant


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda located: halo_repeated(located, {6, 12, 18, 19}), id="halo of every ledger chunk"),
        pytest.param(lambda located: halo_repeated(located, {12}), id="halo of one ledger chunk"),
        pytest.param(lambda located: shifted(located, "gradient"), id="gradient shifted"),
        pytest.param(lambda located: shifted(located, "parameter"), id="parameter shifted"),
    ],
)
def test_the_comparison_with_complete_vectors_detects_a_dropped_halo_or_a_shifted_step(
    tmp_path, monkeypatch, mutant
):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, summary = ledger_of(tmp_path, arrays)
    assert {item.chunk.stop for item in summary.plan.work_items()} == {6, 12, 18, 19}
    assert_is_ledger_of(ledger, arrays)
    Ledger.remove(LocalStorage(ledger))
    monkeypatch.setattr(Trajectory, "locate", mutant(Trajectory.locate))
    # The checksums would detect it, too.
    compute_small(tmp_path / "trajectory.zarr", ledger, trust_states=True)
    with pytest.raises(AssertionError, match="entry"):
        assert_is_ledger_of(ledger, arrays)


def test_the_bits_depend_only_on_the_columns_of_chunks(tmp_path):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, summary = ledger_of(tmp_path / "one chunk", arrays, (64, 40), limits=PlanLimits())
    assert (summary.chunks, summary.plan.tile_columns) == (1, 4)
    for steps, chunks, cuts, read in [(1, 19, 4, 1), (3, 3, 4, 3), (64, 10, 2, 2), (64, 2, 1, 10)]:
        limits = PlanLimits(
            least_tile_bytes=1,
            tasks_of_small_run=1,
            tile_bytes=40 * 8 * -(-19 // chunks) * -(-4 // cuts),
            least_updates=-(-19 // chunks),
            read_block_elements=40 * read,
        )
        other, cut = ledger_of(tmp_path / f"{chunks} {cuts}", arrays, (steps, 40), limits=limits)
        plan = cut.plan
        assert (cut.chunks, -(-4 // plan.tile_columns), plan.read_states) == (chunks, cuts, read)
        assert bits(other) == bits(ledger)


def test_a_chunk_that_is_read_in_blocks_gives_the_products_of_complete_vectors(tmp_path):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, summary = ledger_of(tmp_path, arrays, (1, 40), limits=SHORT_BLOCKS)
    assert summary.plan.read_elements == 7
    assert_is_ledger_of(ledger, arrays)


@pytest.mark.parametrize("compressed", [("parameter", "gradient"), ("gradient",)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_compressed_trajectory_has_the_same_bits(tmp_path, compressed, steps):
    dtypes = {"parameter": "bfloat16", "gradient": "float32"}
    arrays = walk_arrays(ROWS, ELEMENTS, dtypes)
    ledger, _ = ledger_of(tmp_path, arrays, (steps, 40), limits=SHORT_BLOCKS)
    codecs = {name: BloscCodec(cname="zstd") for name in compressed}
    write_trajectory(tmp_path / "compressed.zarr", arrays, SHAPES, (steps, 40), codecs)
    summary = compute_ledger(tmp_path / "compressed.zarr", tmp_path / "other.zarr", limits=SHORT_BLOCKS)
    assert summary.plan.read_elements == 40
    assert bits(tmp_path / "other.zarr") == bits(ledger)


def test_two_tilings_agree_to_rounding(tmp_path):
    arrays = walk_arrays(ROWS, ELEMENTS)
    (gram, ratio), (other, its_ratio) = (
        open_ledger(ledger_of(tmp_path / str(chunk[1]), arrays, chunk)[0]).read() for chunk in (CHUNK, (7, 29))
    )
    assert (gram != other).any()
    # The residual for a different ratio is r' = r + (c - c') d.
    change = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape).copy()
    change[..., RESIDUAL, VECTORS.index("displacement")] = ratio - its_ratio
    moved = change @ gram @ np.swapaxes(change, -1, -2)
    for tensor, part in enumerate(tensor_slices()):
        elements = part.stop - part.start
        keep = np.ix_(range(len(gram)), [tensor], range(RESIDUAL), range(RESIDUAL))
        assert_gram_close(gram[keep], other[keep], elements)
        assert_gram_close(moved[:, tensor], other[:, tensor], elements, slack=4.0)


def test_a_nan_affects_only_its_own_tensor_and_updates(tmp_path):
    arrays = walk_arrays(ROWS, ELEMENTS)
    clean, _ = open_ledger(ledger_of(tmp_path / "clean", arrays)[0]).read()
    arrays["gradient"][6, 41] = (
        np.nan
    )  # in the second part of the second tensor, in the state at the end of a ledger chunk
    gram, ratio = open_ledger(ledger_of(tmp_path / "nan", arrays)[0]).read()
    spoiled = np.zeros_like(gram, dtype=bool)
    change, gradient = VECTORS.index("gradient_change"), VECTORS.index("gradient")
    # Update 5 has it as its next gradient, and update 6 as its gradient and in all vectors formed from it.
    for row, vector in [(5, change), (6, change), (6, gradient), (6, RESIDUAL)]:
        spoiled[row, 1, vector, :] = spoiled[row, 1, :, vector] = True
    np.testing.assert_array_equal(np.isnan(gram), spoiled)
    np.testing.assert_array_equal(gram[~spoiled], clean[~spoiled])
    assert np.isfinite(ratio).all()


@pytest.mark.parametrize("replicates", [0, 1], ids=["compiled", "row by row"])
def test_a_truncated_chunk_is_named_and_an_interrupted_read_continues(tmp_path, monkeypatch, replicates):
    arrays = walk_arrays(ROWS, ELEMENTS)
    if replicates:
        arrays["replicate_parameter/0"], arrays["replicate_parameter/1"] = arrays["parameter"], arrays["gradient"]
    ledger, _ = ledger_of(tmp_path, arrays)
    trajectory, other = tmp_path / "trajectory.zarr", tmp_path / "other.zarr"
    name, interrupted = ("read" if replicates else "products"), []
    reading = getattr(stream, name)

    def interrupt(*args):
        interrupted.append(None)
        return ((1, 1) if name == "products" else 1) if len(interrupted) == 1 else reading(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, name, interrupt)
        compute_small(trajectory, other)
    assert len(interrupted) > 1
    assert bits(other) == bits(ledger)
    Ledger.remove(LocalStorage(other))
    located, chunk = Trajectory.locate, trajectory / "gradient/c/3/1"

    def cut_short(self, *args):
        found = located(self, *args)
        os.truncate(chunk, 100)
        return found

    monkeypatch.setattr(Trajectory, "locate", cut_short)
    with pytest.raises(InputError, match=r"is \d+ bytes too short") as caught:
        compute_small(trajectory, other)
    assert caught.value.where == str(chunk)


# Verification of the states -----------------------------------------------------------------------------------


def flip(chunk, position):
    content = bytearray(chunk.read_bytes())
    content[position] ^= 1
    chunk.write_bytes(content)


def test_the_time_since_which_all_states_are_verified_is_that_of_the_oldest_comparison(tmp_path, monkeypatch):
    arrays, trajectory, ledger = (
        walk_arrays(ROWS + 9, ELEMENTS),
        tmp_path / "trajectory.zarr",
        tmp_path / "ledger.zarr",
    )
    rows = iter([0, ROWS, ROWS + 3, ROWS + 6, ROWS + 9])
    begin = next(rows)

    def grow():
        nonlocal begin
        stop = next(rows)
        part = {name: array[begin:stop] for name, array in arrays.items()}
        begin = stop
        return (
            append_states(trajectory, part)
            if trajectory.exists()
            else write_trajectory(trajectory, part, SHAPES, CHUNK)
        )

    def verified_at(time, **options):
        monkeypatch.setattr(ledger_pass, "now", lambda: time)
        return compute_small(trajectory, ledger, **options).states_verified

    grow()
    assert verified_at("2026-01-01") == "2026-01-01"
    grow()
    # The older states are not read again.
    assert verified_at("2026-01-02") == "2026-01-01"
    open_trajectory(trajectory).record_verification("2026-01-03")
    assert verified_at("2026-01-04") == "2026-01-03"
    grow()
    assert verified_at("2026-01-05", trust_states=True) is None
    assert verified_at("2026-01-06") is None  # no state is read
    open_trajectory(trajectory).record_verification("2026-01-07")
    assert verified_at("2026-01-08") == "2026-01-07"
    grow()
    assert verify_states(trajectory, ledger) is None
    # The ledger chunk that grew contains updates from trusted states.
    assert verified_at("2026-01-09") is None
    open_trajectory(trajectory).record_verification("2026-01-10")
    assert verify_states(trajectory, ledger) == "2026-01-10"


def verify_states(trajectory, ledger):
    return verified_since(open_trajectory(trajectory), open_ledger(ledger))


def test_a_damaged_record_of_a_verification_is_no_verification(tmp_path, caplog):
    ledger, summary = ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS))
    states = open_trajectory(tmp_path / "trajectory.zarr")
    states.record_verification("2999-01-01")
    assert verify_states(states.storage.local_path, ledger) == "2999-01-01"
    flip(states.storage.local_path / "commits/verified.json", 40)
    assert verify_states(states.storage.local_path, ledger) == summary.states_verified
    assert "the time of the last verification is unknown" in caplog.text


# Resuming ------------------------------------------------------------------------------------------------------


def stopped_after(chunks):
    """Return a serial executor that stops early, as if interrupted."""

    def run(job, tasks, digests):
        yield from itertools.islice(executors.serial(job, tasks, digests), chunks)
        raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_stopped_pass_continues_where_it_ended(tmp_path, finished):
    arrays = walk_arrays(ROWS, ELEMENTS)
    undisturbed, _ = ledger_of(tmp_path / "undisturbed", arrays)
    with pytest.raises(KeyboardInterrupt):
        ledger_of(tmp_path, arrays, executor=stopped_after(finished))
    ledger, trajectory = tmp_path / "ledger.zarr", tmp_path / "trajectory.zarr"
    with pytest.raises(InputError, match="incomplete"):
        open_ledger(ledger).read()
    summary = compute_small(trajectory, ledger)
    assert (summary.chunks, summary.computed_chunks) == (4, 4 - finished)
    assert bits(ledger) == bits(undisturbed)
    assert compute_small(trajectory, ledger).computed_chunks == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.compute.plan import PlanLimits
from natgrad.kernel import stream
from natgrad.storage import LocalStorage
from natgrad.store import journal, open_ledger, open_trajectory

owner, name, calls = {owner}, {name!r}, 0
original = getattr(owner, name)

def killed(*args):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

setattr(owner, name, killed)
compute_ledger(LocalStorage(sys.argv[1]), LocalStorage(sys.argv[2]), limits={limits})
"""


@pytest.mark.parametrize(
    ("owner", "name", "call", "kept"),
    [
        # The second may still be being written to the disk.
        pytest.param("stream", "products", 2 * 4 + 1, {1, 2}, id="in the third ledger chunk, at its first tile"),
        pytest.param(
            # The first record contains the numbers of all updates.
            "journal.Journal",
            "write",
            4,
            {2},
            id="in the third ledger chunk, between its data and its record",
        ),
    ],
)
def test_a_process_killed_in_its_third_ledger_chunk_keeps_the_written_chunks(tmp_path, owner, name, call, kept):
    arrays = walk_arrays(ROWS, ELEMENTS)
    undisturbed, _ = ledger_of(tmp_path / "undisturbed", arrays)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, CHUNK)
    ledger = tmp_path / "ledger.zarr"
    code = KILLED.format(limits=SMALL, owner=owner, name=name, call=call)
    process = subprocess.run([sys.executable, "-c", code, trajectory, ledger], check=False)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match=r"updates (6|12) to \d+ are missing"):
        open_ledger(ledger).read()
    summary = compute_small(trajectory, ledger)
    assert summary.chunks == 4
    assert summary.chunks - summary.computed_chunks in kept
    assert bits(ledger) == bits(undisturbed)


def test_a_second_pass_over_a_ledger_is_an_error_while_the_first_runs(tmp_path):
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", walk_arrays(ROWS, ELEMENTS), SHAPES, CHUNK)
    ledger = tmp_path / "ledger.zarr"

    def disturbed(*arguments):
        with pytest.raises(InputError, match=f"another process is writing this ledger: process {os.getpid()} on "):
            compute_small(trajectory, ledger)
        yield from executors.serial(*arguments)

    assert compute_small(trajectory, ledger, executor=disturbed).computed_chunks == 4
    assert compute_small(trajectory, ledger).computed_chunks == 0


def test_only_the_updates_of_new_steps_are_computed(tmp_path, caplog):
    caplog.set_level("DEBUG", "natgrad.compute")
    arrays = walk_arrays(ROWS + 17, ELEMENTS)
    rows = {ROWS: (4, 4), ROWS + 5: (4, 1), ROWS + 13: (6, 2), ROWS + 17: (6, 1)}
    trajectory, ledger, done = tmp_path / "trajectory.zarr", tmp_path / "ledger.zarr", 0
    for stop, counts in rows.items():
        new = {name: array[done:stop] for name, array in arrays.items()}
        if done:
            append_states(trajectory, new)
        else:
            write_trajectory(trajectory, new, SHAPES, CHUNK)
        caplog.clear()
        summary = compute_small(trajectory, ledger)
        tiles = [record.updates for record in caplog.records if record.message == "tile starts"]
        computed = {update for first, last in tiles for update in range(first, last)}
        assert (summary.chunks, summary.computed_chunks) == counts
        assert summary.n_updates == stop - 1
        # The update from the former last state is also new.
        assert computed == set(range(max(done - 1, 0), stop - 1))
        assert summary.computed_updates == len(computed)
        assert (f"{len(computed)} of these updates are missing from the ledger" in caplog.text) == (done > 0)
        done = stop
    assert summary.plan.updates_per_chunk == 6  # as for the first steps
    at_once, _ = ledger_of(tmp_path / "together", arrays)
    assert bits(ledger) == bits(at_once)


def grown_by_three(folder):
    """Return a trajectory with three more states than its ledger (last chunk has one update), and its arrays."""
    arrays = walk_arrays(ROWS + 3, ELEMENTS)
    ledger, summary = ledger_of(folder, {name: array[:ROWS] for name, array in arrays.items()})
    assert summary.n_updates % summary.plan.updates_per_chunk == 1
    append_states(folder / "trajectory.zarr", {name: array[ROWS:] for name, array in arrays.items()})
    return ledger, arrays


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param("stream", "products", 1, id="before its data"),
        pytest.param("journal.Journal", "write", 2, id="between its data and its record"),
    ],
)
def test_a_process_killed_in_a_growing_ledger_chunk_keeps_its_older_updates(tmp_path, owner, name, call):
    ledger, arrays = grown_by_three(tmp_path)
    code = KILLED.format(limits=SMALL, owner=owner, name=name, call=call)
    process = subprocess.run([sys.executable, "-c", code, tmp_path / "trajectory.zarr", ledger], check=False)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="updates 18 to 22 are missing"):
        open_ledger(ledger).read()
    assert compute_small(tmp_path / "trajectory.zarr", ledger).computed_updates == 3
    assert bits(ledger) == bits(ledger_of(tmp_path / "together", arrays)[0])


@pytest.mark.parametrize("array", ["gram", "residual_ratio"])
def test_a_ledger_chunk_with_damaged_updates_is_not_continued(tmp_path, caplog, array):
    ledger, arrays = grown_by_three(tmp_path)
    chunk = open_ledger(ledger).chunk_entry(array, 18).local_path
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    summary = compute_small(tmp_path / "trajectory.zarr", ledger)
    assert (summary.computed_chunks, summary.computed_updates) == (1, 4)
    assert "checksum mismatch" in caplog.text
    assert bits(ledger) == bits(ledger_of(tmp_path / "together", arrays)[0])


def read_ledger(path):
    opened = open_ledger(path)
    return opened.read(), opened.steps()


RECORD = "commits/000000000006.json"


@pytest.mark.parametrize("damage", ["zeroed", "missing"])
@pytest.mark.parametrize("name", ["gram/c/1/0/0/0", RECORD, "step/c/0", "commits/numbers.json"])
def test_a_damaged_ledger_is_refused_by_readers_and_computed_again(tmp_path, caplog, name, damage):
    ledger, _ = ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS))
    expected = bits(ledger)
    if damage == "missing":
        (ledger / name).unlink()
    else:
        (ledger / name).write_bytes(bytes((ledger / name).stat().st_size))
    with pytest.raises(InputError) as refused:
        read_ledger(ledger)
    no_record = (name, damage) == (RECORD, "missing")  # as after an interrupted pass
    assert refused.value.where == str(ledger if no_record else ledger / name)
    assert "natgrad analyze OUT" in refused.value.remedy
    compute_small(tmp_path / "trajectory.zarr", ledger)
    assert no_record or "again" in caplog.text
    assert bits(ledger) == expected
    read_ledger(ledger)


@pytest.mark.parametrize(("state", "computed"), [(17, (2, 9)), (18, (2, 10)), (19, (1, 4)), (20, (1, 3))])
def test_a_ledger_chunk_of_other_states_is_not_continued(tmp_path, state, computed):
    ledger, arrays = grown_by_three(tmp_path)
    arrays["gradient"][state] *= 2
    write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, CHUNK)
    summary = compute_small(tmp_path / "trajectory.zarr", ledger)
    # State 18 is the last of one ledger chunk and the first of the next, and state 19 was the last of all.
    assert (summary.computed_chunks, summary.computed_updates) == computed
    assert bits(ledger) == bits(ledger_of(tmp_path / "together", arrays)[0])


def test_the_ledger_of_a_replaced_trajectory_is_not_used_for_the_new_one(tmp_path):
    ledger, _ = ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS))
    arrays = walk_arrays(ROWS, ELEMENTS, seed=1)
    arrays["parameter"][:7] = walk_arrays(ROWS, ELEMENTS)["parameter"][:7]
    arrays["gradient"][:7] = walk_arrays(ROWS, ELEMENTS)["gradient"][:7]  # the first ledger chunk is unchanged
    with pytest.raises(KeyboardInterrupt):
        ledger_of(tmp_path, arrays, executor=stopped_after(1))
    with pytest.raises(InputError, match="updates 12 to 18 are missing"):
        open_ledger(ledger).read()
    assert compute_small(tmp_path / "trajectory.zarr", ledger).computed_chunks == 2
    assert_is_ledger_of(ledger, arrays)


def test_a_trajectory_that_shrank_and_grew_again_has_no_stale_updates(tmp_path):
    arrays = walk_arrays(ROWS, ELEMENTS)
    ledger, _ = ledger_of(tmp_path, arrays)
    before = bits(ledger)
    start, rest = ({name: array[part] for name, array in arrays.items()} for part in (slice(8), slice(8, None)))
    _, summary = ledger_of(tmp_path, start)
    assert (summary.chunks, summary.computed_chunks) == (2, 1)
    append_states(tmp_path / "trajectory.zarr", rest)
    assert compute_small(tmp_path / "trajectory.zarr", ledger).computed_chunks == 3
    assert bits(ledger) == before


@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [
        ({"other": (ELEMENTS,)}, ("float32", "float32")),
        (SHAPES, ("float64", "float32")),
        (SHAPES, ("float32", "float32", "float32")),
    ],
    ids=["other tensors", "another dtype", "with hvp"],
)
def test_a_trajectory_of_another_kind_gets_a_new_ledger(tmp_path, shapes, dtypes):
    ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS))
    arrays = walk_arrays(ROWS, ELEMENTS, dict(zip(("parameter", "gradient", "hvp"), dtypes, strict=False)))
    ledger, summary = ledger_of(tmp_path, arrays, shapes=shapes)
    assert summary.computed_chunks == summary.chunks
    anew, _ = ledger_of(tmp_path / "anew", arrays, shapes=shapes)
    assert bits(ledger) == bits(anew)
    assert open_ledger(ledger).layout == open_ledger(anew).layout
    assert open_ledger(ledger).vectors == open_ledger(anew).vectors


# Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_states_are_an_error(tmp_path, rows):
    arrays = walk_arrays(rows, ELEMENTS)
    with pytest.raises(InputError, match=f"{rows} logged step.* an update requires two") as caught:
        ledger_of(tmp_path, arrays)
    assert caught.value.where == str(tmp_path / "trajectory.zarr")
    assert not (tmp_path / "ledger.zarr").exists()


def test_a_model_without_elements_is_refused(tmp_path):
    with pytest.raises(InputError, match="no elements"):
        ledger_of(tmp_path, walk_arrays(2, 0), chunk=(64, 1), shapes={"none": (0,)})


def test_a_pass_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="memory_limit is 64 MiB"):
        ledger_of(tmp_path, walk_arrays(ROWS, ELEMENTS), memory_limit=64 * MEBIBYTE)
    assert not (tmp_path / "ledger.zarr").exists()


# Memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.storage import LocalStorage

def peak():
    # Not getrusage: its peak counts the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

idle = peak()
summary = compute_ledger(
    LocalStorage(sys.argv[1]), LocalStorage(sys.argv[2]), memory_limit=int(sys.argv[3])
)
print(idle, peak(), summary.plan.projected_bytes)
"""


@pytest.mark.parametrize(
    ("rows", "shapes", "limit"),
    [
        pytest.param(16, {"weight": (1000, 2000), "bias": (97_152,)}, 340 * MEBIBYTE, id="wide"),
        pytest.param(7700, {f"block.{i}": (1024,) for i in range(4)}, 330 * MEBIBYTE, id="tall"),
    ],
)
def test_a_real_pass_takes_no_more_memory_than_projected(tmp_path, rows, shapes, limit):
    elements = sum(int(np.prod(shape)) for shape in shapes.values())
    block = np.random.default_rng(0).standard_normal((rows, 1 << 10), dtype=np.float32)
    state = np.tile(block, -(-elements // (1 << 10)))[:, :elements]
    chunk = chunk_shape(rows, elements)
    trajectory = write_trajectory(
        tmp_path / "trajectory.zarr", {"parameter": state, "gradient": state}, shapes, chunk
    )
    arguments = [sys.executable, "-c", MEASURED, trajectory, tmp_path / "ledger.zarr", str(limit)]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    idle, peak, projected = map(int, output.split())
    assert projected <= limit
    assert idle + 2 * state.nbytes > limit  # a pass with the complete run in memory would exceed the limit
    assert peak <= projected
