"""Test the metadata of all variables, and variables that are declared outside of the package.

The metadata of the results are a contract: ``variables.toml`` lists them. To change them deliberately, write the
list again and review the difference::

    PYTHONPATH=tests python tests/results/test_variables.py > tests/results/variables.toml
"""

import enum
import json
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from test_dataset import TENSORS, quadratic_walk, table_of, walk

from natgrad.results import dataset, replicates
from natgrad.results.inputs import Optimizer
from natgrad.results.pairs import model_and_tensors
from natgrad.results.recovery import Recovery
from natgrad.results.variables import LONGEST_WINDOW, Defined, Updates, UpdateVariable
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.names import DESCENTS
from natgrad.schema.variables import Status
from natgrad.store import open_store

METADATA = {"units": "1", "equation": "1", "long_name": "one", "description": "Always one."}
COMPARED = ("step", "tensor", "descent", "window")


def declared(compute, dimensions=COMPARED, **options):
    return UpdateVariable(name="own", compute=compute, dimensions=dimensions, **METADATA, **options)


def labelled(variable, table=None, **options):
    return dataset.label(table_of(walk()) if table is None else table, variables=[variable], **options)


# The contract ------------------------------------------------------------------------------------------------

CONTRACT = Path(__file__).with_name("variables.toml")
HEADER = """\
# The variables of results.zarr in the groups /model and /tensor, and of /replicates/model and /replicates/tensor.
# Written by `PYTHONPATH=tests python tests/results/test_variables.py`; users rely on each line.
"""


def metadata(folder):
    """Return dtype, dimensions and attributes of all variables and coordinates of results that were written."""
    states, _ = quadratic_walk()
    table = table_of(states)
    extremes = np.ones((5, len(TENSORS)))
    trees = {
        "": dataset.label(
            replace(
                table,
                optimizer=Optimizer(extremes, extremes, extremes),
                weight_decay=extremes,
                recovery=Recovery(*[extremes] * 6),
            ),
            windows=[2],
            gammas=dataset.GAMMAS,
            variables=[],
        ),
        "replicates/": replicates.label(
            replicates.ledger(np.ones((2, 3)), np.ones((2, 4, 3)), np.ones((2, 4, 3)))[:, None],
            Layout.from_shapes({"w": ((3,), "float64")}),
            replicates=4,
            learning_rate=0.5,
        ),
    }
    found = {}
    for prefix, tree in trees.items():
        dataset.write(tree, open_store(Path(folder) / f"{prefix or 'updates/'}results.zarr"), {})
        written = xr.open_datatree(Path(folder) / f"{prefix or 'updates/'}results.zarr", engine="zarr")
        for group in ("model", "tensor"):
            for name, variable in written[group].to_dataset().variables.items():
                entry = found.setdefault(f"{prefix}{name}", {})
                entry[group] = f"{variable.dtype} ({', '.join(variable.dims)})"
                for attribute, value in variable.attrs.items():
                    assert entry.setdefault(attribute, value) == value, "the groups describe a variable differently"
    return found


def as_toml(found):
    sections = [
        "\n".join([f'["{name}"]', *(f"{key} = {json.dumps(value)}" for key, value in sorted(entry.items()))])
        for name, entry in found.items()
    ]
    return "\n\n".join([HEADER.rstrip(), *sections]) + "\n"


def test_dimensions_dtypes_units_and_descriptions_are_those_of_the_contract(tmp_path):
    found = tomllib.loads(as_toml(metadata(tmp_path)))
    assert found == tomllib.loads(CONTRACT.read_text()), (
        "The metadata of the results, on which users rely, have changed. If this is intended, run "
        "`PYTHONPATH=tests python tests/results/test_variables.py > tests/results/variables.toml`, review the "
        "difference, and add it to the changelog."
    )


# Windows -----------------------------------------------------------------------------------------------------


def periodic(updates, period):
    """Return a table whose loss falls, and whose windows are effective, only over a complete period."""
    losses = [float(k % period == 0) - k / 1000 for k in range(updates + 1)]
    return table_of(
        [
            {"parameter/w": np.array([-x]), "gradient/w": np.array([-1.0]), "loss": x, "learning_rate": 1.0}
            for x in losses
        ]
    )


@pytest.mark.parametrize(
    ("updates", "longest"), [(2, 1), (3, 1), (13, 6), (14, 7), (2 * LONGEST_WINDOW + 20, LONGEST_WINDOW)]
)
def test_all_windows_up_to_half_the_run_and_256_are_tried(updates, longest):
    for period, found in ((longest, True), (longest + 1, False)):
        table = periodic(updates, period)
        model, tensors = model_and_tensors(table, "gradient")
        for aggregation in (model, tensors):
            searched = Updates(table, aggregation, "gradient")
            expected = (period, updates - period + 1) if found else (np.nan, 0)
            effective, count = searched.smallest_effective_window
            np.testing.assert_equal((effective.item(), count.item()), expected)
            np.testing.assert_equal(searched.smallest_decreasing_window, expected)
    # A longer requested window is also tried.
    assert Updates(table, model, "gradient", longest=longest + 1).smallest_effective_window[0] == longest + 1


