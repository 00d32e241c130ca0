"""Higher-order learning rules, which may be effective only in the state extended by their memory.

A rule with memory may step uphill, and no metric explains such an update in terms of the loss alone. The paper
extends the state by the memory (section 1, footnote 1). If a Lyapunov function E of the extended state is known,
it replaces the loss, and the rule is natural gradient descent on E. With d = theta_t - theta_{t-1}, these results
are known:

*Heavy ball*, on any f whose gradient has the Lipschitz constant L, convex or not:
E = f(theta) + (1/eta - L/2)/2 |d|^2 decreases if eta < 2 (1 - beta) / L (Ochs et al.). In this case y.g > 0 also
holds: with the next d denoted d',

    -grad E . (z' - z) = (|d'|^2 - (beta + s) d.d' + s |d|^2) / eta,    s = 1 - eta L / 2,

is a positive definite form, because beta < s < 1.

*Nesterov's method* with eta = 1/L and beta = (sqrt(kappa) - 1)/(sqrt(kappa) + 1), kappa = L/mu, on f with strong
convexity mu and the minimum 0 at 0: E = f(theta) + mu/2 |theta + (sqrt(kappa) - 1) d|^2 shrinks at least by the
factor 1 - 1/sqrt(kappa) per step (Bansal, Gupta; Wilson et al.). E is convex, so y.g > 0 follows.

*Adam*: along the differential equation that is the limit of small learning rates,
E = f(theta) + eta/(2 (1 - beta_1)) sum m^2/(sqrt(s) + epsilon) decreases if 1 - beta_2 <= 4 (1 - beta_1)
(Barakat, Bianchi). The rule itself, with steps of finite length, has no Lyapunov function on all of its states,
because it has cycles even on quadratics (Bock, Weiß). With epsilon = 0, for example, a cycle leads from
theta = eta (1 - beta_1)/(2 (1 + beta_1)) to -theta and back. Therefore the effective updates with this E are
measured, not guaranteed.

References
----------
Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics 4, 1964.
Ochs, Chen, Brox, Pock, "iPiano: inertial proximal algorithm for nonconvex optimization", SIAM Journal on Imaging
Sciences 7, 2014.
Bansal, Gupta, "Potential-function proofs for gradient methods", Theory of Computing 15, 2019.
Wilson, Recht, Jordan, "A Lyapunov analysis of accelerated methods in optimization", JMLR 22, 2021.
Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015.
Barakat, Bianchi, "Convergence and dynamical behavior of the ADAM algorithm for nonconvex stochastic optimization",
SIAM Journal on Optimization 31, 2021.
Bock, Weiß, "Non-convergence and limit cycles in the Adam optimizer", ICANN 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from natgrad.recording.recorder import Recorder
from natgrad.schema.errors import InputError

__all__ = [
    "DIMENSION",
    "OBJECTIVES",
    "RULES",
    "STEPS",
    "Adam",
    "HeavyBall",
    "Nesterov",
    "Objective",
    "Rule",
    "draw_objective",
    "log_higher_order",
]

DIMENSION, STEPS = 8, 200
"""Defaults: number of elements of theta and number of updates."""

CONVEXITY, SMOOTHNESS = 1e-3, 1.0
"""Strong convexity mu, and Lipschitz constant L of the gradient, of the drawn objectives."""

OBJECTIVES = ("quadratic", "log-cosh")

Floats = NDArray[np.float64]
State = Mapping[str, Floats]


@dataclass(frozen=True)
class Objective:
    """Function f with the minimum 0 at 0: a sum of one function for each x_i in a rotated basis x = R theta.

    With curvatures h_i, f is sum h_i x_i^2 / 2 if it is quadratic, and otherwise
    sum mu x_i^2 / 2 + (h_i - mu) log cosh x_i, whose curvature decreases from h_i at 0 to the smallest h_i, mu, far
    from 0.

    Attributes
    ----------
    curvatures : (dimension,) array
        h_i, positive.
    rotation : (dimension, dimension) array
        R, orthogonal.
    quadratic : bool
    """

    curvatures: Floats
    rotation: Floats
    quadratic: bool

    @property
    def convexity(self) -> float:
        """Strong convexity mu."""
        return float(self.curvatures.min())

    @property
    def smoothness(self) -> float:
        """Lipschitz constant L of the gradient."""
        return float(self.curvatures.max())

    def value(self, theta: Floats) -> float:
        """Return the value at a state, shape (dimension,)."""
        x = self.rotation @ theta
        if self.quadratic:
            return float(self.curvatures @ x**2 / 2.0)
        size = np.abs(x)
        # This is log cosh x in a form that neither overflows nor cancels.
        bowl = size + np.log1p(np.expm1(-2.0 * size) / 2.0)
        return float(self.convexity * (x @ x) / 2.0 + (self.curvatures - self.convexity) @ bowl)

    def gradient(self, theta: Floats) -> Floats:
        """Return the gradient at a state, shape (dimension,)."""
        x = self.rotation @ theta
        slope = self.curvatures * x
        if not self.quadratic:
            slope = self.convexity * x + (self.curvatures - self.convexity) * np.tanh(x)
        gradient: Floats = self.rotation.T @ slope
        return gradient


def draw_objective(name: str, dimension: int, random: np.random.Generator) -> Objective:
    """Draw an objective with a random rotation and geometrically spaced curvatures from mu to L.

    Parameters
    ----------
    name : {"quadratic", "log-cosh"}
    dimension : int
        At least 2.
    random : numpy.random.Generator
        Random number generator.
    """
    rotation, _ = np.linalg.qr(random.standard_normal((dimension, dimension)))
    return Objective(np.geomspace(CONVEXITY, SMOOTHNESS, dimension), rotation, name == "quadratic")


# Rules -------------------------------------------------------------------------------------------------------


class Rule(Protocol):
    """A rule with memory, written as a rule without memory on the extended state (``theta`` and the memory)."""

    @property
    def learning_rate(self) -> float:
        """Learning rate eta of all tensors of the state."""

    def start(self, theta: Floats) -> State:
        """Return the initial extended state."""

    def step(self, state: State) -> State:
        """Return the extended state after an update."""

    def energy(self, state: State) -> float:
        """Return the Lyapunov function E."""

    def energy_gradient(self, state: State) -> State:
        """Return the gradient of E with respect to each tensor of the state."""


@dataclass(frozen=True)
class HeavyBall:
    """Polyak's momentum: v' = beta v - grad f(theta), theta' = theta + eta v'.

    Raises
    ------
    InputError
        If eta is not below 2 (1 - beta) / L. It is then not known whether the energy decreases.
    """

    objective: Objective
    learning_rate: float = 0.1
    decay: float = 0.9

    def __post_init__(self) -> None:
        limit = 2.0 * (1.0 - self.decay) / self.objective.smoothness
        if not (0 <= self.decay < 1 and 0 < self.learning_rate < limit):
            raise InputError(
                f"no decreasing energy is known for the heavy ball with learning rate {self.learning_rate} "
                f"and decay {self.decay}",
                why=f"the learning rate must be below 2 (1 - decay) / L = {limit:.3g}",
                remedy="use a smaller learning rate",
            )

    @property
    def _weight(self) -> float:
        # (1/eta - L/2)/2 |d|^2 with d = eta v.
        return (self.learning_rate - self.learning_rate**2 * self.objective.smoothness / 2.0) / 2.0

    def start(self, theta: Floats) -> State:
        """Return the initial state, with velocity 0."""
        return {"theta": theta, "velocity": np.zeros_like(theta)}

    def step(self, state: State) -> State:
        """Return the extended state after an update."""
        velocity = self.decay * state["velocity"] - self.objective.gradient(state["theta"])
        return {"theta": state["theta"] + self.learning_rate * velocity, "velocity": velocity}

    def energy(self, state: State) -> float:
        """Return the sum of the loss and a kinetic energy."""
        return self.objective.value(state["theta"]) + self._weight * float(state["velocity"] @ state["velocity"])

    def energy_gradient(self, state: State) -> State:
        """Return the gradient of the energy."""
        return {
            "theta": self.objective.gradient(state["theta"]),
            "velocity": 2.0 * self._weight * state["velocity"],
        }


@dataclass(frozen=True)
class Nesterov:
    """Nesterov's method for strong convexity: x = theta + beta d, theta' = x - grad f(x) / L, with d = eta v."""

    objective: Objective

    @property
    def learning_rate(self) -> float:
        """1 / L."""
        return 1.0 / self.objective.smoothness

    @property
    def _root(self) -> float:
        return float(np.sqrt(self.objective.smoothness / self.objective.convexity))

    @property
    def rate(self) -> float:
        """Upper bound of the factor by which the energy changes per step, 1 - 1 / sqrt(kappa)."""
        return 1.0 - 1.0 / self._root

    def start(self, theta: Floats) -> State:
        """Return the initial state, with velocity 0."""
        return {"theta": theta, "velocity": np.zeros_like(theta)}

    def step(self, state: State) -> State:
        """Return the extended state after an update."""
        eta, decay = self.learning_rate, (self._root - 1.0) / (self._root + 1.0)
        ahead = state["theta"] + decay * eta * state["velocity"]
        velocity = decay * state["velocity"] - self.objective.gradient(ahead)
        return {"theta": state["theta"] + eta * velocity, "velocity": velocity}

    def _estimate(self, state: State) -> Floats:
        return state["theta"] + (self._root - 1.0) * self.learning_rate * state["velocity"]

    def energy(self, state: State) -> float:
        """Return the loss plus the squared distance of the minimum from the extrapolated state, times mu / 2."""
        estimate = self._estimate(state)
        return self.objective.value(state["theta"]) + self.objective.convexity / 2.0 * float(estimate @ estimate)

    def energy_gradient(self, state: State) -> State:
        """Return the gradient of the energy."""
        pull = self.objective.convexity * self._estimate(state)
        return {
            "theta": self.objective.gradient(state["theta"]) + pull,
            "velocity": (self._root - 1.0) * self.learning_rate * pull,
        }


@dataclass(frozen=True)
class Adam:
    """Adam: m' = beta_1 m + (1 - beta_1) grad f, theta' = theta - eta m'/(sqrt(s') + eps).

    s' is computed like m', but from the square of the gradient and with beta_2. The initial m and s are the first
    gradient and its square instead of zeros. Thus no bias correction is needed, which would change the rule at
    every step.

    Raises
    ------
    InputError
        If 1 - beta_2 > 4 (1 - beta_1). The energy may then increase even along the differential equation.
    """

    objective: Objective
    learning_rate: float = 0.2
    decay: float = 0.9
    square_decay: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not 1.0 - self.square_decay <= 4.0 * (1.0 - self.decay):
            raise InputError(
                f"no decreasing energy is known for Adam with decays {self.decay} and {self.square_decay}",
                why="the squares must decay at most four times as fast as the gradients",
                remedy="use a larger decay for the squares",
            )

    @property
    def _weight(self) -> float:
        return self.learning_rate / (2.0 * (1.0 - self.decay))

    def start(self, theta: Floats) -> State:
        """Return the initial state, with the mean and square of a gradient that has been constant."""
        gradient = self.objective.gradient(theta)
        return {"theta": theta, "mean": gradient, "square": gradient**2}

    def step(self, state: State) -> State:
        """Return the extended state after an update."""
        gradient = self.objective.gradient(state["theta"])
        mean = self.decay * state["mean"] + (1.0 - self.decay) * gradient
        square = self.square_decay * state["square"] + (1.0 - self.square_decay) * gradient**2
        theta = state["theta"] - self.learning_rate * mean / (np.sqrt(square) + self.epsilon)
        return {"theta": theta, "mean": mean, "square": square}

    def energy(self, state: State) -> float:
        """Return the loss plus the squared norm of the mean gradient in Adam's metric, times a weight."""
        kinetic = np.sum(state["mean"] ** 2 / (np.sqrt(state["square"]) + self.epsilon))
        return self.objective.value(state["theta"]) + self._weight * float(kinetic)

    def energy_gradient(self, state: State) -> State:
        """Return the gradient of the energy."""
        root = np.sqrt(state["square"])
        steepness = state["mean"] / (root + self.epsilon)
        # If a gradient element has always been 0, so are its mean and square, and the parameter does not change.
        falls = np.divide(steepness**2, 2.0 * root, out=np.zeros_like(root), where=root > 0)
        return {
            "theta": self.objective.gradient(state["theta"]),
            "mean": 2.0 * self._weight * steepness,
            "square": -self._weight * falls,
        }


