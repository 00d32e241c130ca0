"""Labelled results against the definition: whole vectors, one update at a time."""

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import random_walk
from reference import assert_same_pair, pair_of

from pipeline import geometry, gram, results
from pipeline.schema import DESCENTS, VARIABLES, InputError, Layout, Status

TENSORS = {"wide": (3, 4), "line": (), "plane": (2,)}


def inputs_of(states, numbers=None, learning_rate=None, dtype="float64"):
    """Inputs of `results.label` from a log, by the kernel on whole vectors."""
    shapes = {k.partition("/")[2]: (np.shape(v), dtype) for k, v in states[0].items() if k.startswith("parameter/")}
    layout = Layout.from_shapes(shapes)
    parameter, gradient = (
        np.stack([np.concatenate([np.ravel(s[f"{kind}/{name}"]) for name in shapes]) for s in states])
        for kind in ("parameter", "gradient")
    )
    starts = np.array([tensor.offset for tensor in layout.tensors] + [layout.elements])
    vectors = gram.vectors(hvp=False)
    products = np.empty((len(states) - 1, len(shapes), len(vectors), len(vectors)))
    gram.products([parameter], [gradient], starts, products, np.empty(products.shape[:2]))
    steps = np.array(numbers or range(len(states)))
    logged = np.array([s["learning_rate"] for s in states[:-1]])
    return results.Inputs(
        gram=products,
        vectors=vectors,
        layout=layout,
        steps=steps[:-1],
        spans=np.diff(steps),
        loss=np.array([s["loss"] for s in states[:-1]]),
        next_loss=np.array([s["loss"] for s in states[1:]]),
        learning_rate=logged if learning_rate is None else np.asarray(learning_rate, dtype=float),
        dtypes={"gradient": dtype},
    )


def walk(steps=6, dtype="float64", **options):
    return random_walk(steps, TENSORS, dtype, learning_rate=0.25, **options)


def update_of(states, row, tensor=None, span=1, learning_rate=0.25):
    """Negative gradient and update of a row, of one tensor or of the model."""
    names = [tensor] if tensor else list(TENSORS)

    def vector(kind, state):
        return np.concatenate([np.ravel(np.float64(state[f"{kind}/{name}"])) for name in names])

    displacement = vector("parameter", states[row + 1]) - vector("parameter", states[row])
    return -vector("gradient", states[row]), displacement / (span * learning_rate)


@pytest.mark.parametrize("tensor", [None, *TENSORS])
def test_every_row_is_the_pair_of_its_update(tensor):
    states = walk()
    tree = results.label(inputs_of(states))
    group = tree["model"] if tensor is None else tree["tensor"].sel(tensor=tensor)
    for row in range(5):
        at = group.to_dataset().isel(step=row).sel(descent="gradient", window=1)
        y, g = update_of(states, row, tensor)
        pair = pair_of(y, g)
        assert_same_pair(at["update_norm"] ** 2, at["alignment"], at["angle"], y, g)
        expected = {
            "condition_number": geometry.condition_number(pair),
            "eigenvalue_max": geometry.eigenvalues(pair)[0],
            "eigenvalue_mid": geometry.eigenvalues(pair)[1],
            "eigenvalue_min": geometry.eigenvalues(pair)[2],
            "eigenvalue_max_infimum": geometry.eigenvalue_bounds(pair)[0],
            "eigenvalue_min_supremum": geometry.eigenvalue_bounds(pair)[1],
            "similarity": geometry.similarity(pair),
        }
        effective = y @ g > 0
        assert bool(at["effective"]) == effective
        assert int(at["status"]) == (Status.EFFECTIVE if effective else Status.OBTUSE)
        # Promised is an angle to 1e-13, and kappa has the derivative 2 kappa / cos psi in it.
        relative = 4e-13 / abs(float(geometry.cosine(pair)))
        for name, value in expected.items():
            np.testing.assert_allclose(at[name], value if effective else np.nan, rtol=relative, err_msg=name)


def test_the_last_state_has_no_row_and_spans_are_told():
    states = walk(4)
    tree = results.label(inputs_of(states, numbers=[0, 10, 20, 50]))
    model = tree["model"].to_dataset().sel(window=1, descent="gradient")
    assert model["step"].values.tolist() == [0, 10, 20]
    assert model["step_span"].values.tolist() == [10, 10, 30]
    for row, span in enumerate([10, 10, 30]):
        y, g = update_of(states, row, span=span)
        at = model.isel(step=row)
        assert_same_pair(at["update_norm"] ** 2, at["alignment"], at["angle"], y, g)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_a_window_is_the_extended_state_of_the_averaged_loss(m):
    states = walk(6)
    loss = np.array([s["loss"] for s in states])
    model = results.label(inputs_of(states), windows=[m])["model"].to_dataset().sel(window=m, descent="gradient")
    for row in range(6 - m):
        ys, gs = zip(*(update_of(states, i) for i in range(row, row + m)), strict=True)
        at = model.isel(step=row)
        y, g = np.concatenate(ys) / m, np.concatenate(gs)
        assert_same_pair(at["update_norm"] ** 2, at["alignment"], at["angle"], y, g)
        np.testing.assert_allclose(at["loss_average"], loss[row : row + m].mean(), rtol=m * 2.0**-52)
        assert at["loss_decrease"] == loss[row] - loss[row + m]
    incomplete = model.isel(step=slice(6 - m, None))
    assert (incomplete["status"] == Status.UNVERIFIABLE).all()
    for name in ("angle", "loss_average", "loss_decrease", "condition_number", "update_norm"):
        assert np.isnan(incomplete[name]).all()


