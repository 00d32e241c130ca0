"""Define the names of dimensions, stored arrays, scalars and ledger vectors. These names are a contract."""

from __future__ import annotations

__all__ = [
    "ATTEMPT",
    "DESCENT",
    "DESCENTS",
    "ELEMENT",
    "EVALUATIONS",
    "FROM_OPTIMIZER",
    "GAMMA",
    "GRADIENTS",
    "GROUP",
    "GROUP_KIND",
    "HESSIAN_NUMBERS",
    "HVP",
    "HYPERPARAMETERS",
    "LOGGED",
    "METRIC_EIGENVALUES",
    "OPTIMIZER_NUMBERS",
    "OPTIMIZER_STATES",
    "PRODUCTS",
    "RECORDED",
    "RECORDED_VECTORS",
    "RECOVERY",
    "REPLAYED",
    "REPLICATE",
    "REPLICATES",
    "REPLICATE_HVP",
    "REPLICATE_LOSS",
    "REPLICATE_PARAMETER",
    "REPLICATE_STATES",
    "REPLICATE_VECTOR",
    "RUN",
    "SCALARS",
    "SKIPPED",
    "STATES",
    "STEP",
    "TENSOR",
    "TENSOR_WEIGHT_DECAY",
    "USUAL_SCALARS",
    "VECTOR",
    "VECTORS",
    "WEIGHT_DECAY",
    "WINDOW",
    "WITHOUT_STATE",
    "WITH_REPLICATE_VECTOR",
    "WITH_VECTOR",
    "ledger_vectors",
    "of_replicate",
    "replicate_of",
    "replicate_vectors",
]


STEP, ELEMENT, TENSOR, GROUP = "step", "element", "tensor", "group"

GROUP_KIND = "group_kind"
"""Coordinate of groups of tensors: block, layer or pattern."""

ATTEMPT, RUN = "attempt", "run"

VECTOR, WITH_VECTOR = "vector", "with_vector"

DESCENT, WINDOW, GAMMA = "descent", "window", "gamma"

REPLICATE = "replicate"

REPLICATE_VECTOR, WITH_REPLICATE_VECTOR = "replicate_vector", "with_replicate_vector"

DESCENTS = ("gradient", "corrected", "trapezoid", "taylor")
"""Estimates of the negative gradient y: the gradient of the loss, and three discrete gradients, eq. (12): the
gradient corrected along the displacement, the corrected mean of the gradients of both states, and the gradient plus
hvp / 2, eq. (16)."""

EVALUATIONS = ("batch", "fixed", "unknown")
"""Data on which the loss and gradient of a step are evaluated: the mini-batch of the step, or fixed data."""

HVP = "hvp"

STATES = ("parameter", "gradient", HVP)
"""Arrays (step, element) of a trajectory; ``hvp`` is optional."""

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "master_parameter")
"""Arrays (step, element) of the optimizer state, stored on request. They are NaN at steps without a state."""

METRIC_EIGENVALUES = (
    "metric_eigenvalue_min",
    "metric_eigenvalue_max",
    "next_metric_eigenvalue_min",
    "next_metric_eigenvalue_max",
)
"""Eigenvalues of Kronecker-factored and rotated metrics (Shampoo, SOAP, PSGD, K-FAC). The first two are for the
metric used in the update to this state. If curvature is saved with the state at which it was measured, the other
names are for the metric used in the update from this state."""

TENSOR_WEIGHT_DECAY = "tensor_decoupled_weight_decay"

RECOVERY = (
    "gradient_error_bound",
    "gradient_check_residual",
    "gradient_check_rounding",
    "gradient_check",
    "gradient_rule",
    "gradient_updates",
)
"""Arrays (step, tensor) that are stored if gradients are recovered from optimizer states: the largest relative
error of the gradient, the difference between its displacement and the logged one, the largest difference that
rounding explains, what the comparison proves (0: nothing, 1: the learning rate, 2: the gradient), the number of the
update rule, and the number of updates to the next state."""

OPTIMIZER_NUMBERS = (
    "tensor_learning_rate",
    TENSOR_WEIGHT_DECAY,
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
    *RECOVERY,
)
"""Arrays (step, tensor) of the optimizer state: the options of the parameter group of each tensor, the number of
updates of the state, the smallest and largest element of ``exp_avg_sq``, the eigenvalues of the metric, a flag (1)
for metrics other than Adam's, and a flag (1) for updates rescaled by a factor that is not saved. Unknown values are
NaN. ``weight_decay`` is the saved option, and ``tensor_decoupled_weight_decay`` that of decoupled weight decay: 0
if the optimizer adds its decay to the gradient."""

