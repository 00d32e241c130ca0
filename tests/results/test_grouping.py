"""Test how tensors are divided into groups, and that the results of a group are those of its tensors alone."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from logs import random_walk, write_log
from natgrad.results.grouping import groups_of
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENTS
from processing import process

TENSORS = {
    "embed.weight": (4,),
    "layers.0.a.weight": (3,),
    "layers.0.a.bias": (2,),
    "layers.0.b.weight": (3,),
    "layers.1.a.weight": (3,),
    "layers.1.a.bias": (2,),
}
names = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1", "h2", "w"]), min_size=1, max_size=4).map(".".join),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(names, st.sampled_from(["block", "layer"]))
def test_blocks_and_layers_contain_every_tensor_once(tensors, kind):
    groups = groups_of(tensors, [kind])
    if groups:
        assert sorted(at for group in groups for at in group.tensors) == list(range(len(tensors)))
        assert 1 < len(groups) < len(tensors)
        assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("name", "other", "block"),
    [
        ("layer1.0.conv.weight", "layer1.1.conv.weight", "layer1.0.*"),
        ("params/Dense_0/kernel", "params/Dense_1/kernel", "params/Dense_0/*"),
        ("model.layers.11.mlp.weight", "model.layers.1.mlp.weight", "model.layers.11.*"),
    ],
)
def test_a_block_begins_with_a_numbered_part(name, other, block):
    bias = name.rpartition("." if "." in name else "/")[0] + ("." if "." in name else "/") + "bias"
    first, second = groups_of([name, bias, other], ["block"])
    assert (first.name, first.tensors) == (block, (0, 1))
    assert second.tensors == (2,)


def test_a_model_without_parts_has_no_groups():
    assert groups_of(["w", "b"], ["block", "layer"]) == ()
    assert groups_of(["net.w", "net.b"], ["block", "layer"]) == ()


def test_a_pattern_that_matches_no_tensor_is_an_error():
    with pytest.raises(InputError, match=r"(?s)no tensor has a name that matches 'x\*'.*use block or layer"):
        groups_of(["a.w"], ["x*"])


REQUESTED = ("block", "layer", "*.bias")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    log = write_log(folder / "log", random_walk(90, TENSORS, "float64"))
    return process(log, folder / "out", groups=REQUESTED, windows=(1, 3))


def test_results_have_the_groups_with_their_kinds(tree):
    group = tree["group"]
    kinds = dict(zip(group["group"].values.tolist(), group["group_kind"].values.tolist(), strict=True))
    assert kinds == {
        "embed": "block, layer",
        "layers.0.*": "block",
        "layers.1.*": "block, layer",
        "layers.0.a": "layer",
        "layers.0.b": "layer",
        "*.bias": "pattern",
    }
    only_of_others = {"preconditioner_condition_number", "weight_decay"}
    assert set(group.data_vars) == set(tree["tensor"].data_vars) - only_of_others
    assert group["angle"].dims == ("step", "group", "descent", "window")


@pytest.mark.parametrize("descent", DESCENTS[:3])
def test_a_group_has_the_results_of_a_model_of_its_tensors(tree, tmp_path, descent):
    """Log only the tensors of a group. Estimates that use the loss need the change of the loss of the others."""
    if descent != "gradient":
        model, tensors = tree["model"].sel(descent=descent), tree["tensor"].sel(descent=descent)
        blocks = (
            tree["group"]
            .sel(descent=descent)
            .isel(group=["block" in str(kind) for kind in tree["group"]["group_kind"].values])
        )
        # A sum over all blocks is one over all tensors, and the model: y.g adds up.
        for found in (blocks["alignment"].sum("group"), tensors["alignment"].sum("tensor")):
            # Six tensors, of at most 17 elements: a few roundings of the terms.
            scale = float(np.abs(tensors["alignment"]).max())
            np.testing.assert_allclose(
                found.sel(window=1), model["alignment"].sel(window=1), rtol=0, atol=64 * np.finfo(float).eps * scale
            )
        return
    chosen = {name: shape for name, shape in TENSORS.items() if name.startswith("layers.0.")}
    states = random_walk(90, TENSORS, "float64")
    kept = [
        {key: value for key, value in state.items() if key.partition("/")[2] in {"", *chosen}} for state in states
    ]
    alone = process(write_log(tmp_path / "log", kept), tmp_path / "out", windows=(1, 3))["model"]
    group = tree["group"].to_dataset().sel(group="layers.0.*", descent=descent)
    for name in ("angle", "condition_number", "status", "parameter_norm", "update_to_weight", "angle_uncertainty"):
        expected = alone[name].sel(descent=descent) if "descent" in alone[name].dims else alone[name]
        # The same sum of the same products in the same order.
        np.testing.assert_array_equal(group[name].values, expected.values)


def test_groups_are_optional(tmp_path):
    log = write_log(tmp_path / "log", random_walk(6, TENSORS))
    assert "group" in process(log, tmp_path / "default").children
    plain = process(log, tmp_path / "plain", groups=())
    assert "group" not in plain.children
    xr.testing.assert_identical(
        plain["model"].to_dataset(), process(log, tmp_path / "again", groups=("layer",))["model"].to_dataset()
    )
