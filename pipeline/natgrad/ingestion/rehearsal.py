"""Check whether a log can be ingested, on its first states and its last one. Nothing is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from natgrad.ingestion.description import describe_steps
from natgrad.ingestion.new_updates import finished_steps, states_to_write
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, STORAGE_DTYPES, storage_dtype
from natgrad.schema.names import STATES
from natgrad.sources.base import Recorded, Source, StepContent
from natgrad.sources.completion import complete
from natgrad.sources.listed import ListedLog, OpenedOnce
from natgrad.sources.recovered import RecoveredGradients
from natgrad.sources.steps import LoggedStep, LoggedTensor

__all__ = ["Rehearsal", "rehearse"]

_READ_LIMIT = 16 * MEBIBYTE
"""Bytes of tensors that are read from each state."""


@dataclass(frozen=True)
class Rehearsal:
    """Steps that an ingest of a log would store.

    Attributes
    ----------
    steps : tuple of LoggedStep
        Steps that would be stored.
    content : StepContent
        Content of the first state that has a next one, as it would be stored, with the notes about it.
    warnings : tuple of str
        Warnings about steps that would not be stored.
    log : OpenedOnce
        The log.
    """

    steps: tuple[LoggedStep, ...]
    content: StepContent
    warnings: tuple[str, ...]
    log: OpenedOnce


def rehearse(log: Source, *, allow_gaps: bool = False) -> Rehearsal:
    """Apply the checks of `natgrad.ingestion.ingest` to the first two states of a log and to the last one.

    Parameters
    ----------
    log : Source
    allow_gaps : bool
        See `natgrad.ingestion.ingest`.

    Raises
    ------
    InputError
        If these states cannot be ingested into a new OUT, or if no two of them follow each other.
    """
    warnings: list[str] = []
    with OpenedOnce(log) as examined, ListedLog(examined) as listed:
        steps = finished_steps(listed, listed.steps(), None, warnings)
        states, *_ = states_to_write(listed, steps, None, allow_gaps, None, warnings)
        steps = [state.step for state in states]
        pair = next(((a, b) for a, b in itertools.pairwise(steps) if a.run == b.run), None)
        if pair is None:
            raise InputError(
                f"there {'is only one state' if len(steps) == 1 else f'are {len(steps)} states of different runs'}",
                where=str(log.location),
                why="an update leads from one state to the next, so that at least two states of a run are needed",
                remedy="log more states, or pass the folder that contains them",
            )
        contents = describe_steps(listed, list(dict.fromkeys((*pair, steps[-1]))), [], False)
        for step in pair:
            _read(listed, step, contents[step])
        with listed.open(pair[0]) as reader:
            gradients = STATES[1] in contents[pair[0]].arrays
            content = complete(pair[0], reader.content(), gradients=gradients)
    return Rehearsal(tuple(steps), content, tuple(warnings), examined)


def _read(log: Source, step: LoggedStep, content: StepContent) -> None:
    """Read the first elements of the tensors of a state, and check recovered gradients of a small one."""
    left = _READ_LIMIT
    size = sum(math.prod(tensor.shape) * storage_dtype(tensor.dtype).itemsize for *_, tensor in _tensors(content))
    with log.open(step) as reader:
        if content.recorded and isinstance(reader, Recorded):
            reader.products(tuple(content.arrays[STATES[0]]))
        if isinstance(reader, RecoveredGradients) and size <= left:
            reader.recovery()
        for array, name, tensor in _tensors(content):
            dtype = storage_dtype(tensor.dtype)
            size = min(math.prod(tensor.shape), left // dtype.itemsize)
            if size:
                reader.read(array, name, 0, np.empty(size, dtype))
            left -= size * dtype.itemsize


def _tensors(content: StepContent) -> Sequence[tuple[str, str, LoggedTensor]]:
    return [
        (array, name, tensor)
        for array, tensors in content.readable.items()
        for name, tensor in tensors.items()
        if tensor.dtype in STORAGE_DTYPES
    ]
