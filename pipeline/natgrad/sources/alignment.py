"""Check whether gradients are logged with the right state: updates of gradient descent are parallel to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import STORAGE_DTYPES, unit_roundoff, widened
from natgrad.schema.names import REPLICATE_STATES, STATES
from natgrad.sources.base import Source, StepContent, StepReader
from natgrad.sources.steps import LoggedStep, LoggedTensor

__all__ = ["misalignment", "shift_of_gradients"]

STATES_COMPARED = 4
_TENSORS, _ELEMENTS = 64, 4096
_REQUIRED_EVIDENCE = 12.0
"""Required evidence against chance, as the negative decimal logarithm of the probability."""


def misalignment(log: Source, steps: Sequence[LoggedStep], content: StepContent) -> str:
    """Compare the first updates of a run with its gradients; return a warning if the gradients may need a shift.

    An empty result does not prove that the alignment is correct: only updates of plain gradient descent are
    parallel to the gradients, and only a sample of the elements is compared.

    Parameters
    ----------
    log : Source
    steps : sequence of LoggedStep
        Steps of the log. Only the first few are read.
    content : StepContent
        Complete content of the first step.
    """
    if STATES[1] not in content.readable:
        return ""
    steps = steps[:STATES_COMPARED]
    if len(steps) < STATES_COMPARED or any(
        a.run != b.run or b.number - a.number != 1 for a, b in itertools.pairwise(steps)
    ):
        return content.alignment
    sample = _sample(content.arrays["parameter"])
    roundoff = {name: [_roundoff(content, array, name) for array in ("parameter", "gradient")] for name in sample}
    states = []
    for step in steps:
        with log.open(step) as reader:
            if STATES[1] not in reader.content().arrays:  # the last state of a run
                return content.alignment
            states.append({name: _state(reader, content, name, size) for name, size in sample.items()})
    shift = shift_of_gradients(states, roundoff)
    if not shift:
        return "" if _parallel(states, roundoff) else content.alignment
    others = [name for name in (*STATES[2:], *REPLICATE_STATES) if name in content.arrays]
    others += [name for name in content.scalars if name != "learning_rate"]
    also = ", and " + ", ".join(f"{name}={shift}" for name in others) + " if logged with it" if others else ""
    where, state = ("later", "before") if shift < 0 else ("earlier", "after")
    return (
        f"from step {steps[0].number} on, updates are parallel to the gradients logged one step {where}, and not "
        f"to those of their own step: the logged gradient belongs to the state {state} the update; use --shift "
        f"gradient={shift}{also} (and --overwrite if OUT contains the run)"
    )


def _sample(tensors: Mapping[str, LoggedTensor]) -> dict[str, int]:
    """Return some tensors, and how many of their leading elements are compared."""
    names = [name for name, tensor in tensors.items() if tensor.dtype in STORAGE_DTYPES]
    names = names[:: -(-len(names) // _TENSORS) or 1]
    return {name: min(math.prod(tensors[name].shape), _ELEMENTS) for name in names}


def _roundoff(content: StepContent, array: str, name: str) -> float:
    return unit_roundoff(content.arrays[array][name].dtype)


def _state(reader: StepReader, content: StepContent, name: str, size: int) -> NDArray[np.float64]:
    """Return the leading elements of a parameter and its gradient, (2, size)."""
    values = np.empty((2, size))
    for row, array in zip(values, ("parameter", "gradient"), strict=True):
        dtype = content.arrays[array][name].dtype
        words = np.empty(size, np.uint16 if dtype == "bfloat16" else dtype)
        reader.read(array, name, 0, words)
        with np.errstate(all="ignore"):  # a signaling NaN of a diverged run
            row[:] = widened(words, dtype)
    return values


def shift_of_gradients(
    states: Sequence[Mapping[str, NDArray[np.float64]]], roundoff: Mapping[str, Sequence[float]]
) -> int:
    """Return the shift, -1 or 1, that makes all updates parallel to gradients if they are not without it; else 0.

    Parameters
    ----------
    states : sequence of mapping
        For consecutive states, tensor to parameter and gradient as logged, (2, n).
    roundoff : mapping
        Unit roundoff of the parameter and gradient of each tensor, by its name.

    Notes
    -----
    An update -eta gradient is rounded when it is added. Both states and the gradient are rounded when they are
    stored. With the best eta, the distance of an update from the line along the gradient is at most the sum of
    these roundings; this is required of every tensor. The probability that a vector of n elements and length d lies
    within a distance b of a given line by chance is (b / d)**(n - 1).
    """
    if _parallel(states, roundoff):
        return 0
    updates = range(len(states) - 1)
    for shift in (-1, 1):
        pairs = [(s, s - shift) for s in updates if 0 <= s - shift < len(states)]
        evidence = _evidence(states, pairs, roundoff)
        if evidence is not None and evidence >= _REQUIRED_EVIDENCE:
            return shift
    return 0


def _parallel(states: Sequence[Mapping[str, NDArray[np.float64]]], roundoff: Mapping[str, Sequence[float]]) -> bool:
    """Return True if all updates are parallel to the gradients of their own step."""
    return _evidence(states, [(s, s) for s in range(len(states) - 1)], roundoff) is not None


def _evidence(
    states: Sequence[Mapping[str, NDArray[np.float64]]],
    pairs: Sequence[tuple[int, int]],
    roundoff: Mapping[str, Sequence[float]],
) -> float | None:
    """Return the negative decimal logarithm of the probability of chance; None if updates are not parallel."""
    digits = 0.0
    for (update, logged), name in itertools.product(pairs, roundoff):
        (before, _), (after, _), (_, gradient) = (states[s][name] for s in (update, update + 1, logged))
        displacement = after - before
        with np.errstate(all="ignore"):
            square = gradient @ gradient
            rate = min(displacement @ gradient / square, 0.0) if square > 0 else 0.0
            distance = np.linalg.norm(displacement - rate * gradient)
            parameter_roundoff, gradient_roundoff = roundoff[name]
            bound = np.linalg.norm(
                parameter_roundoff * (abs(before) + abs(after) + abs(rate * gradient))
                + gradient_roundoff * abs(rate * gradient)
            )
            length = np.linalg.norm(displacement)
            if not distance <= bound:
                return None
            if length > bound:
                digits += (displacement.size - 1) * float(np.log10(length / bound)) if bound > 0 else math.inf
    return digits
