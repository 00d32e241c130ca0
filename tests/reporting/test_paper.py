"""Compare Figures 1 to 3 and the numbers with the systems that generated the runs."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from logs import random_walk, write_log
from natgrad.app import run
from natgrad.experiments.linear_system import log_linear_system
from natgrad.reporting import paper, paper_figures
from natgrad.reporting.paper import Plane
from natgrad.reporting.run_results import RunResults
from natgrad.results import dataset
from natgrad.schema.errors import InputError
from natgrad.store import open_store
from natgrad.theory.metric_operators import Metric

FIGURES = {f"figure_{name}.svg" for name in ("1", "2", "3a", "3b", "3c", "3d", "3e")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Process three runs (in a plane, linear, and one that does not descend); return the system of the first."""
    top = tmp_path_factory.mktemp("paper")
    system = log_linear_system(top / "logs" / "plane", dimension=2, steps=30)
    log_linear_system(top / "logs" / "linear", seed=1, steps=60)
    write_log(top / "logs" / "network", random_walk(30))
    for name in ("plane", "linear", "network"):
        run.ingest_run(top / "logs" / name, top / name)
        run.analyze_run(top / name, run.Analysis(windows=(1, 4), workers=1))
    return system, top


@pytest.fixture(scope="module")
def plane(folders):
    return Plane.read(folders[1] / "plane" / "trajectory.zarr")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Log runs in the plane from one state, each with half the learning rate of the previous one."""
    top = tmp_path_factory.mktemp("sweep")
    planes = []
    for halvings in range(8):
        name = f"rate_{halvings}"
        log_linear_system(top / "logs" / name, dimension=2, steps=3, learning_rate=0.05 / 2**halvings)
        run.ingest_run(top / "logs" / name, top / name)
        planes.append(top / name)
    return planes


@pytest.fixture(scope="module")
def runs(folders):
    return [
        RunResults.of(name, dataset.read(open_store(folders[1] / name / "results.zarr")))
        for name in ("linear", "network")
    ]


def test_the_loss_of_the_plane_is_that_of_the_system(folders, plane):
    system, _ = folders
    # Thirty states determine six numbers, which have a few rounding errors of each state.
    assert plane.hessian() == pytest.approx(2 * system.lyapunov, rel=1e-12)
    points = np.random.default_rng(0).standard_normal((5, 4, 2))
    losses = plane.loss(points)
    assert losses.shape == (5, 4)
    for point, loss in zip(points.reshape(-1, 2), losses.ravel(), strict=True):
        assert loss == pytest.approx(system.loss(point), rel=1e-10)


def test_the_command_writes_every_figure_and_the_numbers(folders, capsys):
    _, top = folders
    paper.main([str(top / name) for name in ("plane", "linear", "network", "figures")])
    assert {path.name for path in (top / "figures").iterdir()} == FIGURES | {"numbers.md"}
    assert len(capsys.readouterr().out.splitlines()) == 8
    for name in FIGURES:
        assert ElementTree.parse(top / "figures" / name).getroot().tag.endswith("svg")
    first = (top / "figures" / "figure_1.svg").read_bytes()
    paper.main([str(top / name) for name in ("plane", "linear", "network", "figures")])
    assert (top / "figures" / "figure_1.svg").read_bytes() == first


def test_the_numbers_agree_with_those_of_the_printed_formulas(folders, plane, runs):
    rows = {statement: (printed, ours) for statement, printed, ours in paper.comparisons(plane, *runs)}
    for letter in "AB":
        # Points are half a degree apart in the circle; the ball multiplies this by the root of its kappa.
        stretch = np.sqrt(Metric(*plane.update(paper.shown_step(plane))).condition_number())
        assert float(rows.pop(next(key for key in rows if key.startswith(f"1{letter}")))[1][:-1]) <= 0.5 * stretch
    compared = {key: row for key, row in rows.items() if "ψ =" in key and key.startswith("3B")}
    assert len(compared) == 6
    for printed, ours in compared.values():
        assert printed == ours
    assert rows["3B: updates that are effective"] == ("all", "60 of 60")
    assert rows["3C: steps at which the loss rises"] == ("none", "0 of 59")
    status = runs[1]["status"]
    assert rows["3D: updates that are effective"][1] == f"{(status == 0).sum()} of {len(status)}"


def test_the_discrete_gradient_and_its_metric_go_to_those_of_the_gradient_in_proportion_to_the_learning_rate(sweep):
    planes = [Plane.read(folder / "trajectory.zarr") for folder in sweep]
    rates, turned, moved = paper.limit_distances(planes)
    assert rates == pytest.approx(0.05 / 2.0 ** np.arange(7, -1, -1))
    y, g = planes[0].update(0)
    bent = planes[0].hessian() @ g / 2.0
    # In a plane, y - eta H g rotates by exactly this angle; updates divided by their learning rate have ten digits.
    exact = np.arctan2(rates * (y[0] * bent[1] - y[1] * bent[0]), y @ y - rates * (y @ bent))
    assert turned == pytest.approx(np.abs(exact), rel=1e-9)
    # Halving the learning rate halves both, up to terms of second order: eta relative to the value at which ybar.g
    # is 0.
    second = rates[1:] * np.linalg.norm(bent) * np.linalg.norm(g) / (y @ g)
    assert second[0] < 0.02
    for values in (turned, moved):
        assert (np.abs(values[1:] / values[:-1] / 2.0 - 1.0) <= second).all()
    (panel,) = paper_figures.limit_curve(rates, turned, moved).axes
    proportional = max(turned[-1], moved[-1]) * rates / rates[-1]
    for line, values in zip(panel.lines, (turned, moved, proportional), strict=True):
        assert line.get_xydata() == pytest.approx(np.column_stack([rates, values]))


def test_the_trapezoid_of_the_results_is_the_limit_of_the_figure(sweep):
    for folder in sweep[::3]:
        run.analyze_run(folder, run.Analysis(workers=1))
        angle = dataset.read(open_store(folder / "results.zarr"))["model"]["angle"].isel(step=0).sel(window=1)
        turned, _ = Plane.read(folder / "trajectory.zarr").distance()
        # The loss is a sum of D terms, and its change suffers from cancellation and is divided by the step.
        off = abs(float(angle.sel(descent="trapezoid") - angle.sel(descent="gradient")))
        assert off == pytest.approx(turned, rel=1e-7)


def test_runs_that_start_differently_are_an_error(folders, sweep, runs, tmp_path):
    plane, other = (Plane.read(path / "trajectory.zarr") for path in sweep[:2])
    with pytest.raises(InputError, match="do not start with the same gradient and update"):
        paper.write_figures(tmp_path, plane, *runs, [replace(other, states=2 * other.states)])
    paper.main([str(folders[1] / name) for name in ("plane", "linear", "network")] + [str(tmp_path), str(sweep[3])])
    assert (tmp_path / "limit.svg").exists()
    numbers = (tmp_path / "numbers.md").read_text()
    assert "2.2: ψ̄ − ψ in rad from η = 0.05 to 0.00625 | → 0 |" in numbers


def test_runs_that_cannot_be_drawn_are_an_error(folders, plane, runs, tmp_path, capsys):
    _, top = folders
    with pytest.raises(InputError, match="a run with 8 parameters cannot be drawn in a plane"):
        Plane.read(top / "linear" / "trajectory.zarr")
    with pytest.raises(InputError, match="no quadratic loss has the gradients"):
        replace(plane, gradients=plane.gradients**3).hessian()
    with pytest.raises(InputError, match="no quadratic loss has the gradients"):
        replace(plane, states=plane.states[:2], gradients=plane.gradients[:2]).hessian()
    with pytest.raises(InputError, match="no metric maps g to y: the update is obtuse"):
        paper.write_figures(tmp_path, replace(plane, gradients=-plane.gradients), *runs)
    assert not list(tmp_path.iterdir())
    for arguments in ([], [str(top / name) for name in ("linear", "linear", "network", "figures")]):
        with pytest.raises(SystemExit) as stopped:
            paper.main(arguments)
        assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
