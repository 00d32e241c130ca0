"""Derive the metric of factored update rules from their saved state, following the code of their authors.

========================================  ==================================================================
Shampoo (torch-optimizer,                 the update is ``inv_precond_0 G inv_precond_1`` (``inv_pre_cond`` in
pytorch-optimizer)                        pytorch-optimizer): M is the product of the inverses of these matrices,
                                          S^(1/k) and S^(1/2k) for the statistics S of k dimensions
ScalableShampoo (pytorch-optimizer)       the same with ``pre_conditioners``, for each block of a tensor
PSGD Kron (pytorch-optimizer)             the update is Q'Q times the momentum: M is the product of (Q'Q)^-1
SOAP (pytorch-optimizer, and its authors')  Adam in the basis Q: ``exp_avg_sq`` is in this basis, ``exp_avg`` is not
K-FAC (kfac-pytorch, curvlinops)          G (x) A with damping of each factor, or of their product
========================================  ==================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import takewhile

from natgrad.sources.container import Container
from natgrad.sources.optimizers.state import Factor, FactoredMetric, RotatedMetric
from natgrad.sources.steps import LoggedTensor

__all__ = ["ENTRY", "OPTIONS", "USER_OPTIONS", "Entry", "kfac_metrics", "rule_of", "shape_of"]

ENTRY = (
    r"inv_precond_\d+|inv_pre_cond_\d+|(?:GG|Q)[/.]\d+|shampoo_beta|"
    r"momentum|max_exp_avg_sq|pre_conditioner[/.](?:rank|pre_conditioners(?:[/.]\d+)?)"
)
"""Regular expression for the keys of an entry that determine its metric."""

OPTIONS = ("step", "correct_bias", "normalize_gradient", "normalize_grads")
"""Options of a group that affect the metric."""

USER_OPTIONS = ("compute_method", "start_preconditioning_step", "decoupled_weight_decay")
"""Options that files may not contain: the inversion method of kfac-pytorch, the first step of ScalableShampoo, and
whether weight decay is decoupled (1) or not (0)."""

_KFAC_ROOTS = "preconditioner|preconditioner_state_dict|kfac|kfac_state_dict"
_LAYER = re.compile(rf"({_KFAC_ROOTS})/layers/(.+)/([AG])")
_COVARIANCE = re.compile(rf"((?:{_KFAC_ROOTS})(?:/A)?)/(input|gradient)_covariances/(.+)")


class Entry:
    """An entry of a saved optimizer.

    Parameters
    ----------
    keys : mapping
        Name within the entry to its key in the container.
    tensors : mapping
        Tensors of the container.
    numbers : mapping
        Name within the entry to its value.
    options : mapping
        Options of its group: those in `OPTIONS`, ``beta2`` and ``epsilon``. Booleans are 0 and 1.
    user_options : mapping
        Options in `USER_OPTIONS` that the user specified.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        tensors: Mapping[str, LoggedTensor],
        numbers: Mapping[str, float],
        options: Mapping[str, float],
        user_options: Mapping[str, str | int],
    ) -> None:
        self._keys, self._tensors, self._numbers = keys, tensors, numbers
        self._options, self._user_options = options, user_options

    def metric(self, rule: str, shape: tuple[int, ...]) -> FactoredMetric | RotatedMetric:
        """Return the metric of a tensor of this shape under a rule from `rule_of`."""
        if rule == "AMSGrad":
            return FactoredMetric(rule, problem="its metric depends on max_exp_avg_sq, which is not stored")
        if rule == "SOAP":
            return self._soap()
        if rule == "ScalableShampoo":
            return self._scalable_shampoo()
        names = {"Shampoo": ("inv_precond_{}", "inv_pre_cond_{}"), "PSGD": ("Q/{}", "Q.{}")}[rule]
        factors = next((found for name in names if (found := self._numbered(name))), ())
        if tuple(_size(factor) for factor in factors) != (shape if rule == "Shampoo" else shape or (1,)):
            sizes = [list(factor.shape) for factor in factors]
            return FactoredMetric(
                rule, problem=f"the factors have shapes {sizes}, but the tensor has {list(shape)}"
            )
        root = rule == "PSGD"
        return FactoredMetric(rule, (factors,), exponent=-1.0, root=root, rescaled=root)

    def _numbered(self, name: str) -> tuple[Factor, ...]:
        keys = (self._keys.get(name.format(index), "") for index in range(len(self._keys)))
        return tuple(_factor(key, self._tensors[key]) for key in takewhile(self._tensors.__contains__, keys))

    def _soap(self) -> RotatedMetric:
        options = self._options
        # The authors' SOAP counts updates per entry; pytorch-optimizer counts calls, the first without an update.
        updates = self._numbers.get("step", options.get("step", math.nan) - 1)
        beta2, corrected = options.get("beta2", math.nan), options.get("correct_bias")
        if not updates > 0 or not 0 <= beta2 < 1 or "epsilon" not in options or corrected is None:
            return RotatedMetric(problem="it has made no update yet, or its options are not saved")
        bias = math.sqrt(1.0 - beta2**updates) if corrected else 1.0
        normalized = options.get("normalize_gradient", 0.0) or options.get("normalize_grads", 0.0)
        return RotatedMetric(options["epsilon"], bias, bool(normalized))

    def _scalable_shampoo(self) -> FactoredMetric:
        rule, start = "ScalableShampoo", self._user_options.get("start_preconditioning_step")
        if start is None:
            return FactoredMetric(
                rule,
                problem="its state does not contain the first step with preconditioning: write "
                "start_preconditioning_step = N under [optimizer] in natgrad.toml",
            )
        if not self._options.get("step", math.nan) >= int(start):
            return FactoredMetric(rule, problem=f"it starts preconditioning at step {start}")
        name = "pre_conditioner/pre_conditioners"
        factors = self._numbered(name + "/{}")
        stacked = self._tensors.get(self._keys.get(name, ""))
        if stacked is not None and len(stacked.shape) == 3:
            count, size, _ = stacked.shape
            matrix = LoggedTensor(stacked.shape[1:], stacked.dtype)
            factors = tuple(_factor(self._keys[name], matrix, size * size * index) for index in range(count))
        number = self._numbers.get("pre_conditioner/rank", 0.0)
        rank = int(number) if 1 <= number <= len(factors) else 0
        if not rank or len(factors) % rank:
            return FactoredMetric(rule, problem="there are no factors: only grafting is used, or they are objects")
        blocks = tuple(factors[first : first + rank] for first in range(0, len(factors), rank))
        return FactoredMetric(rule, blocks, exponent=-1.0, rescaled=True)


