"""Recover the gradient of an update from the states of the optimizer before and after it, rule by rule.

With the state m before and m' after an update, and the gradient h that entered the rule:

========================  ===============================================================================
Adam, AdamW, NAdam,       m' = b1 m + (1 - b1) h for the first moment (torch.optim)
RAdam, Adamax
Lion                      m' = b2 m + (1 - b2) h (Chen et al., 2023)
SGD with momentum         m' = mu m + (1 - dampening) h, and m' = h in the first update (torch.optim)
Muon                      m' = mu m + (1 - mu) h (torch.optim)
RMSprop, centered         m' = alpha m + (1 - alpha) h for the mean of the gradient (torch.optim)
RMSprop, momentum         m' = mu m + h / (sqrt(v') + epsilon) (torch.optim)
RMSprop, Adagrad,         h is proportional to the displacement, by factors that the state contains (torch.optim)
Adadelta, Adafactor, SGD
========================  ===============================================================================

If weight decay is coupled, h is the gradient plus the decay times theta; if the optimizer maximizes, the gradient
enters with the opposite sign. All functions work on a slice of a tensor, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RULES", "Rule", "Slice", "Update", "complete_factors", "orthogonalized"]

Array = NDArray[np.float64]

_ROUNDINGS = 4.0
"""Rounding errors of a stored element, in units of the roundoff: those of its operations and of its result."""


@dataclass(frozen=True)
class Update:
    """An update of a tensor, or k of them: the values that all of its elements share.

    Attributes
    ----------
    options : mapping
        Options of the parameter group, by their names in torch; Booleans are 0 and 1.
    count : float
        Number of updates that the state after it counts; NaN if it counts none.
    span : int
        Number of updates k between the states.
    rate : float
        Learning rate.
    decoupled : bool
        The decay is subtracted from the parameters, and not added to the gradient.
    state_roundoff, parameter_roundoff : float
        Unit roundoff of the stored state and of the stored parameters.
    numbers : mapping
        Numbers of the state after it.
    context : mapping
        What a rule needs to know about the complete tensor; see `Rule.context`.
    """

    options: Mapping[str, float]
    count: float
    span: int
    rate: float
    decoupled: bool
    state_roundoff: float
    parameter_roundoff: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decay(self) -> float:
        """Coefficient of weight decay."""
        return self.options.get("weight_decay", 0.0)

    @property
    def coupled_decay(self) -> float:
        """Coefficient of the decay that is added to the gradient."""
        return 0.0 if self.decoupled else self.decay

    def option(self, name: str) -> float:
        """Return an option; 0 if it is not saved."""
        return self.options.get(name, 0.0)

    def correction(self, beta: str) -> float:
        """Return 1 - beta^count, the bias of a moment; 1 if the rule does not correct it."""
        return 1.0 if self.options.get("bias_correction") == 0 else 1.0 - self.options[beta] ** self.count


class Slice:
    """Elements of a tensor and of its state, in float64, which are read on first use.

    Parameters
    ----------
    start : int
        First element.
    read : callable
        Return an array of the state before (0) or after (1) the update, by its name, or ``parameter``. Arrays that
        do not exist before the first update are zero.
    first : bool
        There is no state before the update.
    """

    def __init__(self, start: int, read: Callable[[int, str], Array], *, first: bool = False) -> None:
        self.start, self.first = start, first
        self.before, self.after = (_Arrays(read, index) for index in range(2))

    @property
    def parameter(self) -> Array:
        """Parameters before the update."""
        return self.before["parameter"]

    @property
    def next_parameter(self) -> Array:
        """Parameters after the update."""
        return self.after["parameter"]

    @cached_property
    def displacement(self) -> Array:
        """Change of the parameters."""
        return self.next_parameter - self.parameter


class _Arrays(dict[str, Array]):
    """Arrays of one state, each of which is read once."""

    def __init__(self, read: Callable[[int, str], Array], index: int) -> None:
        super().__init__()
        self._read, self._index = read, index

    def __missing__(self, name: str) -> Array:
        self[name] = self._read(self._index, name)
        return self[name]


@dataclass(frozen=True)
class Rule:
    """An update rule that can be inverted.

    Attributes
    ----------
    name : str
    arrays : callable
        Return the names of the arrays of the state that the rule needs, for an `Update`.
    inverse : callable
        Return the gradient h that entered the rule, and the largest error of it that rounding causes.
    step : callable
        Return the displacement that h causes, without decoupled decay, and the second moment after the update,
        by its name. None if this needs the complete tensor and it is not in the context.
    strength : callable
        Return what agreement of this displacement with the logged one proves for an `Update`.
    from_displacement : bool
        The inverse uses the displacement and the learning rate. It holds for a single update only.
    single : bool
        The inverse holds for a single update only, although it uses no displacement.
    slack : float
        Error of the displacement that the arithmetic of the rule causes, for any dtype of the state.
    context : str
        What the rule needs of the complete tensor: "", ``factors`` (`complete_factors`) or ``orthogonalized``.
    """

    name: str
    arrays: Callable[[Update], tuple[str, ...]]
    inverse: Callable[[Update, Slice], tuple[Array, Array]]
    step: Callable[[Update, Slice, Array], tuple[Array, dict[str, Array]]]
    strength: Callable[[Update], str]
    from_displacement: bool = False
    single: bool = False
    context: str = ""
    slack: float = 0.0

    def gradient(self, update: Update, part: Slice) -> tuple[Array, Array]:
        """Return the gradient, and the largest error of its elements that rounding causes."""
        entered, error = self.inverse(update, part)
        coupled = update.coupled_decay
        error = error + _ROUNDINGS * update.state_roundoff * np.abs(entered)
        if coupled:
            roundoff = max(update.state_roundoff, update.parameter_roundoff)
            error = error + _ROUNDINGS * roundoff * coupled * np.abs(part.parameter)
            if update.span > 1:  # the parameters change while the decay is added to the gradient
                error = error + coupled * np.abs(part.displacement)
            entered = entered - coupled * part.parameter
        return (-entered if update.option("maximize") else entered), error

    def entered(self, update: Update, part: Slice, gradient: Array) -> Array:
        """Return h for a gradient."""
        signed = -gradient if update.option("maximize") else gradient
        return signed + update.coupled_decay * part.parameter

    def displacement(self, update: Update, part: Slice, gradient: Array) -> tuple[Array, dict[str, Array]]:
        """Return the displacement that a gradient causes, and the second moment after the update."""
        moved, moments = self.step(update, part, self.entered(update, part, gradient))
        return (moved - update.rate * update.decay * part.parameter if update.decoupled else moved), moments


# Means of the gradient -----------------------------------------------------------------------------------------


def _from_mean(update: Update, part: Slice, array: str, keep: float, total: float) -> tuple[Array, Array]:
    """Invert m' = keep^k m + a sum of h, where the weights of the k gradients add up to ``total``."""
    old, new = part.before[array], part.after[array]
    kept = keep**update.span
    sizes = np.abs(new) + kept * np.abs(old)
    # Each of the updates rounds; the errors decay like the mean itself.
    roundings = _ROUNDINGS * min(update.span, 1.0 / max(1.0 - keep, 1e-16))
    return (new - kept * old) / total, roundings * update.state_roundoff * sizes / total


