"""Describe the steps of a log, and check that all belong to the same model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

from natgrad.schema.errors import InputError
from natgrad.schema.layout import promote
from natgrad.schema.names import OPTIMIZER_STATES, REPLICATE_LOSS, REPLICATE_STATES, STATES, WITHOUT_STATE
from natgrad.sources.base import Source, StepContent
from natgrad.sources.completion import Completion, not_at_every_step
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, where
from natgrad.store import Trajectory

__all__ = [
    "describe_steps",
    "optimizer_dtypes",
    "parameters_of",
    "scalar_of",
    "stored_dtypes",
    "stores_optimizer",
    "tensor_text",
]


_DIFFERENCES_SHOWN = 8


def stored_dtypes(contents: Iterable[StepContent]) -> dict[str, str]:
    """Return the dtype of each stored array: the smallest that represents all of its tensors exactly."""
    logged: dict[str, set[str]] = {}
    # Steps with equal descriptions share one object.
    for arrays in {id(content.arrays): content.arrays for content in contents}.values():
        for name, tensors in arrays.items():
            logged.setdefault(name, set()).update(tensor.dtype for tensor in tensors.values())
    names = (*STATES, *REPLICATE_STATES, *OPTIMIZER_STATES)
    return {name: promote(sorted(logged[name])) for name in names if logged.get(name)}


def scalar_of(content: StepContent, name: str, replicates: int) -> float | Sequence[float]:
    """Return a scalar of a step, or the losses of its replicates; NaN if the step has none."""
    missing: float | Sequence[float] = [math.nan] * replicates if name == REPLICATE_LOSS else math.nan
    return content.numbers.get(name, missing)


def optimizer_dtypes(trajectory: Trajectory) -> dict[str, str]:
    """Return the dtypes of the arrays of the optimizer state, which some steps may lack."""
    return {name: dtype for name, dtype in trajectory.array_dtypes.items() if name in OPTIMIZER_STATES}


def stores_optimizer(trajectory: Trajectory | None, include: Sequence[str] = ()) -> bool:
    """Return whether to store optimizer state. An existing trajectory keeps its original setting."""
    if trajectory is None:
        return "optimizer" in include
    stored = any(name not in WITHOUT_STATE for name in trajectory.tables)
    if "optimizer" in include and not stored:
        raise InputError(
            "the trajectory was created without the optimizer state",
            where=str(trajectory.storage),
            remedy="start from scratch with --overwrite, or omit --include optimizer",
        )
    return stored


def parameters_of(trajectory: Trajectory) -> dict[str, LoggedTensor]:
    """Return the tensors of a trajectory in the form in which a log describes them."""
    return {tensor.name: LoggedTensor(tensor.shape, tensor.dtype) for tensor in trajectory.layout.tensors}


def describe_steps(
    log: Source,
    steps: Sequence[LoggedStep],
    warnings: list[str],
    optimizer: bool,
    tensors: Collection[str] | None = None,
    gradients: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[LoggedStep, StepContent]:
    """Describe steps, and check that all have the same arrays and tensors.

    The last step of a run may lack all arrays except parameters. All steps may lack gradients.

    Parameters
    ----------
    log : Source
    steps : sequence of LoggedStep
        Steps of one or several runs, run by run.
    warnings : list of str
        Warnings are appended.
    optimizer : bool
        Include the state of the optimizer.
    tensors : collection of str, optional
        Trained tensors of the trajectory. Default: those of the first step.
    gradients : bool, optional
        The trajectory has gradients. Default: the first step decides, unless it is the last one of its run.
    progress : callable, optional
        Called with the number of steps described and their total number.

    Returns
    -------
    dict
        The step with which the others were compared comes first. It lacks nothing unless all steps are last ones.

    Raises
    ------
    InputError
        If the arrays, tensors, shapes or dtypes of a step differ from those of the other steps.
    NotYet
        If there is only one state, without a gradient.
    """
    contents: dict[LoggedStep, StepContent] = {}
    unused: dict[str, LoggedStep] = {}
    notes: dict[str, LoggedStep] = {}
    differences: dict[tuple[str, str, str], list[str]] = {}
    ends = set({step.run: step for step in steps}.values())
    first = next((step for step in steps if step not in ends), steps[0])
    completion, trained = Completion(), tensors
    for done, step in enumerate((first, *(step for step in steps if step != first))):
        if progress is not None:
            progress(done, len(steps))
        with log.open(step) as reader:
            content = reader.content()
            if gradients is None:
                gradients = bool(content.arrays.get(STATES[1]))
                if not gradients and step in ends and content.arrays.get(STATES[0]):
                    raise NotYet(
                        "there is only one state, and it has no gradient",
                        where=where(step),
                        why="an update leads from one state to the next, and the last state may lack its gradient",
                        remedy="run again once the log has more states",
                    )
            elif not gradients and tensors is not None and content.arrays.get(STATES[1]):
                raise _now_with_gradients(step, next(iter(content.arrays[STATES[1]])))
            content = completion.of(
                step,
                content,
                optimizer=optimizer,
                tensors=trained,
                is_last=step in ends,
                gradients=gradients,
            )
            _require_same_model(step, content, first, contents.get(first, content), is_last=step in ends)
        notes.update({note: step for note in content.notes if note not in notes})
        unused.update({key: step for key in content.unused if key not in unused})
        for entry in content.differences:
            values = differences.setdefault((entry.quantity, entry.used, entry.other), [])
            values.append(f"{entry.value!r} and {entry.other_value!r} at step {step.number}")
        if step == first:
            trained = tuple(content.arrays[STATES[0]])
        # Steps with equal descriptions share one object, because a long run of a large model has many steps.
        same = contents.get(first)
        arrays = same.arrays if same is not None and same.arrays == content.arrays else content.arrays
        state = content.optimizer
        state = same.optimizer if same is not None and same.optimizer == state else state
        contents[step] = StepContent(
            arrays,
            content.scalars,
            optimizer=state,
            replicate_loss=content.replicate_loss,
            alignment=content.alignment,
            recorded=content.recorded,
            evaluation=content.evaluation,
        )
    warnings += [f"{note} (in {step.storage.name})" for note, step in notes.items()]
    warnings += [
        f"{quantity} of {used} is used, and that of {other} differs at {len(values)} of {len(steps)} steps: "
        f"{', '.join(values[:_DIFFERENCES_SHOWN])}{', ...' if len(values) > _DIFFERENCES_SHOWN else ''}"
        for (quantity, used, other), values in differences.items()
    ]
    if unused:
        key, step = next(iter(unused.items()))
        warnings.append(f"{len(unused)} keys are not used; the first is {key!r} (in {step.storage.name})")
    return contents


def _now_with_gradients(step: LoggedStep, tensor: str) -> InputError:
    return InputError(
        "the log has gradients, but OUT was created without them",
        where=where(step, STATES[1], tensor),
        why="earlier steps had no gradients, or the log that contains them was added later",
        remedy="start from scratch with --overwrite, or choose another OUT",
    )


def _require_same_model(
    step: LoggedStep, content: StepContent, first: LoggedStep, model: StepContent, *, is_last: bool
) -> None:
    names = (*STATES, *REPLICATE_STATES)
    for name in (name for name in names if name in model.arrays or name in content.arrays):
        have, expect = content.arrays.get(name), model.arrays.get(name)
        if have == expect:
            continue
        if have is None and is_last:
            continue
        if have is None or expect is None:
            lacking, logged = (step, expect) if have is None else (first, have)
            raise not_at_every_step(lacking, name, next(iter(logged or ()), ""))
        for tensor in {**expect, **have}:
            if tensor not in have or tensor not in expect:
                adjective = "missing" if tensor not in have else "new"
                what = f"tensor {tensor!r} is {adjective} at step {step.number}"
            elif have[tensor].shape != expect[tensor].shape:
                what = f"shape changes from {expect[tensor].shape} to {have[tensor].shape}"
            elif have[tensor].dtype != expect[tensor].dtype:
                what = f"dtype changes from {expect[tensor].dtype} to {have[tensor].dtype}"
            else:
                continue
            raise InputError(
                what,
                where=where(step, name, tensor),
                why="the run was restarted with another model, or some of these tensors are not parameters; the "
                f"first step of this ingest is {first.number}",
                remedy="process the steps of each model as a separate run, or select the parameters with --map "
                "parameter=KEY",
            )


def tensor_text(tensor: LoggedTensor | None) -> str:
    """Return the dtype and shape of a tensor, for messages."""
    return "no tensor" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