def rule_of(entries: Iterable[Mapping[str, str]]) -> str | None:
    """Return the factored rule of an optimizer, from the keys of all its entries; None if it has none."""
    names = {name for entry in entries for name in entry}
    if "pre_conditioner/rank" in names:
        return "ScalableShampoo"
    if any(name.startswith("inv_pre") for name in names):
        return "Shampoo"
    if any(name.startswith(("GG", "Q")) for name in names):
        return "SOAP" if "exp_avg_sq" in names else "PSGD"
    if "max_exp_avg_sq" in names:
        return "AMSGrad"
    return "SOAP" if "shampoo_beta" in names else None


def shape_of(keys: Mapping[str, str], tensors: Mapping[str, LoggedTensor]) -> tuple[int, ...] | None:
    """Return the shape of the tensor of an entry, from its Shampoo factors or momentum; None if it has neither."""
    if (momentum := tensors.get(keys.get("momentum", ""))) is not None:
        return momentum.shape
    for name in ("inv_precond_{}", "inv_pre_cond_{}"):
        if factors := Entry(keys, tensors, {}, {}, {})._numbered(name):
            return tuple(map(_size, factors))
    return None


def kfac_metrics(
    container: Container, parameters: Mapping[str, LoggedTensor], user_options: Mapping[str, str | int]
) -> tuple[str | None, dict[str, FactoredMetric]]:
    """Return the K-FAC metrics in a file, by tensor, and the key under which they are saved."""
    layers: dict[str, dict[str, Factor]] = {}
    roots: set[str] = set()
    curvature: dict[str, dict[str, Factor]] = {}
    for key, tensor in container.tensors.items():
        if match := _LAYER.fullmatch(key):
            roots.add(match[1])
            layers.setdefault(match[2], {})[match[3]] = _factor(key, tensor)
        elif match := _COVARIANCE.fullmatch(key):
            roots.add(match[1])
            curvature.setdefault(match[3], {})["A" if match[2] == "input" else "G"] = _factor(key, tensor)
    if len(roots) != 1:
        return None, {}
    (root,) = roots
    found: dict[str, FactoredMetric] = {}
    for name, factors in (layers or curvature).items():
        template = _kfac_pytorch(container, root, user_options) if layers else _curvlinops(container, root)
        found |= _blocks(name, factors, parameters, template)
    return root.split("/")[0], found