def _exponential(array: str, option: str) -> Callable[[Update, Slice], tuple[Array, Array]]:
    def inverse(update: Update, part: Slice) -> tuple[Array, Array]:
        keep = update.options[option]
        return _from_mean(update, part, array, keep, 1.0 - keep**update.span)

    return inverse


def _momentum_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    keep, new = update.options["momentum"], 1.0 - update.option("dampening")
    # The first buffer is the gradient itself, without dampening.
    powers = [keep**index for index in range(update.span)]
    total = new * sum(powers[:-1] if part.first else powers) + (powers[-1] if part.first else 0.0)
    return _from_mean(update, part, "momentum_buffer", keep, total)


def _second_moment(update: Update, part: Slice, entered: Array) -> Array:
    keep = update.options["beta2"]
    return keep * part.before["exp_avg_sq"] + (1.0 - keep) * entered**2


def _first_moment(update: Update, part: Slice, entered: Array) -> Array:
    keep = update.options["beta1"]
    return keep * part.before["exp_avg"] + (1.0 - keep) * entered


def _adam_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    mean, square = _first_moment(update, part, entered), _second_moment(update, part, entered)
    largest = np.maximum(part.before["max_exp_avg_sq"], square) if update.option("amsgrad") else square
    scale = np.sqrt(largest / update.correction("beta2")) + update.option("epsilon")
    return -update.rate * mean / update.correction("beta1") / scale, {"exp_avg_sq": square}


