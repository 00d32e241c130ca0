"""Recover the gradient of a tensor from two states of its optimizer, and check it against the logged displacement.

The check applies the rule to the recovered gradient. Rounding limits what it can prove: the largest difference that
rounding explains is computed along with it, element by element. A larger difference is an error, because the rule,
the learning rate or the parameters are then not those of the update. A check proves nothing if its rounding exceeds
`_VISIBLE`, or if the displacement was used to recover the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import storage_dtype, unit_roundoff, widened
from natgrad.sources.base import StepReader
from natgrad.sources.optimizers.state import RuleState
from natgrad.sources.optimizers.update_rules import (
    NONE,
    RATE_ONLY,
    RULES,
    VERIFIED,
    Rule,
    Slice,
    Update,
    complete_factors,
    orthogonalized,
)
from natgrad.sources.steps import LoggedTensor

__all__ = ["GRADES", "RULE_NAMES", "Check", "NotInvertible", "TensorUpdate", "identified", "keeps_state"]

Array = NDArray[np.float64]

GRADES = (NONE, RATE_ONLY, VERIFIED)
"""Grades of a check, from one that proves nothing to one that proves the gradient."""

RULE_NAMES = (*RULES, "AdamW")
"""Names of the rules, in a fixed order."""

_SLICE = 1 << 13
"""Elements that are processed together: 64 KiB in float64, which fit into the cache, and for which the C library
reuses memory. From 128 KiB on, it maps pages for each array, which takes five times as long."""

_VISIBLE = 0.1
"""Largest rounding with which a check still proves something, relative to the displacement; for the second moment,
relative to its change by the gradient."""

_LARGEST_MATRIX = 1 << 22
"""Elements of the largest matrix whose direction under Muon is computed for the check."""

_RATE = "tensor_learning_rate"
"""Name of the learning rate among the options."""

_COARSE = ("bfloat16", "float16")


class NotInvertible(ValueError):
    """Error for a tensor whose rule cannot be inverted. The message names the rule and the reason."""


# Identification ------------------------------------------------------------------------------------------------


def identified(state: RuleState) -> tuple[Rule, bool | None]:
    """Return the rule of a tensor, and whether its weight decay is decoupled; None if this is unknown.

    Parameters
    ----------
    state : RuleState
        State after an update.

    Raises
    ------
    NotInvertible
        If the rule is unknown, or cannot be inverted.
    """
    if state.problem:
        raise NotInvertible(state.problem)
    options, arrays, names = state.options, state.arrays, {*state.arrays, *state.others}
    for name, (marks, why) in _REFUSED.items():
        if any(mark in options or mark in names for mark in marks):
            raise NotInvertible(f"{name} cannot be inverted: {why}")
    if "maximize" in options and "beta1" in options and "weight_decay" not in options:
        raise NotInvertible("SparseAdam cannot be inverted: it updates only the rows that have a gradient")
    known = {*_KNOWN_NAMES, *arrays, *state.numbers}
    unknown = sorted(name for name in state.others if name not in known)
    if unknown:
        raise NotInvertible(f"its rule is unknown: its state also contains {', '.join(unknown[:4])}")
    rule = RULES.get(_name(options, arrays))
    if rule is None:
        listed = ", ".join(sorted({*options, *arrays})) or "nothing"
        raise NotInvertible(f"its rule is unknown: its options and state are {listed}")
    for option in ("beta1", "beta2", "momentum", "dampening", "alpha"):
        if option in options and not 0 <= options[option] < 1:
            raise NotInvertible(f"{rule.name} with {option} = {options[option]:g} cannot be inverted")
    if not options.get("weight_decay"):
        return rule, False
    return rule, _decoupled(rule.name, options)


def keeps_state(state: RuleState) -> bool:
    """Return False for SGD without momentum, the only rule that keeps nothing between updates."""
    return _name(state.options, state.arrays) != "SGD"


_KNOWN_NAMES = ("step", "mu_product", "momentum_buffer")

_REFUSED = {
    "LBFGS": (("history_size", "old_dirs"), "its displacement depends on a line search and earlier gradients"),
    "Rprop": (("etas/0", "step_size"), "its displacement depends only on the signs of the gradient"),
    "ASGD": (("lambd", "ax"), "the averages that it keeps do not contain the gradient"),
    "Shampoo": (("inv_precond_0", "inv_pre_cond_0", "pre_conditioner"), "it keeps statistics of the gradient only"),
    "SOAP": (("GG", "GG/0", "shampoo_beta"), "the basis of its moments changes between states"),
    "PSGD": (("Q", "Q/0"), "it keeps statistics of the gradient only"),
    "HF Adafactor": (("exp_avg_sq_row", "exp_avg_sq_col"), "the options of transformers' Adafactor are unknown"),
    "AdaBelief": (("exp_avg_var",), "its state is not that of Adam"),
    "Adan": (("exp_avg_diff",), "its moments mix two gradients"),
    "schedule-free": (("z",), "the parameters that it moves are not those that are saved"),
    "Prodigy": (("p0", "s"), "it scales the gradient by a factor that changes"),
}
"""Rules that cannot be inverted: the options or names in the state by which they are known, and the reason."""


def _name(options: Mapping[str, float], arrays: Mapping[str, LoggedTensor]) -> str:
    """Return the name of the rule with these options and arrays; empty if there is none."""
    if "beta1" in options:
        if "momentum_decay" in options:
            return "NAdam"
        if "exp_inf" in arrays:
            return "Adamax"
        if "exp_avg" in arrays and "exp_avg_sq" in arrays:
            radam = "decoupled_weight_decay" in options and "amsgrad" not in options
            return "RAdam" if radam and "maximize" in options else "Adam"
        return "Lion" if "exp_avg" in arrays and "epsilon" not in options else ""
    if "ns_steps" in options:
        return "Muon" if "ns_coefficients/0" in options and "momentum_buffer" in arrays else ""
    if "dampening" in options:
        return "SGD with momentum" if options.get("momentum") else "SGD"
    if "alpha" in options and "square_avg" in arrays:
        if options.get("centered"):
            return "centered RMSprop"
        return "RMSprop with momentum" if options.get("momentum") else "RMSprop"
    if "beta2_decay" in options:
        return "Adafactor"
    if "rho" in options and "acc_delta" in arrays:
        return "Adadelta"
    return "Adagrad" if "lr_decay" in options and "sum" in arrays else ""


def _decoupled(rule: str, options: Mapping[str, float]) -> bool | None:
    """Return True if the decay of a rule is decoupled; None if its options do not state this."""
    if rule in ("Muon", "Adafactor"):
        return True
    if rule == "Lion":
        return bool(options.get("weight_decouple", 1.0))
    if rule in ("Adam", "NAdam", "RAdam"):
        declared = options.get("decoupled_weight_decay")
        # NAdam and RAdam have had this option for as long as they have had decoupled decay.
        return bool(declared or 0.0) if declared is not None or rule != "Adam" else None
    return False


# One tensor ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Properties of a recovered gradient.

    Attributes
    ----------
    error_bound : float
        Largest relative error of the norm of the gradient, or of its direction, that rounding causes. If the
        gradient comes from a displacement and the learning rate changes, also that of the rate.
    residual : float
        Difference between the displacement of the recovered gradient and the logged one, relative to the latter;
        NaN if it was not computed.
    rounding : float
        Largest residual that rounding explains.
    grade : str
        One of `GRADES`.
    difference : str
        Difference that rounding does not explain, for messages; empty if there is none.
    """

    error_bound: float
    residual: float
    rounding: float
    grade: str
    difference: str = ""

    @property
    def holds(self) -> bool:
        """True if rounding explains all differences."""
        return not self.difference


