"""Test that items are written once and in order, that few of them wait, and that nothing waits forever."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.recording.background import BackgroundWriter


@given(sizes=st.lists(st.integers(0, 20), max_size=40), limit=st.integers(0, 30))
def test_every_item_is_written_once_in_order_and_the_waiting_ones_are_limited(sizes, limit):
    written = []
    writer = BackgroundWriter(written.append, limit)
    for number, size in enumerate(sizes):
        writer.put((number, size), size)
        # Read in this order: an item that is written in between is not counted as waiting.
        done = len(written)
        waiting = sizes[done : number + 1]
        assert sum(waiting) <= limit or sum(size > 0 for size in waiting) <= 1
    writer.close()
    assert written == list(enumerate(sizes))
    assert writer.error is None


def test_an_item_that_does_not_fit_waits_for_space():
    may_write, waits, written = threading.Event(), threading.Event(), []

    def write(item):
        may_write.wait()
        written.append(item)

    writer = BackgroundWriter(write, 5)
    writer.put("first", 10)

    def put():
        waits.set()
        writer.put("second", 1)

    thread = threading.Thread(target=put)
    thread.start()
    waits.wait()
    assert written == []
    may_write.set()
    thread.join()
    # The second item was accepted after the first one was written.
    assert written[0] == "first"
    writer.close()
    assert written == ["first", "second"]
    assert writer.seconds_waited > 0


def test_an_error_is_raised_by_the_next_item_and_drops_the_others():
    failed, written = threading.Event(), []

    def write(item):
        if item == 1:
            failed.set()
            raise OSError("disk full")
        written.append(item)

    writer = BackgroundWriter(write, 1 << 20)
    writer.put(0, 1)
    writer.put(1, 1)
    failed.wait()
    writer.close()
    with pytest.raises(OSError, match="disk full"):
        writer.put(2, 1)
    assert isinstance(writer.error, OSError)
    assert written == [0]


def test_an_error_wakes_an_item_that_waits_for_space():
    def write(item):
        raise OSError("disk full")

    writer = BackgroundWriter(write, 0)
    writer.put(0, 1)
    with pytest.raises(OSError, match="disk full"):
        writer.put(1, 1)
    writer.close()


def test_it_can_be_closed_twice_and_items_afterwards_are_dropped():
    written = []
    writer = BackgroundWriter(written.append, 10)
    writer.put(1, 1)
    writer.close()
    writer.close()
    writer.put(2, 1)
    assert written == [1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_writes_nothing_and_ends():
    written = []
    writer = BackgroundWriter(written.append, 0)
    child = os.fork()
    if child == 0:
        writer.put(1, 1)
        writer.put(2, 1)
        writer.close()
        os._exit(len(written))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    writer.put(3, 1)
    writer.close()
    assert written == [3]
