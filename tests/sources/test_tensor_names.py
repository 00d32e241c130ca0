"""Only names that differ by a known rule are matched, one to one and with a note."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.errors import InputError
from natgrad.sources.completion import complete
from natgrad.sources.steps import LoggedTensor
from natgrad.sources.tensor_names import matched_names
from opened import ingest, open_sources

SHAPES = {"fc.weight": (3, 2), "fc.bias": (3,)}


def tensors(*names, shape=(2,)):
    return {name: LoggedTensor(shape, "float64") for name in names}


@pytest.mark.parametrize(
    ("parameters", "others", "aliases", "expected"),
    [
        (["_orig_mod.a", "_orig_mod.b"], ["a", "b"], {}, {"a": "_orig_mod.a", "b": "_orig_mod.b"}),
        (["a", "b"], ["module.a", "module._orig_mod.b"], {}, {"module.a": "a", "module._orig_mod.b": "b"}),
        (["q.lora_A.weight"], ["q.lora_A.default.weight"], {}, {"q.lora_A.default.weight": "q.lora_A.weight"}),
        (["head.weight"], ["head.modules_to_save.default.weight"], {}, {"head.modules_to_save.default.weight":
                                                                       "head.weight"}),
        (["embed", "x"], ["head", "x"], {"head": "embed"}, {"head": "embed"}),
        (["embed", "x"], ["module.head", "x"], {"head": "embed"}, {"module.head": "embed"}),
        (["theta"], ["w"], {}, {"w": "theta"}),
        (["a"], ["a"], {}, {}),
        (["a"], ["b"], {}, {}),
        (["modulea"], ["a"], {}, {}),
        (["a", "module.a"], ["_orig_mod.a"], {}, {}),  # two parameters may be meant
        (["_orig_mod.a"], ["a", "module.a"], {}, {}),  # two tensors may be meant
        (["embed", "head"], ["head", "x"], {"head": "embed"}, {}),
    ],
)  # fmt: skip
def test_names_are_matched_only_one_to_one(parameters, others, aliases, expected):
    assert matched_names(tensors(*parameters), tensors(*others), aliases) == expected


def test_another_shape_is_not_matched():
    assert matched_names(tensors("module.a"), tensors("a", shape=(3,)), {}) == {}
    assert matched_names(tensors("module.a"), tensors("a", shape=(7, 2)), {}, replicates=True) == {"a": "module.a"}


NAMES = st.lists(st.sampled_from(["a", "b", "module", "_orig_mod", "default"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.sets(NAMES), st.sets(NAMES))
def test_a_match_uses_every_name_once(parameters, others):
    found = matched_names(tensors(*parameters), tensors(*others), {})
    assert len(set(found.values())) == len(found)
    assert set(found) <= others - parameters
    assert set(found.values()) <= parameters - others


def write(folder, prefix_of_parameters, prefix_of_gradients):
    """Write parameters and gradients into two folders, and return the gradients of each step."""
    rng, gradients = np.random.default_rng(0), []
    for step in range(3):
        state = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
        gradients.append(state)
        for array, prefix in (("parameter", prefix_of_parameters), ("gradient", prefix_of_gradients)):
            (folder / array).mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(
                {f"{array}/{prefix}{name}": value for name, value in state.items()},
                folder / array / f"step_{step}.safetensors",
            )
    return [folder / "parameter", folder / "gradient"], gradients


@pytest.mark.parametrize(("parameters", "others"), [("_orig_mod.", ""), ("module.", ""), ("", "module._orig_mod.")])
def test_matched_gradients_are_read_and_reported(tmp_path, parameters, others):
    sources, gradients = write(tmp_path, parameters, others)
    log = open_sources(sources)
    step = log.steps()[1]
    with log.open(step) as reader:
        out = np.zeros(3)
        reader.read("gradient", f"{parameters}fc.bias", 0, out)
        content = complete(step, reader.content())
    np.testing.assert_array_equal(out, gradients[1]["fc.bias"])
    assert list(content.arrays["gradient"]) == [f"{parameters}fc.bias", f"{parameters}fc.weight"]
    assert "2 tensors of gradient have names that differ from those of their parameters" in " ".join(content.notes)


def test_matching_can_be_switched_off_and_stays_off(tmp_path):
    sources, _ = write(tmp_path / "log", "module.", "")
    with pytest.raises(InputError, match="has no gradient"):
        ingest(sources, tmp_path / "exact", exact_names=True)
    ingest(sources, tmp_path / "out")
    with pytest.raises(InputError, match="created without --exact-names"):
        ingest(sources, tmp_path / "out", exact_names=True)


def test_a_tied_name_in_the_metadata_is_another_name_of_the_parameter(tmp_path):
    for step in range(2):
        for folder, tree, metadata in (
            (
                "a",
                {"parameter/embed": np.ones(2), "parameter/x": np.ones(2)},
                {"parameter/head": "parameter/embed"},
            ),
            ("b", {"gradient/head": np.full(2, 3.0), "gradient/x": np.ones(2)}, None),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            safetensors.numpy.save_file(tree, tmp_path / folder / f"step_{step}.safetensors", metadata)
    log = open_sources([tmp_path / "a", tmp_path / "b"])
    with log.open(log.steps()[0]) as reader:
        out = np.zeros(2)
        assert list(reader.content().arrays["gradient"]) == ["embed", "x"]
        reader.read("gradient", "embed", 0, out)
    assert out.tolist() == [3.0, 3.0]