class _Comparison:
    """Sums over elements that compare the displacement of a recovered gradient with the logged one.

    Parameters
    ----------
    rule : Rule
    update : Update
        With the context that the displacement needs.
    checkable : bool
        False if the displacement cannot be computed: then only the error bound of the gradient is known.
    rate_doubt : float
        Relative error of the gradient because the learning rate is not known exactly.
    """

    def __init__(self, rule: Rule, update: Update, *, checkable: bool, rate_doubt: float) -> None:
        self._rule, self._update, self._checkable, self._rate_doubt = rule, update, checkable, rate_doubt
        self._gradient, self._error, self._moved = 0.0, 0.0, 0.0
        self._difference, self._allowed = 0.0, 0.0
        self._moment_difference, self._moment_allowed, self._moment_change = 0.0, 0.0, 0.0
        # The bias corrections, computed in the precision of the state, enlarge rounding errors.
        betas = [beta for beta in ("beta1", "beta2") if update.options.get(beta) and not math.isnan(update.count)]
        conditioning = 1.0 + sum(1.0 / update.correction(beta) for beta in betas)
        self._relative = _CHECK_ROUNDINGS * update.state_roundoff * conditioning

    def add(self, part: Slice, gradient: Array, bound: Array) -> None:
        """Add elements, with their gradient and its error bound."""
        rule, update = self._rule, self._update
        self._gradient += _square(gradient)
        self._error += _square(bound)
        if not self._checkable:
            return
        predicted, moments = rule.displacement(update, part, gradient)
        low, high = (rule.displacement(update, part, gradient + sign * bound)[0] for sign in (-1.0, 1.0))
        explained = np.maximum(np.abs(high - predicted), np.abs(low - predicted))
        explained += self._relative * np.abs(predicted)
        # The parameters are rounded after the update, and before it by the factor of decoupled decay.
        explained += 2.0 * update.parameter_roundoff * np.abs(part.next_parameter)
        if update.decoupled and update.decay:
            explained += 4.0 * update.parameter_roundoff * np.abs(part.parameter)
        self._difference += _square(predicted - part.displacement)
        self._allowed += _square(explained) + rule.slack**2 * _square(predicted)
        self._moved += _square(part.displacement)
        for array, values in moments.items():
            saved, keep = part.after[array], update.options["beta2"]
            kept = keep * part.before[array]
            self._moment_difference += _square(values - saved)
            self._moment_change += _square(saved - kept)
            entered = rule.entered(update, part, gradient)
            self._moment_allowed += _square(
                _CHECK_ROUNDINGS * update.state_roundoff * (saved + kept)
                + (1.0 - keep) * (2.0 * np.abs(entered) + bound) * bound
            )

    def result(self) -> Check:
        """Return the check of the elements so far."""
        error = _ratio(self._error, self._gradient) + self._rate_doubt
        if not self._checkable:
            return Check(error, math.nan, math.nan, NONE)
        residual, rounding = _ratio(self._difference, self._moved), _ratio(self._allowed, self._moved)
        other = _ratio(self._moment_difference, self._moment_change)
        limit = _ratio(self._moment_allowed, self._moment_change)
        grade = self._rule.strength(self._update) if max(rounding, limit) <= _VISIBLE else NONE
        failed = ""
        if residual > rounding:
            failed = f"the displacements differ by {residual:.2g} of the logged one"
        elif other > limit:
            failed = f"the second moments differ by {other:.2g} of their change"
        explained = f", and rounding explains {rounding if residual > rounding else limit:.2g}"
        return Check(error, residual, rounding, grade, failed and failed + explained)


