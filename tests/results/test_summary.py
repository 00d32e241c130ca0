"""Test the numbers that summarize the results of a run."""

from dataclasses import replace

import numpy as np
from test_dataset import quadratic_walk, table_of, walk

from natgrad.results import dataset
from natgrad.results.ranking import RankedTensor
from natgrad.results.summary import overview


def test_an_overview_has_the_statuses_and_the_spread_of_the_gradient_of_the_model():
    states, _ = quadratic_walk(8, noise=5.0)
    tree = dataset.label(table_of(states), windows=[2], variables=[])
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    found = overview(tree)
    assert found["updates"] == 7
    effective = int(model["effective"].sum())
    assert found["status"] == {"effective": effective, "obtuse": 7 - effective}
    assert 0 < effective < 7
    assert found["gradient_source"] == "logged"
    for name in ("angle", "condition_number", "update_to_weight"):
        values = sorted(value for value in model[name].values if np.isfinite(value))
        middle = len(values) // 2
        median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
        assert found[name] == [values[0], median, values[-1]]


def test_an_overview_has_the_course_of_the_angle_and_the_worst_tensors():
    states, _ = quadratic_walk(71, noise=5.0)
    tree = dataset.label(table_of(states), variables=[])
    angle = tree["model"]["angle"].sel(descent="gradient", window=1).values
    found = overview(tree)
    assert len(found["angle_course"]) == 32
    # The first of 32 parts of 70 updates have three updates.
    assert found["angle_course"][0] == np.median(angle[:3])
    assert found["angle_course"][-1] == np.median(angle[-2:])
    ranked = [one["tensor"] for one in found["worst_tensors"]]
    shares = tree["tensor"]["effective"].sel(descent="gradient", window=1).mean("step")
    assert ranked == shares.sortby(shares)["tensor"].values.tolist()
    many = [RankedTensor(name, 1, 0.5, 1.0, 1.0) for name in "abcdefg"]
    assert [one["tensor"] for one in overview(tree, many)["worst_tensors"]] == [*"abcde"]


def test_an_overview_of_updates_without_decay_is_that_of_their_group():
    states, _ = quadratic_walk(8, noise=5.0)
    table = table_of(states)
    decayed = replace(table, weight_decay=np.full((7, len(table.layout.names)), 0.5))
    tree = dataset.label(decayed, variables=[])
    rest = tree["without_decay/model"].to_dataset().sel(descent="gradient", window=1)["angle"].values
    found = overview(tree)
    assert found["angle_without_decay"] == [rest.min(), np.median(rest), rest.max()]
    assert found["angle_without_decay"] != found["angle"]
    assert "angle_without_decay" not in overview(dataset.label(table, variables=[]))


def test_an_overview_without_finite_values_has_none():
    tree = dataset.label(replace(table_of(walk()), learning_rate=np.zeros(5)), variables=[])
    found = overview(tree)
    assert found.pop("update_to_weight")[0] > 0  # the learning rate does not matter
    objective = found.pop("objective")
    assert objective.pop("residual") <= 1e-12  # the loss is quadratic
    assert objective == {"evaluation": "unknown", "consistency": "consistent", "warnings": []}
    assert found == {
        "updates": 5,
        "status": {"no_learning_rate": 5},
        "angle": None,
        "condition_number": None,
        "angle_course": None,
        "worst_tensors": [],
        "gradient_source": "logged",
    }
