"""Collect the inputs of results in a table: ledger, scalars and the optimizer's metric, by update."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.results.grouping import BLOCK, TensorGroup, groups_of
from natgrad.results.recovery import Recovery
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.logs import logger
from natgrad.schema.names import (
    ATTEMPT,
    HESSIAN_NUMBERS,
    HVP,
    METRIC_EIGENVALUES,
    OPTIMIZER_NUMBERS,
    RUN,
    SKIPPED,
    TENSOR_WEIGHT_DECAY,
    WEIGHT_DECAY,
    WITHOUT_STATE,
)
from natgrad.store import Ledger, Trajectory
from natgrad.theory.preconditioners import adam_eigenvalues
from natgrad.theory.windows import consecutive

__all__ = ["Optimizer", "UpdateTable", "replicate_products", "update_table"]

Array = NDArray[np.float64]

_log = logger(__name__)


@dataclass(frozen=True)
class Optimizer:
    """The metric of an adaptive optimizer in each update.

    Attributes
    ----------
    smallest, largest : float64 array, shape (updates, tensors)
        Smallest and largest eigenvalue of the metric, NaN if not known.
    learning_rate : float64 array, shape (updates, tensors)
        Learning rate of the parameter group of each tensor.
    """

    smallest: Array
    largest: Array
    learning_rate: Array


@dataclass(frozen=True)
class UpdateTable:
    """The ledger and the scalars of every update of a run. Its size does not depend on the number of parameters.

    Attributes
    ----------
    gram : float64 array, shape (updates, tensors, vectors, vectors)
        The Gram ledger.
    vectors : tuple of str
        Names of the vectors of the ledger.
    layout : Layout
    steps, spans : int64 array, shape (updates,)
        Step before the update, and number of updates to the next logged state.
    loss, next_loss : float64 array, shape (updates,)
        Loss before and after the update, NaN if not logged.
    learning_rate : float64 array, shape (updates,)
        eta of the model, NaN if it was neither logged nor set by an option.
    dtypes : mapping of str to str
        Stored dtype of ``gradient``, and of ``hvp`` if it was logged.
    attempts : int64 array, shape (updates,), optional
        Number of restarts before each update was logged. Default: 0.
    hessian_min_eigenvalue : float64 array, shape (updates,), optional
        Smallest eigenvalue of the Hessian, NaN if not logged.
    hessian_max_eigenvalue, taylor_point : float64 array, shape (updates,), optional
        Largest eigenvalue, and lambda of eq. (11).
    runs : tuple of str, optional
        Names of the runs of a sweep.
    run : int64 array, shape (updates,), optional
        Index into ``runs``. The updates of a run are contiguous, and the runs are in order.
    loss_time_derivative : float64 array, shape (updates,), optional
        dL/dt of a loss that changes with time (section 2.1), NaN if not logged. The model of a run that logs it is
        extended by time: y has the additional element -dL/dt, and g the additional element 1.
    optimizer : Optimizer, optional
        The metric of the optimizer, if its state was stored.
    tensor_learning_rate : float64 array, shape (updates, tensors), optional
        eta of each tensor, if parameter groups differ in it. Default: eta of the model.
    weight_decay : float64 array, shape (updates, tensors), optional
        Coefficient lambda of decoupled weight decay, if it is requested or known and not 0; NaN where not known.
    evaluation : str
        What the loss and the gradient of a step are evaluated on; see `natgrad.schema.names.EVALUATIONS`.
    origin : str
        Origin of the gradients; see `natgrad.store.Trajectory.gradient_source`.
    recovery : Recovery, optional
        Properties of the gradients, if they were recovered from states of the optimizer.
    groups : tuple of TensorGroup
        Groups of tensors for which there are results.
    gradient_logged : bool array, shape (updates, 2), optional
        False if the state before, or after, the update has no gradient. Default: all have one.
    with_time : bool array, shape (updates,), optional
        See `extended`. Default: determined by ``loss_time_derivative``.
    loss_precision : (float, float), optional
        See `natgrad.results.objective.loss_precision`. Default: determined by ``loss``.
    skipped : bool array, shape (updates,), optional
        True if the optimizer skipped the update, because a gradient was not finite. Default: none.

    Notes
    -----
    If the run has no gradients, the products of the gradient are NaN.
    """

    gram: Array
    vectors: tuple[str, ...]
    layout: Layout
    steps: NDArray[np.int64]
    spans: NDArray[np.int64]
    loss: Array
    next_loss: Array
    learning_rate: Array
    dtypes: Mapping[str, str]
    attempts: NDArray[np.int64] | None = None
    hessian_min_eigenvalue: Array | None = None
    hessian_max_eigenvalue: Array | None = None
    taylor_point: Array | None = None
    runs: tuple[str, ...] = ()
    run: NDArray[np.int64] | None = None
    loss_time_derivative: Array | None = None
    optimizer: Optimizer | None = None
    tensor_learning_rate: Array | None = None
    weight_decay: Array | None = None
    evaluation: str = "unknown"
    origin: str = "logged"
    groups: tuple[TensorGroup, ...] = ()
    recovery: Recovery | None = None
    gradient_logged: NDArray[np.bool_] | None = None
    with_time: NDArray[np.bool_] | None = None
    loss_precision: tuple[float, float] | None = None
    skipped: NDArray[np.bool_] | None = None

    def part(self, updates: slice, gram: Array | None = None) -> UpdateTable:
        """Return the table of some updates. Attributes that depend on the complete run must be set.

        Parameters
        ----------
        updates : slice
        gram : array, optional
            Gram ledger of these updates, if the table of the run has none.
        """
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {
            name: column[updates] for name, column in columns.items() if isinstance(column, np.ndarray)
        }
        if self.optimizer is not None:
            parts["optimizer"] = Optimizer(*(column[updates] for column in vars(self.optimizer).values()))
        if self.recovery is not None:
            parts["recovery"] = Recovery(*(column[updates] for column in vars(self.recovery).values()))
        if gram is not None:
            parts["gram"] = gram
        return replace(self, **parts)

    def has(self, names: Iterable[str]) -> bool:
        """Return True if the table has all of the named vectors and columns."""
        return all(name in self.vectors or getattr(self, name, None) is not None for name in names)

    @property
    def gradient_source(self) -> str:
        """Origin of the gradients, or ``none`` if no state has one."""
        logged = self.recovery is not None or self.gradient_logged is None or self.gradient_logged.any()
        return self.origin if logged else "none"

    @property
    def comparable_next_loss(self) -> Array:
        """Loss after the update; NaN if its batch differs from that of the loss before, shape (updates,)."""
        return np.full(self.next_loss.shape, np.nan) if self.evaluation == "batch" else self.next_loss

    def complete(self, m: int) -> NDArray[np.bool_]:
        """Return True for each update that is followed by m - 1 updates without a gap, shape (updates,)."""
        if m == 1:
            return np.ones(len(self.steps), bool)
        return np.pad(consecutive(self.follows(), m - 1).all(axis=-1), (0, m - 1))

    def follows(self) -> NDArray[np.bool_]:
        """Return True for each update, except the first, that continues the one before it, shape (updates - 1,)."""
        follows: NDArray[np.bool_] = self.steps[:-1] + self.spans[:-1] == self.steps[1:]
        if self.run is not None:
            follows &= self.run[:-1] == self.run[1:]
        return follows

    def extended(self) -> NDArray[np.bool_]:
        """Return True for each update in a run that logs dL/dt; its model is extended by time."""
        if self.with_time is not None:
            return self.with_time
        if self.loss_time_derivative is None:
            return np.zeros(len(self.steps), bool)
        runs = np.zeros(len(self.steps), np.int64) if self.run is None else self.run
        return np.isin(runs, runs[~np.isnan(self.loss_time_derivative)])

    def run_slices(self) -> list[slice]:
        """Return the updates of each run of a sweep, or all updates of a single run."""
        if self.run is None:
            return [slice(0, len(self.steps))]
        bounds = np.searchsorted(self.run, range(len(self.runs) + 1))
        return [slice(int(first), int(stop)) for first, stop in itertools.pairwise(bounds)]


def replicate_products(
    ledger: Ledger, updates: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Array, Array]]:
    """Yield the inner products of the replicates of some updates, one ledger chunk at a time.

    Parameters
    ----------
    ledger : Ledger
    updates : int64 array
        Indices into the ledger, see `update_table`.

    Yields
    ------
    positions, products, parameter_norm
        Positions in ``updates`` of the updates in the ledger chunk, their products, and the norms of the parameters
        of each tensor.
    """
    parameter = ledger.vectors.index("parameter")
    for start in range(0, ledger.n_updates, ledger.updates_per_chunk):
        stop = min(start + ledger.updates_per_chunk, ledger.n_updates)
        positions = np.flatnonzero((updates >= start) & (updates < stop))
        if len(positions):
            within = updates[positions] - start
            squares = ledger.read_chunk("gram", start, stop)[within, :, parameter, parameter]
            yield positions, ledger.read_chunk("replicate_gram", start, stop)[within], np.sqrt(squares)


def update_table(
    states: Trajectory,
    ledger: Ledger,
    *,
    learning_rate: float | None = None,
    weight_decay: Mapping[str, float] | None = None,
    evaluation: str = "unknown",
    groups: Sequence[str] = (BLOCK,),
    attempt: int | None = None,
    with_gram: bool = True,
) -> tuple[NDArray[np.int64], UpdateTable]:
    """Select the current updates of each run, in the order of their steps.

    Parameters
    ----------
    states : Trajectory
    ledger : Ledger
    learning_rate : float, optional
        Learning rate for steps without a logged one.
    weight_decay : mapping of str to float, optional
        Coefficient of decoupled weight decay where none was logged, by patterns of the names of tensors. The last
        pattern that matches a tensor applies.
    evaluation : str
        What the loss and the gradient of a step are evaluated on, as far as the user declared it. Default: as the
        log declares it.
    groups : sequence of str
        Groups of tensors, see `natgrad.results.grouping.groups_of`.
    attempt : int, optional
        Select the run as it was at this attempt. Default: the newest attempt.
    with_gram : bool
        Read the Gram ledger. Without it, the table has its column ``gram`` with 0 tensors, see `UpdateTable.part`.

    Returns
    -------
    updates : int64 array, shape (updates,)
        Indices into the ledger.
    table : UpdateTable

    Raises
    ------
    InputError
        If there is no such attempt, no two selected states follow each other, or a pattern of ``weight_decay``
        or ``groups`` matches no tensor.
    """
    steps, spans = ledger.steps()
    attempts = states.scalar(ATTEMPT)
    if attempt is not None and not 0 <= attempt <= attempts.max():
        raise InputError(
            f"there is no attempt {attempt}; the last attempt is {attempts.max()}",
            where="--attempt",
            remedy="omit --attempt to analyze the newest attempt",
        )
    # The pass may lag behind the trajectory, and an interrupted writer of a run without states may be ahead of it.
    count = min(len(steps), max(len(attempts) - 1, 0))
    steps, spans, current = steps[:count], spans[:count], states.current(attempt)[: count + 1]
    # Without states, the products of the last update before a restart do not depend on the state after it.
    updates = np.flatnonzero((spans > 0) & current[:-1] & (current[1:] | bool(states.recorded)))
    if not len(updates):
        raise InputError(
            "no two logged states follow each other, but an update requires two",
            where=str(states.storage),
            why="the run was restarted, and only one state was logged since then",
            remedy="ingest more steps",
        )
    run = states.scalar(RUN)
    updates = updates[np.lexsort((steps[updates], run[updates]))]
    # A run of a sweep whose last state was completed later has its last update twice; the later one is complete.
    is_newest = np.append((np.diff(run[updates]) != 0) | (np.diff(steps[updates]) != 0), True)
    updates = updates[is_newest]
    loss = states.scalar("loss")
    logged = np.full(len(attempts), states.has_gradient)
    logged[[state for state, names in states.lacking().items() if "gradient" in names]] = False
    # Without states, the products with the gradient change belong to the update itself.
    after = logged[updates if "gradient_change" in states.recorded else updates + 1]
    recovery = Recovery.of(states, updates)
    # Each recovered gradient belongs to the mini-batch of its update.
    declared = "batch" if recovery is not None else states.evaluation
    rates, of_tensors = _learning_rates(states, updates, learning_rate)
    return updates, UpdateTable(
        gram=ledger.read_updates(updates) if with_gram else np.empty((len(updates), 0, 0, 0)),
        vectors=ledger.vectors,
        layout=ledger.layout,
        groups=groups_of(ledger.layout.names, groups),
        steps=steps[updates],
        spans=spans[updates],
        loss=loss[updates],
        next_loss=loss[updates + 1],
        learning_rate=rates,
        dtypes=_dtypes(states),
        attempts=attempts[updates],
        hessian_min_eigenvalue=states.scalar("hessian_min_eigenvalue")[updates],
        **{name: states.scalar(name)[updates] if name in states.scalars else None for name in HESSIAN_NUMBERS[1:]},
        runs=states.runs if states.sweep else (),
        run=run[updates] if states.sweep else None,
        loss_time_derivative=states.scalar("loss_time_derivative")[updates],
        optimizer=_optimizer(states, updates, rates) if set(states.tables) - set(WITHOUT_STATE) else None,
        tensor_learning_rate=of_tensors,
        weight_decay=_weight_decay(states, updates, steps[updates], ledger.layout, weight_decay),
        evaluation=declared if evaluation == "unknown" else evaluation,
        origin=states.gradient_source,
        recovery=recovery,
        gradient_logged=np.stack([logged[updates], after], axis=1),
        skipped=states.scalar(SKIPPED)[updates] == 1.0 if SKIPPED in states.scalars else None,
    )


def _dtypes(states: Trajectory) -> dict[str, str]:
    """Return the dtype of each array, or of the one that it is computed from."""
    found = {"gradient": states.array_dtypes["parameter"], **states.array_dtypes, **states.dtypes}
    return {HVP: found["gradient"], **found} if HVP in states.recorded else found


def _weight_decay(
    states: Trajectory,
    updates: NDArray[np.int64],
    steps: NDArray[np.int64],
    layout: Layout,
    option: Mapping[str, float] | None,
) -> NDArray[np.float64] | None:
    """Return the coefficient of decoupled weight decay of each update and tensor; None if there is no decay.

    The optimizer's own coefficient comes first, then the logged one, then the option.
    """
    logged = states.scalar(WEIGHT_DECAY)[updates]
    if option is None and TENSOR_WEIGHT_DECAY not in states.numbers and not (logged > 0).any():
        return None  # without arrays of NaN for each tensor
    decay = states.scalar(TENSOR_WEIGHT_DECAY)[updates]
    decay = np.where(np.isnan(decay), logged[:, None], decay)
    if option is None:
        return decay if (decay > 0).any() else None
    default = _of_each_tensor(layout, option)
    known = ~np.isnan(decay)
    # Groups without decay are usual: that they differ matters only if the option sets no other.
    unused = known.all() | (np.isnan(default) | known).all()
    differs = np.argwhere(known & ~np.isnan(default) & (decay != default) & ((decay > 0) | unused))
    if len(differs):
        update, tensor = differs[0]
        _log.warning(
            "--weight-decay sets %g for tensor %r, but the log has %g at step %d: the logged value is used",
            default[tensor],
            layout.names[tensor],
            decay[update, tensor],
            int(steps[update]),
        )
    return np.where(np.isnan(decay), default, decay)


def _of_each_tensor(layout: Layout, option: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the coefficient of each tensor that an option sets; NaN if no pattern matches its name."""
    values = np.full(len(layout.names), np.nan)
    for pattern, value in option.items():
        matches = [name == pattern or fnmatchcase(name, pattern) for name in layout.names]
        if not any(matches):
            raise InputError(
                f"no tensor has a name that matches {pattern!r}",
                where="option weight_decay",
                why=f"the first tensors are {', '.join(map(repr, layout.names[:4]))}",
                remedy="correct the pattern: * stands for any text",
            )
        values[matches] = value
    return values


