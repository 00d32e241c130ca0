"""Select the part of a step that can be processed: parameters and gradients of the same tensors, in one order.

The trained tensors of a full model are those that have gradients. If a run has none, they are those that the
optimizer updates, if its state names them, and otherwise all except the running statistics of normalization layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_PARAMETER, REPLICATE_STATES, STATES
from natgrad.sources.base import StepContent
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor, is_running_statistic, where

__all__ = ["Completion", "complete", "not_at_every_step"]

_NAMES_LIMIT = 24
"""Maximum number of tensor names in a note."""


def complete(
    step: LoggedStep,
    content: StepContent,
    *,
    optimizer: bool = False,
    tensors: Collection[str] | None = None,
    is_last: bool = False,
    gradients: bool = True,
) -> StepContent:
    """Return the part of a step that can be processed: parameters and gradients of the same tensors, in one order.

    Tensors are sorted by name, with numbers in names compared by value, because no other order is the same in all
    formats. Tensors that share memory are counted once. Tensors of a full model that have no gradient are omitted,
    with a note. If the optimizer is requested, its arrays are included for the tensors that have a state.

    Parameters
    ----------
    step : LoggedStep
    content : StepContent
    optimizer : bool
        Include the state of the optimizer.
    tensors : collection of str, optional
        Trained tensors of the run, if other steps have already been described.
    is_last : bool
        It is the last step of the run, which may then lack everything except parameters.
    gradients : bool
        The run has gradients. Otherwise, no step may have any.

    Raises
    ------
    InputError
        If parameters, gradients, or a quantity whose key the user specified are missing, or the names or shapes of
        parameters, gradients or replicates differ, or if the optimizer is requested and its entries cannot be
        assigned to tensors.
    """
    arrays = {array: dict(logged) for array, logged in content.arrays.items()}
    if content.recorded and {*arrays} - {*STATES[:2]}:
        other = next(name for name in arrays if name not in STATES[:2])
        raise InputError(
            f"{other} cannot be added to a log of ledgers",
            where=where(step, other, next(iter(arrays[other]), "")),
            why="inner products with it can be computed only from states",
            remedy="pass the log of ledgers alone, or with logs of scalars",
        )
    may_lack = is_last and tensors is not None
    notes = list(content.notes)
    for quantity, error in content.absent.items():
        if not may_lack or quantity == STATES[0]:
            raise error
    # Hessian-vector products and replicates have no meaning without gradients.
    alone = not gradients and not content.replicate_loss
    alone &= {array for array, logged in arrays.items() if logged} <= {STATES[0]}
    if arrays.get(STATES[0]) and not arrays.get(STATES[1]) and (may_lack or alone):
        # Without gradients, the trained tensors and those that share memory are known only from other steps.
        if tensors is not None and (gradients or content.untrained):
            arrays = {array: {t: logged[t] for t in tensors if t in logged} for array, logged in arrays.items()}
            arrays = {array: logged for array, logged in arrays.items() if logged}
            content = replace(content, ties={})
        elif content.untrained:
            notes += _omit_untrained(arrays[STATES[0]], content.optimizer)
        content = replace(content, untrained=False)
    for array in STATES[: 1 if may_lack or alone else 2]:
        if not arrays.get(array):
            if tensors is not None and array != STATES[0]:
                raise not_at_every_step(step, array, next(iter(tensors), ""))
            raise InputError(
                f"there are no {array}s in this step",
                where=where(step, array, next(iter(arrays.get(STATES[0], ())), "")),
                why="; ".join(
                    (
                        f"found {sorted(content.unused)[:6] or 'nothing else'}",
                        *content.notes[:3],
                        "most checkpoints contain no gradients",
                    )
                ),
                remedy=f"specify their key (--map {array}=KEY), or pass the log that contains them as an "
                "additional SOURCE",
            )
    with_gradient = arrays.get("gradient", {})
    for tensor, target in content.ties.items():
        # Trainers log the gradient of shared memory once; keep the name that they use for it.
        dropped = target if tensor in with_gradient and target not in with_gradient else tensor
        if tensor in arrays["parameter"] and target in arrays["parameter"]:
            for named in arrays.values():
                named.pop(dropped, None)
            remaining = tensor if dropped == target else target
            notes.append(f"{dropped!r} and {remaining!r} share memory: they are counted once, as {remaining!r}")
    if content.untrained:
        untrained = [tensor for tensor in arrays["parameter"] if tensor not in arrays["gradient"]]
        if len(untrained) < len(arrays["parameter"]):
            for tensor in untrained:
                del arrays["parameter"][tensor]
            if untrained and content.no_gradient:
                shown = ", ".join(map(repr, untrained[:_NAMES_LIMIT])) + (
                    ", ..." if len(untrained) > _NAMES_LIMIT else ""
                )
                notes.append(
                    f"{len(untrained)} tensors have no gradient and are omitted: {shown}; {content.no_gradient}"
                )
            elif untrained:
                notes.append(
                    f"{len(untrained)} tensors without gradient (buffers, frozen) are omitted, "
                    f"the first is {untrained[0]!r}"
                )
    for array in STATES[1:]:
        if array in arrays:
            _require_same_tensors(step, array, arrays["parameter"], arrays[array])
    _require_replicates(step, replace(content, arrays=arrays))
    order = sorted(arrays["parameter"], key=_by_number)
    logged = [name for name in (*STATES, *REPLICATE_STATES) if name in arrays]
    selected = {name: {t: arrays[name][t] for t in order} for name in logged}
    state = content.optimizer
    if state is not None and not optimizer:
        # The hyperparameters of groups are needed with or without the rest of the state.
        state = (
            state.hyperparameters() if len(state.group_rates) > 1 else state.hyperparameters().with_rates({}, ())
        )
        state = state if state.numbers else None
    elif state is not None:
        notes += state.notes
        if state.unread:
            raise InputError(
                f"cannot read the state of the optimizer: {state.unread}",
                where=where(step),
                why="--include optimizer requests it; parameters and gradients do not need it",
                remedy="write its file again, or omit --include optimizer",
            )
        if state.problem:
            raise InputError(
                f"cannot read the state of the optimizer: {state.problem}",
                where=where(step),
                why="torch numbers the parameters of an optimizer and does not save their names",
                remedy='write order = ["tensor", ...] into natgrad.toml in the folder of the log, in the order of '
                "model.named_parameters() or in which they were passed to the optimizer; or omit --include "
                "optimizer",
            )
        for name, saved in state.arrays.items():
            selected[name] = {t: saved[t] for t in order if t in saved}
        missing = [t for t in order if not any(t in saved for saved in state.arrays.values())]
        if state.arrays and missing:
            notes.append(
                f"the optimizer has no state for {len(missing)} tensors (NaN is stored), the first is "
                f"{missing[0]!r}"
            )
    return replace(content, arrays=selected, notes=tuple(notes), optimizer=state)


class Completion:
    """Completes the steps of a log, once for consecutive steps that differ only in numbers; see `complete`."""

    def __init__(self) -> None:
        self._last: tuple[StepContent, dict[str, Any], StepContent] | None = None

    def of(self, step: LoggedStep, content: StepContent, **options: Any) -> StepContent:
        """Return ``complete(step, content, **options)``."""
        if self._last is not None:
            before, before_options, completed = self._last
            same_count = len(content.replicate_loss) == len(before.replicate_loss)
            if same_count and options == before_options and _with_numbers(content, before) == before:
                return _with_numbers(completed, content)
        completed = complete(step, content, **options)
        self._last = content, options, completed
        return completed


def _with_numbers(content: StepContent, numbers: StepContent) -> StepContent:
    """Return a description with the numbers of another step."""
    return replace(
        content, scalars=numbers.scalars, replicate_loss=numbers.replicate_loss, differences=numbers.differences
    )


def _omit_untrained(parameters: dict[str, LoggedTensor], optimizer: OptimizerState | None) -> list[str]:
    """Remove the tensors of a full model that are not trained, as far as this is known; return notes."""
    updated = set() if optimizer is None else {name for table in optimizer.numbers.values() for name in table}
    if updated & parameters.keys():
        omitted = [name for name in parameters if name not in updated]
        reason = "that the optimizer does not update"
    else:
        omitted = list(filter(is_running_statistic, parameters))
        reason = "with running statistics of normalization layers"
    for name in omitted:
        del parameters[name]
    return [f"{len(omitted)} tensors {reason} are omitted, the first is {omitted[0]!r}"] if omitted else []


def not_at_every_step(step: LoggedStep, array: str, tensor: str) -> InputError:
    """Return the error for a step that lacks an array that other steps have; ``tensor`` is one of its tensors."""
    return InputError(
        f"{array} is not logged at every step",
        where=where(step, array, tensor),
        why="only the last state of a run may lack it",
        remedy=f"log {array} at every step or at no step",
    )


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key in which numbers are compared by value: "layer.10" comes after "layer.9"."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _require_same_tensors(
    step: LoggedStep, array: str, parameters: Mapping[str, LoggedTensor], others: Mapping[str, LoggedTensor]
) -> None:
    for tensor in [*parameters, *others]:
        if tensor not in others or tensor not in parameters:
            missing = array if tensor not in others else "parameter"
            raise InputError(
                f"tensor {tensor!r} has no {missing}",
                where=where(step, array, tensor),
                why=f"the names differ: parameters {sorted(parameters)[:6]}, {array}s {sorted(others)[:6]}",
                remedy=f"log parameter and {array} under the same names",
            )
        if parameters[tensor].shape != others[tensor].shape:
            raise InputError(
                f"{array} has shape {others[tensor].shape}, but its parameter has {parameters[tensor].shape}",
                where=where(step, array, tensor),
                remedy="log both with the same shape",
            )


def _require_replicates(step: LoggedStep, content: StepContent) -> None:
    """Refuse a step unless it has R replicates of every tensor, each with the shape of its parameter."""
    count, logged = content.replicates, [array for array in REPLICATE_STATES if content.arrays.get(array)]
    logged += [REPLICATE_LOSS] if content.replicate_loss else []
    if logged and not count:
        raise InputError(
            f"{' and '.join(logged)} without {REPLICATE_PARAMETER}, or with 0 replicates",
            where=where(step, logged[0]),
            remedy=f"log the states that the replicates lead to as {REPLICATE_PARAMETER}, stacked along axis 0",
        )
    for array in logged[: len(logged) - bool(content.replicate_loss)]:
        parameters = content.arrays["parameter"]
        expected = {name: replace(tensor, shape=(count, *tensor.shape)) for name, tensor in parameters.items()}
        for name, tensor in content.arrays[array].items():
            if name in expected and tensor.shape != expected[name].shape:
                raise InputError(
                    f"{array} has shape {tensor.shape}, but {count} replicates have {expected[name].shape}",
                    where=where(step, array, name),
                    remedy="log the same number of replicates of every tensor, stacked along a new first axis",
                )
        _require_same_tensors(step, array, expected, content.arrays[array])
    if content.replicate_loss and len(content.replicate_loss) != count:
        raise InputError(
            f"{len(content.replicate_loss)} values of {REPLICATE_LOSS} for {count} replicates",
            where=where(step, REPLICATE_LOSS),
            remedy="log one value per replicate",
        )
