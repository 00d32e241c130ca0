"""Names that are part of a contract: dimensions, stored arrays, scalars and vectors of the ledger."""

from __future__ import annotations

__all__ = [
    "ATTEMPT",
    "DESCENT",
    "DESCENTS",
    "ELEMENT",
    "GAMMA",
    "HVP",
    "METRIC_EIGENVALUES",
    "OPTIMIZER_NUMBERS",
    "OPTIMIZER_STATES",
    "REPLICATE",
    "REPLICATES",
    "REPLICATE_HVP",
    "REPLICATE_LOSS",
    "REPLICATE_PARAMETER",
    "REPLICATE_STATES",
    "REPLICATE_VECTOR",
    "RUN",
    "SCALARS",
    "STATES",
    "STEP",
    "TENSOR",
    "USUAL_SCALARS",
    "VECTOR",
    "VECTORS",
    "WINDOW",
    "WITH_REPLICATE_VECTOR",
    "WITH_VECTOR",
    "ledger_vectors",
    "of_replicate",
    "replicate_of",
    "replicate_vectors",
]


STEP, ELEMENT, TENSOR = "step", "element", "tensor"

ATTEMPT, RUN = "attempt", "run"

VECTOR, WITH_VECTOR = "vector", "with_vector"

DESCENT, WINDOW, GAMMA = "descent", "window", "gamma"

REPLICATE = "replicate"

REPLICATE_VECTOR, WITH_REPLICATE_VECTOR = "replicate_vector", "with_replicate_vector"

DESCENTS = ("gradient", "corrected", "trapezoid", "taylor")
"""Negative gradients y: of the loss; and three discrete ones, eq. (12): the gradient corrected along the
displacement, the mean of the gradients at both ends so corrected, and the gradient plus hvp / 2, eq. (16)."""

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


def ledger_vectors(hvp: bool) -> tuple[str, ...]:
    """Names of the ledger's vectors, with or without the Hessian-vector product."""
    return tuple(name for name in VECTORS if hvp or name != HVP)
