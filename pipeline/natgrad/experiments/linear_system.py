"""The stable linear time-invariant system of section 3.1, eq. (21), and its Lyapunov function as the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm, solve_continuous_lyapunov

from natgrad.recording.recorder import Recorder
from natgrad.schema.errors import InputError

__all__ = [
    "DIMENSION",
    "LEARNING_RATE",
    "METHODS",
    "STEPS",
    "LinearSystem",
    "log_linear_system",
    "lyapunov_matrix",
    "random_dynamics",
]

METHODS = ("euler", "exponential")
"""Integration methods: explicit Euler steps, or the exact matrix exponential."""

DIMENSION, LEARNING_RATE, STEPS = 8, 0.05, 300
"""Defaults: number of elements of theta, time per step and number of updates."""

Floats = NDArray[np.float64]


def random_dynamics(dimension: int, random: np.random.Generator) -> Floats:
    """Draw a random matrix A that is stable, asymmetric and not normal, with oscillating modes.

    The real Schur form of A is drawn, and then a random reflection is applied. Thus the eigenvalues are known:
    pairs -d +- i f with decay d in [1/2, 3/2] and frequency f in [1/2, 2] per unit of time. Each pair rotates on
    an ellipse (axes 2 : 1) and drives the pairs above it, so the angle psi between the flow and steepest descent
    changes along a trajectory.

    Parameters
    ----------
    dimension : int
        Number of elements D of theta; if it is odd, one eigenvalue is real.
    random : numpy.random.Generator
        Random number generator.

    Returns
    -------
    (dimension, dimension) array
        A, per unit of time.

    Raises
    ------
    InputError
        If the dimension is less than 2, because every matrix is then symmetric.
    """
    if dimension < 2:
        raise InputError(
            f"dimension {dimension} is too small",
            why="a one-dimensional system is symmetric, so it is already gradient descent",
            remedy="use a dimension of at least 2",
        )
    pairs = dimension // 2
    # With this scale, the strength of the coupling between pairs hardly depends on the dimension.
    schur = np.triu(random.standard_normal((dimension, dimension)), 1) / np.sqrt(dimension)
    decay = random.uniform(0.5, 1.5, pairs + dimension % 2)
    frequency = random.uniform(0.5, 2.0, pairs)
    np.fill_diagonal(schur, -np.repeat(decay, 2)[:dimension])
    first = 2 * np.arange(pairs)
    schur[first, first + 1] = 2.0 * frequency
    schur[first + 1, first] = -frequency / 2.0
    normal = random.standard_normal(dimension)
    reflection = np.eye(dimension) - (2.0 / (normal @ normal)) * np.outer(normal, normal)
    reflected: Floats = reflection @ schur @ reflection
    return reflected


def lyapunov_matrix(dynamics: Floats) -> Floats:
    """Solve P A + A' P = -I (section 3.1, Q = I) for the symmetric positive definite P.

    Parameters
    ----------
    dynamics : (dimension, dimension) array
        A, stable; per unit of time.

    Returns
    -------
    (dimension, dimension) array
        P, exactly symmetric.
    """
    # SciPy solves a X + X a' = q. With a = A' and q = -Q, this is A' X + X A = -Q, the equation of the paper. The
    # more obvious call with (A, Q) would solve A X + X A' = Q, whose solution is negative definite and belongs to a
    # different system.
    solution = solve_continuous_lyapunov(dynamics.T, -np.eye(len(dynamics)))
    # 2 P theta is the gradient of theta' P theta only if P is symmetric, and the solution is symmetric only up to
    # rounding.
    symmetric: Floats = (solution + solution.T) / 2.0
    return symmetric


@dataclass(frozen=True)
class LinearSystem:
    """The flow d theta/dt = A theta, eq. (21), and its loss L = theta' P theta.

    Attributes
    ----------
    dynamics : (dimension, dimension) array
        A, per unit of time.
    lyapunov : (dimension, dimension) array
        P from `lyapunov_matrix`.
    """

    dynamics: Floats
    lyapunov: Floats

    def loss(self, theta: Floats) -> float:
        """Return the Lyapunov function theta' P theta of a state, shape (dimension,)."""
        return float(theta @ self.lyapunov @ theta)

    def gradient(self, theta: Floats) -> Floats:
        """Return the gradient 2 P theta of the loss at a state, shape (dimension,); it is -y of eq. (2)."""
        return 2.0 * (self.lyapunov @ theta)

    def update(self, theta: Floats, learning_rate: float, method: str) -> Floats:
        """Return the state after one step, shape (dimension,).

        Parameters
        ----------
        theta : (dimension,) array
            State before the step.
        learning_rate : float
            Time eta per step.
        method : {"euler", "exponential"}
            ``euler`` returns theta + eta A theta: g of eq. (2) is A theta, and y.g = |theta|^2 > 0. ``exponential``
            returns expm(A eta) theta, the exact solution: g is the mean flow during the step.
        """
        if method == "euler":
            return theta + learning_rate * (self.dynamics @ theta)
        flow: Floats = expm(self.dynamics * learning_rate) @ theta
        return flow


def log_linear_system(
    folder: Path,
    *,
    steps: int = STEPS,
    dimension: int = DIMENSION,
    learning_rate: float = LEARNING_RATE,
    method: str = "euler",
    seed: int = 0,
    container: str = "safetensors",
) -> LinearSystem:
    """Simulate a random system from a random state and log every state, in float64, as the tensor ``theta``.

    Parameters
    ----------
    folder : Path
        Folder of the log.
    steps : int
        Number of updates. One more state is logged, because the last update needs the state after it.
    dimension : int
        Number of elements D of theta, at least 2.
    learning_rate : float
        Time eta per step. It is logged as the learning rate, because theta_{t+1} = theta_t + eta g.
    method : {"euler", "exponential"}
        See `LinearSystem.update`.
    seed : int
        Seed of the system and the first state.
    container : {"safetensors", "npz"}
        Container of a step.

    Returns
    -------
    LinearSystem
        The simulated system.

    Raises
    ------
    InputError
        If an option is out of range, or the Euler method is unstable with this learning rate.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}", remedy=f"choose one of: {', '.join(METHODS)}")
    if steps < 1 or not 0 < learning_rate < np.inf:
        raise InputError(
            f"{steps} steps with learning rate {learning_rate} do not form a trajectory",
            remedy="use at least one step and a positive learning rate",
        )
    random = np.random.default_rng(seed)
    dynamics = random_dynamics(dimension, random)
    growth = float(np.abs(1.0 + learning_rate * np.linalg.eigvals(dynamics)).max())
    if method == "euler" and growth >= 1.0:
        raise InputError(
            f"Euler steps with learning rate {learning_rate} grow by a factor of {growth:.3g} per step",
            why="the step is too long for the oscillations of the system: |1 + eta lambda| >= 1",
            remedy="use a smaller learning rate, or the method exponential",
        )
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    theta = random.standard_normal(dimension)
    recorder = Recorder(folder, container)
    for step in range(steps + 1):
        recorder.record(
            step,
            parameter={"theta": theta},
            gradient={"theta": system.gradient(theta)},
            loss=system.loss(theta),
            learning_rate=learning_rate,
        )
        theta = system.update(theta, learning_rate, method)
    return system
