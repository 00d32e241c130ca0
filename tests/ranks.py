"""Run the ranks of a training job as forks of a process that has imported its library."""

import multiprocessing
import sys


def run_ranks(train, ranks, *arguments):
    """Call a function in one process for each rank, with the rank first, and exit with 1 if one of them fails."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)