HYPERPARAMETERS = ("tensor_learning_rate", TENSOR_WEIGHT_DECAY)
"""Options of an optimizer that are stored with or without the rest of its state."""

WITHOUT_STATE = (*HYPERPARAMETERS, *RECOVERY)
"""Optimizer numbers that are stored with or without the rest of the state."""

LOGGED, FROM_OPTIMIZER, REPLAYED, RECORDED = "logged", "from-optimizer", "replayed", "recorded"

GRADIENTS = (LOGGED, FROM_OPTIMIZER, REPLAYED)
"""Where the gradients of a log come from: the log, the differences between the states of its optimizer, or the
evaluations of an objective at its states."""

WEIGHT_DECAY = "decoupled_weight_decay"

HESSIAN_NUMBERS = ("hessian_min_eigenvalue", "hessian_max_eigenvalue", "taylor_point")
"""Scalars of the Hessian for an update: its extreme eigenvalues, and lambda of eq. (11), where it was evaluated."""

SCALARS = ("loss", "learning_rate", "loss_time_derivative", *HESSIAN_NUMBERS, WEIGHT_DECAY)
"""Numbers of a step that a log may contain: arrays (step) of a trajectory, NaN where they were not logged."""

USUAL_SCALARS = SCALARS[:2]
"""Scalars that every trajectory has. The others exist only if they were logged."""

SKIPPED = "skipped"
"""Number of a step that a log of ledgers contains: 1 if the optimizer skipped the update from it, otherwise 0."""

VECTORS = ("parameter", "displacement", "gradient", "gradient_change", "residual", HVP)
"""Vectors of the Gram ledger. ``hvp`` exists only if it was logged."""

RECORDED_VECTORS = ("parameter", "displacement", "gradient", "residual")
"""Vectors of the ledger of single updates, which a training loop computes without the gradient after the update."""

PRODUCTS = "products"
"""Inner products of the vectors of an update, which a log of ledgers contains instead of states."""

REPLICATE_PARAMETER, REPLICATE_HVP = "replicate_parameter", "replicate_hvp"

REPLICATE_STATES = (REPLICATE_PARAMETER, REPLICATE_HVP)
"""Arrays (step, replicate, element) of a trajectory, if a stochastic rule logs them: the states after R draws of
the update from theta_t, and the Hessian times the displacement of each draw."""

REPLICATE_LOSS = "replicate_loss"
"""Array (step, replicate) of a trajectory: the loss of each of these states."""

REPLICATES = (*REPLICATE_STATES, REPLICATE_LOSS)
"""All arrays of replicates that a log may contain."""


def of_replicate(array: str, replicate: int) -> str:
    """Return the name of one replicate of an array, which is an array (step, element).

    Examples
    --------
    >>> of_replicate("replicate_parameter", 3)
    'replicate_parameter/3'
    """
    return f"{array}/{replicate}"


def replicate_of(name: str) -> tuple[str, int | None]:
    """Return the array and the replicate of a name; the replicate is None if the array has no replicates.

    Examples
    --------
    >>> replicate_of("replicate_parameter/3"), replicate_of("gradient")
    (('replicate_parameter', 3), ('gradient', None))
    """
    array, slash, replicate = name.partition("/")
    return array, int(replicate) if slash else None


def replicate_vectors(replicates: int, hvp: bool) -> tuple[str, ...]:
    """Return the vectors of the ledger of R replicates, with or without their Hessian-vector products.

    A deviation is the difference between a replicate and the mean. Means are computed before any products, so a
    mean loses no digits even if it is much shorter than the replicates. The residual is that of the mean, gradient
    - c mean_displacement, so the angle of the mean update is accurate near 0 and pi.

    Examples
    --------
    >>> replicate_vectors(2, hvp=False)
    ('gradient', 'mean_displacement', 'residual', 'displacement_deviation_0', 'displacement_deviation_1')
    """
    if not replicates:
        return ()
    kinds = ("displacement", HVP) if hvp else ("displacement",)
    means = {"displacement": ("gradient", "mean_displacement", "residual"), HVP: (f"mean_{HVP}",)}
    of_kind = [(*means[kind], *(f"{kind}_deviation_{index}" for index in range(replicates))) for kind in kinds]
    return tuple(name for names in of_kind for name in names)


def ledger_vectors(hvp: bool) -> tuple[str, ...]:
    """Return the names of the vectors of the ledger, with or without the Hessian-vector product."""
    return tuple(name for name in VECTORS if hvp or name != HVP)