def test_the_corrected_gradient_explains_the_change_of_loss_of_the_model():
    states = walk()
    tree = results.label(inputs_of(states), windows=[1, 3])
    corrected = tree["model"].to_dataset().sel(descent="corrected")
    loss = np.array([s["loss"] for s in states])
    np.testing.assert_allclose(0.25 * corrected["alignment"].sel(window=1), loss[:-1] - loss[1:], rtol=2.0**-48)
    residual = corrected["discrete_identity_residual"]
    # A window adds three such terms, whose sum may be smaller than they are.
    cancelled = np.abs(np.diff(loss)).sum() / np.abs(corrected["loss_decrease"]).min()
    assert (np.abs(residual.sel(window=1)) <= 2.0**-48).all()
    assert (np.abs(residual.sel(window=3).dropna("step")) <= 2.0**-48 * float(cancelled)).all()
    plain = tree["model"].to_dataset().sel(descent="gradient", window=1)
    y, g = update_of(states, 0)
    decrease = loss[0] - loss[1]
    expected = (0.25 * (y @ g) - decrease) / abs(decrease)
    np.testing.assert_allclose(plain["discrete_identity_residual"][0], expected, rtol=2.0**-44)
    shares = tree["tensor"].to_dataset().sel(descent="corrected", window=1)["alignment"].sum("tensor")
    np.testing.assert_allclose(shares, corrected["alignment"].sel(window=1), rtol=2.0**-44)


def status_of(states, group="model", **options):
    tree = results.label(inputs_of(states, **options))
    return tree[group].to_dataset().sel(window=1)


def test_a_gradient_that_is_not_finite_spoils_its_own_row_only():
    states = walk()
    clean = status_of(states).sel(descent="gradient")
    states[2]["gradient/plane"] = np.array([np.nan, 1.0])
    model, tensors = status_of(states), status_of(states, "tensor")
    spoiled = model.sel(descent="gradient")
    assert spoiled["status"][2] == Status.NON_FINITE
    assert np.isnan(spoiled["angle"][2])
    rest = [0, 1, 3, 4]
    xr.testing.assert_identical(spoiled.isel(step=rest), clean.isel(step=rest))
    assert (tensors["status"].sel(descent="gradient").isel(step=2) == Status.NON_FINITE).values.tolist() == [
        False,
        False,
        True,
    ]


def test_without_a_learning_rate_no_metric_is_told():
    model = status_of(walk(), learning_rate=[0.25, np.nan, 0.0, 0.25, 0.25]).sel(descent="gradient")
    assert (model["status"] == Status.NO_LEARNING_RATE).values.tolist() == [False, True, True, False, False]
    for name in ("angle", "condition_number", "update_norm", "alignment"):
        assert np.isnan(model[name][1:3]).all()
        assert np.isfinite(model[name][[0, 3, 4]]).all()


def test_without_a_loss_only_the_corrected_gradient_is_unverifiable():
    states = walk()
    states[3]["loss"] = np.nan
    model = status_of(states)
    corrected = (model["status"].sel(descent="corrected") == Status.UNVERIFIABLE).values
    assert corrected.tolist() == [False, False, True, True, False]
    assert not (model["status"].sel(descent="gradient") == Status.UNVERIFIABLE).any()


def test_an_update_that_is_zero_has_no_angle():
    states = walk()
    for name in TENSORS:
        states[3][f"parameter/{name}"] = states[2][f"parameter/{name}"]
    model = status_of(states)
    assert (model["status"].isel(step=2) == Status.ZERO_UPDATE).all()
    assert np.isnan(model["angle"].isel(step=2)).all()


def test_an_update_within_the_rounding_of_bfloat16_is_unverifiable():
    states = random_walk(4, {"w": (2000,)}, "bfloat16", learning_rate=1e-5)
    model = status_of(states, dtype="bfloat16").sel(descent="gradient")
    assert set(model["status"].values.tolist()) <= {int(Status.UNVERIFIABLE), int(Status.ZERO_UPDATE)}
    assert np.isnan(model["condition_number"]).all()
    same = status_of(random_walk(4, {"w": (2000,)}, "float64", learning_rate=1e-5)).sel(descent="gradient")
    assert (same["status"] == Status.EFFECTIVE).all()


