"""Compare the drawn curves of the figures of the paper with the runs."""

import numpy as np
import pytest

from logs import random_walk, write_log
from natgrad.app import run
from natgrad.experiments.linear_system import log_linear_system
from natgrad.reporting import paper, paper_figures
from natgrad.reporting.paper import Plane
from natgrad.reporting.run_results import EIGENVALUES, RunResults
from natgrad.theory.metric_operators import Metric
from processing import process


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    top = tmp_path_factory.mktemp("plane")
    log_linear_system(top / "log", dimension=2, steps=30)
    run.ingest_run(top / "log", top / "out")
    return Plane.read(top / "out" / "trajectory.zarr")


def test_contours_of_figures_1_and_2_have_one_loss_each(plane):
    step = paper.shown_step(plane)
    y, g = plane.update(step)
    first = paper_figures.descent_balls(plane.loss, plane.states[step], y, g, plane.ball(step), 0.1)
    second = paper_figures.metric_field(plane.loss, plane.states[:5], np.stack(5 * [plane.ball(0)]))
    for axes in (*first.axes, *second.axes):
        (contours,) = axes.collections
        assert len(contours.levels) == 12
        cell = max(np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())) / 119
        for level, path in zip(contours.levels, contours.get_paths(), strict=True):
            losses = plane.loss(path.vertices)
            # Along the edge of a cell, a quadratic differs from its chord by an eighth of its curvature.
            off = np.linalg.norm(plane.hessian(), 2) * cell**2 / 8
            assert losses == pytest.approx(np.full(len(losses), level), abs=2 * off)


def test_in_figure_1_the_ball_is_that_of_the_metric(plane):
    step = paper.shown_step(plane)
    y, g = plane.update(step)
    figure = paper_figures.descent_balls(plane.loss, plane.states[step], y, g, plane.ball(step), 0.1)
    matrices = Metric(y, g).to_dense(), np.eye(2)
    areas = []
    for axes, matrix in zip(figure.axes, matrices, strict=True):
        curve = axes.lines[0].get_xydata() - plane.states[step]
        lengths = np.einsum("ni,ij,nj->n", curve, matrix, curve)
        assert lengths == pytest.approx(np.full(len(lengths), lengths[0]), rel=1e-9)
        areas.append(np.pi * lengths[0] / np.sqrt(np.linalg.det(matrix)))
        arrows = [text for text in axes.texts if text.get_text() == ""]
        assert all(np.array_equal(arrow.xyann, plane.states[step]) for arrow in arrows)
        for arrow, vector in zip(arrows, (y, g), strict=True):
            tip = np.array(arrow.xy) - plane.states[step]
            assert tip @ vector == pytest.approx(np.linalg.norm(tip) * np.linalg.norm(vector))
    # The axes of a ball are found among its points, half a degree apart.
    assert areas[0] == pytest.approx(areas[1], rel=1e-3)
    assert areas[1] == pytest.approx(np.pi * 0.1**2)


def test_in_figure_2_every_ball_lies_around_its_state(plane):
    states, balls = plane.states[:5], np.stack([plane.ball(step) for step in range(5)])
    (axes,) = paper_figures.metric_field(plane.loss, states, balls).axes
    trajectory, *curves = (line.get_xydata() for line in axes.lines)
    assert np.array_equal(trajectory, states)
    assert len(curves) == 5
    sizes = []
    for curve, state, ball in zip(curves, states, balls, strict=True):
        around = curve - state
        sizes.append(np.linalg.norm(around) / np.linalg.norm(ball))
        assert around == pytest.approx(sizes[0] * ball, abs=1e-12)
    assert sizes == pytest.approx([sizes[0]] * 5)


def test_figure_3_is_drawn_from_the_results(tmp_path):
    results = RunResults.of("a $run$", process(write_log(tmp_path / "log", random_walk(20)), tmp_path / "out"))
    (axes,) = paper_figures.spectrum(results, "B").axes
    for line, name in zip(axes.lines, EIGENVALUES, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), results[name])
    (axes,) = paper_figures.loss_curve(results, "C").axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), results["loss"])
    figure = paper_figures.eigenvalue_curves([results])
    paper_figures.save(figure, tmp_path / "a.svg")
    assert "a $run$" in (tmp_path / "a.svg").read_text()
