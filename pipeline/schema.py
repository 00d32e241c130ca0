"""The words of the pipeline: vectors, dimensions, layout of a model, names and units of results.

Nothing is computed here, and nothing but the standard library is imported.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "ATTEMPT",
    "DESCENTS",
    "DIMENSIONS",
    "ELEMENT",
    "GAMMA",
    "HVP",
    "LAYOUT_VERSION",
    "METRIC_EIGENVALUES",
    "OPTIMIZER_NUMBERS",
    "OPTIMIZER_STATES",
    "REPLICATE",
    "REPLICATES",
    "REPLICATE_HVP",
    "REPLICATE_LOSS",
    "REPLICATE_PARAMETER",
    "REPLICATE_STATES",
    "REPLICATE_VARIABLES",
    "REPLICATE_VECTOR",
    "RUN",
    "SCALARS",
    "STATES",
    "STEP",
    "STORAGE_DTYPES",
    "TENSOR",
    "USUAL_SCALARS",
    "VARIABLES",
    "VECTOR",
    "VECTORS",
    "WINDOW",
    "WITH_REPLICATE_VECTOR",
    "WITH_VECTOR",
    "InputError",
    "Layout",
    "ShiftedMetric",
    "Status",
    "Tensor",
    "Unavailable",
    "Variable",
    "of_replicate",
    "promote",
    "replicate_of",
    "replicate_vectors",
    "unit_roundoff",
]

LAYOUT_VERSION = 3
"""Version of the layout of ``trajectory.zarr`` and ``ledger.zarr``; a store of a newer one is refused.

Version 1 had no attempts, and checksums of the states only; in version 2 the records were all numbers and names in
lists. They are read, and become of this version by what is written to them next.
"""

# Dimensions -------------------------------------------------------------------------------------------------

STEP, ELEMENT, TENSOR = "step", "element", "tensor"
ATTEMPT, RUN = "attempt", "run"
VECTOR, WITH_VECTOR = "vector", "with_vector"
DESCENT, WINDOW, GAMMA = "descent", "window", "gamma"
REPLICATE = "replicate"
REPLICATE_VECTOR, WITH_REPLICATE_VECTOR = "replicate_vector", "with_replicate_vector"

DIMENSIONS: dict[str, str] = {
    STEP: "step number, as logged, of the state before the update",
    ATTEMPT: "number of restarts before this step was logged",
    RUN: "name of the run",
    ELEMENT: "element of the flattened model, tensors in the order of the layout table",
    TENSOR: "name of the tensor",
    VECTOR: "first vector of an inner product",
    WITH_VECTOR: "second vector of an inner product",
    DESCENT: "which negative gradient is meant",
    WINDOW: "number m of consecutive updates taken together, eq. (3)",
    REPLICATE: "one of many updates that a stochastic rule makes from the same state",
    REPLICATE_VECTOR: "first vector of an inner product of the replicates of an update",
    WITH_REPLICATE_VECTOR: "second vector of an inner product of the replicates of an update",
    GAMMA: "weight of the one-parameter family of metrics, eq. (22)",
}

DESCENTS = ("gradient", "corrected", "trapezoid", "taylor")
"""Negative gradients y: of the loss; and three discrete ones, eq. (12): the gradient corrected along the
displacement, the mean of the gradients at both ends so corrected, and the gradient plus hvp / 2, eq. (16)."""

# What is stored ---------------------------------------------------------------------------------------------

HVP = "hvp"
STATES = ("parameter", "gradient", HVP)
"""Arrays (step, element) of a trajectory; ``hvp`` is optional."""

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "master_parameter")
"""Arrays (step, element) of what an optimizer keeps; stored where asked for, NaN at steps that have none."""

METRIC_EIGENVALUES = (
    "metric_eigenvalue_min",
    "metric_eigenvalue_max",
    "next_metric_eigenvalue_min",
    "next_metric_eigenvalue_max",
)
"""Eigenvalues of Kronecker-factored and rotated metrics (Shampoo, SOAP, PSGD, K-FAC): of the metric that was used
in the update to this state; and where curvature is saved with the state it was taken at, in the update from it."""

OPTIMIZER_NUMBERS = (
    "tensor_learning_rate",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "momentum",
    "updates",
    "exp_avg_sq_min",
    "exp_avg_sq_max",
    *METRIC_EIGENVALUES,
    "metric_factored",
    "metric_rescaled",
)
"""Arrays (step, tensor) beside them: the options of each tensor's group, the updates that an entry has seen, the
smallest and largest element of ``exp_avg_sq`` and eigenvalue of the metric, 1 where the metric is not Adam's, and 1
where the update was rescaled by what is not saved. NaN where there is none."""

SCALARS = ("loss", "learning_rate", "loss_time_derivative", "hessian_min_eigenvalue")
"""Numbers of a step that a log may hold; arrays (step) of a trajectory, NaN where the log has none."""

USUAL_SCALARS = SCALARS[:2]
"""Those that every trajectory has; the others only where they are logged."""

VECTORS = ("parameter", "displacement", "gradient", "gradient_change", "residual", HVP)
"""Vectors of the Gram ledger; ``hvp`` only where it was logged."""

REPLICATE_PARAMETER, REPLICATE_HVP = "replicate_parameter", "replicate_hvp"
REPLICATE_STATES = (REPLICATE_PARAMETER, REPLICATE_HVP)
"""Arrays (step, replicate, element) of a trajectory, where a stochastic rule logs them: the states that R draws of
the update lead to from theta_t, and the Hessian times the displacement of each."""

REPLICATE_LOSS = "replicate_loss"
"""Array (step, replicate) of a trajectory: the loss of each of these states."""

REPLICATES = (*REPLICATE_STATES, REPLICATE_LOSS)
"""All that a log may hold of replicates."""

STORAGE_DTYPES: dict[str, int] = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
"""Dtypes that are stored as they are, with the bits of their significand (the implicit one included)."""


def unit_roundoff(dtype: str) -> float:
    """Largest relative error of rounding to a dtype, 2**-p for p bits of significand.

    Examples
    --------
    >>> unit_roundoff("bfloat16")
    0.00390625
    """
    return math.ldexp(1.0, -STORAGE_DTYPES[dtype])


def promote(dtypes: Sequence[str]) -> str:
    """Smallest storage dtype that holds every value of the given ones exactly.

    Examples
    --------
    >>> promote(["float16", "bfloat16"])
    'float32'
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "float64" if "float64" in distinct else "float32"