def _nadam_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    mean, square = _first_moment(update, part, entered), _second_moment(update, part, entered)
    beta, decay = update.options["beta1"], update.options["momentum_decay"]
    now, following = (beta * (1.0 - 0.5 * 0.96 ** (count * decay)) for count in (update.count, update.count + 1.0))
    product = update.numbers["mu_product"]
    mixed = (1.0 - now) / (1.0 - product) * entered + following / (1.0 - product * following) * mean
    scale = np.sqrt(square / update.correction("beta2")) + update.option("epsilon")
    return -update.rate * mixed / scale, {"exp_avg_sq": square}


def _radam_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    mean, square = _first_moment(update, part, entered), _second_moment(update, part, entered)
    beta, corrected = update.options["beta2"], update.correction("beta2")
    limit = 2.0 / (1.0 - beta) - 1.0
    length = limit - 2.0 * update.count * beta**update.count / corrected
    moved = -update.rate * mean / update.correction("beta1")
    if length > 5.0:
        variance = (length - 4.0) * (length - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * length)
        moved = moved * math.sqrt(corrected * variance) / (np.sqrt(square) + update.option("epsilon"))
    return moved, {"exp_avg_sq": square}


def _adamax_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    mean = _first_moment(update, part, entered)
    keep = update.options["beta2"]
    largest = np.maximum(keep * part.before["exp_inf"], np.abs(entered) + update.option("epsilon"))
    return -update.rate / update.correction("beta1") * _quotient(mean, largest), {}


def _lion_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    return -update.rate * np.sign(_first_moment(update, part, entered)), {}


def _momentum_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    keep, new = update.options["momentum"], 1.0 - update.option("dampening")
    buffer = entered if part.first else keep * part.before["momentum_buffer"] + new * entered
    return -update.rate * (entered + keep * buffer if update.option("nesterov") else buffer), {}


def _muon_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    matrix = update.context["orthogonalized"][part.start : part.start + len(entered)]
    return -update.rate * update.context["adjustment"] * matrix, {}


# Displacements -------------------------------------------------------------------------------------------------


