"""Compare the drawings of several runs with their results."""

import numpy as np
import pytest

from logs import random_walk, write_log
from natgrad.reporting import figures
from natgrad.reporting import page as report
from natgrad.reporting.figures import RunResults
from processing import process

TENSORS = {"one": (4, 3), "two": (5,)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Return the results of two runs with two tensors (the second ascends), and of a run with one of these."""
    folder = tmp_path_factory.mktemp("compared")
    logs = {
        "first": random_walk(12, TENSORS, "float64"),
        "climbing": random_walk(20, TENSORS, "float64", seed=1),
        "smaller": random_walk(12, {"two": (5,)}, "float64", seed=2),
    }
    for state in logs["climbing"]:
        for key in state:
            if key.startswith("gradient/"):
                state[key] = -state[key]
    return {name: process(write_log(folder / name, log), folder / f"{name}-out") for name, log in logs.items()}


@pytest.fixture
def compared(trees):
    """Return a function from names of runs to their figure and the runs."""

    def draw(*names):
        runs = [RunResults.of(name, trees[name]) for name in names]
        return figures.comparison(runs).figure, runs

    return draw


def test_rows_are_the_model_and_its_tensors_and_columns_angle_and_condition_number(compared):
    figure, runs = compared("first", "climbing")
    assert [len(row) for row in figure.rows] == [2] * (1 + len(TENSORS))
    colours = set()
    for row, name in enumerate((None, *TENSORS)):
        for column, variable in enumerate(("angle", "condition_number")):
            drawn = [line for line in figure.rows[row][column].lines if line.width and len(line.x) > 2]
            assert len(drawn) == len(runs)
            for run, line in zip(runs, drawn, strict=True):
                expected = run[variable] if name is None else run.tensor(variable, name)
                np.testing.assert_array_equal(line.x, run.steps)
                np.testing.assert_array_equal(line.y, expected)
                colours.add((run.name, line.colour))
        assert figure.rows[row][0].title.endswith(name or "model")
    assert len(colours) == len({colour for _, colour in colours}) == len(runs)
    assert [line.label for line in figure.legend] == ["first", "climbing"]
    # The obtuse half is in sight where a run is there.
    assert runs[1]["angle"].max() > np.pi / 2
    assert figure.panels[0].y.high > np.pi


def test_runs_of_different_models_are_compared_by_their_common_tensors(compared):
    figure, _ = compared("first", "smaller")
    titles = [row[0].title for row in figure.rows]
    assert titles == ["model", "1  two"]


def test_the_one_tensor_of_a_model_is_not_drawn_twice(compared):
    figure, _ = compared("smaller", "smaller")
    assert len(figure.panels) == 2


def test_all_compared_runs_can_be_distinguished(compared):
    figure, runs = compared(*figures.COMPARED_RUNS * ["smaller"])
    looks = {(line.colour, line.dash) for line in figure.legend}
    assert len(looks) == len(runs) == figures.COMPARED_RUNS


def test_runs_without_any_condition_number_are_drawn(compared):
    figure, runs = compared("climbing", "climbing")
    assert np.isnan(runs[0].tensor("condition_number", "one")).any()
    assert len(figure.panels) == 6


def test_a_page_compares_several_runs_and_states_if_there_are_too_many(trees, tmp_path):
    def says(*names, most=figures.COMPARED_RUNS):
        chosen = {name: trees[name] for name in names}
        page = report.write_report(chosen, tmp_path / "page.html", compared_runs=most).read_text("utf-8")
        return page.count('id="comparison"'), page.count(f"At most {most} runs can be distinguished")

    assert says("first") == (0, 0)
    assert says("first", "smaller") == (1, 0)
    assert says("first", most=1) == (0, 0)
    assert says("first", "smaller", most=1) == (0, 1)


def test_tensors_are_read_chunk_by_chunk_and_each_chunk_once_per_variable(tmp_path):
    names = {f"t{index}": (2,) for index in range(figures.SHOWN_TENSORS + 3)}
    tree = process(write_log(tmp_path / "log", random_walk(20, names, "float64")), tmp_path / "out").load()
    expected = RunResults.of("all", tree)
    for variable in tree["tensor"].data_vars.values():
        variable.encoding["preferred_chunks"] = {"step": 7}
    reads = []

    class Counted(RunResults):
        def blocks(self, variable):
            for block in super().blocks(variable):
                reads.append((variable, len(block)))
                yield block

    run = Counted.of("chunks", tree)
    assert run.largest_tensors() == expected.largest_tensors()
    sizes = (tree["tensor"]["gradient_norm"].sel(descent="gradient", window=1) ** 2).sum("step")
    largest = sizes.sortby(sizes, ascending=False)["tensor"].values[: figures.SHOWN_TENSORS]
    assert run.largest_tensors() == largest.tolist()
    for variable in ("angle", "status"):
        for name in (*run.largest_tensors(), "t0"):
            values = tree["tensor"][variable].sel(descent="gradient", window=1, tensor=name).values
            np.testing.assert_array_equal(run.tensor(variable, name), values)
            np.testing.assert_array_equal(expected.tensor(variable, name), values)
    assert [length for variable, length in reads if variable == "gradient_norm"] == [7, 7, 5]
    # Once for all tensors that are shown, and once more if another tensor is requested.
    assert len([1 for variable, _ in reads if variable == "angle"]) in (3, 6)
