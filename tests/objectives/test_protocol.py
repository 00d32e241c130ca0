"""Test that results of objectives which are not a loss and gradients are refused."""

import numpy as np
import pytest

from natgrad.objectives.protocol import evaluate, load_objective, product, split_name
from natgrad.schema.errors import InputError

TENSORS = {"a": np.ones(3), "b": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize("name", ["module", "module:", ":factory", "a b:c", "folder/module.py:factory", "m:f()"])
def test_other_names_of_factories_are_refused(name):
    with pytest.raises(InputError, match="does not name the factory"):
        split_name(name)


def test_factories_may_be_attributes(tmp_path):
    (tmp_path / "attribute_factory.py").write_text("class A:\n    factory = lambda: lambda tensors: None\n")
    objective, fingerprint = load_objective("attribute_factory:A.factory", str(tmp_path))
    assert objective({}) is None
    assert fingerprint["objective"] == "attribute_factory:A.factory"


def test_a_change_of_the_module_is_another_objective(tmp_path):
    text = "def factory():\n    return lambda tensors: None\n"
    for name in ("one_factory", "same_factory"):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "other_factory.py").write_text(text + "# changed\n")
    names = ("one_factory", "same_factory", "other_factory")
    one, same, other = (load_objective(f"{name}:factory", str(tmp_path))[1]["source"] for name in names)
    assert one == same != other


def test_a_fingerprint_that_cannot_be_compared_is_refused(tmp_path):
    (tmp_path / "odd_factory.py").write_text(
        "def factory():\n    def objective(tensors): ...\n    objective.fingerprint = {'x': object()}\n"
        "    return objective\n"
    )
    with pytest.raises(InputError, match="the fingerprint of the objective"):
        load_objective("odd_factory:factory", str(tmp_path))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.0, "the objective returns 1.0"),
        ((1.0,), "the objective returns"),
        ((np.ones(2), {"a": np.ones(3)}), r"the loss has shape \(2,\)"),
        (("x", {"a": np.ones(3)}), "the loss"),
        ((1.0, {}), "the gradients are"),
        ((1.0, {"c": np.ones(3)}), "but no such tensor"),
        ((1.0, {"a": np.ones(4)}), r"of shape \(4,\)"),
        ((1.0, {"a": np.ones(3, int)}), "int64 of shape"),
        ((1.0, {"a": None}), "object of shape"),
    ],
)
def test_results_that_are_not_valid_are_refused(result, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluate(lambda tensors: result, TENSORS, "here")
    assert caught.value.where.startswith("here")


def test_losses_that_are_not_finite_are_results():
    loss, _ = evaluate(lambda tensors: (float("nan"), {"a": np.ones(3)}), TENSORS, "here")
    assert np.isnan(loss)


def test_products_belong_to_the_direction():
    class Objective:
        def hvp(self, tensors, direction):
            return {"b": np.ones((2, 2))}

    with pytest.raises(InputError, match="there is a product of 'b', but no such tensor"):
        product(Objective(), TENSORS, {"a": np.ones(3)}, "here")
