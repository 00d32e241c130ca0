"""Which state a logged gradient belongs to, as far as the updates tell: those of gradient descent lie along it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import STORAGE_DTYPES, unit_roundoff, widened
from natgrad.sources.base import Source, StepContent, StepReader
from natgrad.sources.steps import LoggedStep, LoggedTensor

__all__ = ["misalignment", "shift_of_gradients"]

STATES_COMPARED = 4
_TENSORS, _ELEMENTS = 64, 4096
_CHANCE = 12.0
"""Decimal digits of how unlikely it must be that updates lie along the gradients of another step by chance."""


def misalignment(log: Source, steps: Sequence[LoggedStep], content: StepContent) -> str:
    """Compare the first updates of a run with its gradients, and say what must be shifted; else nothing.

    That nothing is said proves nothing: only plain gradient descent lies along its gradients, and a sample of
    elements is looked at.

    Parameters
    ----------
    log : Source
    steps : sequence of LoggedStep
        Of the log; the first few are read.
    content : StepContent
        Of the first step, complete.
    """
    steps = steps[:STATES_COMPARED]
    if len(steps) < STATES_COMPARED or any(
        a.run != b.run or b.number - a.number != 1 for a, b in itertools.pairwise(steps)
    ):
        return ""
    sample = _sample(content.arrays["parameter"])
    roundoff = {name: [_roundoff(content, array, name) for array in ("parameter", "gradient")] for name in sample}
    states = []
    for step in steps:
        with log.open(step) as reader:
            states.append({name: _state(reader, content, name, size) for name, size in sample.items()})
    shift = shift_of_gradients(states, roundoff)
    if not shift:
        return ""
    where, state = ("later", "before") if shift < 0 else ("earlier", "after")
    return (
        f"from step {steps[0].number} on, updates lie exactly along the gradients logged one step {where}, and not "
        f"along those of their own step: what is logged as gradient is that of the state {state}; give --shift "
        f"gradient={shift}, and loss={shift} if the loss was logged with it (and --overwrite where OUT has the run)"
    )


def _sample(tensors: Mapping[str, LoggedTensor]) -> dict[str, int]:
    """Return some tensors, and how many of their first elements are looked at."""
    names = [name for name, tensor in tensors.items() if tensor.dtype in STORAGE_DTYPES]
    names = names[:: -(-len(names) // _TENSORS) or 1]
    return {name: min(math.prod(tensors[name].shape), _ELEMENTS) for name in names}


def _roundoff(content: StepContent, array: str, name: str) -> float:
    return unit_roundoff(content.arrays[array][name].dtype)


def _state(reader: StepReader, content: StepContent, name: str, size: int) -> NDArray[np.float64]:
    """First elements of a parameter and its gradient, (2, size)."""
    values = np.empty((2, size))
    for row, array in zip(values, ("parameter", "gradient"), strict=True):
        dtype = content.arrays[array][name].dtype
        words = np.empty(size, np.uint16 if dtype == "bfloat16" else dtype)
        reader.read(array, name, 0, words)
        with np.errstate(all="ignore"):  # a signalling NaN of a diverged run
            row[:] = widened(words, dtype)
    return values


def shift_of_gradients(
    states: Sequence[Mapping[str, NDArray[np.float64]]], roundoff: Mapping[str, Sequence[float]]
) -> int:
    """Find the shift, -1 or 1, with which all updates lie along gradients though they do not without it; else 0.

    Parameters
    ----------
    states : sequence of mapping
        Of consecutive states, tensor to parameter and gradient as logged, (2, n).
    roundoff : mapping
        Tensor to the unit roundoff of both.

    Notes
    -----
    An update that is -eta gradient was rounded when it was added, and both states and the gradient when they were
    stored. With the best eta it is off the line by no more than these roundings; that is required of every tensor.
    That n elements lie within a part b / d of each other's line by chance has the probability (b / d)**(n - 1).
    """
    updates = range(len(states) - 1)
    if _evidence(states, [(s, s) for s in updates], roundoff) is not None:
        return 0
    for shift in (-1, 1):
        pairs = [(s, s - shift) for s in updates if 0 <= s - shift < len(states)]
        evidence = _evidence(states, pairs, roundoff)
        if evidence is not None and evidence >= _CHANCE:
            return shift
    return 0


def _evidence(
    states: Sequence[Mapping[str, NDArray[np.float64]]],
    pairs: Sequence[tuple[int, int]],
    roundoff: Mapping[str, Sequence[float]],
) -> float | None:
    """Decimal digits of how little chance explains that updates lie along gradients; None where they do not."""
    digits = 0.0
    for (update, logged), name in itertools.product(pairs, roundoff):
        (before, _), (after, _), (_, gradient) = (states[s][name] for s in (update, update + 1, logged))
        displacement = after - before
        with np.errstate(all="ignore"):
            square = gradient @ gradient
            rate = min(displacement @ gradient / square, 0.0) if square > 0 else 0.0
            off = np.linalg.norm(displacement - rate * gradient)
            of_parameter, of_gradient = roundoff[name]
            bound = np.linalg.norm(
                of_parameter * (abs(before) + abs(after) + abs(rate * gradient))
                + of_gradient * abs(rate * gradient)
            )
            length = np.linalg.norm(displacement)
            if not off <= bound:
                return None
            if length > bound:
                digits += (displacement.size - 1) * float(np.log10(length / bound)) if bound > 0 else math.inf
    return digits
