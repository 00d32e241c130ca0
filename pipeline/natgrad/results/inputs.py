"""The updates of a run as a table: the ledger and the scalars of every update, and what its optimizer used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.names import ATTEMPT, METRIC_EIGENVALUES, OPTIMIZER_NUMBERS, RUN
from natgrad.store import Ledger, Trajectory
from natgrad.theory.preconditioners import adam_eigenvalues
from natgrad.theory.windows import consecutive

__all__ = ["Optimizer", "UpdateTable", "replicate_products", "update_table"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Optimizer:
    """The metric that an adaptive optimizer used in each update.

    Attributes
    ----------
    smallest, largest : float64 array, shape (rows, tensors)
        Its eigenvalues, NaN where not known.
    learning_rate : float64 array, shape (rows, tensors)
        Of the group of each tensor.
    """

    smallest: Array
    largest: Array
    learning_rate: Array


@dataclass(frozen=True)
class UpdateTable:
    """What results are made of, all of it small: nothing scales with the number of elements.

    Attributes
    ----------
    gram : float64 array, shape (rows, tensors, vectors, vectors)
        The Gram ledger.
    vectors : tuple of str
        Its vectors.
    layout : Layout
    steps, spans : int64 array, shape (rows,)
        Step before the update, and updates to the next logged state.
    loss, next_loss : float64 array, shape (rows,)
        Before and after the update, NaN where not logged.
    learning_rate : float64 array, shape (rows,)
        eta of the model, NaN where neither logged nor given.
    dtypes : mapping of str to str
        Stored dtypes of ``gradient``, and of ``hvp`` where it was logged.
    attempts : int64 array, shape (rows,), optional
        Restarts before each row was logged; none where not given.
    hessian_min_eigenvalue : float64 array, shape (rows,), optional
        Smallest eigenvalue of the Hessian, NaN where not logged.
    runs : tuple of str, optional
        Names of the runs of a sweep.
    run : int64 array, shape (rows,), optional
        Position of each row's run in them; rows of a run lie together, in order.
    loss_time_derivative : float64 array, shape (rows,), optional
        dL/dt of a loss that changes with time (section 2.1), NaN where not logged. A run that logs it has the model
        extended by time: y has the element -dL/dt more, and g the element 1.
    optimizer : Optimizer, optional
        Where its state was stored.
    tensor_learning_rate : float64 array, shape (rows, tensors), optional
        eta of each tensor, where groups of the optimizer have several; that of the model where not given.
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
    runs: tuple[str, ...] = ()
    run: NDArray[np.int64] | None = None
    loss_time_derivative: Array | None = None
    optimizer: Optimizer | None = None
    tensor_learning_rate: Array | None = None

    def whole(self, m: int) -> NDArray[np.bool_]:
        """Whether each row is the first of m updates, each from the state that the one before led to."""
        if m == 1:
            return np.ones(len(self.steps), bool)
        return np.pad(consecutive(self.follows(), m - 1).all(axis=-1), (0, m - 1))

    def follows(self) -> NDArray[np.bool_]:
        """Whether each row but the first starts from the state that the one before led to, shape (rows - 1,)."""
        follows: NDArray[np.bool_] = self.steps[:-1] + self.spans[:-1] == self.steps[1:]
        if self.run is not None:
            follows &= self.run[:-1] == self.run[1:]
        return follows

    def extended(self) -> NDArray[np.bool_]:
        """Whether the model of each row is extended by time: its run logs how the loss changes with it."""
        if self.loss_time_derivative is None:
            return np.zeros(len(self.steps), bool)
        runs = np.zeros(len(self.steps), np.int64) if self.run is None else self.run
        return np.isin(runs, runs[~np.isnan(self.loss_time_derivative)])

    def of_runs(self) -> list[slice]:
        """Rows of each run of a sweep; all rows where it is one run."""
        if self.run is None:
            return [slice(0, len(self.steps))]
        bounds = np.searchsorted(self.run, range(len(self.runs) + 1))
        return [slice(int(first), int(stop)) for first, stop in itertools.pairwise(bounds)]


