"""Draw Figures 1 to 3 of the paper from runs, and compare the numbers of the paper with those of the runs.

``python -m natgrad.reporting.paper PLANE LINEAR NETWORK FOLDER [PLANE ..]`` uses the folders of three processed
runs: one with two parameters and a quadratic loss (Figures 1 and 2), and one for each half of Figure 3. From
additional runs that start at the same state as the first but have other learning rates, it draws the convergence of
the discrete gradient and its metric to those of the gradient (section 2.2). All numbers are read from trajectories
and results.

No other module imports this one: it is a separate program, and it needs Matplotlib (the extra ``plot``).
`natgrad report` draws only Figure 3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from natgrad.reporting import paper_figures as figures
from natgrad.reporting.run_results import RunResults, number
from natgrad.results import dataset
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status
from natgrad.store import open_store, open_trajectory
from natgrad.theory import geometry
from natgrad.theory.metric_operators import Metric

__all__ = ["Plane", "comparisons", "limit_distances", "shown_step", "write_figures"]

Array = NDArray[np.float64]

_POINTS = 721
"""Number of points on a ball: one for each half degree."""


@dataclass(frozen=True)
class Plane:
    """A run with two parameters, and the quadratic loss that its gradients determine.

    Attributes
    ----------
    states, gradients : array, shape (steps, 2)
    losses, learning_rates : array, shape (steps,)
    """

    states: Array
    gradients: Array
    losses: Array
    learning_rates: Array

    @classmethod
    def read(cls, path: Path) -> Plane:
        """Read a trajectory store.

        Raises
        ------
        InputError
            If the run does not have exactly two parameters, in float64.
        """
        trajectory = open_trajectory(path)
        if trajectory.layout.elements != 2:
            raise InputError(
                f"a run with {trajectory.layout.elements} parameters cannot be drawn in a plane",
                where=str(path),
                remedy="log a run with two: python -m natgrad.experiments linear-system FOLDER --dimension 2",
            )
        arrays = []
        for name in ("parameter", "gradient"):
            if trajectory.dtypes[name] != "float64":
                raise InputError(
                    f"{name} has dtype {trajectory.dtypes[name]}, not float64",
                    where=str(path),
                    remedy="log float64",
                )
            arrays.append(np.empty((trajectory.n_states, 2)))
            trajectory.read(name, 0, trajectory.n_states, 0, arrays[-1])
        scalars = (np.asarray(trajectory.scalar(name), np.float64) for name in ("loss", "learning_rate"))
        return cls(*arrays, *scalars)

    def hessian(self) -> Array:
        """Return the Hessian of the quadratic loss, shape (2, 2).

        Raises
        ------
        InputError
            If no quadratic loss has these gradients.
        """
        known = np.column_stack([self.states, np.ones(len(self.states))])
        solution, _, rank, _ = np.linalg.lstsq(known, self.gradients)
        hessian = solution[:2].T
        # The tolerance is the square root of the unit roundoff: rounding errors are much smaller, and the misfit of
        # a loss that is not quadratic is larger.
        off = max(np.abs(known @ solution - self.gradients).max(), np.abs(hessian - hessian.T).max())
        if rank < 3 or not off <= 2.0**-26 * np.abs(self.gradients).max():
            raise InputError(
                "no quadratic loss has the gradients of this run",
                why=f"the relative error of the best fit is {off:.3g}, and the states have rank {rank}",
                remedy="pass a linear system of dimension 2",
            )
        return np.asarray((hessian + hessian.T) / 2.0)

    def loss(self, points: Array) -> Array:
        """Return the loss at points of the plane, shape (..., 2), expanded at the first state."""
        away = points - self.states[0]
        quadratic = np.einsum("...i,ij,...j->...", away, self.hessian(), away) / 2.0
        return np.asarray(self.losses[0] + away @ self.gradients[0] + quadratic)

    def update(self, step: int) -> tuple[Array, Array]:
        """Return the negative gradient and the update of a step."""
        displacement = self.states[step + 1] - self.states[step]
        return -self.gradients[step], displacement / self.learning_rates[step]

    def distance(self) -> tuple[float, float]:
        """Measure the distance of the first discrete gradient and its metric from the gradient and its metric.

        Returns
        -------
        angle_change, metric_change : float
            |psi_bar - psi| in radian, and |Mbar - M| / |M| of the metrics with the smallest condition number. The H
            of a quadratic loss does not depend on the point, so eq. (16) has only one ybar.
        """
        y, g = self.update(0)
        discrete = y - self.learning_rates[0] * self.hessian() @ g / 2.0
        metric, other = Metric(y, g), Metric(discrete, g)
        metric_change = np.linalg.norm(other.to_dense() - metric.to_dense(), 2) / np.linalg.norm(
            metric.to_dense(), 2
        )
        angle_change = abs(geometry.angle(other.pair) - geometry.angle(metric.pair))
        return float(angle_change), float(metric_change)

    def ball(self, step: int) -> Array:
        """Return the ball of the optimal metric of a step, v' M v = 1, shape (points, 2)."""
        turn = np.linspace(0.0, 2.0 * np.pi, _POINTS)
        return Metric(*self.update(step)).inv_sqrt(np.stack([np.cos(turn), np.sin(turn)])).T


