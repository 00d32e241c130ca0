"""Time the works, in turns."""

import pytest

from benchmarks.conftest import FIRST_CALL
from benchmarks.works import WORKS


def test_first_call_of_the_kernel(first_call, pytestconfig):
    pytestconfig.stash[FIRST_CALL] = first_call
    assert first_call["compiled"] > 0


@pytest.mark.parametrize("name", WORKS)
def test_throughput(benchmark, files, memory, name, turn):
    work = WORKS[name]
    benchmark.group = name
    benchmark.extra_info |= {"title": work.title, "turn": turn, "bytes": work.size(files), **memory[name]}
    with work.prepare(files) as run:
        files.clear()
        # The first run warms all caches, and shows that the work is done before its time is taken.
        work.check(files, run())
        benchmark.pedantic(run, setup=files.clear)
