"""Define the inputs from which result variables are computed, and the declaration of a variable.

`Updates` holds the updates of a run in windows, for one aggregation and one estimate of the gradient. An
`UpdateVariable` declares what it needs, the updates at which it is defined, its function and its metadata. The
metadata are here and not in `natgrad.schema`, because functions and metadata cannot be understood separately.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.results.pairs import Aggregation
from natgrad.results.rounding import round_bits
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT, DESCENTS, GAMMA, GROUP, STEP, TENSOR, VECTORS, WINDOW
from natgrad.schema.variables import Status, Variable
from natgrad.theory import discrete_time, geometry, windows
from natgrad.theory.geometry import Pair
from natgrad.theory.windows import LONGEST_WINDOW

__all__ = [
    "LONGEST_WINDOW",
    "Defined",
    "UpdateVariable",
    "Updates",
]

Array = NDArray[np.float64]

EVERY_AGGREGATION = ("model", "tensor", "group")
_AXES = (STEP, TENSOR, DESCENT, WINDOW, GAMMA)


# Inputs of variables ------------------------------------------------------------------------------------------


class Updates:
    """The updates of a run in windows of m, for one aggregation and one estimate of the gradient.

    This is the argument of the functions that compute variables. Properties are computed once and shared by all
    variables. Arrays have the shape (updates,) for the model, (updates, tensors) for tensors and (updates, groups)
    for groups. Arrays for windows have m - 1 fewer updates.

    Attributes
    ----------
    table : UpdateTable
        The ledger and the scalars of every update.
    aggregation : Aggregation
        Pairs of single updates, and the largest errors by rounding.
    aggregation_name : str
        ``model``, ``tensor`` or ``group``.
    descent : str
        Estimate of the negative gradient, one of `natgrad.schema.names.DESCENTS`.
    m : int
        Number of consecutive updates in a window.
    gammas : float64 array
        Weights of the one-parameter family.
    longest : int
        Longest requested window.
    run : slice
        For a variable without the dimension ``step``: the updates of the run for which it is computed.
    effective_lengths : bool array, optional
        For such a variable: the lengths of windows that are effective, if they are known already.
    """

    def __init__(
        self,
        table: UpdateTable,
        aggregation: Aggregation,
        descent: str,
        m: int = 1,
        *,
        gammas: Sequence[float] = (),
        longest: int = 1,
        of_gradient: Updates | None = None,
        run: slice = slice(None),
        effective_lengths: NDArray[np.bool_] | None = None,
    ) -> None:
        self.table, self.aggregation, self.descent, self.m = table, aggregation, descent, m
        self.aggregation_name = aggregation.dimensions[1] if len(aggregation.dimensions) > 1 else "model"
        self.gammas, self.longest, self.run = np.asarray(gammas, np.float64), longest, run
        self._of_gradient = of_gradient
        self._effective_lengths = effective_lengths

    @property
    def of_gradient(self) -> Updates:
        """The same windows, with the gradient itself as the estimate."""
        # An attribute would be a reference to itself, and keep the arrays until Python searches for cycles.
        return self if self._of_gradient is None else self._of_gradient

    @cached_property
    def pair(self) -> Pair:
        """Pair of each window."""
        return geometry.window(self.aggregation.pair, self.m)

    @cached_property
    def update_floor(self) -> Array:
        """Largest norm of the error of g by rounding of the stored parameters."""
        return windows.rolling_norm(self.aggregation.update_floor, self.m)

    @cached_property
    def gradient_floor(self) -> Array:
        """Largest norm of the error of y by rounding of the stored values."""
        return windows.rolling_norm(self.aggregation.gradient_floor, self.m) / self.m

    @cached_property
    def gradient_norm(self) -> Array:
        """Norm of the negative gradient. The norm of the gradient itself is known without a learning rate."""
        if self.aggregation.gradient_norm is None:
            return self.pair.gradient_norm
        return windows.rolling_norm(self.aggregation.gradient_norm, self.m) / self.m

    @cached_property
    def status(self) -> NDArray[np.int8]:
        """Values of `natgrad.schema.variables.Status`."""
        # The smallest rate represents the window: it is NaN if any rate is, and not positive if any is not.
        rate = windows.consecutive(self.aggregation.rate, self.m).min(axis=-1)
        found = geometry.status(
            self.pair,
            # The direction of the update of a window depends on the ratios of the rates.
            learning_rate=rate if self.m == 1 else np.where(self.rate_known, rate, np.nan),
            finite=windows.consecutive(self.aggregation.finite, self.m).all(axis=-1),
            known=windows.consecutive(self.aggregation.known, self.m).all(axis=-1),
            update_floor=self.update_floor,
        )
        if self.table.skipped is None:
            return found
        skipped = windows.consecutive(self.table.skipped, self.m).any(axis=-1)
        skipped = skipped.reshape(-1, *[1] * (found.ndim - 1))
        return np.where(skipped, np.int8(Status.SKIPPED), found)

    @cached_property
    def rate_known(self) -> NDArray[np.bool_]:
        """True if the learning rates of all updates of the window are known."""
        return np.asarray(windows.consecutive(self.aggregation.rate_known, self.m).all(axis=-1))

    @cached_property
    def has_angle(self) -> NDArray[np.bool_]:
        """True if the angle is defined."""
        has_angle: NDArray[np.bool_] = self.status <= Status.OBTUSE
        return has_angle

    @cached_property
    def in_range(self) -> NDArray[np.bool_]:
        """True if the inner products of y and g neither underflow nor overflow."""
        in_range: NDArray[np.bool_] = ~np.isin(self.status, (Status.UNDERFLOW, Status.OVERFLOW))
        return in_range

    @cached_property
    def effective(self) -> NDArray[np.bool_]:
        """True if metrics exist."""
        effective: NDArray[np.bool_] = self.status == Status.EFFECTIVE
        return effective

    @cached_property
    def loss_decrease(self) -> Array:
        """L(t) - L(t+m), eq. (3)."""
        table, m = self.table, self.m
        return table.loss[: len(table.loss) - m + 1] - table.comparable_next_loss[m - 1 :]

    @cached_property
    def eigenvalues(self) -> tuple[Array, Array, Array]:
        """Largest, middle and smallest eigenvalue of the optimal metric."""
        return geometry.eigenvalues(self.pair)

    @cached_property
    def eigenvalue_bounds(self) -> tuple[Array, Array]:
        """Bounds of the spectrum of every metric (Props. 2 and 3)."""
        return geometry.eigenvalue_bounds(self.pair)

    @cached_property
    def family_eigenvalues(self) -> tuple[Array, Array, Array]:
        """Eigenvalues of the one-parameter family, gammas last."""
        return geometry.family_eigenvalues(self.pair, self.gammas)

    @cached_property
    def learning_rate_bounds(self) -> tuple[Array, Array]:
        """Bounds of eq. (18) for the Hessian of the averaged loss: a block for each step, divided by m."""
        table, m = self.table, self.m
        if table.hessian_min_eigenvalue is None:
            weakest = np.full(self.pair.alignment.shape, np.nan)
        else:
            # The logged Hessian is not that of the parameters extended by time.
            of_parameters = np.where(table.extended(), np.nan, table.hessian_min_eigenvalue)
            weakest = windows.consecutive(of_parameters, m).min(axis=-1) / m
        # g is the mean of the updates between two logged states, so a span of k steps moves by k learning rates.
        spans = windows.consecutive(table.spans, m).max(axis=-1)
        supremum, optimal = discrete_time.learning_rate_bounds(self.pair, weakest)
        return supremum / spans, optimal / spans

    # One run, for variables without the dimension step --------------------------------------------------------

    @property
    def _longest_tried(self) -> int:
        return windows.longest_tried(len(self.table.steps[self.run]), self.longest)

    @property
    def _follows(self) -> NDArray[np.bool_]:
        return self.table.follows()[self.run][: len(self.table.steps[self.run]) - 1]

    @cached_property
    def smallest_effective_window(self) -> tuple[Array, NDArray[np.int64]]:
        """Smallest length for which all windows are effective, and the number of these windows."""
        effective = self._effective_lengths
        if effective is None:
            terms = self.aggregation.window_terms(self.run)
            updates = len(terms.learning_rate)
            longest = min(self._longest_tried, updates)
            effective = windows.effective_lengths(terms, self._follows, updates, longest)
        return windows.smallest_length(effective, self._follows)

    @cached_property
    def smallest_decreasing_window(self) -> tuple[float, int]:
        """Smallest length of windows over which the loss always decreases, and the number of these windows."""
        loss, next_loss = self.table.loss[self.run], self.table.comparable_next_loss[self.run]
        return windows.smallest_decreasing(loss, next_loss, self._follows, self._longest_tried)


# Declaration of a variable ------------------------------------------------------------------------------------


class Defined(enum.Enum):
    """The updates at which a variable is defined. Elsewhere it has the fill value of its entry."""

    ALWAYS = enum.auto()
    IN_RANGE = enum.auto()
    WITH_ANGLE = enum.auto()
    WITH_METRIC = enum.auto()


@dataclass(frozen=True, kw_only=True)
class UpdateVariable(Variable):
    """A result variable of updates: its metadata, and the function that computes it.

    Attributes
    ----------
    compute : callable
        Takes `Updates` and returns an array with the dimensions of the variable except ``descent`` and ``window``.
        If the variable has these dimensions, the function is called once for each estimate of the gradient and each
        window. The array may omit the dimension ``tensor`` if all tensors have the same value. A variable without
        ``step`` has one value for the run (or for each tensor), computed for ``updates.run``.
    needs : tuple of str
        Vectors of the ledger and columns of `natgrad.results.inputs.UpdateTable` that the variable requires. If any
        is missing, the results do not contain the variable.
    aggregations : tuple of str
        Groups of the results that have the variable: some of ``model``, ``tensor`` and ``group``.
    descents : tuple of str
        Estimates of the negative gradient for which it is defined.
    defined : Defined
        Updates at which it is defined.
    needs_rate : bool
        It depends on the learning rate, and is not defined at updates for which the rate is unknown.
    fill : float, int or bool
        Value where the variable is not defined, and for windows that extend past the end of the run or a restart.
    comment : callable, optional
        Takes `Updates` and returns the attribute ``comment``, or an empty string if it has none.
    upper_bound : bool
        It is an upper bound, and is rounded upwards if it has fewer significant bits.
    """

    compute: Callable[[Updates], Any]
    needs: tuple[str, ...] = ()
    aggregations: tuple[str, ...] = EVERY_AGGREGATION
    descents: tuple[str, ...] = DESCENTS
    defined: Defined = Defined.ALWAYS
    needs_rate: bool = False
    fill: float = np.nan
    comment: Callable[[Updates], str] | None = None
    upper_bound: bool = False

    def __post_init__(self) -> None:
        unknown = {*self.needs} - {*VECTORS, *(field.name for field in fields(UpdateTable))}
        if unknown:
            raise InputError(
                f"variable {self.name!r} needs unknown quantities: {', '.join(sorted(unknown))}",
                remedy="use vectors of the ledger (natgrad.schema.names.VECTORS) or columns of UpdateTable",
            )
        if self.dimensions != tuple(axis for axis in _AXES if axis in self.dimensions):
            raise InputError(
                f"variable {self.name!r} has unknown or unordered dimensions {self.dimensions}",
                remedy=f"use dimensions from {', '.join(_AXES)}, in this order",
            )
        if self.significant_bits is not None and not 1 <= self.significant_bits <= 51:
            raise InputError(
                f"variable {self.name!r} cannot have {self.significant_bits} significant bits",
                why="the mantissa has 52",
                remedy="use 1 to 51 bits, or None for all of them",
            )
        required = {STEP, TENSOR} if self.defined is not Defined.ALWAYS or self.needs_rate else set()
        required |= {STEP, TENSOR, DESCENT} if self.descents != DESCENTS else set()
        if not required <= {*self.dimensions}:
            raise InputError(
                f"variable {self.name!r} lacks dimensions that its definition depends on",
                why=f"it has {self.dimensions}, but whether it is defined depends on {sorted(required)}",
                remedy="declare these dimensions, or declare the variable as defined everywhere",
            )

    def values(self, updates: Updates) -> NDArray[Any]:
        """Compute the variable, with the fill value where it is not defined.

        Raises
        ------
        InputError
            If the array does not have the shape that the dimensions of the variable require.
        """
        try:
            values = np.asarray(self.compute(updates))
        except Exception as error:
            error.add_note(f"raised by the function of the result variable {self.name!r}")
            raise
        self._require_shape(values, updates)
        if self.significant_bits is not None:
            values = round_bits(values, self.significant_bits, upwards=self.upper_bound)
        if values.dtype.kind in "iub" and np.isnan(self.fill) and self._may_be_undefined:
            values = values.astype(np.float64)
        if self.defined is Defined.ALWAYS and updates.descent in self.descents and not self.needs_rate:
            return values
        mask: NDArray[np.bool_] = np.full(updates.status.shape, updates.descent in self.descents)
        if self.needs_rate:
            mask &= updates.rate_known
        if self.defined is Defined.IN_RANGE:
            mask &= updates.in_range
        elif self.defined is Defined.WITH_ANGLE:
            mask &= updates.has_angle
        elif self.defined is Defined.WITH_METRIC:
            mask &= updates.effective
        if values.ndim < mask.ndim + (GAMMA in self.dimensions):
            values = values[:, None]  # the same for all tensors
        if GAMMA in self.dimensions:
            mask = mask[..., None]
        return np.where(mask, values, values.dtype.type(self.fill))

    @property
    def _may_be_undefined(self) -> bool:
        everywhere = self.defined is Defined.ALWAYS and self.descents == DESCENTS and not self.needs_rate
        return WINDOW in self.dimensions or not everywhere

    def _require_shape(self, values: NDArray[Any], updates: Updates) -> None:
        sizes = {
            STEP: len(updates.table.steps) - updates.m + 1,
            TENSOR: len(
                updates.table.groups if updates.aggregation_name == GROUP else updates.table.layout.tensors
            ),
            GAMMA: len(updates.gammas),
        }
        axes = [axis for axis in sizes if axis in self.dimensions]
        if updates.aggregation_name == "model":
            axes = [axis for axis in axes if axis != TENSOR]
        shape = tuple(sizes[axis] for axis in axes)
        without_tensors = tuple(sizes[axis] for axis in axes if axis != TENSOR)
        if values.shape != shape and not (STEP in axes and values.shape == without_tensors):
            raise InputError(
                f"variable {self.name!r} must have values of shape {shape}, got {values.shape}",
                where=f"{updates.aggregation_name}, descent {updates.descent}, window {updates.m}",
                why=f"its dimensions are {self.dimensions}",
                remedy="correct the function or the dimensions of the variable",
            )