@given(seed=st.integers(0, 100), m=st.integers(1, 3))
def test_the_bound_of_a_window_is_that_of_its_longest_span(seed, m):
    # g of a span of k updates is a mean, so its step is k eta g, and the largest k limits eta.
    numbers = np.cumsum([0, *np.random.default_rng(seed).permutation([1, 2, 3, 5])])
    states, _ = quadratic_walk(5, seed, noise=2.0)
    least = -np.random.default_rng(seed).uniform(0.5, 2.0, 4)
    table = replace(table_of(states, numbers.tolist()), hessian_min_eigenvalue=least)
    model, _ = model_and_tensors(table, "corrected")
    updates = Updates(table, model, "corrected", m)
    with np.errstate(all="ignore"):
        found = updates.learning_rate_bounds
        supremum, _ = updates.eigenvalue_bounds[::-1]
        smallest = updates.eigenvalues[2]
    for first in range(5 - m):
        span = np.diff(numbers)[first : first + m].max()
        # H is half the Hessian, and the Hessian of the mean loss has the blocks of the steps, divided by m.
        concavity = -least[first : first + m].min() / 2 / m
        for bound, eigenvalue in zip(found, (supremum, smallest), strict=True):
            np.testing.assert_allclose(bound[first], eigenvalue[first] / concavity / span, rtol=8 * 2.0**-52)


# Variables of other packages -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), m=st.integers(1, 4), defined=st.sampled_from(list(Defined)))
def test_a_variable_is_nan_exactly_if_it_is_not_defined(seed, m, defined):
    states, _ = quadratic_walk(7, seed, noise=3.0)
    states[2]["gradient/plane"] = np.array([np.nan, 1.0])
    table = replace(table_of(states), steps=np.array([0, 1, 2, 3, 9, 10]))
    ones = declared(lambda updates: np.ones(updates.status.shape), defined=defined, descents=DESCENTS[:3])
    tree = labelled(ones, table, windows=[m])
    for group in ("model", "tensor"):
        found = tree[group].to_dataset()
        status = found["status"].sel(window=m)
        follow = [table.steps[first + m - 1] - table.steps[first] == m - 1 for first in range(7 - m)]
        complete = xr.DataArray(np.pad(follow, (0, m - 1)), dims="step")
        expected = xr.ones_like(status, dtype=bool) & complete
        if defined not in (Defined.ALWAYS, Defined.IN_RANGE):
            expected &= status <= (Status.EFFECTIVE if defined is Defined.WITH_METRIC else Status.OBTUSE)
        expected[{"descent": 3}] = False
        own = found["own"].sel(window=m)
        np.testing.assert_array_equal(np.isfinite(own), expected)
        assert (own.values[expected.values] == 1).all()


@pytest.mark.parametrize(
    ("dimensions", "compute"),
    [
        (("step",), lambda updates: np.full(5, 2.0)),
        (("step", "tensor"), lambda updates: np.full(updates.aggregation.rate.shape, 2.0)),
        (("step", "window"), lambda updates: np.full(6 - updates.m, 2.0)),
        (("step", "tensor", "descent"), lambda updates: np.full(updates.status.shape, 2.0)),
        (("step", "tensor", "gamma"), lambda updates: np.full((*updates.status.shape, 2), 2.0)),
        (("tensor",), lambda updates: np.full(updates.aggregation.rate.shape[1:], 2.0)),
        (("descent",), lambda updates: 2.0),
        ((), lambda updates: 2.0),
    ],
)
def test_a_variable_has_the_dimensions_that_it_declares(dimensions, compute):
    tree = labelled(declared(compute, dimensions), gammas=[1, 2])
    for group in ("model", "tensor"):
        variable = tree[group]["own"]
        assert variable.dims == tuple(name for name in dimensions if name != "tensor" or group == "tensor")
        assert variable.attrs == METADATA
        assert (variable == 2).all()


def test_one_value_for_all_tensors_is_stored_once():
    tree = labelled(declared(lambda updates: updates.table.loss, ("step", "tensor")))
    assert tree["tensor"]["own"].dims == ("step",)
    masked = labelled(
        declared(lambda updates: updates.table.loss, ("step", "tensor", "descent"), defined=Defined.WITH_METRIC)
    )
    found = masked["tensor"].to_dataset()
    assert found["own"].dims == ("step", "tensor", "descent")
    np.testing.assert_array_equal(np.isfinite(found["own"]), found["effective"].sel(window=1))