def _learning_rates(
    states: Trajectory, updates: NDArray[np.int64], default: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the learning rate of each update, and of each of its tensors if parameter groups have different rates.

    If only the groups have rates, the rate of the model is the largest rate, provided that all are known. This does
    not apply to a loss that changes with time, because the learning rate is then also the unit of time.
    """
    rate = states.scalar("learning_rate")[updates]
    if "tensor_learning_rate" not in states.numbers:
        return rate if default is None else np.where(np.isnan(rate), default, rate), None
    own = states.scalar("tensor_learning_rate")[updates]
    missing = np.isnan(own)
    differ = np.where(missing, np.inf, own).min(axis=1) < np.where(missing, -np.inf, own).max(axis=1)
    if np.isnan(states.scalar("loss_time_derivative")).all():
        rate = np.where(np.isnan(rate), own.max(axis=1), rate)
    if default is not None:
        rate = np.where(np.isnan(rate), default, rate)
    if not differ.any():
        return rate, None
    return rate, np.where(differ[:, None] & ~missing, own, rate[:, None])


def _optimizer(states: Trajectory, updates: NDArray[np.int64], learning_rate: NDArray[np.float64]) -> Optimizer:
    """Return the metric that the optimizer used in each update.

    The optimizer state is saved after the update, and the learning rate before it. If the rule has factors, the
    metric is computed from them, and otherwise from Adam's second moment. If the update of a tensor was rescaled by
    a factor that is not saved, the rate of the tensor is NaN.
    """
    after = {name: states.scalar(name)[updates + 1] for name in OPTIMIZER_NUMBERS if name not in WITHOUT_STATE}
    low, high = adam_eigenvalues(
        after["exp_avg_sq_min"], after["exp_avg_sq_max"], after["beta2"], after["epsilon"], after["updates"]
    )
    used = [after[name] for name in METRIC_EIGENVALUES[:2]]
    following = [states.scalar(name)[updates] for name in METRIC_EIGENVALUES[2:]]
    factored = (after["metric_factored"] == 1.0) | (states.scalar("metric_factored")[updates] == 1.0)
    low, high = (
        np.where(factored, np.where(np.isnan(end), next_end, end), adam)
        for end, next_end, adam in zip(used, following, (low, high), strict=True)
    )
    rate = states.scalar("tensor_learning_rate")[updates]
    rate = np.where(np.isnan(rate), learning_rate[:, None], rate)
    return Optimizer(low, high, np.where(after["metric_rescaled"] == 1.0, np.nan, rate))
