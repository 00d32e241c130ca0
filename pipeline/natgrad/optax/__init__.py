"""Record training runs of JAX, from the gradient transformations of Optax.

>>> import natgrad.optax
>>> optimizer = natgrad.optax.watch(optax.adamw(0.01), "logs/jax", mode="ledger")  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from natgrad.recording import Recorder
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger

__all__ = ["WatchState", "watch"]

_log = logger("natgrad.recording")


class WatchState(NamedTuple):
    """State of the transformation: the number of updates so far, and the state of the optimizer."""

    count: Any
    inner: Any


def watch(
    optimizer: Any,
    folder: str | Path,
    *,
    mode: str = "full",
    evaluation: str = "unknown",
    configuration: Mapping[str, Any] | None = None,
    learning_rate: float | Callable[[Any], Any] | None = None,
    resume: bool = False,
    on_error: str = "warn",
) -> Any:
    """Record the parameters, gradients and updates of an optimizer.

    The loss is recorded if it is passed: ``optimizer.update(gradients, state, params, value=loss)``. Gradients are
    those that are passed to ``update``, before any clipping by the optimizer.

    Parameters
    ----------
    optimizer : optax.GradientTransformation
    folder : str or Path
        Folder of the log.
    mode : {"full", "ledger"}
        Record complete states, or only the inner products of each update. The last update of a log of states has no
        result, because the state after it is not passed to the optimizer.
    evaluation : {"batch", "fixed", "unknown"}
        What loss and gradient are evaluated on, in a log of ledgers.
    configuration : mapping, optional
        Options of the run, which pages show and compare; see `natgrad.Recorder`.
    learning_rate : float or callable, optional
        Learning rate, or its schedule by the number of updates. Default: that of ``optax.inject_hyperparams``, if
        the state of the optimizer has it.
    resume : bool
        Continue the log in the folder. The number of updates is a part of the state of the optimizer.
    on_error : {"warn", "raise"}
        What to do if an update cannot be recorded. By default, the recording ends with a warning, and the training
        continues.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        The optimizer, with `WatchState` as its state. ``update`` requires the parameters. It can be compiled by
        ``jax.jit``; ``jax.effects_barrier()`` waits until all updates are recorded.

    Raises
    ------
    InputError
        If an argument is not valid, the folder contains another log, or several processes train the run.
    """
    import jax
    import jax.experimental
    import optax

    if on_error not in ("warn", "raise"):
        raise InputError(f"on_error must be 'warn' or 'raise', got {on_error!r}", remedy="correct the argument")
    if jax.process_count() > 1:
        raise InputError(
            f"{jax.process_count()} processes train the run, and each has a part of its arrays",
            where="natgrad.optax.watch",
            remedy="record the checkpoints of the run instead (Orbax)",
        )
    inner = optax.with_extra_args_support(optimizer)
    recorder = Recorder(folder, mode=mode, resume=resume, evaluation=evaluation, configuration=configuration)
    record = _Record(recorder, mode, on_error == "raise")

    def init(params: Any) -> WatchState:
        return WatchState(jax.numpy.zeros((), jax.numpy.int32), inner.init(params))

    def update(updates: Any, state: WatchState, params: Any = None, **extra: Any) -> tuple[Any, WatchState]:
        if params is None:
            raise InputError(
                "the parameters are required to record an update",
                where="update of natgrad.optax.watch",
                remedy="pass them: optimizer.update(gradients, state, params)",
            )
        found, inner_state = inner.update(updates, state.inner, params, **extra)
        rate = _rate(learning_rate, state.count, inner_state)
        after = optax.apply_updates(params, found) if mode == "ledger" else None
        numbers = (state.count, extra.get("value", math.nan), rate)
        jax.experimental.io_callback(record, None, *numbers, params, updates, after, ordered=True)
        return found, WatchState(state.count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _rate(option: float | Callable[[Any], Any] | None, count: Any, state: Any) -> Any:
    """Return the learning rate of an update: that of the option or of the state; NaN if it is not known."""
    import optax

    if option is not None:
        return option(count) if callable(option) else option
    try:
        # The state also has the states of schedules under this name.
        found = optax.tree_utils.tree_get(
            state, "learning_rate", filtering=lambda _, value: hasattr(value, "dtype")
        )
    except KeyError:  # several parts of the optimizer have one
        found = None
    return math.nan if found is None else found


class _Record:
    """The function that JAX calls with the arrays of each update."""

    def __init__(self, recorder: Recorder, mode: str, raises: bool) -> None:
        self._recorder, self._mode, self._raises = recorder, mode, raises
        self._ended = False

    def __call__(self, count: Any, loss: Any, rate: Any, params: Any, gradients: Any, after: Any) -> None:
        if self._ended:
            return
        try:
            step = int(count)
            known = [None if math.isnan(number) else float(number) for number in (float(loss), float(rate))]
            self._recorder.record(
                step,
                parameter=_named(params),
                gradient=_named(gradients),
                loss=known[0],
                learning_rate=known[1],
            )
            if self._mode == "ledger":
                self._recorder.record(step + 1, parameter=_named(after))
        except Exception as error:  # no error of the recorder ends the training, unless that was requested
            self._ended = True
            if self._raises:
                raise
            _log.warning(
                "the recording in %s has ended, and the training continues: %s", self._recorder.folder, error
            )


def _named(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by their paths."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "value": np.asarray(leaf) for path, leaf in leaves
    }
