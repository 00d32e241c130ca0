"""Time the tasks, in turns."""

from benchmarks.conftest import FIRST_CALL, FIXED_COST, processor_seconds
from benchmarks.tasks import groups
from natgrad.compute.ledger_pass import PassSummary


def test_first_call_of_the_kernel(first_call, pytestconfig):
    pytestconfig.stash[FIRST_CALL] = first_call
    assert first_call["compiled"] > 0


def test_fixed_cost(fixed_cost, pytestconfig):
    pytestconfig.stash[FIXED_COST] = fixed_cost
    assert fixed_cost["total"]["min"] > 0


def test_throughput(benchmark, runs, memory, pytestconfig, group, name, turn):
    tasks = groups(pytestconfig.option.sizes)[group].tasks
    task = tasks[name]
    runs.need({each.run for each in tasks.values()})
    files = runs.get(task.run)
    benchmark.group = f"{group}/{name}"
    facts = {"title": task.title, "turn": turn, "bytes": task.size(files), "runs": files.runs()}
    facts |= memory(benchmark.group, files)
    with task.prepare(files) as run:
        files.clear()
        # The first run fills all caches. Its result is checked before the task is timed.
        answer = run()
        task.check(files, answer)
        if isinstance(answer, PassSummary):
            facts["memory_projected"] = answer.plan.projected_bytes
        before = []

        def setup():
            files.clear()
            before.append(processor_seconds())

        benchmark.pedantic(run, setup=setup)
        facts["processor_seconds"] = processor_seconds() - before[-1]
    benchmark.extra_info |= facts
