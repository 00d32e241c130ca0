"""Test the plan of a pass: its coverage, its cost and its errors."""

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.compute.plan import PlanLimits, plan_pass, read_blocks
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, IngestLimits, chunk_shape

LIMITS, INGEST = PlanLimits(), IngestLimits()


@st.composite
def trajectories(draw):
    """Draw shapes of trajectories and of their ledgers, with chunks of `chunk_shape` or any other chunks."""
    states = draw(st.integers(2, 1000))
    elements = draw(st.integers(1, 5_000_000) | st.integers(1, 300))
    widths = st.integers(max(1, elements // 20), elements)
    chunk = draw(st.just(chunk_shape(states, elements)) | st.tuples(st.integers(1, 600), widths))
    return {
        "states": states,
        "elements": elements,
        "chunk": chunk,
        "itemsizes": draw(st.lists(st.sampled_from([2, 4, 8]), min_size=2, max_size=3)),
        "tensors": draw(st.integers(1, 300)),
        "vectors": draw(st.sampled_from([5, 6])),
        "complete_chunks": draw(st.booleans()),
    }


@given(states=st.integers(1, 1_000_000), elements=st.integers(1, 1 << 34))
def test_chunks_are_complete_steps_of_about_a_million_elements_with_little_padding(states, elements):
    steps, width = chunk_shape(states, elements)
    columns = math.ceil(elements / width)
    assert steps >= 1
    assert width >= 1
    assert steps * width <= INGEST.chunk_elements
    # The smallest possible number of columns, and less than one element of padding in each.
    assert columns == math.ceil(elements / INGEST.chunk_elements)
    assert columns * width - elements < columns
    # Slightly more steps than the run has, or, if it has more, as many as fit.
    assert steps <= max(INGEST.minimum_steps, 2 * (states - 1))
    assert steps >= min(states, INGEST.chunk_elements // width)


def test_a_model_without_elements_still_has_a_chunk_shape():
    assert chunk_shape(10, 0) == (INGEST.minimum_steps, 1)


@given(trajectories())
def test_ledger_chunks_cover_every_update_once_and_their_tiles_every_column_once(shape):
    plan = plan_pass(**shape)
    items = list(plan.work_items())
    chunks = [item.chunk for item in items]
    assert [0, *(chunk.stop for chunk in chunks)] == [*(chunk.start for chunk in chunks), shape["states"] - 1]
    columns = math.ceil(shape["elements"] / shape["chunk"][1])
    for item in items:
        assert 0 < item.n_updates <= plan.updates_per_chunk
        assert {(tile.start, tile.stop) for tile in item.tiles} == {(item.chunk.start, item.chunk.stop)}
        assert [0, *(tile.last for tile in item.tiles)] == [*(tile.first for tile in item.tiles), columns]
        assert all(tile.first < tile.last for tile in item.tiles)


@given(trajectories(), st.data())
def test_the_work_after_an_update_is_the_remainder_of_every_tile(shape, data):
    item = data.draw(st.sampled_from(list(plan_pass(**shape).work_items())))
    update = data.draw(st.integers(item.chunk.start, item.chunk.stop - 1))
    rest = item.after(update)
    assert rest.chunk == item.chunk
    assert rest.n_updates == item.chunk.stop - update
    assert [(tile.stop, tile.first, tile.last) for tile in rest.tiles] == [
        (tile.stop, tile.first, tile.last) for tile in item.tiles
    ]
    assert {tile.start for tile in rest.tiles} == {update}


@given(trajectories())
def test_a_ledger_chunk_is_complete_chunks_of_states_or_less_than_one(shape):
    plan, steps = plan_pass(**shape), shape["chunk"][0]
    assert plan.updates_per_chunk < steps or plan.updates_per_chunk % steps == 0
    assert 1 <= plan.read_states <= plan.updates_per_chunk


@given(st.integers(0, 1 << 40), st.integers(1, 3_000_000), st.integers(1000, 1 << 20))
def test_read_blocks_cover_the_elements_of_a_column_once(first, elements, size):
    cut = list(read_blocks(first, first + elements, size))
    assert [first, *(stop for _, stop in cut)] == [*(start for start, _ in cut), first + elements]
    assert all(stop - start == size for start, stop in cut[:-1])
    assert 0 < cut[-1][1] - cut[-1][0] <= size


@pytest.mark.parametrize(
    ("chunk", "complete_chunks", "read"),
    [
        pytest.param((1, 833_334), False, (1, 1 << 17), id="in read blocks"),
        pytest.param((2, 833_334), False, (1, 1 << 17), id="in read blocks where several steps share a chunk"),
        pytest.param((41, 25_000), False, (5, 25_000), id="several states that are shorter than a read block"),
        pytest.param((1, 833_334), True, (10, 833_334), id="complete where compressed"),
        pytest.param((1, 2_500_000), True, (3, 2_500_000), id="the least number of states"),
    ],
)
def test_the_amount_read_at_a_time(chunk, complete_chunks, read):
    shape = {"states": 400, "elements": 2_500_000, "itemsizes": (4, 4), "tensors": 6, "vectors": 5}
    plan = plan_pass(**shape, chunk=chunk, complete_chunks=complete_chunks)
    assert (plan.read_states, plan.read_elements) == read


@given(trajectories())
def test_the_bytes_to_read_are_those_of_every_ledger_chunk_and_its_halo(shape):
    plan = plan_pass(**shape)
    state_bytes = shape["elements"] * sum(shape["itemsizes"])
    assert plan.read_bytes == sum(item.n_updates + 1 for item in plan.work_items()) * state_bytes
    assert plan.halo_bytes == plan.read_bytes - shape["states"] * state_bytes


def test_the_halo_of_a_wide_model_is_one_state_in_thirty_two():
    shape = {"states": 321, "elements": 10_000_000, "itemsizes": (4, 4), "tensors": 50, "vectors": 5}
    plan = plan_pass(**shape, chunk=chunk_shape(321, 10_000_000))
    assert plan.updates_per_chunk == LIMITS.least_updates == 32
    assert plan.halo_bytes == 9 * 10_000_000 * 8
    assert plan.tile_columns == 2


@pytest.mark.parametrize("states", [2, 3, 33, 34, 1000])
def test_the_ledger_chunks_of_a_wide_model_do_not_depend_on_how_long_its_run_was_at_first(states):
    # They do not change when it grows.
    plan = plan_pass(states=states, elements=10**9, chunk=(1, 1 << 20), itemsizes=[4, 4], tensors=500, vectors=5)
    assert plan.updates_per_chunk == LIMITS.least_updates


def test_a_billion_parameters_and_ten_thousand_steps_are_some_fifty_thousand_tiles():
    elements = 1_000_000_000
    chunk = chunk_shape(10_000, elements)
    plan = plan_pass(
        states=10_000,
        elements=elements,
        chunk=chunk,
        itemsizes=(4, 4),
        tensors=500,
        vectors=5,
        memory_limit=512 * MEBIBYTE,
    )
    tiles = sum(len(item.tiles) for item in plan.work_items())
    assert 0.5 * LIMITS.most_tiles < tiles < 1.5 * LIMITS.most_tiles


def test_the_ledger_of_a_short_run_has_no_capacity_for_a_hundred_thousand_updates():
    plan = plan_pass(states=3, elements=10, chunk=(64, 10), itemsizes=(4, 4), tensors=1, vectors=5)
    assert plan.updates_per_chunk == LIMITS.minimum_updates


def test_the_projected_memory_of_a_worked_example_is_its_documented_sum():
    # 400 states of 2.5 million elements in float32, six tensors: three chunk columns of 833,334 elements.
    plan = plan_pass(states=400, elements=2_500_000, chunk=(1, 833_334), itemsizes=(4, 4), tensors=6, vectors=5)
    assert plan.updates_per_chunk == 32
    assert (plan.read_states, plan.read_elements) == (1, 131_072)
    seen = 2 * 131_072 * 4 + 2 * 131_072 * 4  # parameter, gradient: a row and the previous one
    entry = (5 * 5 + 1) * 8  # the products and the ratio of one row of one segment
    segments = 6 + 3 + 6  # each boundary of a column may divide a tensor, and each part is a segment
    checksums = 33 * 2 * 3 * 4  # of each state, array and column: recorded, decoded and kept
    assert (
        plan.projected_bytes == LIMITS.reserved_bytes + seen + 32 * entry * (3 * segments + 2 * 6) + 3 * checksums
    )


def test_a_run_shorter_than_a_ledger_chunk_takes_the_memory_of_its_updates():
    shape = {
        "elements": 100,
        "chunk": (64, 100),
        "itemsizes": (4, 4),
        "tensors": 2,
        "vectors": 5,
        "updates_per_chunk": 64,
    }
    few, many = plan_pass(states=11, **shape), plan_pass(states=65, **shape)
    ledger, checksums = (5 * 5 + 1) * 8 * (3 * 3 + 2 * 2), 3 * 2 * 4
    assert many.projected_bytes - few.projected_bytes == (64 - 10) * (ledger + checksums)


@given(trajectories(), st.integers(1, 1 << 30))
def test_an_accepted_limit_is_kept_and_a_rejected_plan_states_the_smallest_accepted_limit(shape, limit):
    try:
        plan = plan_pass(**shape, memory_limit=limit)
    except InputError as error:
        least = int(re.fullmatch(r"raise --memory-limit to (\d+)MiB or more", error.remedy)[1])
        assert limit < least * MEBIBYTE
        plan = plan_pass(**shape, memory_limit=least * MEBIBYTE)
        assert plan.projected_bytes <= least * MEBIBYTE
        with pytest.raises(InputError, match=f"would need {least} MiB"):
            plan_pass(**shape, memory_limit=(least - 1) * MEBIBYTE)
    else:
        assert plan.projected_bytes <= limit
    assert plan.read_states >= 1


@given(trajectories(), st.integers(LIMITS.reserved_bytes, 1 << 30))
def test_a_limit_changes_how_much_is_read_at_a_time_and_nothing_else(shape, limit):
    free = plan_pass(**shape)
    try:
        tight = plan_pass(**shape, memory_limit=limit)
    except InputError:
        assert free.projected_bytes > limit
        return
    changed = {"read_states": free.read_states, "projected_bytes": free.projected_bytes}
    assert dataclasses.replace(tight, **changed) == free
    assert tight.read_states <= free.read_states


@given(trajectories(), st.integers(1, 200))
def test_the_chunks_of_an_existing_ledger_are_kept(shape, updates_per_chunk):
    plan = plan_pass(**shape, updates_per_chunk=updates_per_chunk)
    assert plan.updates_per_chunk == updates_per_chunk
    for before, after in itertools.pairwise(item.chunk for item in plan.work_items()):
        assert before.stop - before.start == updates_per_chunk
        assert after.start == before.stop


@pytest.mark.parametrize("states", [0, 1])
def test_a_run_without_an_update_has_nothing_to_read(states):
    plan = plan_pass(states=states, elements=10, chunk=(64, 10), itemsizes=(4, 4), tensors=1, vectors=5)
    assert (plan.n_updates, plan.read_bytes, plan.halo_bytes, list(plan.work_items())) == (0, 0, 0, [])


def test_a_plan_prints_its_reads_and_its_memory():
    plan = plan_pass(
        states=9, elements=1000, chunk=(4, 250), itemsizes=(4, 4), tensors=1, vectors=5, updates_per_chunk=4
    )
    assert str(plan) == (
        "8 updates in 2 tasks, 0.1 MB to read (10.0% of it twice), projected peak memory per worker 320 MiB"
    )


def test_the_shape_of_chunks_can_be_chosen():
    assert chunk_shape(201, 25_408, limits=IngestLimits(chunk=(8, 17))) == (8, 17)
    assert chunk_shape(201, 25_408, limits=IngestLimits(chunk_elements=10_000)) == (1, 8470)
