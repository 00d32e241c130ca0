"""Higher-order learning rules: effective in the state extended by their memory, if not for the loss alone.

A rule with a memory may step uphill, and no metric of the loss alone explains such an update. The paper extends the
state by the memory (section 1, footnote 1). Where a Lyapunov function E of that state is known, it is the loss to
take: the rule is natural gradient descent on E. With d = theta_t - theta_{t-1}, what is known is this:

*Heavy ball*, on any f whose gradient has the Lipschitz constant L, convex or not:
E = f(theta) + (1/eta - L/2)/2 |d|^2 decreases where eta < 2 (1 - beta) / L (Ochs et al.). There y.g > 0 as well:
with d' the next d,

    -grad E . (z' - z) = (|d'|^2 - (beta + s) d.d' + s |d|^2) / eta,    s = 1 - eta L / 2,

is a positive definite form as beta < s < 1.

*Nesterov's method* with eta = 1/L and beta = (sqrt(kappa) - 1)/(sqrt(kappa) + 1), kappa = L/mu, on f of strong
convexity mu with the minimum 0 at 0: E = f(theta) + mu/2 |theta + (sqrt(kappa) - 1) d|^2 shrinks by the factor
1 - 1/sqrt(kappa) or more (Bansal, Gupta; Wilson et al.). As E is convex, y.g > 0 follows.

*Adam*: along the differential equation to which small learning rates lead,
E = f(theta) + eta/(2 (1 - beta_1)) sum m^2/(sqrt(s) + epsilon) decreases where 1 - beta_2 <= 4 (1 - beta_1)
(Barakat, Bianchi). The rule itself, of steps of finite length, has no Lyapunov function on all of its states: it
has cycles even on quadratics (Bock, Weiß), as with epsilon = 0 from theta = eta (1 - beta_1)/(2 (1 + beta_1)) to
-theta and back. So with this E, what is effective is measured and not promised.

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
"""Elements of theta, and number of updates, by default."""

CONVEXITY, SMOOTHNESS = 1e-3, 1.0
"""Strong convexity mu, and Lipschitz constant L of the gradient, of the objectives drawn."""

OBJECTIVES = ("quadratic", "log-cosh")

Floats = NDArray[np.float64]
State = Mapping[str, Floats]


@dataclass(frozen=True)
class Objective:
    """Function f with the minimum 0 at 0: in a rotated basis, x = R theta, a sum of one function of each x_i.

    With curvatures h_i it is sum h_i x_i^2 / 2, or, where it is not quadratic,
    sum mu x_i^2 / 2 + (h_i - mu) log cosh x_i, whose curvature falls from h_i at 0 to mu, the least h_i, far out.

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
        """Value at a state, shape (dimension,)."""
        x = self.rotation @ theta
        if self.quadratic:
            return float(self.curvatures @ x**2 / 2.0)
        size = np.abs(x)
        # log cosh x, which would overflow and cancel.
        bowl = size + np.log1p(np.expm1(-2.0 * size) / 2.0)
        return float(self.convexity * (x @ x) / 2.0 + (self.curvatures - self.convexity) @ bowl)

    def gradient(self, theta: Floats) -> Floats:
        """Gradient at a state, shape (dimension,)."""
        x = self.rotation @ theta
        slope = self.curvatures * x
        if not self.quadratic:
            slope = self.convexity * x + (self.curvatures - self.convexity) * np.tanh(x)
        gradient: Floats = self.rotation.T @ slope
        return gradient


def draw_objective(name: str, dimension: int, random: np.random.Generator) -> Objective:
    """Draw a rotation for an objective with curvatures from mu to L, in equal ratios.

    Parameters
    ----------
    name : {"quadratic", "log-cosh"}
    dimension : int
        2 or more.
    random : numpy.random.Generator
        Source of chance.
    """
    rotation, _ = np.linalg.qr(random.standard_normal((dimension, dimension)))
    return Objective(np.geomspace(CONVEXITY, SMOOTHNESS, dimension), rotation, name == "quadratic")


# Rules -------------------------------------------------------------------------------------------------------


class Rule(Protocol):
    """A rule with a memory, as a rule without one on the extended state: ``theta`` and the tensors it remembers."""

    @property
    def learning_rate(self) -> float:
        """Learning rate eta of all tensors of the state."""

    def start(self, theta: Floats) -> State:
        """Give the extended state from which the rule sets out."""

    def step(self, state: State) -> State:
        """Make an update of the extended state."""

    def energy(self, state: State) -> float:
        """Lyapunov function E."""

    def energy_gradient(self, state: State) -> State:
        """Gradient of E by every tensor of the state."""


