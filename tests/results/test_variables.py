"""Test variables that are declared outside of the package: their missing values, and invalid declarations."""

import enum
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from test_dataset import TENSORS, quadratic_walk, table_of, walk

from natgrad.results import dataset
from natgrad.results.variables import Defined, UpdateVariable
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENTS
from natgrad.schema.variables import Status

METADATA = {"units": "1", "equation": "1", "long_name": "one", "description": "Always one."}
COMPARED = ("step", "tensor", "descent", "window")


def declared(compute, dimensions=COMPARED, **options):
    return UpdateVariable(name="own", compute=compute, dimensions=dimensions, **METADATA, **options)


def labelled(variable, table=None, **options):
    return dataset.label(table_of(walk()) if table is None else table, variables=[variable], **options)


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
        if defined is not Defined.ALWAYS:
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


def test_integers_become_floats_if_they_may_be_missing():
    always = labelled(declared(lambda updates: updates.table.spans, ("step",)))
    assert always["model"]["own"].dtype == np.int64
    sometimes = labelled(declared(lambda updates: np.ones(updates.status.shape, int), defined=Defined.WITH_METRIC))[
        "model"
    ].to_dataset()
    assert sometimes["own"].dtype == np.float64
    assert (np.isnan(sometimes["own"]) == ~sometimes["effective"]).all()


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
        (("step",), {"defined": Defined.WITH_METRIC}, "lacks dimensions on which its definition depends"),
        (("step", "tensor"), {"descents": ("corrected",)}, "lacks dimensions on which its definition depends"),
    ],
)
def test_a_contradictory_declaration_is_an_error(dimensions, options, message):
    with pytest.raises(InputError, match=message):
        declared(lambda updates: updates.status, dimensions, **options)


def test_values_of_another_shape_are_an_error_with_the_name_of_the_variable():
    with pytest.raises(
        InputError, match=r"'own' has values of shape \(4,\), but \(5,\) is required[\s\S]*model, descent gradient"
    ):
        labelled(declared(lambda updates: np.ones(4), ("step",)))
    with pytest.raises(InputError, match=r"but \(3,\) is required"):
        labelled(declared(lambda updates: 1.0, ("tensor",), aggregations=("tensor",)))
    assert len(TENSORS) == 3


def test_an_error_of_the_function_names_the_variable():
    with pytest.raises(ZeroDivisionError) as caught:
        labelled(declared(lambda updates: 1 / 0))
    assert caught.value.__notes__ == ["raised by the function of the result variable 'own'"]
