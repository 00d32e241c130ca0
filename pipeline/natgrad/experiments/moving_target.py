"""A loss that changes with time (section 2.1): a quadratic bowl whose minimum runs on a circle.

L(theta, t) = (theta - c(t))' H (theta - c(t)) / 2. Two rules follow it, by Euler steps of the length eta in time:

*gradient*: d theta/dt = -grad L. It is steepest descent on the loss as it stands, and yet the loss may rise, as its
minimum moves on: dL/dt = -|grad L|^2 + partial L/partial t.

*tracking*: d theta/dt = -grad L + dc/dt. It knows how the minimum moves, so dL/dt = -|grad L|^2 < 0, though against
the loss as it stands a step may point uphill.

So the extended pair y = (-grad L, -partial L/partial t), g = (d theta/dt, 1) says of both what the loss does, and
the pair of theta alone says it of neither. (The paper prints theta' for v' in dL/dt; see docs/errata.md, 16.)
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
"""Radian per unit of time of the target, time per step, and number of updates, by default."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MovingTarget:
    """The loss L(theta, t) and its derivatives.

    Attributes
    ----------
    hessian : (2, 2) array
        H, symmetric positive definite.
    frequency : float
        Radian per unit of time of the target c(t) = (cos, sin) on the unit circle.
    """

    hessian: Floats
    frequency: float

    def target(self, time: float) -> Floats:
        """Minimum c(t)."""
        turn = self.frequency * time
        return np.array([np.cos(turn), np.sin(turn)])

    def velocity(self, time: float) -> Floats:
        """Velocity dc/dt of the minimum."""
        turn = self.frequency * time
        return self.frequency * np.array([-np.sin(turn), np.cos(turn)])

    def loss(self, theta: Floats, time: float) -> float:
        """L(theta, t)."""
        away = theta - self.target(time)
        return float(away @ self.hessian @ away) / 2.0

    def gradient(self, theta: Floats, time: float) -> Floats:
        """Gradient by theta."""
        return self.hessian @ (theta - self.target(time))

    def time_derivative(self, theta: Floats, time: float) -> float:
        """Partial derivative by time, at a theta that rests."""
        return -float(self.gradient(theta, time) @ self.velocity(time))

    def flow(self, theta: Floats, time: float, rule: str) -> Floats:
        """Give the flow d theta/dt of a rule."""
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
    """Follow the target from a random state and log every state, in float64, with ``loss_time_derivative``.

    Parameters
    ----------
    folder : Path
        Folder of the log.
    rule : {"gradient", "tracking"}
    steps : int
        Number of updates; one state more is logged, as the last update needs the state after it.
    frequency : float
        Radian per unit of time of the target; at 0 the loss does not change with time.
    learning_rate : float
        Time eta per step: the logged learning rate, and what t grows by in a step.
    seed : int
        Seed of the bowl and the first state.
    container : {"safetensors", "npz"}
        Container of a step.

    Returns
    -------
    MovingTarget
        The loss that was followed.

    Raises
    ------
    InputError
        If an option is out of its range.
    """
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}", remedy=f"choose one of: {', '.join(RULES)}")
    if steps < 1 or not 0 < learning_rate < np.inf or not np.isfinite(frequency):
        raise InputError(
            f"{steps} steps with learning rate {learning_rate} and frequency {frequency} do not form a trajectory",
            remedy="give at least one step, a positive learning rate and a finite frequency",
        )
    random = np.random.default_rng(seed)
    turn = random.uniform(0.0, np.pi)
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
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