@pytest.mark.parametrize("dimensions", [COMPARED, COMPARED[:-1]])
def test_integers_become_floats_if_they_may_be_missing(dimensions):
    always = labelled(declared(lambda updates: updates.table.spans, ("step",)))
    assert always["model"]["own"].dtype == np.int64
    ones = declared(lambda updates: np.ones(updates.status.shape, int), dimensions, defined=Defined.WITH_METRIC)
    sometimes = labelled(ones)["model"].to_dataset()
    assert sometimes["own"].dtype == np.float64
    assert (np.isnan(sometimes["own"]) == ~sometimes["effective"].sel(window=1)).all()


def test_gradients_that_were_not_checked_have_the_lowest_grade():
    assert Recovery(*[np.full((3, 2), np.nan)] * 6).attributes()["gradient_check"] == "none"


class Colour(enum.IntEnum):
    RED = 0
    GREEN = 1


def test_flags_are_explained_and_have_the_fill_value_if_they_are_not_defined():
    green = declared(
        lambda updates: np.full(updates.status.shape, np.int8(Colour.GREEN)),
        defined=Defined.WITH_METRIC,
        fill=Colour.RED,
        flags=Colour,
    )
    found = labelled(green, windows=[5])["model"].to_dataset()
    assert found["own"].dtype == np.int8
    assert found["own"].attrs == {**METADATA, "flag_values": [0, 1], "flag_meanings": "red green"}
    np.testing.assert_array_equal(found["own"] == Colour.GREEN, found["effective"])


def test_a_sweep_has_the_values_of_each_run():
    table = replace(
        table_of(walk(6)), steps=np.array([0, 1, 2, 0, 1]), run=np.array([0, 0, 0, 1, 1]), runs=("a", "b")
    )
    number = declared(lambda updates: np.int64(len(updates.table.steps[updates.run])), ())
    assert labelled(number, table)["model"]["own"].sel(run=["a", "b"]).values.tolist() == [3, 2]
    by_step = labelled(declared(lambda updates: updates.table.steps, ("step",), absent=-7), table)
    assert by_step["model"]["own"].values.tolist() == [[0, 1, 2], [0, 1, -7]]
    parts = dataset.runs(by_step)
    assert {name: part["model"]["own"].values.tolist() for name, part in parts.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1],
    }
    single = labelled(number)
    assert dataset.runs(single) == {"": single}


@pytest.mark.parametrize("group", ["model", "tensor"])
def test_a_variable_belongs_to_the_groups_that_it_declares(group):
    tree = labelled(declared(lambda updates: updates.status, aggregations=(group,)))
    assert [name for name in ("model", "tensor") if "own" in tree[name]] == [group]


def test_a_variable_is_omitted_if_its_needs_are_missing():
    hvp = declared(lambda updates: updates.table.gram[..., -1, -1].sum(axis=1), ("step",), needs=("hvp",))
    states, _ = quadratic_walk()
    assert (labelled(hvp, table_of(states))["model"]["own"] > 0).all()
    assert "own" not in labelled(hvp)["model"]
    least = declared(lambda updates: updates.table.loss, ("step",), needs=("loss", "hessian_min_eigenvalue"))
    assert "own" not in labelled(least)["model"]
    assert "own" in labelled(least, replace(table_of(walk()), hessian_min_eigenvalue=np.ones(5)))["model"]


@pytest.mark.parametrize(
    ("dimensions", "options", "message"),
    [
        (COMPARED, {"needs": ("gradient", "momentum")}, "needs unknown quantities: momentum"),
        (("tensor", "step"), {}, r"has unknown or unordered dimensions \('tensor', 'step'\)"),
        (("step", "layer"), {}, r"has unknown or unordered dimensions \('step', 'layer'\)"),
        (("step",), {"defined": Defined.WITH_METRIC}, "lacks dimensions that its definition depends on"),
        (("step", "tensor"), {"descents": ("corrected",)}, "lacks dimensions that its definition depends on"),
    ],
)
def test_a_contradictory_declaration_is_an_error(dimensions, options, message):
    with pytest.raises(InputError, match=message):
        declared(lambda updates: updates.status, dimensions, **options)


def test_values_of_another_shape_are_an_error_with_the_name_of_the_variable():
    with pytest.raises(
        InputError, match=r"'own' must have values of shape \(5,\), got \(4,\)[\s\S]*model, descent gradient"
    ):
        labelled(declared(lambda updates: np.ones(4), ("step",)))
    with pytest.raises(InputError, match=r"must have values of shape \(3,\)"):
        labelled(declared(lambda updates: 1.0, ("tensor",), aggregations=("tensor",)))
    assert len(TENSORS) == 3


def test_an_error_of_the_function_names_the_variable():
    with pytest.raises(ZeroDivisionError) as caught:
        labelled(declared(lambda updates: 1 / 0))
    assert caught.value.__notes__ == ["raised by the function of the result variable 'own'"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        sys.stdout.write(as_toml(metadata(directory)))
