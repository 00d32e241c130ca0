"""Represent a logged optimizer state, including the metrics of K-FAC, Shampoo, PSGD and SOAP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from natgrad.schema.names import HYPERPARAMETERS, TENSOR_WEIGHT_DECAY
from natgrad.sources.steps import LoggedTensor

__all__ = [
    "Factor",
    "FactoredMetric",
    "OptimizerState",
    "RotatedMetric",
    "RuleState",
    "factor_array",
]


@dataclass(frozen=True)
class Factor:
    """A logged factor of a metric that is not loaded.

    Attributes
    ----------
    key : str
        Key in the file.
    shape : tuple of int
        (n, n) for a matrix, (n,) for a diagonal, () for a number.
    dtype : str
    start : int
        First element under the key, if several matrices are stacked.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


@dataclass(frozen=True)
class FactoredMetric:
    """The metric M that an optimizer uses for a tensor, as Kronecker products of saved factors.

    On each block, M = F_0 (x) F_1 (x) ... + shift with F_i = (S_i + damping_i)^exponent, where S_i is the factor,
    or Q'Q for a factor Q if ``root`` is set. The first factor acts on the first dimension of the tensor.

    Attributes
    ----------
    Name of the update rule.
        Name of the rule.
    blocks : tuple of tuple of Factor
        One product, or several if the tensor was split into blocks. A product without factors is 1.
    exponent, shift : float
    damping : tuple of float
        One value per factor of a product; empty if there is no damping.
    balanced : bool
        The damping is distributed over the two factors according to their mean eigenvalues (Martens and Grosse,
        2015, section 6.3): ``damping`` contains the damping of the product and its minimum.
    root : bool
    tensors : tuple of str
        Tensors that share the block, if there are several: weight and bias of a layer, with the bias as the last
        column.
    follows : bool
        M is the metric of the update from this state, not of the update to it.
    rescaled : bool
        The update was multiplied by a positive factor that is not saved, so M is known only up to this factor.
    problem : str
        Why the metric is unknown. The other attributes are then not set.
    """

    rule: str
    blocks: tuple[tuple[Factor, ...], ...] = ()
    exponent: float = 1.0
    damping: tuple[float, ...] = ()
    shift: float = 0.0
    balanced: bool = False
    root: bool = False
    tensors: tuple[str, ...] = ()
    follows: bool = False
    rescaled: bool = False
    problem: str = ""


@dataclass(frozen=True)
class RotatedMetric:
    """The metric Q diag(sqrt(v) + epsilon) Q' / bias of SOAP, where v is ``exp_avg_sq`` in the basis Q.

    Attributes
    ----------
    epsilon, bias : float
        ``bias`` is sqrt(1 - beta2^updates), or 1 without bias correction.
    rescaled, problem
        See `FactoredMetric`.
    """

    epsilon: float = math.nan
    bias: float = math.nan
    rescaled: bool = False
    problem: str = ""


def factor_array(index: int) -> str:
    """Return the name of the array of a factor of a metric. Factors are numbered across all blocks.

    Examples
    --------
    >>> factor_array(1)
    'metric_factor/1'
    """
    return f"metric_factor/{index}"


@dataclass(frozen=True)
class RuleState:
    """Options and state of an optimizer for a tensor, from which its rule is identified and inverted.

    Attributes
    ----------
    options : mapping
        Options of the parameter group. Booleans are 0 and 1.
    numbers : mapping
        Numbers of the entry, such as ``step``.
    arrays : mapping
        Arrays of the entry, by the names under which a step reads them.
    others : tuple of str
        Names in the entry that are neither.
    problem : str
        Why the entry cannot be read.
    """

    options: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, LoggedTensor] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class OptimizerState:
    """State that an optimizer keeps between steps, by tensor.

    Attributes
    ----------
    arrays : mapping
        Arrays in `natgrad.schema.names.OPTIMIZER_STATES`, each a mapping of tensor name to `LoggedTensor`.
    numbers : mapping
        Numbers in `natgrad.schema.names.OPTIMIZER_NUMBERS`, each a mapping of tensor name to value.
    metrics : mapping
        Metric by tensor name, for rules whose metric is not a diagonal of ``exp_avg_sq``. `factor_array`
        returns the names of the arrays of its factors.
    problem : str
        Why the entries cannot be assigned to tensors. The attributes above are then not set.
    unread : str
        Why the saved state cannot be read. The other attributes are then not set.
    notes : tuple of str
        Notes for users who requested the state.
    group_rates : tuple of float
        Learning rate of each parameter group, if saved.
    decay_note : str
        Note on weight decay that may or may not be decoupled.
    rules : mapping
        Options and state that the optimizer saved for each tensor, by its name.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, FactoredMetric | RotatedMetric] = field(default_factory=dict)
    problem: str = ""
    unread: str = ""
    notes: tuple[str, ...] = ()
    group_rates: tuple[float, ...] = ()
    decay_note: str = ""
    rules: Mapping[str, RuleState] = field(default_factory=dict)

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rate of each tensor; empty if unknown."""
        return self.numbers.get("tensor_learning_rate", {})

    @property
    def decays(self) -> Mapping[str, float]:
        """Coefficient of decoupled weight decay of each tensor; empty if unknown."""
        return self.numbers.get(TENSOR_WEIGHT_DECAY, {})

    def hyperparameters(self) -> OptimizerState:
        """Return the learning rates and the coefficients of weight decay alone."""
        numbers = {name: self.numbers[name] for name in HYPERPARAMETERS if self.numbers.get(name)}
        return OptimizerState(numbers=numbers, group_rates=self.group_rates, decay_note=self.decay_note)

    def with_decays(self, decays: Mapping[str, float]) -> OptimizerState:
        """Return a copy with other coefficients of decoupled weight decay."""
        return replace(self, numbers={**self.numbers, TENSOR_WEIGHT_DECAY: decays})

    def with_rates(self, rates: Mapping[str, float], group_rates: tuple[float, ...]) -> OptimizerState:
        """Return a copy with other learning rates, or without any."""
        numbers = {name: values for name, values in self.numbers.items() if name != "tensor_learning_rate"}
        numbers |= {"tensor_learning_rate": rates} if rates else {}
        return replace(self, numbers=numbers, group_rates=group_rates)

    @property
    def readable(self) -> list[str]:
        """Names of all arrays of this state that a step can read."""
        products = [metric.blocks for metric in self.metrics.values() if isinstance(metric, FactoredMetric)]
        most = max((sum(map(len, blocks)) for blocks in products), default=0)
        of_rules = dict.fromkeys(array for rule in self.rules.values() for array in rule.arrays)
        return list(dict.fromkeys((*self.arrays, *map(factor_array, range(most)), *of_rules)))
