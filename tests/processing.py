"""Run the complete pipeline in this process, from a log to its results, and read the files of a log into arrays."""

import numpy as np

from natgrad.app import run
from natgrad.compute import executors
from opened import open_source, read_results


class Serial(run.Analysis):
    """Options of an analysis that needs no workers."""

    def executor(self, stack=None):
        return executors.serial


def process(log, out, windows=(1,), **options):
    """Ingest and analyze a log, and return its results."""
    run.ingest_run(log, out)
    run.analyze_run(out, Serial(windows=windows, **options))
    return read_results(run.RunFolder.of(out).results)


def read_log(folder):
    """Return loss and learning rate (step), and parameter and gradient (step, element) of every tensor of a log."""
    source = open_source(folder)
    scalars, states = [], []
    for step in source.steps():
        assert step.number == len(states)
        with source.open(step) as reader:
            content = reader.content()
            scalars.append([content.scalars["loss"], content.scalars["learning_rate"]])
            state = {}
            for array, tensors in content.arrays.items():
                for tensor, logged in tensors.items():
                    state[array, tensor] = np.empty(int(np.prod(logged.shape)), logged.dtype)
                    reader.read(array, tensor, 0, state[array, tensor])
            states.append(state)
    arrays = {key: np.stack([state[key] for state in states]) for key in states[0]}
    return *np.transpose(scalars), arrays
