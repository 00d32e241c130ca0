"""Test that configurations become plain values under flat keys, regardless of their contents."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.configuration import declared_configuration, flat_configuration
from natgrad.schema.errors import InputError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=40
)


@given(TREES)
def test_any_tree_becomes_values_that_json_can_store(tree):
    found = flat_configuration(tree)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


def test_levels_are_joined_and_text_of_a_number_is_a_number():
    tree = {
        "optimizer": {"lr": "1e-3", "betas": [0.9, "0.95"], "name": "adamw"},
        "seed": "7",
        "id": "007",
        "eps": float("nan"),
        "amp": True,
        "resume": None,
        "_private": 1,
    }
    assert flat_configuration(tree) == {
        "optimizer.lr": 1e-3,
        "optimizer.betas.0": 0.9,
        "optimizer.betas.1": 0.95,
        "optimizer.name": "adamw",
        "seed": 7,
        "id": "007",
        "eps": "nan",
        "amp": True,
    }


def test_a_tree_that_contains_itself_or_very_much_is_cut():
    tree = {"lr": 0.1}
    tree["self"] = [tree, tree]
    assert flat_configuration(tree)["lr"] == 0.1
    bomb = {"lr": 0.1}
    for _ in range(60):
        bomb = {"a": bomb, "b": bomb}
    assert len(flat_configuration(bomb)) <= 1000
    assert flat_configuration({"lr": 0.1, "labels": {str(i): i for i in range(10**6)}})["lr"] == 0.1
    assert len(flat_configuration({"text": "x" * 10**6})["text"]) <= 200


def test_a_recorder_accepts_what_argparse_gives_and_refuses_objects():
    found = declared_configuration({"out": Path("a") / "b", "lr": np.float32(0.5), "names": ("a", None), "n": 3})
    assert found == {"out": "a/b", "lr": 0.5, "names": ["a", None], "n": 3}
    with pytest.raises(InputError, match=r"'model\.layer' in the configuration is an object of type object"):
        declared_configuration({"model": {"layer": object()}})
    with pytest.raises(InputError, match="must be a mapping, got list"):
        declared_configuration([1])
