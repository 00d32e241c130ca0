"""A loss that changes with time (section 2.1): a quadratic function whose minimum moves on a circle.

L(theta, t) = (theta - c(t))' H (theta - c(t)) / 2. Two rules follow the minimum, with Euler steps of length eta in
time:

*gradient*: d theta/dt = -grad L. This is steepest descent on the current loss, and yet the loss may increase,
because its minimum moves: dL/dt = -|grad L|^2 + partial L/partial t.

*tracking*: d theta/dt = -grad L + dc/dt. The rule knows the velocity of the minimum, so dL/dt = -|grad L|^2 < 0,
although a step may point uphill on the current loss.

For both rules, the extended pair y = (-grad L, -partial L/partial t), g = (d theta/dt, 1) determines how the loss
changes; the pair of theta alone does not. (The paper prints theta' for v' in dL/dt; see erratum 16.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from natgrad.recording.recorder import Recorder
from natgrad.schema.errors import InputError

__all__ = ["FREQUENCY", "LEARNING_RATE", "RULES", "STEPS", "MovingTarget", "log_moving_target"]

RULES = ("gradient", "tracking")
"""Rules that follow the target."""

FREQUENCY, LEARNING_RATE, STEPS = 1.0, 0.05, 200
"""Defaults: frequency of the target in radians per unit of time, time per step and number of updates."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MovingTarget:
    """The loss L(theta, t) and its derivatives.

    Attributes
    ----------
    hessian : (2, 2) array
        H, symmetric positive definite.
    frequency : float
        Frequency of the target c(t) = (cos, sin) on the unit circle, in radians per unit of time.
    """

    hessian: Floats
    frequency: float

    def target(self, time: float) -> Floats:
        """Return the minimum c(t)."""
        angle = self.frequency * time
        return np.array([np.cos(angle), np.sin(angle)])

    def velocity(self, time: float) -> Floats:
        """Return the velocity dc/dt of the minimum."""
        angle = self.frequency * time
        return self.frequency * np.array([-np.sin(angle), np.cos(angle)])

    def loss(self, theta: Floats, time: float) -> float:
        """Return the loss L(theta, t)."""
        offset = theta - self.target(time)
        return float(offset @ self.hessian @ offset) / 2.0

    def gradient(self, theta: Floats, time: float) -> Floats:
        """Return the gradient with respect to theta."""
        return self.hessian @ (theta - self.target(time))

    def time_derivative(self, theta: Floats, time: float) -> float:
        """Return the partial derivative with respect to time, at constant theta."""
        return -float(self.gradient(theta, time) @ self.velocity(time))

    def flow(self, theta: Floats, time: float, rule: str) -> Floats:
        """Return the flow d theta/dt of a rule."""
        descent = -self.gradient(theta, time)
        return descent + self.velocity(time) if rule == "tracking" else descent


def log_moving_target(
    folder: Path,
    *,
    rule: str = "gradient",
    steps: int = STEPS,
    frequency: float = FREQUENCY,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    container: str = "safetensors",
) -> MovingTarget:
    """Follow the target from a random state, and log every state in float64, including ``loss_time_derivative``.

    Parameters
    ----------
    folder : Path
        Folder of the log.
    rule : {"gradient", "tracking"}
    steps : int
        Number of updates. One more state is logged, because the last update needs the state after it.
    frequency : float
        Frequency of the target in radians per unit of time; with 0 the loss does not change with time.
    learning_rate : float
        Time eta per step: the logged learning rate, and the increment of t.
    seed : int
        Seed of the loss and the first state.
    container : {"safetensors", "npz"}
        Container of a step.

    Returns
    -------
    MovingTarget
        The loss and its moving minimum.

    Raises
    ------
    InputError
        If an option is out of range.
    """
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}", remedy=f"choose one of: {', '.join(RULES)}")
    if steps < 1 or not 0 < learning_rate < np.inf or not np.isfinite(frequency):
        raise InputError(
            f"{steps} steps with learning rate {learning_rate} and frequency {frequency} do not form a trajectory",
            remedy="use at least one step, a positive learning rate and a finite frequency",
        )
    random = np.random.default_rng(seed)
    angle = random.uniform(0.0, np.pi)
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moving = MovingTarget(axes @ np.diag([1.0, 4.0]) @ axes.T, frequency)
    theta = 3.0 * random.standard_normal(2)
    recorder = Recorder(folder, container)
    for step in range(steps + 1):
        time = step * learning_rate
        recorder.record(
            step,
            parameter={"theta": theta},
            gradient={"theta": moving.gradient(theta, time)},
            loss=moving.loss(theta, time),
            learning_rate=learning_rate,
            loss_time_derivative=moving.time_derivative(theta, time),
        )
        theta = theta + learning_rate * moving.flow(theta, time, rule)
    return moving