RULES: dict[str, type[HeavyBall | Nesterov | Adam]] = {"heavy-ball": HeavyBall, "nesterov": Nesterov, "adam": Adam}
"""Rules by name."""


# Logs --------------------------------------------------------------------------------------------------------


def log_higher_order(
    folder: Path,
    *,
    rules: Sequence[str] = tuple(RULES),
    objectives: Sequence[str] = OBJECTIVES,
    steps: int = STEPS,
    dimension: int = DIMENSION,
    seed: int = 0,
    container: str = "safetensors",
) -> dict[str, Rule]:
    """Run each rule on each objective and log each trajectory twice, in float64.

    ``RULE-OBJECTIVE-loss`` contains the tensor ``theta``, the loss f and its gradient. ``RULE-OBJECTIVE-extended``
    contains the extended state, the energy E as its loss, and the gradient of E.

    Parameters
    ----------
    folder : Path
        Folder of the logs.
    rules, objectives : sequence of str
        Names from `RULES` and `OBJECTIVES`.
    steps : int
        Number of updates. One more state is logged, because the last update needs the state after it.
    dimension : int
        Number of elements D of theta, at least 2.
    seed : int
        Seed of the objectives and the first state.
    container : {"safetensors", "npz"}
        Container of a step.

    Returns
    -------
    dict
        Logged rules by ``RULE-OBJECTIVE``.

    Raises
    ------
    InputError
        If an option is out of range, or a name is unknown.
    """
    for kind, names, known in (("rule", rules, tuple(RULES)), ("objective", objectives, OBJECTIVES)):
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"unknown {kind} {unknown[0]!r}", remedy=f"choose from: {', '.join(known)}")
    if steps < 1 or dimension < 2:
        raise InputError(
            f"{steps} steps in {dimension} dimensions do not form a trajectory",
            remedy="use at least one step and at least two dimensions",
        )
    logged: dict[str, Rule] = {}
    for objective in objectives:
        random = np.random.default_rng(seed)
        drawn = draw_objective(objective, dimension, random)
        theta = 3.0 * random.standard_normal(dimension)
        for name in rules:
            run = f"{name}-{objective}"
            logged[run] = RULES[name](drawn)
            _log_rule(logged[run], drawn, theta, steps, Path(folder) / run, container)
    return logged


def _log_rule(rule: Rule, objective: Objective, theta: Floats, steps: int, path: Path, container: str) -> None:
    alone, extended = (Recorder(path.with_name(f"{path.name}-{end}"), container) for end in ("loss", "extended"))
    state = rule.start(theta)
    for step in range(steps + 1):
        alone.record(
            step,
            parameter={"theta": state["theta"]},
            gradient={"theta": objective.gradient(state["theta"])},
            loss=objective.value(state["theta"]),
            learning_rate=rule.learning_rate,
        )
        extended.record(
            step,
            parameter=state,
            gradient=rule.energy_gradient(state),
            loss=rule.energy(state),
            learning_rate=rule.learning_rate,
        )
        state = rule.step(state)