def of_replicate(array: str, replicate: int) -> str:
    """Name of one replicate of an array, which is an array (step, element).

    Examples
    --------
    >>> of_replicate("replicate_parameter", 3)
    'replicate_parameter/3'
    """
    return f"{array}/{replicate}"


def replicate_of(name: str) -> tuple[str, int | None]:
    """Array and replicate that a name is of; no replicate where the array has none.

    Examples
    --------
    >>> replicate_of("replicate_parameter/3"), replicate_of("gradient")
    (('replicate_parameter', 3), ('gradient', None))
    """
    array, slash, replicate = name.partition("/")
    return array, int(replicate) if slash else None


def replicate_vectors(replicates: int, hvp: bool) -> tuple[str, ...]:
    """Vectors of the ledger of a stochastic rule, for R replicates, with or without their Hessian-vector products.

    A deviation is that of a replicate from the mean: means are taken before any product, so they lose no digits
    where they are much shorter than the replicates.

    Examples
    --------
    >>> replicate_vectors(2, hvp=False)
    ('gradient', 'mean_displacement', 'displacement_deviation_0', 'displacement_deviation_1')
    """
    if not replicates:
        return ()
    kinds = ("displacement", HVP) if hvp else ("displacement",)
    of_kind = [(f"mean_{kind}", *(f"{kind}_deviation_{index}" for index in range(replicates))) for kind in kinds]
    return ("gradient", *(name for names in of_kind for name in names))


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model: where its elements lie on the element axis.

    Attributes
    ----------
    name : str
        Name as logged.
    offset : int
        First element on the element axis.
    shape : tuple of int
        Shape; its product is the number of elements (1 for a scalar).
    dtype : str
        Dtype in which the *parameter* was logged: it sets the rounding floor of the displacement.
    group : str
        Parameter group, empty where the log knows none.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    group: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element on the element axis."""
        return self.offset + self.size


@dataclass(frozen=True)
class Layout:
    """The layout table of a model: its tensors, end to end on one element axis."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> Layout:
        """Lay tensors end to end in the order given.

        Parameters
        ----------
        shapes : mapping
            Name to (shape, dtype).
        """
        tensors, offset = [], 0
        for name, (shape, dtype) in shapes.items():
            tensors.append(Tensor(name, offset, tuple(shape), dtype))
            offset = tensors[-1].stop
        return cls(tuple(tensors))

    @classmethod
    def from_json(cls, table: Sequence[Mapping[str, Any]]) -> Layout:
        """Rebuild a layout from the attribute of a store."""
        return cls(tuple(Tensor(**{**row, "shape": tuple(row["shape"])}) for row in table))

    def to_json(self) -> list[dict[str, Any]]:
        """Rows of the layout table, for the attribute of a store."""
        return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in order."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def elements(self) -> int:
        """Number of elements of the model, the paper's D."""
        return self.tensors[-1].stop if self.tensors else 0

    def segments(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Pieces of tensors within a range of the element axis.

        Returns
        -------
        list of (tensor index, first element, stop element)
            In order, not empty ones only; elements count from the start of the axis.
        """
        pieces = []
        for index in range(bisect_right(self.tensors, start, key=lambda tensor: tensor.stop), len(self.tensors)):
            tensor = self.tensors[index]
            if tensor.offset >= stop:
                break
            low, high = max(start, tensor.offset), min(stop, tensor.stop)
            if low < high:
                pieces.append((index, low, high))
        return pieces


# Results ----------------------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    """Why a metric exists or not; CF flag values of the variable ``status``.

    Where several apply the first of this order wins: not_logged (a run of a sweep does not have the step, another
    has), non_finite, no_learning_rate, zero_gradient, zero_update, unverifiable, and then the sign of the
    alignment decides.
    """

    EFFECTIVE = 0
    ORTHOGONAL = 1
    OBTUSE = 2
    ZERO_UPDATE = 3
    ZERO_GRADIENT = 4
    NON_FINITE = 5
    NO_LEARNING_RATE = 6
    UNVERIFIABLE = 7
    NOT_LOGGED = 8


class ShiftedMetric(enum.IntEnum):
    """What is known of Mbar + eta H, the metric of the true gradient of eq. (17); flags of ``shifted_metric``.

    Unknown where no smallest Hessian eigenvalue was logged or Mbar does not exist. Indefinite whatever Mbar is,
    where y.g <= 0. Otherwise definite with the Mbar of smallest condition number, or with some Mbar; or undecided:
    a metric of the true gradient exists, but the learning rate is not below the bound that makes it this one.
    """

    UNKNOWN = 0
    DEFINITE_OPTIMAL = 1
    DEFINITE = 2
    UNDECIDED = 3
    INDEFINITE = 4


@dataclass(frozen=True)
class Variable:
    """What a variable of ``results.zarr`` is called, in which unit, by which equation."""

    long_name: str
    units: str
    equation: str


# y is a loss per parameter, g a parameter per learning rate (eq. 2), so a metric M with M g = y has the
# unit loss x learning rate / parameter^2. The pipeline does not know these units and names them.
_METRIC = "loss learning_rate parameter-2"

VARIABLES: dict[str, Variable] = {
    "loss": Variable("loss before the update", "loss", "L(theta_t)"),
    "learning_rate": Variable("learning rate of the update", "learning_rate", "eta, eq. (2)"),
    "step_span": Variable(
        "number of updates between this logged state and the next", "1", "t' - t for logged neighbours t, t'"
    ),
    "parameter_norm": Variable("norm of the parameters", "parameter", "|theta_t|"),
    "update_norm": Variable(
        "norm of the mean update over the window's steps",
        "parameter learning_rate-1",
        "|g|, g = (theta_{t+k} - theta_t) / (k eta), eq. (2)",
    ),
    "gradient_norm": Variable("norm of the negative gradient", "loss parameter-1", "|y|"),
    "alignment": Variable("inner product of negative gradient and update", "loss learning_rate-1", "y.g"),
    "cosine": Variable("cosine of the angle between negative gradient and update", "1", "cos(psi)"),
    "angle": Variable("angle between negative gradient and update", "radian", "psi in [0, pi], eq. (9)"),
    "angle_uncertainty": Variable(
        "largest error of the angle by rounding of the stored values",
        "radian",
        "asin(|dy| / |y|) + asin(|dg| / |g|), dy and dg what rounding to the stored dtypes makes at most",
    ),
    "effective": Variable("the update descends: y.g > 0", "1", "y.g > 0, section 2.1"),
    "condition_number": Variable(
        "smallest condition number of any metric M with M g = y", "1", "kappa(M_opt), below eq. (9), Prop. 1"
    ),
    "preconditioner_condition_number": Variable(
        "condition number of the metric that the optimizer used",
        "1",
        "kappa(diag(sqrt(v) + epsilon)) of Adam, of the factors of Shampoo, PSGD and K-FAC, beside kappa(M_opt) of "
        "eq. (9)",
    ),
    "similarity": Variable("similarity of update and steepest descent", "1", "1 / kappa(M_opt)"),
    "eigenvalue_max": Variable("largest eigenvalue of the optimal metric", _METRIC, "eq. (9)"),
    "eigenvalue_mid": Variable(
        "eigenvalue of the optimal metric of multiplicity D - 2 (none where D <= 2)", _METRIC, "eq. (9)"
    ),
    "eigenvalue_min": Variable("smallest eigenvalue of the optimal metric", _METRIC, "eq. (9)"),
    "eigenvalue_max_infimum": Variable(
        "greatest lower bound of the largest eigenvalue of any metric", _METRIC, "Prop. 3"
    ),
    "eigenvalue_min_supremum": Variable(
        "least upper bound of the smallest eigenvalue of any metric", _METRIC, "Prop. 2"
    ),
    "family_eigenvalue_max": Variable(
        "largest eigenvalue over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_eigenvalue_mid": Variable(
        "eigenvalue of multiplicity D - 2 over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_eigenvalue_min": Variable(
        "smallest eigenvalue over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_condition_number": Variable("condition number over the one-parameter family", "1", "Lemma 1, eq. (22)"),
    "discrete_identity_residual": Variable(
        "relative failure of the discrete gradient identity", "1", "(eta g.y + dL) / |dL|, eq. (12)"
    ),
    "learning_rate_bound": Variable(
        "learning rate below which some metric Mbar + eta H is one of the true gradient",
        "learning_rate",
        "eta < |ybar| cos(psi_bar) / (h |g|), below eq. (17)",
    ),
    "learning_rate_bound_optimal": Variable(
        "learning rate below which that of the optimal Mbar is", "learning_rate", "eta < lambda_min(Mbar) / h"
    ),
    "shifted_metric": Variable(
        "what Mbar + eta H is, the metric of the true gradient", "1", "Mbar + eta H, eq. (17)"
    ),
    "loss_average": Variable("mean loss over the window", "loss", "L_avg(t), below eq. (3)"),
    "loss_decrease": Variable("decrease of the loss over the window", "loss", "L(t) - L(t+m), eq. (3)"),
    "effective_window": Variable(
        "smallest window of which all are effective, NaN where none is", "1", "m with y.g > 0 for all t, eq. (3)"
    ),
    "effective_window_count": Variable("windows that support effective_window", "1", "number of t, eq. (3)"),
    "decreasing_window": Variable(
        "smallest window over which the loss always decreases, NaN where none is", "1", "m of eq. (3)"
    ),
    "decreasing_window_count": Variable("windows that support decreasing_window", "1", "number of t, eq. (3)"),
    "status": Variable("why the metric exists or not", "1", "y.g > 0, section 2.1"),
}


# Of a stochastic rule g stands for its mean over replicates, and an error is that of the mean, by the jackknife.
REPLICATE_VARIABLES: dict[str, Variable] = {
    **{
        name: VARIABLES[name]
        for name in (
            "status",
            "effective",
            "update_norm",
            "gradient_norm",
            "alignment",
            "angle",
            "condition_number",
        )
    },
    "stochastic_weight": Variable(
        "weight alpha above which the metric of the mean update is positive definite", _METRIC, "eq. (19)"
    ),
    "stochastic_alpha": Variable("weight alpha of the best conditioned Mbar", _METRIC, "eqs. (9), (19)"),
    "stochastic_definite": Variable("with it the metric of the mean update is positive definite", "1", "eq. (19)"),
    "learning_rate_bound": Variable(
        "learning rate up to which it is, with y, <Hg> and alpha held", "learning_rate", "eq. (19)"
    ),
    "loss_decrease": Variable("mean decrease of the loss", "loss", "-<dL>, section 2.2"),
    "replicate_loss_decrease": Variable("decrease of the loss in each replicate", "loss", "-dL"),
    "replicate_alignment": Variable("y.g of each replicate", "loss learning_rate-1", "y.g"),
    "replicate_angle": Variable("angle between y and g of each replicate", "radian", "psi in [0, pi], eq. (9)"),
    "replicate_update_norm": Variable("norm of the update of each replicate", "parameter learning_rate-1", "|g|"),
}
REPLICATE_VARIABLES |= {
    f"{name}_error": Variable(
        f"standard error of {name}", REPLICATE_VARIABLES[name].units, "jackknife over replicates"
    )
    for name in (
        "alignment",
        "angle",
        "condition_number",
        "stochastic_weight",
        "learning_rate_bound",
        "loss_decrease",
    )
}
"""Variables of `pipeline.replicates.label`."""


# Errors -----------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Input that is refused: what, where, why usually, and what to do.

    Parameters
    ----------
    what : str
        What is wrong, with the values found.
    where : str, optional
        File, step and tensor.
    why : str, optional
        Why this usually happens.
    remedy : str, optional
        What to do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        lines = [what]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  why:   {why}"] if why else []
        lines += [f"  do:    {remedy}"] if remedy else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all four parts, as the error may cross to another process."""
        return (_input_error, (type(self), self.what, self.where, self.why, self.remedy))


class Unavailable(InputError):
    """What is refused now and may be taken later, unchanged: a lock that is held, a scheduler that is lost."""


def _input_error(kind: type[InputError], what: str, where: str, why: str, remedy: str) -> InputError:
    return kind(what, where=where, why=why, remedy=remedy)
