"""Figures 1 to 3: what is drawn and written against the systems that made the runs."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from logs import random_walk, write_log

from pipeline import figures, paper, results, run
from pipeline.experiments.linear_system import log_linear_system
from pipeline.figures import RunResults
from pipeline.metrics import Metric
from pipeline.paper import Plane
from pipeline.schema import InputError

FIGURES = {f"figure_{name}.svg" for name in ("1", "2", "3a", "3b", "3c", "3d", "3e")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three processed runs and the system of the first: of a plane, linear, and one that is no descent."""
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
def runs(folders):
    return [RunResults.of(name, results.read(folders[1] / name / "results.zarr")) for name in ("linear", "network")]


def test_the_loss_of_the_plane_is_that_of_the_system(folders, plane):
    system, _ = folders
    # Thirty states determine six numbers; a few roundings of each reach them.
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


def test_the_numbers_stand_beside_those_of_the_printed_formulas(folders, plane, runs):
    rows = {statement: (printed, ours) for statement, printed, ours in paper.comparisons(plane, *runs)}
    for letter in "AB":
        # Points lie half a degree apart in the circle; the ball stretches that by its condition number's root.
        stretch = np.sqrt(Metric(*plane.update(paper._shown_step(plane))).condition_number())
        assert float(rows.pop(next(key for key in rows if key.startswith(f"1{letter}")))[1][:-1]) <= 0.5 * stretch
    compared = {key: row for key, row in rows.items() if "ψ =" in key and key.startswith("3B")}
    assert len(compared) == 6
    for printed, ours in compared.values():
        assert printed == ours
    assert rows["3B: updates that are effective"] == ("all", "60 of 60")
    assert rows["3C: steps at which the loss rises"] == ("none", "0 of 59")
    status = runs[1]["status"]
    assert rows["3D: updates that are effective"][1] == f"{(status == 0).sum()} of {len(status)}"


@pytest.fixture
def drawn(monkeypatch):
    """Matplotlib's figures in place of pictures."""
    monkeypatch.setattr(figures, "_picture", lambda figure, alt: figure)


@pytest.mark.usefixtures("drawn")
def test_in_figure_1_the_ball_is_that_of_the_metric(plane):
    step = paper._shown_step(plane)
    y, g = plane.update(step)
    figure = figures.descent_balls(plane.loss, plane.states[step], y, g, plane.ball(step), 0.1)
    matrices = Metric(y, g).to_dense(), np.eye(2)
    areas = []
    for axes, matrix in zip(figure.axes, matrices, strict=True):
        curve = axes.lines[0].get_xydata() - plane.states[step]
        lengths = np.einsum("ni,ij,nj->n", curve, matrix, curve)
        assert lengths == pytest.approx(np.full(len(lengths), lengths[0]), rel=1e-9)
        areas.append(np.pi * lengths[0] / np.sqrt(np.linalg.det(matrix)))
        tips = [note.xy - plane.states[step] for note in axes.texts if note.get_text() == ""]
        for tip, vector in zip(tips, (y, g), strict=True):
            assert tip @ vector == pytest.approx(np.linalg.norm(tip) * np.linalg.norm(vector))
    # The axes of a ball are found among its points, half a degree apart.
    assert areas[0] == pytest.approx(areas[1], rel=1e-3)
    assert areas[1] == pytest.approx(np.pi * 0.1**2)


@pytest.mark.usefixtures("drawn")
def test_in_figure_2_every_ball_lies_around_its_state(plane):
    states, balls = plane.states[:5], np.stack([plane.ball(step) for step in range(5)])
    (axes,) = figures.metric_field(plane.loss, states, balls).axes
    trajectory, *curves = axes.lines
    assert np.array_equal(trajectory.get_xydata(), states)
    assert len(curves) == 5
    sizes = []
    for curve, state, ball in zip(curves, states, balls, strict=True):
        around = curve.get_xydata() - state
        sizes.append(np.linalg.norm(around) / np.linalg.norm(ball))
        assert around == pytest.approx(sizes[0] * ball, abs=1e-12)
    assert sizes == pytest.approx([sizes[0]] * 5)


def test_what_cannot_be_drawn_is_refused(folders, plane, runs, tmp_path, capsys):
    _, top = folders
    with pytest.raises(InputError, match="a run of 8 parameters is not drawn in a plane"):
        Plane.read(top / "linear" / "trajectory.zarr")
    with pytest.raises(InputError, match="those of no quadratic loss"):
        replace(plane, gradients=plane.gradients**3).hessian()
    with pytest.raises(InputError, match="those of no quadratic loss"):
        replace(plane, states=plane.states[:2], gradients=plane.gradients[:2]).hessian()
    with pytest.raises(InputError, match="no metric maps g to y: the update is obtuse"):
        paper.write_figures(tmp_path, replace(plane, gradients=-plane.gradients), *runs)
    assert not list(tmp_path.iterdir())
    for arguments in ([], [str(top / name) for name in ("linear", "linear", "network", "figures")]):
        with pytest.raises(SystemExit) as stopped:
            paper.main(arguments)
        assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