def write_figures(
    folder: Path, plane: Plane, linear: RunResults, network: RunResults, others: Sequence[Plane] = ()
) -> list[Path]:
    """Write Figures 1, 2, 3A to 3E as SVG, and the numbers of the paper and of the runs to ``numbers.md``.

    Parameters
    ----------
    folder : Path
        Created if it does not exist.
    plane : Plane
    linear, network : RunResults
        Runs for panels B and C, and for panels D and E.
    others : sequence of Plane
        Runs from the same state as ``plane`` with other learning rates, for ``limit.svg``.

    Returns
    -------
    list of Path
        The written files.

    Raises
    ------
    InputError
        If an update of the plane is not effective, its loss is not quadratic, or the others start differently.
    """
    step = shown_step(plane)
    y, g = plane.update(step)
    # Half of the step of steepest descent in the direction of largest curvature.
    size = float(np.linalg.norm(y) / np.linalg.norm(plane.hessian(), 2)) / 2.0
    every = range(0, len(plane.states) - 1, max(1, (len(plane.states) - 1) // 24))
    pictures: dict[str, Figure] = {
        "figure_1": figures.descent_balls(plane.loss, plane.states[step], y, g, plane.ball(step), size),
        "figure_2": figures.metric_field(
            plane.loss, plane.states[list(every)], np.stack([plane.ball(index) for index in every])
        ),
        "figure_3a": figures.eigenvalue_curves([linear, network]),
        "figure_3b": figures.spectrum(linear, "B"),
        "figure_3c": figures.loss_curve(linear, "C"),
        "figure_3d": figures.spectrum(network, "D"),
        "figure_3e": figures.loss_curve(network, "E"),
    }
    if others:
        pictures["limit"] = figures.limit_curve(*limit_distances([plane, *others]))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in pictures.items():
        written.append(folder / f"{name}.svg")
        figures.save(figure, written[-1])
    rows = [("statement", "paper", "run"), ("---",) * 3, *comparisons(plane, linear, network)]
    rows += _limit_rows([plane, *others]) if others else []
    written.append(folder / "numbers.md")
    written[-1].write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
    return written


def shown_step(plane: Plane) -> int:
    """Return the step whose angle is closest to pi/4, where the two balls differ most clearly."""
    cosines = []
    for step in range(len(plane.states) - 1):
        y, g = plane.update(step)
        cosines.append(y @ g / np.linalg.norm(y) / np.linalg.norm(g))
    return int(np.argmin(np.abs(np.array(cosines) - np.sqrt(0.5))))


def comparisons(plane: Plane, linear: RunResults, network: RunResults) -> list[tuple[str, str, str]]:
    """List statements of the paper, each with the number in the paper and the number of the runs.

    The numbers of the paper are its printed formulas, evaluated at the measured angle. Near pi/2 these formulas
    suffer from cancellation (erratum 14); the formulas for the runs do not.

    Returns
    -------
    list of (statement, paper, run)
    """
    rows = [*_figure_1_rows(plane)]
    for run, panels in ((linear, "3B"), (network, "3D")):
        effective = run["status"] == Status.EFFECTIVE
        rows.append((f"{panels}: updates that are effective", "all", f"{effective.sum()} of {len(effective)}"))
        if not effective.any():
            continue
        angle, kappa = run["angle"][effective], run["condition_number"][effective]
        length = (run["gradient_norm"] / run["update_norm"])[effective]
        for label, row in (("least", int(angle.argmin())), ("greatest", int(angle.argmax()))):
            sine, cosine = np.sin(angle[row]), np.cos(angle[row])
            where = f"{panels}: at the {label} angle, ψ = {number(float(angle[row]))} rad,"
            rows.append((f"{where} κ = (1 + sin ψ)/(1 − sin ψ)", *_formatted((1 + sine) / (1 - sine), kappa[row])))
            for name, sign in (("max", 1), ("min", -1)):
                printed = length[row] * (1 / cosine + sign * sine / cosine)
                measured = run[f"eigenvalue_{name}"][effective][row]
                rows.append((f"{where} λ_{name} of eq. (9)", *_formatted(printed, measured)))
        spread = f"{number(float((1 / kappa).min()))} to {number(float((1 / kappa).max()))}"
        rows.append((f"{panels}: 1/κ", "in (0, 1]", spread))
    rows.append(("3C: steps at which the loss rises", "none", _rises(linear["loss"])))
    rows.append(("3E: steps at which the loss rises", "some", _rises(network["loss"])))
    if network.loss_average is not None:
        label = f"3E: steps at which its mean over {max(network.windows)} rises"
        rows.append((label, "none", _rises(network.loss_average)))
    return rows


def limit_distances(planes: Sequence[Plane]) -> tuple[Array, Array, Array]:
    """Return the ascending learning rates of runs, and the distances of their first updates.

    Parameters
    ----------
    planes : sequence of Plane
        Runs that differ only in the learning rate.

    Returns
    -------
    rates, angle_change, metric_change : array, shape (runs,)
        See `Plane.distance`.

    Raises
    ------
    InputError
        If the runs start differently.
    """
    first = np.stack(planes[0].update(0))
    for plane in planes[1:]:
        # The tolerance is the square root of the unit roundoff, because a rounded update is divided by its learning
        # rate.
        if not np.linalg.norm(np.stack(plane.update(0)) - first) <= 2.0**-26 * np.linalg.norm(first):
            raise InputError(
                "the runs of the plane do not start with the same gradient and update",
                why="they have different systems or seeds, or a method other than explicit Euler steps",
                remedy="log the runs again, and change only the learning rate",
            )
    order = sorted(planes, key=lambda plane: float(plane.learning_rates[0]))
    angle_change, metric_change = np.array([plane.distance() for plane in order]).T
    return np.array([plane.learning_rates[0] for plane in order]), angle_change, metric_change


def _limit_rows(planes: Sequence[Plane]) -> list[tuple[str, str, str]]:
    rates, angle_change, metric_change = limit_distances(planes)
    ends = f"from η = {number(float(rates[-1]))} to {number(float(rates[0]))}"
    return [
        (f"2.2: {name} {ends}", "→ 0", f"{number(float(values[-1]))} to {number(float(values[0]))}")
        for name, values in (("ψ̄ − ψ in rad", angle_change), ("M̄ − M, relative", metric_change))
    ]


def _figure_1_rows(plane: Plane) -> list[tuple[str, str, str]]:
    """Return rows that compare the steepest direction on each ball, among all its points, with the expected one."""
    step = shown_step(plane)
    (y, g), ball = plane.update(step), plane.ball(step)
    turn = np.linspace(0.0, 2.0 * np.pi, _POINTS)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    rows = []
    for letter, curve, name, steepest in (("A", ball, "g", g), ("B", circle, "y", y)):
        found = curve[np.argmax(curve @ y)]
        cosine = found @ steepest / np.linalg.norm(found) / np.linalg.norm(steepest)
        off = f"{np.degrees(np.arccos(min(cosine, 1.0))):.1f}°"
        rows.append((f"1{letter}: steepest descent on the ball, from {name}", "0°", off))
    return rows


def _formatted(printed: float, measured: float) -> tuple[str, str]:
    return number(float(printed)), number(float(measured))


def _rises(losses: NDArray[np.float64]) -> str:
    changes = np.diff(losses)
    changes = changes[~np.isnan(changes)]  # a change from or to an unknown loss is not known
    return f"{(changes > 0).sum()} of {len(changes)}"


def main(arguments: Sequence[str]) -> None:
    """Draw the figures from the folders of three runs, and of additional runs of the plane."""
    if len(arguments) < 4:
        sys.stderr.write("usage: python -m natgrad.reporting.paper PLANE LINEAR NETWORK FOLDER [PLANE ..]\n")
        raise SystemExit(2)
    plane, linear, network, folder, *others = map(Path, arguments)
    try:
        first, second = (
            RunResults.of(path.name, dataset.read(open_store(path / "results.zarr"))) for path in (linear, network)
        )
        planes = [Plane.read(path / "trajectory.zarr") for path in (plane, *others)]
        written = write_figures(folder, planes[0], first, second, planes[1:])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    sys.stdout.write("".join(f"{path}\n" for path in written))


if __name__ == "__main__":
    main(sys.argv[1:])
