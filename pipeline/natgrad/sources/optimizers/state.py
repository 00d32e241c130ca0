"""The state of an optimizer as a log holds it, with the metrics of K-FAC, Shampoo, PSGD and SOAP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from natgrad.sources.steps import LoggedTensor

__all__ = [
    "Factor",
    "FactoredMetric",
    "OptimizerState",
    "RotatedMetric",
    "factor_array",
]


@dataclass(frozen=True)
class Factor:
    """A factor of a metric as logged, not loaded.

    Attributes
    ----------
    key : str
        Key in the file.
    shape : tuple of int
        (n, n) of a matrix, (n,) of a diagonal; () of a number.
    dtype : str
    start : int
        First element under the key, where several matrices are stacked.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


@dataclass(frozen=True)
class FactoredMetric:
    """The metric M that an optimizer uses for a tensor, as Kronecker products of factors that it saves.

    With F_i = (S_i + damping_i)^exponent, where S_i is the factor, or Q'Q of a factor Q that is a ``root``, it is
    F_0 (x) F_1 (x) .. + shift on each of its blocks: the first factor is of the first dimension of the tensor.

    Attributes
    ----------
    rule : str
        Name of the rule.
    blocks : tuple of tuple of Factor
        One product, or several where the tensor was parted; a product of no factors is 1.
    exponent, shift : float
    damping : tuple of float
        One for each factor of a product; none where there is no damping.
    balanced : bool
        Damping is divided between the two factors by their mean eigenvalues (Martens and Grosse, 2015, section
        6.3): ``damping`` is that of the product and the least.
    root : bool
    tensors : tuple of str
        Those that share the block, where there are more: weight and bias of a layer, of which the bias is the last
        column.
    follows : bool
        It is the metric of the update from this state, not of that to it.
    rescaled : bool
        The update was multiplied by a positive factor that is not saved: M is known up to it.
    problem : str
        Why the metric is not known; then nothing else is there.
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
    """The metric Q diag(sqrt(v) + epsilon) Q' / bias of SOAP: ``exp_avg_sq`` is v, in the basis of Q.

    Attributes
    ----------
    epsilon, bias : float
        ``bias`` is sqrt(1 - beta2^updates), or 1 where it is not corrected.
    rescaled, problem
        As of `FactoredMetric`.
    """

    epsilon: float = math.nan
    bias: float = math.nan
    rescaled: bool = False
    problem: str = ""


def factor_array(index: int) -> str:
    """Array under which a step gives the factor of a metric, counted through all blocks.

    Examples
    --------
    >>> factor_array(1)
    'metric_factor/1'
    """
    return f"metric_factor/{index}"


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer kept between steps, by tensor.

    Attributes
    ----------
    arrays : mapping
        Some of `natgrad.schema.names.OPTIMIZER_STATES`, each a mapping of tensor name to `LoggedTensor`.
    numbers : mapping
        Some of `natgrad.schema.names.OPTIMIZER_NUMBERS`, each a mapping of tensor name to value.
    metrics : mapping
        Tensor name to the metric of a rule whose metric is no diagonal of ``exp_avg_sq``; its factors are read as
        `factor_array` says.
    problem : str
        Why it is not known which tensor an entry belongs to; then nothing else is there.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, FactoredMetric | RotatedMetric] = field(default_factory=dict)
    problem: str = ""

    @property
    def readable(self) -> list[str]:
        """Names of all arrays that a step gives of it."""
        products = [metric.blocks for metric in self.metrics.values() if isinstance(metric, FactoredMetric)]
        most = max((sum(map(len, blocks)) for blocks in products), default=0)
        return [*self.arrays, *map(factor_array, range(most))]
