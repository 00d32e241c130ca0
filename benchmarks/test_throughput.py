"""Time the tasks in turns."""

from benchmarks.conftest import FIRST_CALL, FIXED_COST, processor_seconds
from benchmarks.works import groups
from natgrad.compute.ledger_pass import PassSummary


def test_first_call_of_the_kernel(first_call, pytestconfig):
    pytestconfig.stash[FIRST_CALL] = first_call
    assert first_call["compiled"] > 0


def test_fixed_cost(fixed_cost, pytestconfig):
    pytestconfig.stash[FIXED_COST] = fixed_cost
    assert fixed_cost["total"]["min"] > 0


def test_throughput(benchmark, runs, memory, pytestconfig, group, name, turn):
    works = groups(pytestconfig.option.sizes)[group].works
    work = works[name]
    runs.need({each.run for each in works.values()})
    files = runs.get(work.run)
    benchmark.group = f"{group}/{name}"
    facts = {"title": work.title, "turn": turn, "bytes": work.size(files), "runs": files.runs()}
    facts |= memory(benchmark.group, files)
    with work.prepare(files) as run:
        files.clear()
        # The first run fills all caches, and its result is checked before the task is timed.
        answer = run()
        work.check(files, answer)
        if isinstance(answer, PassSummary):
            facts["memory_projected"] = answer.plan.projected_bytes
        before = []

        def setup():
            files.clear()
            before.append(processor_seconds())

        benchmark.pedantic(run, setup=setup)
        facts["processor_seconds"] = processor_seconds() - before[-1]
    benchmark.extra_info |= facts
