"""Flat keys are split into the kind and the name of a tensor, all of them or none."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import random_walk
from natgrad.sources.families import left_out, usual_families
from natgrad.sources.opening import open_source
from natgrad.sources.steps import LoggedTensor
from natgrad.storage import open_storage

SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (1, 4), "2.bias": (1,)}
FAMILIES = [
    ("param_*", "grad_*"),
    ("params.*", "grads.*"),
    ("param:*", "gradient:*"),
    ("p_*", "g_*"),
    ("theta-*", "grad-*"),
    ("*", "grad_*"),
    ("*", "d*"),
    ("*", "*.grad"),
    ("*_p", "*_g"),
]


def keys(pattern, shapes=SHAPES):
    return {pattern.replace("*", name): LoggedTensor(shape, "float32") for name, shape in shapes.items()}


@pytest.mark.parametrize(("parameter", "gradient"), FAMILIES)
def test_every_tensor_of_a_family_is_found(parameter, gradient):
    found = usual_families(keys(parameter) | keys(gradient))
    assert {array: pattern for array, (pattern, _) in found.items()} == {
        "parameter": parameter,
        "gradient": gradient,
    }
    assert all(names.keys() == SHAPES.keys() for _, names in found.values())


@pytest.mark.parametrize(
    "tensors",
    [
        keys("a_*") | keys("b_*"),
        keys("*.weight", {"a": (3,), "b": (2,)}),
        # These are not the gradients of these parameters.
        keys("p_*") | keys("g_*", {name: (*shape, 2) for name, shape in SHAPES.items()}),
        # A generator and a discriminator.
        keys("g_*") | keys("d_*", {name: (*shape, 2) for name, shape in SHAPES.items()}),
        # Some parameters have no gradient with this word: the keys do not show which ones.
        keys("param_*") | keys("grad_*", {"0.bias": (4,)}) | keys("grad_0.*", {"scale": (4,)}),
    ],
)
def test_other_keys_are_not_split(tensors):
    assert usual_families(tensors) == {}


@given(
    st.dictionaries(
        st.text(st.sampled_from("pgdw_.:/*0aé"), min_size=1, max_size=6),
        st.sampled_from([(2,), (3,)]).map(lambda shape: LoggedTensor(shape, "float32")),
        max_size=8,
    )
)
def test_no_tensor_is_in_two_arrays_and_gradients_have_parameters(tensors):
    found = usual_families(tensors)
    used = [key for _, names in found.values() for key in names.values()]
    assert len(used) == len(set(used))
    assert set(used) <= set(tensors)
    for pattern, names in found.values():
        assert all(pattern.replace("*", name, 1) == key for name, key in names.items())
        assert not left_out(pattern, names.values(), set(tensors) - set(used))
    for name, key in found.get("gradient", ("", {}))[1].items() if len(found) > 1 else ():
        assert tensors[found["parameter"][1][name]].shape == tensors[key].shape


def test_a_part_of_a_family_is_recognized():
    assert left_out("param_0", ["param_0.weight"], ["param_2.weight", "params"]) == ["param_2.weight"]
    assert left_out("grad_fc", ["grad_fc.w"], ["grad_head.w", "gradual"]) == ["grad_head.w"]
    assert left_out("layers/0", ["layers/0/w"], ["layers/1/w"]) == ["layers/1/w"]
    assert left_out("net", ["net/w"], ["net_ema/w", "param_2"]) == []
    assert left_out("param_0", [], ["param_2"]) == []


def write(folder, parameter, gradient, *, last=True):
    states = random_walk(3, SHAPES, "float32")
    folder.mkdir()
    for step, state in enumerate(states):
        arrays = {}
        for key, value in state.items():
            array, _, name = key.partition("/")
            pattern = {"parameter": parameter, "gradient": gradient}.get(array, array)
            if array != "gradient" or step < 2 or last:
                arrays[pattern.replace("*", name)] = value
        np.savez(folder / f"step_{step}.npz", **arrays)
    return states


@pytest.mark.parametrize(("parameter", "gradient"), FAMILIES)
def test_files_with_such_keys_are_read_without_options(tmp_path, parameter, gradient):
    last = parameter == "*_p"  # bare names without gradients do not show that they end with their kind
    states = write(tmp_path / "log", parameter, gradient, last=last)
    log = open_source(open_storage(tmp_path / "log"))
    for step, state in zip(log.steps(), states, strict=True):
        with log.open(step) as reader:
            content = reader.content()
            arrays = ("parameter", "gradient") if step.number < 2 or last else ("parameter",)
            assert [array for array, logged in content.arrays.items() if logged] == [*arrays]
            for array in arrays:
                assert content.arrays[array].keys() == SHAPES.keys()
                for name, shape in SHAPES.items():
                    value = np.zeros(int(np.prod(shape)), np.float32)
                    reader.read(array, name, 0, value)
                    np.testing.assert_array_equal(value, state[f"{array}/{name}"].ravel())


def test_all_steps_have_the_same_tensors_whether_or_not_they_have_gradients(tmp_path):
    for number, (one, other) in enumerate(pairwise(FAMILIES[:3])):
        write(tmp_path / str(number), one[0], other[1])
        log = open_source(open_storage(tmp_path / str(number)))
        with log.open(log.steps()[0]) as reader:
            content = reader.content()
        # The separators differ, so the keys do not belong to one family, and the file has no gradients.
        assert not content.arrays.get("gradient")


def test_a_key_that_selects_a_part_of_a_family_is_reported(tmp_path):
    write(tmp_path / "log", "param_*", "grad_*")
    log = open_source(open_storage(tmp_path / "log"), None, {"parameter": "param_0", "gradient": "grad_0"})
    with log.open(log.steps()[0]) as reader:
        notes = reader.content().notes
    assert any("param_0" in note and "OMITTED" in note and "param_2.weight" in note for note in notes)
    assert any("grad_0" in note and "OMITTED" in note for note in notes)


def test_a_star_in_a_key_stands_for_the_names(tmp_path):
    write(tmp_path / "log", "x<*>", "dx<*>")
    log = open_source(open_storage(tmp_path / "log"), None, {"parameter": "x<*>", "gradient": "dx<*>"})
    with log.open(log.steps()[0]) as reader:
        content = reader.content()
    assert content.arrays["gradient"].keys() == content.arrays["parameter"].keys() == SHAPES.keys()
    assert not any("OMITTED" in note for note in content.notes)


def test_a_list_of_gradients_has_the_names_of_the_parameters(tmp_path):
    (tmp_path / "log").mkdir()
    state = random_walk(1, SHAPES, "float32")[0]
    names = ["2.weight", "0.bias", "0.weight", "2.bias"]  # the order of the model, not that of the names
    params = {name: np.array(state[f"parameter/{name}"]) for name in names}
    for step, shapes in enumerate((names, names[:-1], sorted(names))):
        grads = [np.array(state[f"gradient/{name}"]) for name in shapes]
        (tmp_path / "log" / f"step_{step}.pkl").write_bytes(pickle.dumps({"model": params, "grads": grads}))
    log = open_source(open_storage(tmp_path / "log"))
    first, *others = log.steps()
    with log.open(first) as reader:
        content = reader.content()
        for name, shape in SHAPES.items():
            value = np.zeros(int(np.prod(shape)), np.float32)
            reader.read("gradient", name, 0, value)
            np.testing.assert_array_equal(value, state[f"gradient/{name}"].ravel())
    assert any("in the order of the file" in note for note in content.notes)
    for other in others:  # of another length, or of other shapes
        with log.open(other) as reader:
            assert set(reader.content().arrays["gradient"]).isdisjoint(SHAPES)