def test_the_uncertainty_of_the_angle_covers_what_float32_storage_moved():
    exact = status_of(random_walk(20, {"w": (50,)}, "float64", learning_rate=1e-4)).sel(descent="gradient")
    stored = random_walk(20, {"w": (50,)}, "float32", learning_rate=1e-4)
    rounded = status_of(stored, dtype="float32").sel(descent="gradient")
    moved = np.abs(rounded["angle"] - exact["angle"])
    assert (moved > 0).any()
    assert (moved <= rounded["angle_uncertainty"]).all()


@given(seed=st.integers(0, 10_000), tensors=st.integers(1, 4))
@settings(max_examples=25)
def test_metrics_exist_where_the_status_is_effective_and_nowhere_else(seed, tensors):
    rng = np.random.default_rng(seed)
    states = random_walk(5, {f"t{k}": (int(rng.integers(1, 5)),) for k in range(tensors)}, "float64", seed)
    for value in (np.nan, np.inf, 0.0):
        state, key = states[rng.integers(5)], rng.choice(list(states[0]))
        state[key] = np.full_like(state[key], value)
    tree = results.label(inputs_of(states), windows=[1, 2])
    for group in ("model", "tensor"):
        dataset = tree[group].to_dataset()
        effective = dataset["status"] == Status.EFFECTIVE
        np.testing.assert_array_equal(dataset["effective"], effective)
        for name in (
            "condition_number",
            "similarity",
            "eigenvalue_max",
            "eigenvalue_min",
            "eigenvalue_max_infimum",
        ):
            np.testing.assert_array_equal(np.isfinite(dataset[name]), effective)
        family = np.isfinite(dataset["family_condition_number"])
        np.testing.assert_array_equal(family, effective.expand_dims(gamma=family["gamma"]).transpose(*family.dims))
        np.testing.assert_array_equal(np.isfinite(dataset["angle"]), dataset["status"] <= Status.OBTUSE)


# Labels and files --------------------------------------------------------------------------------------------


def test_xarray_alone_opens_the_results_and_finds_every_name(tmp_path):
    tree = results.label(inputs_of(walk()), windows=[2], provenance={"source": "a log"})
    results.write(tree, tmp_path / "results.zarr")
    code = """
import sys, json, xarray
tree = xarray.open_datatree(sys.argv[1])
assert not any(name.startswith("pipeline") for name in sys.modules)
table = {g: {n: [list(v.dims), v.attrs] for n, v in tree[g].data_vars.items()} for g in ("model", "tensor")}
print(json.dumps([table, tree.attrs, {n: tree["tensor"][n].values.tolist() for n in tree["tensor"].coords}]))
"""
    command = [sys.executable, "-W", "error", "-c", code, tmp_path / "results.zarr"]
    table, attributes, coordinates = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert attributes["source"] == "a log"
    assert attributes["versions"]["natgrad-pipeline"]
    assert coordinates["descent"] == list(DESCENTS)
    assert coordinates["window"] == [1, 2]
    assert coordinates["gamma"] == list(results.GAMMAS)
    assert coordinates["tensor"] == list(TENSORS)
    assert set(table["model"]) == set(VARIABLES)
    assert set(VARIABLES) - set(table["tensor"]) == {"discrete_identity_residual"}
    for group, leading in (("model", ["step"]), ("tensor", ["step", "tensor"])):
        for name, (_, attrs) in table[group].items():
            assert all(attrs[key] for key in ("long_name", "units", "equation")), name
        assert table[group]["angle"][0] == [*leading, "descent", "window"]
        assert table[group]["family_eigenvalue_max"][0] == [*leading, "descent", "window", "gamma"]
        assert table[group]["status"][1]["flag_meanings"].split()[Status.OBTUSE] == "obtuse"


def test_results_are_read_back_as_they_were_and_replaced_whole(tmp_path):
    first, second = results.label(inputs_of(walk())), results.label(inputs_of(walk(seed=2)), gammas=[2.0])
    results.write(first, tmp_path / "results.zarr")
    results.write(second, tmp_path / "results.zarr")
    xr.testing.assert_identical(results.read(tmp_path / "results.zarr").load(), second)
    assert [path.name for path in tmp_path.iterdir()] == ["results.zarr"]


def test_no_results_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"no results here[\s\S]*natgrad analyze"):
        results.read(tmp_path / "results.zarr")


@pytest.mark.parametrize("gammas", [[0.0], [-1.0], [np.nan], [np.inf], []])
def test_a_gamma_that_is_no_weight_is_refused(gammas):
    with pytest.raises(InputError, match="gamma must be positive"):
        results.label(inputs_of(walk()), gammas=gammas)


@pytest.mark.parametrize("window", [0, -2, 6])
def test_a_window_that_does_not_fit_the_run_is_refused(window):
    with pytest.raises(InputError, match="do not fit a run of 5 updates"):
        results.label(inputs_of(walk()), windows=[window])