def _kfac_pytorch(container: Container, root: str, user_options: Mapping[str, str | int]) -> FactoredMetric:
    """Return the damping of kfac-pytorch. State saved after ``step()`` is that of the update to this state."""
    numbers, rule = container.numbers, "K-FAC"
    steps, every = numbers.get(f"{root}/steps", math.nan), numbers.get(f"{root}/inv_update_steps", math.nan)
    damping, method = numbers.get(f"{root}/damping"), user_options.get("compute_method")
    if method is None:
        problem = (
            'its state does not contain the inversion method: write compute_method = "eigen" (the default of '
            'kfac-pytorch) or "inverse" under [optimizer] in natgrad.toml'
        )
    elif damping is None or not every >= 1:
        problem = "its damping or inversion interval is a function, which checkpoints do not contain"
    elif not steps >= 1:
        problem = "it has made no update yet"
    elif (steps - 1) % every:
        problem = f"it computes inverses every {every:g} steps, and those that it used here are not saved"
    elif method == "eigen":
        return FactoredMetric(rule, shift=damping)
    else:
        return FactoredMetric(rule, damping=(damping, damping))
    return FactoredMetric(rule, problem=problem)


def _curvlinops(container: Container, root: str) -> FactoredMetric:
    """Return the damping of a ``KFACInverseLinearOperator``, whose factors belong to the state saved with them."""
    numbers, rule = container.numbers, "K-FAC"
    above = root.removesuffix("/A")
    damping = numbers.get(f"{above}/damping")
    both = (numbers.get(f"{above}/damping/0", damping), numbers.get(f"{above}/damping/1", damping))
    options = {name: container.texts.get(f"{above}/use_{name}_damping") for name in ("exact", "heuristic")}
    if above == root or None in both or None in options.values():
        return FactoredMetric(rule, problem="its damping is not saved: save a KFACInverseLinearOperator")
    input_damping, gradient_damping = (float(number or 0.0) for number in both)
    if options["exact"] == "True":
        return FactoredMetric(rule, shift=input_damping, follows=True)
    if options["heuristic"] == "True":
        minimum = numbers.get(f"{above}/min_damping", math.nan)
        return FactoredMetric(rule, damping=(input_damping, minimum), balanced=True, follows=True)
    return FactoredMetric(rule, damping=(gradient_damping, input_damping), follows=True)


def _blocks(
    name: str, factors: Mapping[str, Factor], parameters: Mapping[str, LoggedTensor], template: FactoredMetric
) -> dict[str, FactoredMetric]:
    """Return the metrics of the weight and bias of a layer: one that they share, or one for each."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    present = [tensor for tensor in (weight, bias) if tensor in parameters]
    if template.problem or "G" not in factors:
        problem = template.problem or "its factors are not saved"
        return {tensor: FactoredMetric(template.rule, problem=problem) for tensor in present}
    shape = parameters[present[0]].shape if present else ()
    inputs = math.prod(shape[1:]) if weight in present else -1
    size = _size(factors["A"]) if "A" in factors else 0
    fits = present and shape and _size(factors["G"]) == shape[0] and (inputs < 0 or size in (inputs, inputs + 1))
    if not fits:
        problem = f"the factors of layer {name!r} do not match its weight or bias of shape {list(shape)}"
        return {tensor: FactoredMetric(template.rule, problem=problem) for tensor in present}
    product = (factors["G"], factors["A"]) if "A" in factors else (factors["G"],)
    if size == inputs + 1:
        return {tensor: replace(template, blocks=(product,), tensors=tuple(present)) for tensor in present}
    found = {weight: replace(template, blocks=(product,))} if weight in present else {}
    if bias in present:
        found[bias] = replace(template, blocks=((factors["G"],),), damping=template.damping[:1])
        if template.balanced:
            found[bias] = FactoredMetric(
                template.rule, problem="heuristic damping of a separate bias is not supported"
            )
    return found


def _factor(key: str, tensor: LoggedTensor, start: int = 0) -> Factor:
    return Factor(key, tensor.shape, tensor.dtype, start)


def _size(factor: Factor) -> int:
    """Return the dimension on which a factor acts; 0 if it is not a square matrix or a diagonal."""
    square = len(factor.shape) < 2 or (len(factor.shape) == 2 and factor.shape[0] == factor.shape[1])
    return math.prod(factor.shape[:1]) if square else 0
