"""Compare the values of the last update with exact arithmetic."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.kernel.updates import portable_products
from natgrad.recording.live import last_update


def values(step, tensors, rates):
    """Return the values of an update from its arrays, each (name, before, after, gradient)."""
    names, *arrays = zip(*tensors, strict=True)
    gram, _ = portable_products(*arrays)
    return last_update(step, gram, [array.size for array in arrays[0]], {name: rates[name] for name in names})


@given(
    seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), alignment=st.floats(-1, 1)
)
def test_the_values_are_those_of_exact_arithmetic(seed, sizes, alignment):
    random = np.random.default_rng(seed)
    tensors, rates = [], {}
    for number, size in enumerate(sizes):
        before, gradient, noise = random.standard_normal((3, size))
        after = before - 0.1 * (alignment * gradient + noise)
        tensors.append((f"t{number}", before, after, gradient))
        rates[f"t{number}"] = 0.1 / (1 + number)
    found = values(7, tensors, rates)
    assert found.step == 7
    assert list(found.tensors) == list(rates)
    with mpmath.workdps(40):
        groups = {name: [one] for one in tensors for name in one[:1]} | {"": tensors}
        for name, parts in groups.items():
            its = found.tensors[name] if name else found.model
            sums = dict.fromkeys(("yg", "yy", "gg", "dd", "pp"), mpmath.mpf(0))
            for part, *vectors in parts:
                for before, after, gradient in zip(*(map(mpmath.mpf, map(float, v)) for v in vectors), strict=True):
                    # The model has one learning rate.
                    move, rate = after - before, mpmath.mpf(rates[part] if name else 0.1)
                    sums["yg"] -= gradient * move / rate
                    sums["yy"] += gradient**2
                    sums["gg"] += (move / rate) ** 2
                    sums["dd"] += move**2
                    sums["pp"] += before**2
            length = mpmath.sqrt(sums["yy"] * sums["gg"])
            psi = mpmath.acos(max(-1, min(1, sums["yg"] / length)))
            assert its.angle == pytest.approx(float(psi), abs=1e-13)
            assert its.update_to_weight == pytest.approx(float(mpmath.sqrt(sums["dd"] / sums["pp"])), rel=1e-14)
            assert its.effective == (sums["yg"] > 0)
            if sums["yg"] > length / 1000:
                kappa = ((1 + mpmath.sin(psi)) / mpmath.cos(psi)) ** 2
                assert its.condition_number == pytest.approx(float(kappa), rel=1e-10)


def test_updates_without_a_direction_have_no_angle():
    zero, one = np.zeros(2), np.ones(2)
    found = values(
        0,
        [("still", one, one, one), ("flat", one, 2 * one, zero), ("new", zero, -one, one)],
        {"still": 1.0, "flat": 1.0, "new": math.nan},
    )
    assert math.isnan(found.tensors["still"].angle)
    assert found.tensors["still"].update_to_weight == 0
    assert math.isnan(found.tensors["flat"].angle)
    assert not found.tensors["flat"].effective
    # The learning rate is unknown, so the update is also unknown.
    assert math.isnan(found.tensors["new"].angle)
    assert math.isnan(found.tensors["new"].update_to_weight)
    assert math.isnan(found.model.angle)


def test_a_gradient_that_is_not_finite_gives_no_number():
    one = np.ones(2, np.float32)
    for gradient in (np.full(2, np.inf), np.full(2, np.nan)):
        found = values(0, [("w", one, 2 * one, gradient)], {"w": 0.1})
        assert math.isnan(found.model.angle)
        assert math.isnan(found.model.condition_number)
        assert not found.model.effective