def _quotient(numerator: Array, denominator: Array) -> Array:
    """Divide, returning 0 where both are 0, as for elements that never had a gradient."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _from_displacement(update: Update, part: Slice, rate: float, scale: Array) -> tuple[Array, Array]:
    """Invert d = -rate h / scale - decoupled decay."""
    decay = update.rate * update.decay if update.decoupled else 0.0
    moved = part.displacement + decay * part.parameter
    sizes = np.abs(part.next_parameter) + np.abs(part.parameter)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = (
            _ROUNDINGS * update.parameter_roundoff * sizes / rate * scale if rate else np.full(len(moved), np.inf)
        )
        return (-moved / rate * scale if rate else np.full(len(moved), np.nan)), error


def _sgd_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    return _from_displacement(update, part, update.rate, np.ones_like(part.parameter))


def _sgd_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    return -update.rate * entered, {}


def _adagrad_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    rate = update.rate / (1.0 + (update.count - 1.0) * update.option("lr_decay"))
    return _from_displacement(update, part, rate, np.sqrt(part.after["sum"]) + update.option("epsilon"))


def _adagrad_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    rate = update.rate / (1.0 + (update.count - 1.0) * update.option("lr_decay"))
    return -rate * _quotient(entered, np.sqrt(part.after["sum"]) + update.option("epsilon")), {}


def _adadelta_scale(update: Update, part: Slice) -> Array:
    epsilon = update.option("epsilon")
    return np.asarray(np.sqrt(part.after["square_avg"] + epsilon) / np.sqrt(part.before["acc_delta"] + epsilon))


def _adadelta_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    return _from_displacement(update, part, update.rate, _adadelta_scale(update, part))


def _adadelta_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    return -update.rate * entered / _adadelta_scale(update, part), {}


def _rmsprop_scale(update: Update, part: Slice) -> Array:
    square = part.after["square_avg"]
    if update.option("centered"):
        square = np.maximum(square - part.after["grad_avg"] ** 2, 0.0)
    return np.asarray(np.sqrt(square) + update.option("epsilon"))


def _rmsprop_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    if update.option("centered"):
        return _exponential("grad_avg", "alpha")(update, part)
    scale = _rmsprop_scale(update, part)
    if not update.option("momentum"):
        return _from_displacement(update, part, update.rate, scale)
    keep = update.options["momentum"]
    scaled, error = _from_mean(update, part, "momentum_buffer", keep, 1.0)
    return scaled * scale, error * scale


def _rmsprop_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    moved = _quotient(entered, _rmsprop_scale(update, part))
    if update.option("momentum"):
        moved = update.options["momentum"] * part.before["momentum_buffer"] + moved
    return -update.rate * moved, {}


def _adafactor_scale(update: Update, part: Slice) -> Array:
    """Return sqrt of the estimated second moment, from the factors of the complete tensor."""
    known = update.context
    if "variance" in known:
        square = known["variance"][part.start : part.start + len(part.parameter)]
    else:
        rows, columns = known["shape"]
        row, column = np.divmod(np.arange(part.start, part.start + len(part.parameter)), columns)
        batch = row // rows
        square = known["row_var"][row] * known["col_var"][batch * columns + column] / known["row_mean"][batch]
    return np.asarray(np.sqrt(np.maximum(square, known["epsilon"] ** 2)))


def _adafactor_inverse(update: Update, part: Slice) -> tuple[Array, Array]:
    rate = update.context["rate"] / update.context.get("clipping", 1.0)
    return _from_displacement(update, part, rate, _adafactor_scale(update, part))


def _adafactor_step(update: Update, part: Slice, entered: Array) -> tuple[Array, dict[str, Array]]:
    rate = update.context["rate"] / update.context.get("clipping", 1.0)
    return -rate * entered / _adafactor_scale(update, part), {}


# Complete tensors ----------------------------------------------------------------------------------------------


def complete_factors(
    update: Update,
    shape: tuple[int, ...],
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    parameter_square: float,
    sums: Callable[[Update], float],
    epsilon: float,
) -> dict[str, Any]:
    """Return what Adafactor needs to know about a complete tensor.

    The update is divided by its root mean square if that is above ``d``. The means of the squared gradient in the
    state give this divisor.

    Parameters
    ----------
    update : Update
    shape : tuple of int
    before, after : mapping
        ``row_var`` and ``col_var``, or ``variance``, of both states.
    parameter_square : float
        Sum of the squares of the parameters before the update.
    sums : callable
        Return the sum of the squares of the recovered gradient, without the divisor.
    epsilon : float
        If the group does not state the smallest value of the second moment, it is the square of this.
    """
    size = math.prod(shape)
    steps = update.count
    smallest = update.options.get("eps/0", epsilon)
    rate = max(update.options["eps/1"], math.sqrt(parameter_square / size)) * min(update.rate, steps**-0.5)
    known: dict[str, Any] = {"rate": rate, "epsilon": smallest}
    if "variance" in after:
        known["variance"] = after["variance"]
        array = "variance"
    else:
        rows, columns = shape[-2:]
        means = after["row_var"].reshape(-1, rows).mean(axis=1)
        known |= {"shape": (rows, columns), "row_var": after["row_var"], "col_var": after["col_var"]}
        known["row_mean"] = np.maximum(means, smallest)
        array = "row_var"
    weight = steps ** update.options["beta2_decay"]
    mean_square = float(((after[array] - (1.0 - weight) * before[array]) / weight).mean())
    unscaled = sums(replace(update, context=known))
    known["clipping"] = max(1.0, math.sqrt(max(mean_square, 0.0) * size / unscaled)) if unscaled > 0 else 1.0
    return known


def orthogonalized(update: Update, matrix: Array) -> dict[str, Any]:
    """Return the direction of Muon for a complete matrix, as torch computes it in bfloat16, and its factor.

    Parameters
    ----------
    update : Update
    matrix : array, shape (rows, columns)
        Momentum, or its mean with the gradient.
    """
    rows, columns = matrix.shape
    a, b, c = (np.float32(update.options[f"ns_coefficients/{index}"]) for index in range(3))
    steps, epsilon = int(update.options["ns_steps"]), update.options["epsilon"]
    x = _bfloat16(matrix.astype(np.float32))
    x = x.T if rows > columns else x
    norm = _bfloat16(np.array([np.sqrt(np.square(x, dtype=np.float64).sum())], np.float32))[0]
    x = _bfloat16(x / max(norm, np.float32(epsilon)))
    for _ in range(steps):
        gram = _bfloat16(x @ x.T)
        polynomial = _bfloat16(b * gram + c * (gram @ gram))
        x = _bfloat16(a * x + polynomial @ x)
    x = x.T if rows > columns else x
    factor = math.sqrt(max(1.0, rows / columns))
    if update.option("adjust_lr_fn"):
        factor = 0.2 * math.sqrt(max(rows, columns))
    return {"orthogonalized": x.astype(np.float64).ravel(), "adjustment": factor}


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.asarray((rounded & np.uint32(0xFFFF0000)).view(np.float32))


# The rules -----------------------------------------------------------------------------------------------------

VERIFIED, RATE_ONLY, NONE = "verified", "rate only", "none"


def _unless_coupled(update: Update) -> str:
    return RATE_ONLY if update.coupled_decay else VERIFIED


def _adam_arrays(update: Update) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if update.option("amsgrad") else ()))


def _rmsprop_arrays(update: Update) -> tuple[str, ...]:
    centered, momentum = update.option("centered"), update.option("momentum")
    return ("square_avg", *(("grad_avg",) if centered else ()), *(("momentum_buffer",) if momentum else ()))


_MEAN = _exponential("exp_avg", "beta1")

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("Adam", _adam_arrays, _MEAN, _adam_step, _unless_coupled),
        Rule("NAdam", _adam_arrays, _MEAN, _nadam_step, _unless_coupled),
        Rule("RAdam", _adam_arrays, _MEAN, _radam_step, _unless_coupled),
        Rule("Adamax", lambda update: ("exp_avg", "exp_inf"), _MEAN, _adamax_step, _unless_coupled),
        Rule("Lion", lambda update: ("exp_avg",), _exponential("exp_avg", "beta2"), _lion_step, _unless_coupled),
        Rule(
            "Muon",
            lambda update: ("momentum_buffer",),
            _exponential("momentum_buffer", "momentum"),
            _muon_step,
            lambda update: VERIFIED if update.option("nesterov") else RATE_ONLY,
            context="orthogonalized",
            slack=2.0**-5,  # five iterations in bfloat16, whose products torch may add in another order
        ),
        Rule(
            "SGD with momentum",
            lambda update: ("momentum_buffer",),
            _momentum_inverse,
            _momentum_step,
            lambda update: RATE_ONLY,
        ),
        Rule("SGD", lambda update: (), _sgd_inverse, _sgd_step, lambda update: NONE, from_displacement=True),
        Rule(
            "RMSprop",
            _rmsprop_arrays,
            _rmsprop_inverse,
            _rmsprop_step,
            lambda update: NONE,
            from_displacement=True,
        ),
        Rule(
            "RMSprop with momentum",
            _rmsprop_arrays,
            _rmsprop_inverse,
            _rmsprop_step,
            lambda update: RATE_ONLY,
            single=True,
        ),
        Rule("centered RMSprop", _rmsprop_arrays, _rmsprop_inverse, _rmsprop_step, lambda update: RATE_ONLY),
        Rule(
            "Adagrad",
            lambda update: ("sum",),
            _adagrad_inverse,
            _adagrad_step,
            lambda update: NONE,
            from_displacement=True,
        ),
        Rule(
            "Adadelta",
            lambda update: ("square_avg", "acc_delta"),
            _adadelta_inverse,
            _adadelta_step,
            lambda update: NONE,
            from_displacement=True,
        ),
        Rule(
            "Adafactor",
            lambda update: (),
            _adafactor_inverse,
            _adafactor_step,
            lambda update: NONE,
            from_displacement=True,
            context="factors",
        ),
    )
}
"""Rules that can be inverted, by name."""
