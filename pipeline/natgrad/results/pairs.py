"""Reduce the Gram matrices of updates to pairs: the few numbers for (y, g) that determine all results.

The Gram matrix of an update gives one pair for each estimate of the negative gradient (eq. 12), and the largest
error of this pair caused by rounding. `natgrad.results.variables` computes the variables from the pairs.

Decoupled weight decay (AdamW) adds -eta lambda theta_t to the update. `without_decay` gives the pairs of the rest
of the update, whose displacement is d + eta lambda theta_t. Its inner products follow from those of the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.results.grouping import TensorGroup
from natgrad.results.inputs import UpdateTable
from natgrad.schema.layout import Layout, underflow_error, unit_roundoff
from natgrad.schema.names import GROUP, HVP, STEP, TENSOR
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair
from natgrad.theory.windows import WindowTerms

__all__ = ["Aggregation", "model_and_tensors", "without_decay"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GradientEstimate:
    """An estimate of the negative gradient from the vectors of the ledger (eq. 12).

    Attributes
    ----------
    half : str, optional
        Vector, half of which is added to the gradient.
    corrected : bool
        Whether the sum is then corrected along the displacement.
    """

    half: str | None = None
    corrected: bool = False


_ESTIMATES = {
    "gradient": GradientEstimate(),
    "corrected": GradientEstimate(corrected=True),
    "trapezoid": GradientEstimate(half="gradient_change", corrected=True),
    "taylor": GradientEstimate(half=HVP),
}


@dataclass(frozen=True)
class Aggregation:
    """The pairs of all updates, of the model or of each tensor, and the largest errors caused by rounding.

    If parameter groups have different learning rates, each tensor has its own eta, and eq. (2) holds for the tensor
    with that eta. The model has one eta. Its g is parallel to the displacement, so y.g > 0 if and only if the
    update descends. The ratios between the etas of the tensors are part of the learning rule, as in the metric of
    an optimizer. Stacking the g of all tensors, each with its own eta, would give a different vector: the loss may
    decrease along that vector and increase along the update.

    Attributes
    ----------
    dimensions : tuple of str
        Dimensions of the arrays: (step,) for the model, (step, tensor) for tensors, (step, group) for groups.
    rate : array
        eta times the number of updates between the two logged states, or 1 if eta is not known.
    rate_known : bool array
        False if eta is not known. The direction of g does not depend on it, but its length does.
    pair : Pair
    finite : bool array
        False if the parameters or gradients are not finite.
    known : bool array
        False if a loss or a vector that the estimate requires was not logged.
    update_floor, gradient_floor : array
        Largest norm of the error of g and of y, caused by rounding of the stored values.
    gradient_norm : array, optional
        |y| if it is known without a learning rate.
    parameter_norm, displacement_norm : array
    """

    dimensions: tuple[str, ...]
    rate: Array
    rate_known: NDArray[np.bool_]
    pair: Pair
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]
    update_floor: Array
    gradient_floor: Array
    gradient_norm: Array | None
    parameter_norm: Array
    displacement_norm: Array

    @classmethod
    def without_updates(cls, dimensions: tuple[str, ...], tensors: int) -> Aggregation:
        """Return the pairs of no update, for a number of tensors or groups."""
        none = np.empty((0, tensors) if len(dimensions) > 1 else 0)
        size, flag = none.astype(np.int64), none.astype(bool)
        pair = Pair(none, none, none, size)
        return cls(dimensions, none, flag, pair, flag, flag, none, none, none, none, none)

    @classmethod
    def joined(cls, parts: Sequence[Aggregation]) -> Aggregation:
        """Join the columns of some tensors or groups."""
        return parts[0]._combined(lambda *columns: np.concatenate(columns, axis=1), *parts[1:])

    def columns(self, index: Any) -> Aggregation:
        """Return some of the tensors or groups."""
        # The order of later sums follows from the order in memory.
        return self._combined(lambda values: np.ascontiguousarray(values[:, index]))

    def _combined(self, function: Callable[..., Array], *others: Aggregation) -> Aggregation:
        """Apply a function to each array of these pairs and the same array of others."""

        def each(one: Any, *more: Any) -> Any:
            if isinstance(one, Pair):
                names = [field.name for field in fields(Pair)]
                return Pair(*(each(*(getattr(pair, name) for pair in (one, *more))) for name in names))
            return function(one, *more) if isinstance(one, np.ndarray) else one

        values = (vars(part) for part in (self, *others))
        return Aggregation(*(each(*column) for column in zip(*(value.values() for value in values), strict=True)))

    def window_terms(self, updates: slice) -> WindowTerms:
        """Return the terms of some updates that determine the status of windows of any length."""
        return WindowTerms(
            self.pair[updates],
            np.where(self.rate_known, self.rate, np.nan)[updates],
            self.update_floor[updates],
            self.finite[updates],
            self.known[updates],
        )


def model_and_tensors(table: UpdateTable, descent: str) -> tuple[Aggregation, ...]:
    """Compute the pairs of the model, its tensors and its groups for one estimate of the negative gradient.

    Parameters
    ----------
    table : UpdateTable
    descent : str
        Estimate of the negative gradient, one of `natgrad.schema.names.DESCENTS` (eqs. 12 and 16).

    Returns
    -------
    model, tensors : Aggregation
        Arrays have the shapes (updates,) and (updates, tensors).
    groups : Aggregation
        Shape (updates, groups). Omitted if the table has no groups.
    """
    estimate = _ESTIMATES[descent]
    model, *parts = _uncorrected(table, estimate)
    return _all_corrected(table, model, parts) if estimate.corrected else (model, *parts)


def _uncorrected(table: UpdateTable, estimate: GradientEstimate) -> tuple[Aggregation, ...]:
    """Compute the pairs before the correction along the displacement."""
    layout, half = table.layout, estimate.half
    gram, vectors, logged = _products(table, half)
    index = {name: position for position, name in enumerate(vectors)}

    @cache
    def norm(vector: str) -> Array:
        return np.sqrt(gram[..., index[vector], index[vector]])

    def is_finite(vector: str) -> NDArray[np.bool_]:
        # The square of a finite vector may overflow to infinity, but only that of another one is NaN.
        return ~np.isnan(gram[..., index[vector], index[vector]])

    # If there are k updates between two logged states, g is their mean (eq. 2).
    rate = (table.learning_rate * table.spans)[:, None]
    own = table.tensor_learning_rate
    own_rate = rate if own is None else own * table.spans[:, None]
    known_rate, known_own_rate = ~np.isnan(rate), ~np.isnan(own_rate)
    rate, own_rate = np.where(known_rate, rate, 1.0), np.where(known_own_rate, own_rate, 1.0)
    sizes, roundoff, underflow = _rounding(layout)
    of_parts = of_tensors = geometry.pair(gram, vectors, rate, sizes, half=half)
    if own is not None:
        of_tensors = geometry.pair(gram, vectors, own_rate, sizes, half=half)
    displacement_floor = geometry.displacement_floor(norm("parameter"), norm("displacement"), roundoff, underflow)
    gradient_floor = _rounding_error(norm("gradient"), sizes, table.dtypes["gradient"])
    if table.recovery is not None:
        gradient_floor = gradient_floor + table.recovery.error_bound * norm("gradient")
    # A gradient that was not logged is NaN as well.
    own_logged, next_logged = np.ones((2, len(gram), 1), bool)
    if table.gradient_logged is not None:
        own_logged, next_logged = np.split(table.gradient_logged, 2, axis=1)
    finite = is_finite("displacement") & (is_finite("gradient") | ~own_logged)
    if table.skipped is not None:
        finite &= ~table.skipped[:, None]
    known = np.broadcast_to(own_logged & logged, finite.shape)
    if half is not None and logged:
        # The norm of the other gradient is at most the sum of the norms of this one and of their difference.
        stored = _rounding_error(norm(half), sizes, table.dtypes[half if half == HVP else "gradient"]) / 2.0
        gradient_floor = gradient_floor + stored + geometry.across_floor(gram, vectors, half, of_tensors)
        if half == HVP:
            finite &= is_finite(half)
        else:
            known, finite = known & next_logged, finite & (is_finite(half) | ~(own_logged & next_logged))
    tensors = Aggregation(
        (STEP, TENSOR),
        np.broadcast_to(own_rate, finite.shape),
        np.broadcast_to(known_own_rate, finite.shape),
        of_tensors,
        finite,
        known,
        displacement_floor / own_rate,
        gradient_floor,
        norm("gradient") if half is None else None,
        norm("parameter"),
        norm("displacement"),
    )

    rounding = displacement_floor / rate

    def totals(members: NDArray[np.int64]) -> Aggregation:
        """Sum over the tensors of groups of the same size. They share the learning rate of the model."""

        def total_norm(values: Array) -> Array:
            return _norm(np.ascontiguousarray(values[:, members]), axis=-1)

        count = len(members)
        return Aggregation(
            (STEP, GROUP),
            np.broadcast_to(rate, (len(rate), count)),
            np.broadcast_to(known_rate, (len(rate), count)),
            geometry.direct_sum([of_parts[:, of_each] for of_each in members.T]),
            np.asarray(finite[:, members].all(axis=-1)),
            np.asarray(known[:, members].all(axis=-1)),
            total_norm(rounding),
            total_norm(gradient_floor),
            total_norm(norm("gradient")) if half is None else None,
            total_norm(norm("parameter")),
            total_norm(norm("displacement")),
        )

    complete = replace(totals(np.arange(len(sizes))[None]).columns(0), dimensions=(STEP,))
    model = _with_time(complete, table.extended(), table.loss_time_derivative, estimate)
    return model, tensors, *([_of_groups(table.groups, totals)] if table.groups else [])


def _of_groups(groups: Sequence[TensorGroup], totals: Callable[[NDArray[np.int64]], Aggregation]) -> Aggregation:
    """Return the sums over the tensors of each group. Those of groups of the same size are computed together."""
    same: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        same.setdefault(len(group.tensors), []).append(position)
    parts = [totals(np.array([groups[position].tensors for position in of_size])) for of_size in same.values()]
    order = np.argsort(np.concatenate(list(same.values())))
    joined = Aggregation.joined(parts)
    return joined.columns(order)


def _products(table: UpdateTable, half: str | None) -> tuple[Array, tuple[str, ...], bool]:
    """Return the Gram matrices, the names of their vectors, and whether the vector of an estimate was logged."""
    if half is None or half in table.vectors:
        return table.gram, table.vectors, True
    # A vector that was not logged is replaced by NaN and marked as not known: the run has not failed.
    padded = np.pad(table.gram, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)
    return padded, (*table.vectors, half), False


def _all_corrected(table: UpdateTable, model: Aggregation, parts: Sequence[Aggregation]) -> tuple[Aggregation, ...]:
    """Correct the pairs of the model, and of its tensors and groups."""
    change = (table.comparable_next_loss - table.loss)[:, None]
    rate = model.rate[:, None]
    found = [_corrected(model, change[:, 0], model.pair, model.update_floor)]
    for part in parts:
        # A tensor's share of the loss change is computed from the model's pair.
        known = replace(part, known=part.known & model.known[:, None], finite=part.finite & model.finite[:, None])
        # The g of the model divided by the learning rate of the tensor, as the g of the tensor is.
        factor = np.where(part.rate == rate, 1.0, rate / part.rate)
        of_model = geometry.scaled(model.pair[:, None], factor)
        found.append(_corrected(known, change, of_model, model.update_floor[:, None] * factor))
    return tuple(found)


def _corrected(aggregation: Aggregation, change: Array, model: Pair, model_floor: Array) -> Aggregation:
    """Correct the negative gradient along the displacement, which requires the losses of both states."""
    floors = aggregation.update_floor, model_floor
    floor = discrete_time.correction_floor(aggregation.pair, aggregation.rate, change, model, floors)
    return replace(
        aggregation,
        pair=discrete_time.corrected(aggregation.pair, aggregation.rate, change, model),
        known=aggregation.known & np.isfinite(change),
        gradient_floor=aggregation.gradient_floor + floor,
        gradient_norm=None,
    )


def _with_time(
    model: Aggregation, extended: NDArray[np.bool_], slope: Array | None, estimate: GradientEstimate
) -> Aggregation:
    """Extend the model by time, in the runs that log dL/dt."""
    if slope is None:
        return model
    # The direction of an update extended by time depends on eta.
    rate = np.where(extended & ~model.rate_known, np.nan, model.rate)
    with_time = geometry.with_time(model.pair, slope)
    with_time = replace(with_time, alignment=np.where(np.isnan(rate), np.nan, with_time.alignment))
    columns = zip(astuple(with_time), astuple(model.pair), strict=True)
    norm = model.gradient_norm
    return replace(
        model,
        rate=rate,
        pair=Pair(*(np.where(extended, new, old) for new, old in columns)),
        finite=model.finite & ~(extended & np.isinf(slope)),
        # A Hessian-vector product of the parameters does not include the change of the gradient with time.
        known=model.known & ~(extended & (np.isnan(slope) | (estimate.half == HVP))),
        gradient_norm=norm if norm is None else np.where(extended, np.hypot(norm, slope), norm),
    )


def without_decay(
    table: UpdateTable, descent: str, with_decay: Sequence[Aggregation]
) -> tuple[Aggregation, Aggregation]:
    """Compute the pairs of the updates without decoupled weight decay, d + eta lambda theta_t.

    The estimate of the negative gradient is the same as with decay. In particular, a corrected gradient is that
    along the complete displacement, to which the change of the loss belongs.

    Parameters
    ----------
    table : UpdateTable
        With the coefficients lambda (``weight_decay``). If they are not known, or if several updates lie between
        two logged states, the decay and the pairs are unknown.
    descent : str
        Estimate of the negative gradient.
    with_decay : sequence of Aggregation
        Model and tensors with decay, from `model_and_tensors`. Groups are ignored.

    Returns
    -------
    model, tensors : Aggregation

    Notes
    -----
    With s = |d| + eta lambda |theta|, each inner product of the ledger is off by at most e = 1e-14 of the norms
    (`natgrad.theory.geometry.LEDGER_ERROR`), so the square q of the rest is off by at most e s^2, and its product
    with y by e |y| s. Together they change the angle as an error of the rest of norm ``2 e s (1 + s / sqrt(q))``
    does, which is part of the largest error of the update. Where q <= 2 e s^2, decay cancels the rest of the update
    completely. The rest of that tensor is then unverifiable, and at most ``2 sqrt(e) s``.
    """
    estimate = _ESTIMATES[descent]
    model, tensors, *_ = with_decay
    gram, vectors, _ = _products(table, estimate.half)
    index = {name: position for position, name in enumerate(vectors)}
    correction = np.zeros(len(gram))
    if estimate.corrected:
        before, *_ = _uncorrected(replace(table, groups=()), estimate)
        # The multiple of the displacement that the correction adds to the gradient.
        correction = (
            -discrete_time.correction(before.rate, table.comparable_next_loss - table.loss, before.pair)
            / before.rate
        )
    share = _decayed_share(table, np.where(tensors.rate_known, tensors.rate, np.nan))
    rest = _rest(gram, index, share, correction[:, None])
    cancelled, length = rest.cancelled, rest.length
    sizes, roundoff, underflow = _rounding(table.layout)
    of_parts = geometry.pair(rest.products, vectors, model.rate[:, None], sizes, half=estimate.half)
    of_model = geometry.direct_sum([of_parts[:, tensor] for tensor in range(len(sizes))])
    if table.tensor_learning_rate is not None:
        of_parts = geometry.pair(rest.products, vectors, tensors.rate, sizes, half=estimate.half)
    known = ~np.isnan(share)

    # The error of the update: rounding of theta_t, and of the inner products.
    stored = np.abs(share) * geometry.rounding_error(tensors.parameter_norm, roundoff, underflow)
    stored += tensors.update_floor * tensors.rate
    lost = np.where(cancelled, 2.0 * np.sqrt(geometry.LEDGER_ERROR) * length, 0.0)
    error = np.where(cancelled, lost, _cancellation(length, of_parts.update_norm * tensors.rate))
    model_error = _cancellation(_norm(length, axis=1), of_model.update_norm * model.rate) + _norm(lost, axis=1)
    # The error of the component of y across the rest.
    across = np.where(share == 0, 0.0, geometry.combination_floor(rest.across_length, of_parts))
    # In one dimension, y has no component across the rest, but the model has that part of y across its rest.
    of_lines = of_parts.gradient_norm * np.minimum(
        geometry.safe_divide(error, of_parts.update_norm * tensors.rate), 1.0
    )
    across_model = np.where((sizes == 1) & (share != 0), of_lines, across)
    of_tensors = replace(of_parts, update_square=np.where(cancelled, np.nan, of_parts.update_square))
    found = replace(
        model,
        pair=of_model,
        known=model.known & known.all(axis=1),
        update_floor=(_norm(stored, axis=1) + model_error) / model.rate,
        gradient_floor=model.gradient_floor + _norm(across_model, axis=1),
        displacement_norm=of_model.update_norm * model.rate,
    )
    slope = table.loss_time_derivative
    if slope is not None:
        # The correction also changes the element of y for time, whose displacement is eta.
        slope = slope + correction * model.rate
    return (
        replace(_with_time(found, table.extended(), slope, estimate), gradient_norm=model.gradient_norm),
        replace(
            tensors,
            pair=of_tensors,
            known=tensors.known & known & ~cancelled,
            update_floor=(stored + error) / tensors.rate,
            gradient_floor=tensors.gradient_floor + across,
            displacement_norm=of_tensors.update_norm * tensors.rate,
        ),
    )


def _decayed_share(table: UpdateTable, rate: Array) -> Array:
    """Return eta lambda, the share of theta_t that decays in each update; NaN where it is not known."""
    decay = np.full(rate.shape, np.nan) if table.weight_decay is None else table.weight_decay
    # If several updates lie between two logged states, the parameters that decay are unknown.
    return np.where(decay == 0, 0.0, np.where(table.spans[:, None] == 1, rate * decay, np.nan))


@dataclass(frozen=True)
class _Rest:
    """The rest of updates without decay.

    Attributes
    ----------
    products : array
        Gram matrices in which ``displacement`` is d + share theta, ``gradient`` is the corrected gradient, and
        ``residual`` is its residual.
    cancelled : bool array
        True if decay cancels the rest completely. The square of the displacement is then 0.
    length : array
        Sum of the norms of d and share theta; 0 if nothing decays.
    across_length : array
        Sum of the norms of the vectors that make up the residual; 0 if nothing decays.
    """

    products: Array
    cancelled: NDArray[np.bool_]
    length: Array
    across_length: Array


def _rest(gram: Array, index: Mapping[str, int], share: Array, correction: Array) -> _Rest:
    """Return the products of d + share theta, and of the gradient + correction d."""
    moved = gram.copy()
    parameter, displacement, gradient, residual = (
        index[name] for name in ("parameter", "displacement", "gradient", "residual")
    )

    def norm(vector: int) -> Array:
        return np.sqrt(gram[..., vector, vector])

    def add(target: int, source: int, factor: Array) -> None:
        # 0 times an infinite product is 0.
        factor = factor[..., None]
        moved[..., target, :] += np.where(factor == 0, 0.0, factor * moved[..., source, :])
        moved[..., :, target] += np.where(factor == 0, 0.0, factor * moved[..., :, source])

    def replaced(target: int, source: int, where: NDArray[np.bool_]) -> None:
        moved[..., target, :] = np.where(where[..., None], moved[..., source, :], moved[..., target, :])
        moved[..., :, target] = np.where(where[..., None], moved[..., :, source], moved[..., :, target])

    square, along = gram[..., displacement, displacement], gram[..., gradient, displacement]
    # The ratio c of the residual is not known if the square of the displacement is not accurate.
    inexact = square < geometry.EXACT_NORM**2
    ratio = np.where(inexact, 0.0, geometry.safe_divide(along - gram[..., residual, displacement], square))
    replaced(residual, gradient, inexact)
    ratio = ratio + correction
    add(gradient, displacement, np.broadcast_to(correction, share.shape))
    decayed = np.abs(share) * norm(parameter)
    length = np.where(share == 0, 0.0, norm(displacement) + decayed)
    own = square + share * (2.0 * gram[..., displacement, parameter] + share * gram[..., parameter, parameter])
    cancelled = (share != 0) & (own <= 2.0 * geometry.LEDGER_ERROR * length**2)
    best = geometry.safe_divide(
        moved[..., gradient, displacement] + share * moved[..., gradient, parameter], np.maximum(own, 0.0)
    )
    best = np.where(share == 0, ratio, np.where(cancelled, 0.0, best))
    add(residual, displacement, ratio - best)
    add(residual, parameter, -best * share)
    across_length = norm(residual) + np.abs(ratio - best) * norm(displacement) + np.abs(best) * decayed
    add(displacement, parameter, share)
    # Its products with other vectors are known, and are a part of those of the model.
    moved[..., displacement, displacement] = np.where(cancelled, 0.0, moved[..., displacement, displacement])
    return _Rest(moved, cancelled, length, np.where(share == 0, 0.0, across_length))


def _cancellation(length: Array, norm: Array) -> Array:
    """Return the largest error 2 e s (1 + s / norm) of the rest, see `without_decay`."""
    share = np.where(norm > 0, geometry.safe_divide(length, norm), np.inf)
    return np.where(length == 0, 0.0, 2.0 * geometry.LEDGER_ERROR * length * (1.0 + share))


def _rounding(layout: Layout) -> tuple[NDArray[np.int64], Array, Array]:
    """Return the sizes of the tensors, and the arguments of `geometry.rounding_error` for their parameters."""
    sizes = np.array([tensor.size for tensor in layout.tensors])
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    return sizes, roundoff, np.array([underflow_error(tensor.dtype) for tensor in layout.tensors]) * np.sqrt(sizes)


def _norm(values: Array, axis: int) -> Array:
    return np.asarray(np.sqrt(np.square(values).sum(axis=axis)))


def _rounding_error(norm: Array, sizes: NDArray[np.int64], dtype: str) -> Array:
    return geometry.rounding_error(norm, unit_roundoff(dtype), underflow_error(dtype) * np.sqrt(sizes))