def replicate_products(
    ledger: Ledger, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Positions in some rows of the ledger of those of each ledger chunk, and the products of their replicates."""
    for start in range(0, ledger.n_updates, ledger.updates_per_chunk):
        stop = min(start + ledger.updates_per_chunk, ledger.n_updates)
        positions = np.flatnonzero((rows >= start) & (rows < stop))
        if len(positions):
            yield positions, ledger.read_chunk("replicate_gram", start, stop)[rows[positions] - start]


def update_table(
    states: Trajectory, ledger: Ledger, *, learning_rate: float | None = None, attempt: int | None = None
) -> tuple[NDArray[np.int64], UpdateTable]:
    """Select the updates of the runs as they stand, each run in the order of its steps.

    Parameters
    ----------
    states : Trajectory
    ledger : Ledger
    learning_rate : float, optional
        Learning rate of the steps for which the log has none.
    attempt : int, optional
        Select the run as it stood at this attempt. Default: the newest attempt.

    Returns
    -------
    rows : int64 array, shape (updates,)
        Rows of the ledger.
    table : UpdateTable

    Raises
    ------
    InputError
        If there is no such attempt, or no two selected states follow each other.
    """
    gram, _ = ledger.read()
    steps, spans = ledger.steps()
    attempts = states.scalar(ATTEMPT)
    if attempt is not None and not 0 <= attempt <= attempts.max():
        raise InputError(
            f"there is no attempt {attempt}, the last is {attempts.max()}",
            where="--attempt",
            remedy="leave it out for the run as it stands",
        )
    current = states.current(attempt)[: len(steps) + 1]
    rows = np.flatnonzero((spans > 0) & current[:-1] & current[1:])
    if not len(rows):
        raise InputError(
            "no two logged states follow each other, but an update needs two",
            where=str(states.storage),
            why="the run was restarted, and one state was logged since",
            remedy="ingest more steps",
        )
    run = states.scalar(RUN)
    rows = rows[np.lexsort((steps[rows], run[rows]))]
    loss = states.scalar("loss")
    rates, of_tensors = _learning_rates(states, rows, learning_rate)
    return rows, UpdateTable(
        gram=gram if len(rows) == len(gram) else gram[rows],
        vectors=ledger.vectors,
        layout=ledger.layout,
        steps=steps[rows],
        spans=spans[rows],
        loss=loss[rows],
        next_loss=loss[rows + 1],
        learning_rate=rates,
        dtypes=states.dtypes,
        attempts=attempts[rows],
        hessian_min_eigenvalue=states.scalar("hessian_min_eigenvalue")[rows],
        runs=states.runs if states.sweep else (),
        run=run[rows] if states.sweep else None,
        loss_time_derivative=states.scalar("loss_time_derivative")[rows],
        optimizer=_optimizer(states, rows, rates) if states.tables else None,
        tensor_learning_rate=of_tensors,
    )


def _learning_rates(
    states: Trajectory, rows: NDArray[np.int64], given: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Learning rate of each update, and of each tensor in it where groups of the optimizer have several.

    Where only the groups have rates the model's is the largest, if all are known. Of a loss that changes with time
    it is not taken: its unit of time is that of the learning rate.
    """
    rate, own = states.scalar("learning_rate")[rows], states.scalar("tensor_learning_rate")[rows]
    missing = np.isnan(own)
    differ = np.where(missing, np.inf, own).min(axis=1) < np.where(missing, -np.inf, own).max(axis=1)
    if np.isnan(states.scalar("loss_time_derivative")).all():
        rate = np.where(np.isnan(rate), own.max(axis=1), rate)
    if given is not None:
        rate = np.where(np.isnan(rate), given, rate)
    if not differ.any():
        return rate, None
    return rate, np.where(differ[:, None] & ~missing, own, rate[:, None])


def _optimizer(states: Trajectory, rows: NDArray[np.int64], learning_rate: NDArray[np.float64]) -> Optimizer:
    """Return what the optimizer used in each update: its state is saved after it, the rate before.

    The metric is that of the factors, where the rule has some, or else that of Adam's second moment. A tensor whose
    update was rescaled by what is not saved has no rate.
    """
    after = {name: states.scalar(name)[rows + 1] for name in OPTIMIZER_NUMBERS if name != "tensor_learning_rate"}
    low, high = adam_eigenvalues(
        after["exp_avg_sq_min"], after["exp_avg_sq_max"], after["beta2"], after["epsilon"], after["updates"]
    )
    used = [after[name] for name in METRIC_EIGENVALUES[:2]]
    following = [states.scalar(name)[rows] for name in METRIC_EIGENVALUES[2:]]
    factored = (after["metric_factored"] == 1.0) | (states.scalar("metric_factored")[rows] == 1.0)
    low, high = (
        np.where(factored, np.where(np.isnan(end), next_end, end), adam)
        for end, next_end, adam in zip(used, following, (low, high), strict=True)
    )
    rate = states.scalar("tensor_learning_rate")[rows]
    rate = np.where(np.isnan(rate), learning_rate[:, None], rate)
    return Optimizer(low, high, np.where(after["metric_rescaled"] == 1.0, np.nan, rate))
