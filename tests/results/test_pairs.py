"""Compare the uncertainty of the angle with exact arithmetic, from both sides."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from test_dataset import table_of

from logs import DTYPES
from natgrad.results.pairs import model_and_tensors
from natgrad.results.variables import VARIABLES, Updates
from natgrad.schema.layout import Layout, unit_roundoff
from natgrad.schema.variables import Status
from reference import exact, exact_dot, promised_angle_error

PARTS = {"a": slice(0, 3), "b": slice(3, 8)}
RATE = 0.25

LARGEST_FACTOR = 7.0
"""Largest quotient of the reported uncertainty and the formula with the largest errors of all elements.

An element x is off by at most max(u |x|, h), where h is half the smallest positive number. The results know only
norms. With a, b, d the norms of both states and of their difference, d <= a + b, the floor of the update is
u (2 a + d) + 2 sqrt(D) h <= u (3 a + b) + 2 sqrt(D) h <= (sqrt(10) + 1) |dg|, because |dg| >= u sqrt(a^2 + b^2) and
|dg| >= 2 sqrt(D) h. The floor of the gradient is at most sqrt(2) |dy|. Because asin is convex, a factor of c in its
argument is at most asin(1) / asin(1 / c) = 6.5 in its value, for c = sqrt(10) + 1 and while the angle is known.
"""


def rounded(values, dtype):
    return np.asarray(values, DTYPES[dtype])


def half_gaps(stored, sign):
    """Return the largest errors, in the direction of the sign, of values that are rounded to the stored values."""
    away = np.where(sign > 0, np.inf, -np.inf).astype(stored.dtype)
    return (np.nextafter(stored, away).astype(float) - stored.astype(float)) / 2.0


def largest_errors(stored):
    """Return max(u |x|, h) for each element."""
    smallest = float(ml_dtypes.finfo(stored.dtype).smallest_subnormal)
    return np.maximum(unit_roundoff(stored.dtype.name) * np.abs(stored.astype(float)), smallest / 2.0)


def turning(vector, other):
    """Return the direction across a vector in which it turns away from another one."""
    return vector * (vector @ other) / (vector @ vector) - other


class Stored:
    """Three stored states, and values that are rounded to them."""

    def __init__(self, seed, dtypes, angle, size, step, scale, worst):
        rng = np.random.default_rng(seed)
        of_parameters, of_gradients = dtypes
        moves = [np.ones(8), *(step * np.ones((2, 8)))] * rng.standard_normal((3, 8))
        walk = size * np.cumsum(moves, axis=0)
        self.states = rounded(walk, of_parameters)
        updates = np.diff(self.states.astype(float), axis=0)
        across = rng.standard_normal((2, 8))
        negative = []
        for update, other in zip(updates, across, strict=True):
            length = np.linalg.norm(update) or 1.0
            other = other - update * (other @ update) / length**2
            negative.append(np.cos(angle) * update / length + np.sin(angle) * other / np.linalg.norm(other))
        self.gradients = rounded(-scale * np.array([*negative, np.ones(8)]), of_gradients)
        share = 1.0 if worst else rng.random()
        signs = rng.choice([-1.0, 1.0], (3, 8))
        slopes = rng.choice([-1.0, 1.0], (3, 8))
        if worst:
            # Each update turns away from the negative gradient, and the gradient from the update.
            y, g = -self.gradients[:2].astype(float), updates
            away = [np.sign(turning(g[row], y[row])) if g[row].any() else np.ones(8) for row in range(2)]
            signs = np.array([-away[0], away[0], away[1]])
            slopes[:2] = [-np.sign(turning(y[row], g[row])) if y[row].any() else np.ones(8) for row in range(2)]
        with mp.workdps(60):
            self.exact_states = self._moved(self.states, signs, share)
            self.exact_gradients = self._moved(self.gradients, slopes, share)

    @staticmethod
    def _moved(stored, signs, share):
        errors = share * half_gaps(stored, signs)
        # Half the gap of float64 is exact, and so is the sum.
        return [
            [value + error for value, error in zip(exact(row), exact(error), strict=True)]
            for row, error in zip(stored, errors, strict=True)
        ]

    def table(self):
        """Return the UpdateTable of the stored values. The kernel converts all dtypes to float64 without error."""
        states = [
            {f"{kind}/{name}": values[part].astype(float) for name, part in PARTS.items()
             for kind, values in (("parameter", theta), ("gradient", gradient))}
            | {"loss": 0.0, "learning_rate": RATE}
            for theta, gradient in zip(self.states, self.gradients, strict=True)
        ]  # fmt: skip
        shapes = {name: ((part.stop - part.start,), self.states.dtype.name) for name, part in PARTS.items()}
        dtypes = {"gradient": self.gradients.dtype.name}
        return replace(table_of(states), layout=Layout.from_shapes(shapes), dtypes=dtypes)

    def exact_angle(self, first, m, part):
        """Return the angle of a window before rounding."""
        with mp.workdps(60):
            y = [-x for row in self.exact_gradients[first : first + m] for x in row[part]]
            pairs = zip(self.exact_states[first : first + m], self.exact_states[first + 1 :], strict=False)
            g = [after - before for one, two in pairs for before, after in zip(one[part], two[part], strict=True)]
            along, square = exact_dot(y, g), exact_dot(g, g)
            rest = [a - b * along / square for a, b in zip(y, g, strict=True)]
            return mp.atan2(mp.sqrt(exact_dot(rest, rest)), along / mp.sqrt(square))

    def formula(self, first, m, part):
        """Return asin(|dy| / |y|) and asin(|dg| / |g|) of a window with the largest errors of all elements."""
        states, gradients = self.states[:, part], self.gradients[first : first + m, part]
        errors = largest_errors(states)
        g_error = np.linalg.norm((errors[:-1] + errors[1:])[first : first + m])
        g = np.linalg.norm(np.diff(states.astype(float), axis=0)[first : first + m])
        y_error, y = np.linalg.norm(largest_errors(gradients)), np.linalg.norm(gradients.astype(float))
        return [
            math.asin(error / length) if error < length else np.pi for error, length in ((y_error, y), (g_error, g))
        ]


DTYPE_PAIRS = [
    *((name, name) for name in DTYPES),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("float16", "float32"),
]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids="-".join)
@given(
    seed=st.integers(0, 10_000),
    angle=st.sampled_from([0.0, 1e-9, 1e-4, 0.5, 1.5, np.pi / 2, 2.5, np.pi - 1e-6, np.pi]) | st.floats(0.0, np.pi),
    # In float16 numbers below 6e-5 have fewer digits, and those below 3e-8 are zero.
    size=st.sampled_from([1.0, 1e-5]),
    step=st.sampled_from([4.0, 32.0, 1e3, 1e6]),
    scale=st.sampled_from([1.0, 1e-3, 3e-5, 2e-6, 2e-7]),
    worst=st.booleans(),
)
@settings(max_examples=40)
def test_the_uncertainty_of_the_angle_is_neither_too_small_nor_too_large(
    dtypes, seed, angle, size, step, scale, worst
):
    stored = Stored(seed, dtypes, angle, size, step * unit_roundoff(dtypes[0]), scale, worst)
    table = stored.table()
    for aggregation, parts in zip(
        model_and_tensors(table, "gradient"), ([slice(0, 8)], PARTS.values()), strict=True
    ):
        for m in (1, 2):
            updates = Updates(table, aggregation, "gradient", m)
            with np.errstate(all="ignore"):
                status, found, psi = (
                    np.reshape(VARIABLES[name].values(updates), (3 - m, len(parts)))
                    for name in ("status", "angle_uncertainty", "angle")
                )
            for first in range(3 - m):
                for column, part in enumerate(parts):
                    at = first, column
                    of_gradient, of_update = stored.formula(first, m, part)
                    if status[at] > Status.OBTUSE:
                        assert np.isnan(found[at])
                        # A zero vector, or an update whose largest errors may be as long as it.
                        assert (math.sqrt(10.0) + 1.0) * math.sin(min(of_update, 1.5)) >= 1.0 - 1e-12 or (
                            of_gradient == np.pi
                        )
                        continue
                    moved = float(abs(mpf(float(psi[at])) - stored.exact_angle(first, m, part)))
                    assert moved <= found[at] + promised_angle_error()
                    formula = min(of_gradient + of_update, np.pi)
                    # Both are sums of a few norms of at most 16 elements in float64.
                    assert formula * (1 - 64 * 2.0**-52) <= found[at] <= LARGEST_FACTOR * formula


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_the_gradient_alone_turns_the_angle_by_nearly_its_uncertainty(dtype):
    # 1 + u / 2 is half of the way from 1 to the next number. The update is exact: its rounding is that of float64.
    roundoff = unit_roundoff(dtype)
    states = [
        {
            "parameter/w": np.array([x, x]),
            "gradient/w": np.array([-1.0, 1.0]),
            "loss": 0.0,
            "learning_rate": 1.0,
        }
        for x in (0.0, 1.0)
    ]
    table = replace(table_of(states), dtypes={"gradient": dtype})
    model, _ = model_and_tensors(table, "gradient")
    found = float(VARIABLES["angle_uncertainty"].values(Updates(table, model, "gradient"))[0])
    with mp.workdps(40):
        moved = [mpf(1) + mpf(roundoff), mpf(-1) + mpf(roundoff)]
        turned = float(mp.pi / 2 - mp.atan2(moved[0] - moved[1], moved[0] + moved[1]))
    assert turned <= found
    # Both elements are just above a power of two, where rounding is coarsest. The update adds 2 u of float64.
    assert found <= turned * (1 + roundoff) + 4 * 2.0**-53