@dataclass(frozen=True)
class HeavyBall:
    """Polyak's momentum: v' = beta v - grad f(theta), theta' = theta + eta v'.

    Raises
    ------
    InputError
        If eta is not below 2 (1 - beta) / L, and the energy not known to decrease.
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
                remedy="give a smaller learning rate",
            )

    @property
    def _weight(self) -> float:
        # (1/eta - L/2)/2 |d|^2 with d = eta v.
        return (self.learning_rate - self.learning_rate**2 * self.objective.smoothness / 2.0) / 2.0

    def start(self, theta: Floats) -> State:
        """Begin at rest."""
        return {"theta": theta, "velocity": np.zeros_like(theta)}

    def step(self, state: State) -> State:
        """Make an update of the extended state."""
        velocity = self.decay * state["velocity"] - self.objective.gradient(state["theta"])
        return {"theta": state["theta"] + self.learning_rate * velocity, "velocity": velocity}

    def energy(self, state: State) -> float:
        """Loss and kinetic energy."""
        return self.objective.value(state["theta"]) + self._weight * float(state["velocity"] @ state["velocity"])

    def energy_gradient(self, state: State) -> State:
        """Gradient of the energy."""
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
        """Factor by which the energy shrinks at least, 1 - 1 / sqrt(kappa)."""
        return 1.0 - 1.0 / self._root

    def start(self, theta: Floats) -> State:
        """Begin at rest."""
        return {"theta": theta, "velocity": np.zeros_like(theta)}

    def step(self, state: State) -> State:
        """Make an update of the extended state."""
        eta, decay = self.learning_rate, (self._root - 1.0) / (self._root + 1.0)
        ahead = state["theta"] + decay * eta * state["velocity"]
        velocity = decay * state["velocity"] - self.objective.gradient(ahead)
        return {"theta": state["theta"] + eta * velocity, "velocity": velocity}

    def _estimate(self, state: State) -> Floats:
        return state["theta"] + (self._root - 1.0) * self.learning_rate * state["velocity"]

    def energy(self, state: State) -> float:
        """Loss, and distance of the minimum from where the momentum leads."""
        estimate = self._estimate(state)
        return self.objective.value(state["theta"]) + self.objective.convexity / 2.0 * float(estimate @ estimate)

    def energy_gradient(self, state: State) -> State:
        """Gradient of the energy."""
        pull = self.objective.convexity * self._estimate(state)
        return {
            "theta": self.objective.gradient(state["theta"]) + pull,
            "velocity": (self._root - 1.0) * self.learning_rate * pull,
        }


@dataclass(frozen=True)
class Adam:
    """Adam: m' = beta_1 m + (1 - beta_1) grad f, s' alike of its square, theta' = theta - eta m'/(sqrt(s') + eps).

    It begins with the first gradient and its square in the place of zeros, so it has no bias to correct, which
    would make the rule another one at every step.

    Raises
    ------
    InputError
        If 1 - beta_2 > 4 (1 - beta_1), and the energy does not even decrease along the differential equation.
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
                remedy="give a larger decay for the squares",
            )

    @property
    def _weight(self) -> float:
        return self.learning_rate / (2.0 * (1.0 - self.decay))

    def start(self, theta: Floats) -> State:
        """Begin with the first gradient as if it had always been the same."""
        gradient = self.objective.gradient(theta)
        return {"theta": theta, "mean": gradient, "square": gradient**2}

    def step(self, state: State) -> State:
        """Make an update of the extended state."""
        gradient = self.objective.gradient(state["theta"])
        mean = self.decay * state["mean"] + (1.0 - self.decay) * gradient
        square = self.square_decay * state["square"] + (1.0 - self.square_decay) * gradient**2
        theta = state["theta"] - self.learning_rate * mean / (np.sqrt(square) + self.epsilon)
        return {"theta": theta, "mean": mean, "square": square}

    def energy(self, state: State) -> float:
        """Loss, and the mean gradient measured in Adam's own metric."""
        kinetic = np.sum(state["mean"] ** 2 / (np.sqrt(state["square"]) + self.epsilon))
        return self.objective.value(state["theta"]) + self._weight * float(kinetic)

    def energy_gradient(self, state: State) -> State:
        """Gradient of the energy."""
        root = np.sqrt(state["square"])
        steepness = state["mean"] / (root + self.epsilon)
        # Where a gradient has been 0 all the time, its mean and square are 0 and nothing moves.
        falls = np.divide(steepness**2, 2.0 * root, out=np.zeros_like(root), where=root > 0)
        return {
            "theta": self.objective.gradient(state["theta"]),
            "mean": 2.0 * self._weight * steepness,
            "square": -self._weight * falls,
        }


RULES: dict[str, type[HeavyBall | Nesterov | Adam]] = {"heavy-ball": HeavyBall, "nesterov": Nesterov, "adam": Adam}
"""Name to rule."""


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
    """Follow every rule on every objective and log each trajectory twice, in float64.

    ``RULE-OBJECTIVE-loss`` has the tensor ``theta``, the loss f and its gradient; ``RULE-OBJECTIVE-extended`` has
    the extended state, the energy E as its loss and the gradient of E.

    Parameters
    ----------
    folder : Path
        Folder of the logs.
    rules, objectives : sequence of str
        Names of `RULES` and `OBJECTIVES`.
    steps : int
        Number of updates; one state more is logged, as the last update needs the state after it.
    dimension : int
        Number of elements D of theta, 2 or more.
    seed : int
        Seed of the objectives and the first state.
    container : {"safetensors", "npz"}
        Container of a step.

    Returns
    -------
    dict
        ``RULE-OBJECTIVE`` to the rule that was followed.

    Raises
    ------
    InputError
        If an option is out of its range, or a name is not known.
    """
    for what, names, known in (("rule", rules, tuple(RULES)), ("objective", objectives, OBJECTIVES)):
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"unknown {what} {unknown[0]!r}", remedy=f"choose from: {', '.join(known)}")
    if steps < 1 or dimension < 2:
        raise InputError(
            f"{steps} steps in {dimension} dimensions do not form a trajectory",
            remedy="give at least one step and at least two dimensions",
        )
    followed: dict[str, Rule] = {}
    for objective in objectives:
        random = np.random.default_rng(seed)
        drawn = draw_objective(objective, dimension, random)
        theta = 3.0 * random.standard_normal(dimension)
        for name in rules:
            run = f"{name}-{objective}"
            followed[run] = RULES[name](drawn)
            _follow(followed[run], drawn, theta, steps, Path(folder) / run, container)
    return followed


def _follow(rule: Rule, objective: Objective, theta: Floats, steps: int, path: Path, container: str) -> None:
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