class TensorUpdate:
    """Two states of a tensor and of its optimizer, k updates apart.

    Parameters
    ----------
    name : str
    readers : tuple of StepReader
        Both steps.
    logged : tuple of LoggedTensor
        The parameter in both steps.
    states : tuple of RuleState
        State that the optimizer saved for it.
    span : int
        Number of updates between the states, if the optimizer does not count them.

    Raises
    ------
    NotInvertible
        If the rule is unknown, or cannot be inverted at all or over k updates.
    """

    def __init__(
        self,
        name: str,
        readers: tuple[StepReader, StepReader],
        logged: tuple[LoggedTensor, LoggedTensor],
        states: tuple[RuleState, RuleState],
        span: int,
    ) -> None:
        self.name, self._readers, self._logged, self._states = name, readers, logged, states
        before, after = states
        self.rule, self._decoupled = identified(after)
        self.span = _updates(before, after, span)
        self._cached: Update | None = None
        self._compared = 0
        if self.span < 1:
            return
        needed = self.rule.arrays(self._update(after.options, bool(self._decoupled)))
        started = bool(before.arrays) or before.numbers.get("step", 0.0) > 0
        for state, text in ((after, "its state"), *(((before, "the state before the update"),) if started else ())):
            for array in needed:
                if array not in state.arrays:
                    raise NotInvertible(f"{self.rule.name} cannot be inverted: {text} lacks {array}")
        if self.span > 1 and (self.rule.from_displacement or self.rule.single):
            raise NotInvertible(
                f"{self.rule.name} can be inverted only between consecutive states, and these are {self.span} "
                "updates apart"
            )
        if self.rule.name == "SGD" and logged[1].dtype in _COARSE:
            raise NotInvertible(f"SGD without momentum cannot be inverted from parameters in {logged[1].dtype}")
        if self.rule.name == "Muon" and not after.options.get("nesterov") and _is_bfloat16(after.arrays):
            raise NotInvertible(
                "Muon without nesterov cannot be inverted from a momentum in bfloat16, which torch overwrites with "
                "its normalized values"
            )
        if self.rule.from_displacement and all(math.isnan(options[_RATE]) for options in self._options):
            raise NotInvertible(
                f"{self.rule.name} cannot be inverted without the learning rate, which is not saved"
            )

    @property
    def dtype(self) -> str:
        """Dtype of the gradient: float64 if anything that it is computed from is, otherwise float32."""
        dtypes = [logged.dtype for logged in (*self._logged, *self._states[1].arrays.values())]
        return "float64" if "float64" in dtypes else "float32"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self._logged[0].shape)

    @cached_property
    def is_skipped(self) -> bool:
        """True if the optimizer made no update: its counter is unchanged, or it has none and nothing changed."""
        if not self.span or _count(self._states[1]) is not None:
            return not self.span
        arrays = ("parameter", *self._states[1].arrays)
        return all(
            np.array_equal(one, other)
            for array in arrays
            for one, other in zip(self._values(0, array), self._values(1, array), strict=True)
        )

    @property
    def rule_name(self) -> str:
        """Name of the rule, one of `RULE_NAMES`: Adam with decoupled weight decay is AdamW."""
        update = self._prepared
        return "AdamW" if self.rule.name == "Adam" and update.decoupled and update.decay else self.rule.name

    def gradient(self, start: int, stop: int) -> Iterator[Array]:
        """Yield the gradient of elements ``start`` to ``stop``, slice by slice."""
        for first in range(start, stop, _SLICE):
            with _diverged():
                values = self._recovered(first, min(first + _SLICE, stop))
            yield values

    def check(self) -> Check:
        """Return the error bound of the gradient of the tensor, and the agreement with the logged displacement.

        Elements whose gradient was computed in order before are not computed again.
        """
        with _diverged():
            while self._compared < self.elements:
                self._recovered(self._compared, min(self._compared + _SLICE, self.elements))
            return min((one.result() for one in self._comparisons), key=_distance)

    def _recovered(self, start: int, stop: int) -> Array:
        """Return the gradient of some elements. If they follow those that were compared, compare them as well."""
        part = self._slice(start, stop)
        values, bound = self.rule.gradient(self._prepared, part)
        if start == self._compared:
            for comparison in self._comparisons:
                comparison.add(part, values, bound)
            self._compared = stop
            # The others have a rate that is not that of the update.
            self._comparisons = [one for one in self._comparisons if one.result().holds] or self._comparisons
        return values

    @cached_property
    def _comparisons(self) -> list[_Comparison]:
        """The comparisons with the displacement, one for each learning rate that the update may have had."""
        update = self._prepared
        # The rate of an update is saved with the state before it or after it; the check shows which.
        rates = dict.fromkeys(options[_RATE] for options in self._options)
        updates = [replace(update, rate=rate) for rate in rates if not self.rule.from_displacement] or [update]
        return [self._comparison(one) for one in updates]

    def _comparison(self, update: Update) -> _Comparison:
        """Return a comparison of an update, for which the direction of Muon is computed."""
        checkable = self.span == 1 and not math.isnan(update.rate)
        if checkable and self.rule.context == "orthogonalized":
            checkable = self.elements <= _LARGEST_MATRIX
            context = self._orthogonalized(update) if checkable else {}
            update = replace(update, context={**update.context, **context})
        doubt = 0.0
        if self.rule.from_displacement and update.rate:
            doubt = max(abs(options[_RATE] / update.rate - 1.0) for options in self._options)
        return _Comparison(self.rule, update, checkable=checkable, rate_doubt=doubt)

    def _check(self, update: Update) -> Check:
        """Compare all elements under an update, which may be one of several that are possible."""
        comparison = self._comparison(update)
        for first in range(0, self.elements, _SLICE):
            part = self._slice(first, min(first + _SLICE, self.elements))
            comparison.add(part, *self.rule.gradient(update, part))
        return comparison.result()

    # Values that all elements share

    @cached_property
    def _options(self) -> list[dict[str, float]]:
        """The options of the update: those saved before it and those saved after it, if they differ.

        A schedule may change them before or after a state is saved.
        """
        found = [{_RATE: math.nan, **state.options} for state in self._states if state.options]
        used = [{name: value for name, value in options.items() if name != "step"} for options in found]
        return [options for index, options in enumerate(used) if options not in used[:index]]

    def _update(self, options: Mapping[str, float], decoupled: bool) -> Update:
        after = self._states[1]
        parameter = max(unit_roundoff(logged.dtype) for logged in self._logged)
        return Update(
            options,
            math.nan if (count := _count(after)) is None else count,
            self.span,
            options.get(_RATE, math.nan),
            decoupled,
            max((unit_roundoff(logged.dtype) for logged in after.arrays.values()), default=parameter),
            parameter,
            after.numbers,
        )

    @property
    def _prepared(self) -> Update:
        """The update, with the options that explain it and the context that the rule needs."""
        if self._cached is None:
            known = self._decoupled is not None
            flags = (bool(self._decoupled),) if known else (True, False)
            found = [self._update(options, decoupled) for options in self._options for decoupled in flags]
            found = [replace(update, context=self._context(update)) for update in found]
            others = [{**update.options, _RATE: 0.0} for update in found]
            if not known or any(options != others[0] for options in others):
                found = self._explaining(found, known=known)
            self._cached = found[0]
        return self._cached

    def _explaining(self, updates: list[Update], *, known: bool) -> list[Update]:
        """Return the updates whose check holds, the one with the smallest residual first."""
        checks = sorted(((self._check(update), update) for update in updates), key=lambda pair: _distance(pair[0]))
        computed = [pair for pair in checks if not math.isnan(pair[0].residual)]
        # If none holds, the check of the tensor refuses the one with the smallest residual.
        found = [pair for pair in computed if pair[0].holds] or computed[:1] or checks[:1]
        if not known and (not computed or len({update.decoupled for _, update in found}) > 1):
            raise NotInvertible(
                f"{self.rule.name} cannot be inverted: neither its options nor the displacement show whether "
                "weight decay is decoupled; write decoupled_weight_decay = true (AdamW) or false (Adam) "
                "under [optimizer] in natgrad.toml in the folder of the log"
            )
        return [update for _, update in found]

    def _context(self, update: Update) -> dict[str, Any]:
        return self._factors(update) if self.rule.context == "factors" and self.elements else {}

    def _factors(self, update: Update) -> dict[str, Any]:
        """Return the context of Adafactor; see `complete_factors`."""
        before, after = self._small(0), self._small(1)
        parameters = sum(_square(values) for values in self._values(0, "parameter"))

        def squares(known: Update) -> float:
            return sum(
                _square(self.rule.gradient(known, self._slice(first, min(first + _SLICE, self.elements)))[0])
                for first in range(0, self.elements, _SLICE)
            )

        epsilon = 2.0 * unit_roundoff(self._logged[0].dtype)
        return complete_factors(update, self._logged[0].shape, before, after, parameters, squares, epsilon)

    def _small(self, index: int) -> dict[str, Array]:
        arrays = {name: math.prod(logged.shape) for name, logged in self._states[1].arrays.items()}
        return {name: self._read(index, name, 0, size) for name, size in arrays.items()}

    def _orthogonalized(self, update: Update) -> dict[str, Any]:
        """Return the context of Muon; see `orthogonalized`."""
        entered = []
        for first in range(0, self.elements, _SLICE):
            part = self._slice(first, min(first + _SLICE, self.elements))
            new = part.after["momentum_buffer"]
            if update.option("nesterov"):
                h = self.rule.inverse(update, part)[0]
                new = h + update.options["momentum"] * (new - h)
            entered.append(new)
        return orthogonalized(update, np.concatenate(entered).reshape(self._logged[0].shape))

    # Reading

    def _slice(self, start: int, stop: int) -> Slice:
        def read(index: int, array: str) -> Array:
            return self._read(index, array, start, stop)

        return Slice(start, read, first=not self._states[0].arrays)

    def _values(self, index: int, array: str) -> Iterator[Array]:
        for first in range(0, self.elements, _SLICE):
            yield self._read(index, array, first, min(first + _SLICE, self.elements))

    def _read(self, index: int, array: str, start: int, stop: int) -> Array:
        state = self._states[index].arrays
        if array != "parameter" and array not in state:
            return np.zeros(stop - start)  # before the first update
        logged = self._logged[index] if array == "parameter" else state[array]
        words = np.empty(stop - start, storage_dtype(logged.dtype))
        self._readers[index].read(array, self.name, start, words)
        return widened(words, logged.dtype).astype(np.float64)


_CHECK_ROUNDINGS = 8.0
"""Rounding errors of a displacement, in units of the roundoff."""


def _diverged() -> np.errstate:
    """Return a context for computing with the numbers of a run that may have diverged: the results are then NaN."""
    return np.errstate(all="ignore")


def _is_bfloat16(arrays: Mapping[str, LoggedTensor]) -> bool:
    return any(logged.dtype == "bfloat16" for logged in arrays.values())


def _square(values: Array) -> float:
    return float(values @ values)


def _ratio(numerator: float, denominator: float) -> float:
    """Return the ratio of two norms from their squares; 0 if both are 0."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return math.sqrt(numerator / denominator)


def _count(state: RuleState) -> float | None:
    """Return the number of updates that a state counts, by tensor or by group; None if it counts none."""
    return state.numbers.get("step", state.options.get("step"))


def _updates(before: RuleState, after: RuleState, span: int) -> int:
    """Return the number of updates between two states, by the counter of the optimizer if it has one."""
    count = _count(after)
    return span if count is None else int(count - (_count(before) or 0.0))


def _distance(check: Check) -> float:
    return math.inf if math.isnan(check.residual) else check.residual
