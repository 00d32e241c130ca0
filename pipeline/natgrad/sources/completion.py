"""What of a step can be processed: parameters and gradients of the same tensors, in one order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from natgrad.schema.errors import InputError
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_PARAMETER, REPLICATE_STATES, STATES
from natgrad.sources.base import StepContent
from natgrad.sources.steps import LoggedStep, LoggedTensor, where

__all__ = ["complete"]

_NAMED = 24
"""Tensors that a note names."""


def complete(step: LoggedStep, content: StepContent, *, optimizer: bool = False) -> StepContent:
    """Return what of a step can be processed: parameters and gradients of the same tensors, in one order.

    The order is that of the names with numbers by value, as no other order survives all formats. A tensor tied to
    another counts once. Tensors of a whole model that have no gradient are left out, with a note. What the
    optimizer keeps is among the arrays where it is asked for; tensors that it has nothing of are not in it.

    Raises
    ------
    InputError
        Where parameters or gradients are missing, or their names or shapes differ, or those of the replicates do;
        where the optimizer is asked for and it is not known which tensors it means.
    """
    arrays = {array: dict(tensors) for array, tensors in content.arrays.items()}
    for array in STATES[:2]:
        if not arrays.get(array):
            raise InputError(
                f"no {array}s in this step",
                where=where(step),
                why=f"found {sorted(content.unused)[:6] or 'nothing else'}; most checkpoints hold no gradients",
                remedy=f"say where they are (--map {array}=KEY), or give the log that has them as a further SOURCE",
            )
    notes = list(content.notes)
    for tensor, kept in content.ties.items():
        # The trainer's gradients say which of the names counts, as they name each memory once.
        drop = kept if tensor in arrays["gradient"] and kept not in arrays["gradient"] else tensor
        if tensor in arrays["parameter"] and kept in arrays["parameter"]:
            for tensors in arrays.values():
                tensors.pop(drop, None)
            stays = tensor if drop == kept else kept
            notes.append(f"{drop!r} lies in the memory of {stays!r}: they count once, under that name")
    if content.untrained:
        left = [tensor for tensor in arrays["parameter"] if tensor not in arrays["gradient"]]
        if len(left) < len(arrays["parameter"]):
            for tensor in left:
                del arrays["parameter"][tensor]
            if left and content.no_gradient:
                shown = ", ".join(map(repr, left[:_NAMED])) + (", ..." if len(left) > _NAMED else "")
                notes.append(
                    f"{len(left)} tensors have no gradient and are left out: {shown}; {content.no_gradient}"
                )
            elif left:
                notes.append(
                    f"{len(left)} tensors without gradient (buffers, frozen) are left out, {left[0]!r} the first"
                )
    for array in STATES[1:]:
        if array in arrays:
            _require_same_tensors(step, array, arrays["parameter"], arrays[array])
    _require_replicates(step, replace(content, arrays=arrays))
    order = sorted(arrays["parameter"], key=_by_number)
    logged = [name for name in (*STATES, *REPLICATE_STATES) if name in arrays]
    kept_arrays = {name: {t: arrays[name][t] for t in order} for name in logged}
    state = content.optimizer if optimizer else None
    if state is not None:
        if state.problem:
            raise InputError(
                f"the state of the optimizer cannot be read: {state.problem}",
                where=where(step),
                why="torch numbers the parameters of an optimizer and keeps no names",
                remedy='write order = ["tensor", ...] in natgrad.toml in the folder of the log, in the order of '
                "model.named_parameters() or as the optimizer was given them, or leave --include optimizer out",
            )
        for name, saved in state.arrays.items():
            kept_arrays[name] = {t: saved[t] for t in order if t in saved}
        lacking = [t for t in order if not any(t in saved for saved in state.arrays.values())]
        if state.arrays and lacking:
            notes.append(
                f"the optimizer has no state of {len(lacking)} tensors, {lacking[0]!r} the first: it is NaN"
            )
    return replace(content, arrays=kept_arrays, notes=tuple(notes), optimizer=state)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorting key of a name: digits by value, "layer.10" behind "layer.9"."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _require_same_tensors(
    step: LoggedStep, array: str, parameters: Mapping[str, LoggedTensor], others: Mapping[str, LoggedTensor]
) -> None:
    for tensor in [*parameters, *others]:
        if tensor not in others or tensor not in parameters:
            lacking = array if tensor not in others else "parameter"
            raise InputError(
                f"tensor {tensor!r} has no {lacking}",
                where=where(step, array, tensor),
                why=f"names differ: parameters {sorted(parameters)[:6]}, {array}s {sorted(others)[:6]}",
                remedy=f"log parameter and {array} under the same names",
            )
        if parameters[tensor].shape != others[tensor].shape:
            raise InputError(
                f"{array} has shape {others[tensor].shape}, its parameter {parameters[tensor].shape}",
                where=where(step, array, tensor),
                remedy="log both in the same shape",
            )


def _require_replicates(step: LoggedStep, content: StepContent) -> None:
    """Refuse replicates that are not R of every tensor, one shape after the other."""
    count, logged = content.replicates, [array for array in REPLICATE_STATES if content.arrays.get(array)]
    logged += [REPLICATE_LOSS] if content.replicate_loss else []
    if logged and not count:
        raise InputError(
            f"{' and '.join(logged)} without {REPLICATE_PARAMETER}, or of none",
            where=where(step, logged[0]),
            remedy=f"log the states that the replicates lead to as {REPLICATE_PARAMETER}, replicates first",
        )
    for array in logged[: len(logged) - bool(content.replicate_loss)]:
        parameters = content.arrays["parameter"]
        expected = {name: replace(tensor, shape=(count, *tensor.shape)) for name, tensor in parameters.items()}
        for name, tensor in content.arrays[array].items():
            if name in expected and tensor.shape != expected[name].shape:
                raise InputError(
                    f"{array} has shape {tensor.shape}, {count} replicates of its parameter {expected[name].shape}",
                    where=where(step, array, name),
                    remedy="log as many replicates of every tensor, along a first dimension of their own",
                )
        _require_same_tensors(step, array, expected, content.arrays[array])
    if content.replicate_loss and len(content.replicate_loss) != count:
        raise InputError(
            f"{len(content.replicate_loss)} values of {REPLICATE_LOSS} for {count} replicates",
            where=where(step, REPLICATE_LOSS),
            remedy="log one for each replicate",
        )
