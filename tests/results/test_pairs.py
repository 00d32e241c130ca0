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
from natgrad.results.pairs import model_and_tensors, without_decay
from natgrad.results.variables import BOUND_BITS, VARIABLES, Updates
from natgrad.schema.layout import Layout, unit_roundoff
from natgrad.schema.variables import Status
from reference import exact, exact_dot, promised_angle_error

PARTS = {"a": slice(0, 3), "b": slice(3, 8)}
RATE = 0.25

LARGEST_FACTOR = 7.0
"""Largest ratio of the reported uncertainty to the formula with the largest errors of all elements.

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
    """Return the direction, orthogonal to a vector, in which it rotates away from another one."""
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
        # Half the gap of float64 and the sum are exact.
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
def test_rounding_of_the_gradient_alone_changes_the_angle_by_nearly_its_uncertainty(dtype):
    # 1 + u / 2 is halfway from 1 to the next number. The update is exact: its rounding is that of float64.
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
    # Both elements are just above a power of two, where rounding is coarsest. The update adds 2 u of float64. The
    # bound is rounded upwards.
    assert found <= (turned * (1 + roundoff) + 4 * 2.0**-53) * (1 + 2.0**-BOUND_BITS)


# Without weight decay ------------------------------------------------------------------------------------------

DECAY_TENSORS = {"wide": (3, 4), "line": (), "plane": (2,)}


def decayed_states(seed, decays, cancellation, time=False):
    """Return three states whose updates are -eta lambda theta plus a rest, which is longer or shorter than that.

    The rest has a random angle to the negative gradient. Its length relative to the decay is ``cancellation``.
    """
    rng = np.random.default_rng(seed)
    theta = {name: rng.standard_normal(shape) for name, shape in DECAY_TENSORS.items()}
    states = []
    for _ in range(3):
        gradient = {name: rng.standard_normal(shape) for name, shape in DECAY_TENSORS.items()}
        state = {f"parameter/{name}": np.array(value) for name, value in theta.items()}
        state |= {f"gradient/{name}": np.array(value) for name, value in gradient.items()}
        states.append(state | {"loss": rng.standard_normal(), "learning_rate": RATE})
        for (name, value), decay in zip(theta.items(), decays, strict=True):
            rest = rng.standard_normal(value.shape) * cancellation * (RATE * decay or 1.0)
            theta[name] = np.asarray(value - RATE * decay * value + rest)
    return states


def exact_rest(states, row, names, decays, descent):
    """Return y, g without decay and the complete displacement of some tensors, as exact numbers.

    A corrected gradient is the gradient plus the multiple of the complete displacement of the model that explains
    the change of the loss, eq. (12).
    """

    def vector(kind, state, of=names):
        return [x for name in of for x in exact(state[f"{kind}/{name}"])]

    before, after = states[row], states[row + 1]
    displacement = [b - a for a, b in zip(vector("parameter", before), vector("parameter", after), strict=True)]
    decay = [mpf(decays[name]) for name in names for _ in exact(before[f"parameter/{name}"])]
    theta = vector("parameter", before)
    rest = [d + mpf(RATE) * x * t for d, x, t in zip(displacement, decay, theta, strict=True)]
    gradient = vector("gradient", before)
    if descent == "trapezoid":
        gradient = [(a + b) / 2 for a, b in zip(gradient, vector("gradient", after), strict=True)]
    if descent != "gradient":
        every = list(DECAY_TENSORS)
        moves = [
            b - a
            for a, b in zip(vector("parameter", before, every), vector("parameter", after, every), strict=True)
        ]
        slopes = vector("gradient", before, every)
        if descent == "trapezoid":
            slopes = [(a + b) / 2 for a, b in zip(slopes, vector("gradient", after, every), strict=True)]
        change = mpf(float(after["loss"])) - mpf(float(before["loss"]))
        factor = (change - exact_dot(slopes, moves)) / exact_dot(moves, moves)
        gradient = [a + factor * d for a, d in zip(gradient, displacement, strict=True)]
    decayed = [mpf(RATE) * x * t for x, t in zip(decay, theta, strict=True)]
    scale = mp.sqrt(exact_dot(displacement, displacement)) + mp.sqrt(exact_dot(decayed, decayed))
    return [-x for x in gradient], [x / mpf(RATE) for x in rest], scale


def exact_angle_between(y, g):
    along, square = exact_dot(y, g), exact_dot(g, g)
    across = [a - b * along / square for a, b in zip(y, g, strict=True)]
    return mp.atan2(mp.sqrt(exact_dot(across, across)), along / mp.sqrt(square))


@given(
    seed=st.integers(0, 2**32 - 1),
    decays=st.tuples(*[st.sampled_from([0.0, 1e-4, 0.1, 2.0])] * 3),
    cancellation=st.sampled_from([1e3, 1.0, 1e-2, 1e-4, 1e-6]),
    descent=st.sampled_from(["gradient", "corrected", "trapezoid"]),
)
@settings(max_examples=60)
def test_the_rest_of_an_update_is_that_of_directly_formed_vectors(seed, decays, cancellation, descent):
    states = decayed_states(seed, decays, cancellation)
    table = replace(table_of(states), weight_decay=np.tile(decays, (2, 1)))
    model, tensors = without_decay(table, descent, model_and_tensors(table, descent))
    by_name = dict(zip(DECAY_TENSORS, decays, strict=True))
    every, each = [[*DECAY_TENSORS]], [[name] for name in DECAY_TENSORS]
    # The uncertainty of the model contains those of its tensors, so the tensors are tested first.
    largest = mpf(0)
    for aggregation, parts in ((tensors, each), (model, every)):
        updates = Updates(table, aggregation, descent)
        with np.errstate(all="ignore"):
            values = {
                name: np.reshape(VARIABLES[name].values(updates), (2, len(parts)))
                for name in ("status", "angle", "angle_uncertainty", "update_norm", "alignment", "gradient_norm")
            }
        for row, column in np.ndindex(2, len(parts)):
            found = {name: float(value[row, column]) for name, value in values.items()}
            with mp.workdps(60):
                y, g, scale = exact_rest(states, row, parts[column], by_name, descent)
                norm, of_y = (mp.sqrt(exact_dot(vector, vector)) for vector in (g, y))
                # Relative to the vectors that are added. The square is off by 1e-14 of the square of their sum.
                share = scale / (mpf(RATE) * norm)
                largest = max(largest, share)
                if found["status"] <= Status.OBTUSE:
                    assert abs(found["update_norm"] - norm) * RATE <= 1e-12 * scale * max(share, 1) / 2
                    assert abs(found["alignment"] - exact_dot(y, g)) * RATE <= 1e-12 * of_y * scale * max(share, 1)
                    turned = abs(found["angle"] - exact_angle_between(y, g))
                    assert turned <= found["angle_uncertainty"] + promised_angle_error()
                    # The uncertainty grows with the cancellation, and not faster: at most by two terms of 2e-7
                    # share and the rounding of both states, each of which is shorter than 20.
                    rounding = 3 * 20 * 2.0**-53 / (mpf(RATE) * norm)
                    limit = 1e-6 * largest if largest < 1e5 else mp.pi
                    assert found["angle_uncertainty"] <= limit + mp.pi * rounding
                else:
                    assert found["status"] == Status.UNVERIFIABLE
                    assert share >= 1e6


def test_cancellation_is_a_part_of_the_uncertainty():
    wide, narrow = (
        decayed_states(1, (0.1, 0.1, 0.1), cancellation) for cancellation in (1.0, 1e-5)
    )  # the rest is as long as the decay, or much shorter
    found = []
    for states in (wide, narrow):
        table = replace(table_of(states), weight_decay=np.full((2, 3), 0.1))
        model, _ = without_decay(table, "gradient", model_and_tensors(table, "gradient"))
        found.append(VARIABLES["angle_uncertainty"].values(Updates(table, model, "gradient")))
    assert (found[0] < 1e-11).all()
    # A square that is off by 1e-14 of 4e10 times itself changes the angle by at most 4e-4 / 2.
    assert (found[1] > 1e-5).all()


def test_an_update_that_is_only_decay_is_unverifiable_and_leaves_the_model_exact():
    states = decayed_states(0, (0.0, 0.0, 0.0), 1.0)
    # With a few bits less than float64 has, 1 - 1/4 times a number is exact.
    states[0]["parameter/wide"] = np.round(states[0]["parameter/wide"] * 2**20) / 2**20
    for row in (1, 2):
        states[row]["parameter/wide"] = states[row - 1]["parameter/wide"] * (1 - RATE)
    table = replace(table_of(states), weight_decay=np.tile([1.0, 0.0, 0.0], (2, 1)))
    model, tensors = without_decay(table, "gradient", model_and_tensors(table, "gradient"))
    status = VARIABLES["status"].values(Updates(table, tensors, "gradient"))
    assert (status[:, 0] == Status.UNVERIFIABLE).all()
    assert (status[:, 1:] <= Status.OBTUSE).all()
    updates = Updates(table, model, "gradient")
    assert (VARIABLES["status"].values(updates) <= Status.OBTUSE).all()
    assert np.isnan(VARIABLES["update_norm"].values(Updates(table, tensors, "gradient"))[0, 0])
    y, g, _ = exact_rest(states, 0, [*DECAY_TENSORS], {"wide": 1.0, "line": 0.0, "plane": 0.0}, "gradient")
    with mp.workdps(60):
        turned = abs(float(VARIABLES["angle"].values(updates)[0]) - exact_angle_between(y, g))
        assert turned <= VARIABLES["angle_uncertainty"].values(updates)[0]


@pytest.mark.parametrize("descent", ["gradient", "corrected", "trapezoid", "taylor"])
def test_decay_that_is_not_known_is_unverifiable(descent):
    states = decayed_states(3, (0.1, 0.1, 0.1), 1.0)
    unknown = np.array([[0.1, np.nan, 0.1], [0.1, 0.1, 0.1]])
    table = replace(table_of(states), weight_decay=unknown)
    model, tensors = without_decay(table, descent, model_and_tensors(table, descent))
    of_model, of_tensors = (
        VARIABLES["status"].values(Updates(table, aggregation, descent)) for aggregation in (model, tensors)
    )
    known = Status.UNVERIFIABLE if descent == "taylor" else Status.OBTUSE
    assert of_model[0] == of_tensors[0, 1] == Status.UNVERIFIABLE
    assert of_model[1] <= known
    assert (of_tensors[1] <= known).all()
    # Between logged states that are two updates apart, the parameters that decay are not known.
    table = replace(table_of(states, numbers=[0, 2, 3]), weight_decay=np.full((2, 3), 0.1))
    model, _ = without_decay(table, descent, model_and_tensors(table, descent))
    assert VARIABLES["status"].values(Updates(table, model, descent))[0] == Status.UNVERIFIABLE


def test_no_decay_gives_the_same_bits():
    states = decayed_states(4, (0.1, 0.0, 2.0), 1.0)
    table = replace(table_of(states), weight_decay=np.zeros((2, 3)))
    own = model_and_tensors(table, "gradient")
    for rest, complete in zip(without_decay(table, "gradient", own), own, strict=True):
        for one, other in zip(vars(rest.pair).values(), vars(complete.pair).values(), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(rest.update_floor, complete.update_floor, rtol=4 * 2.0**-53)
        np.testing.assert_array_equal(rest.gradient_floor, complete.gradient_floor)


@pytest.mark.parametrize("descent", ["gradient", "corrected"])
def test_a_model_extended_by_time_keeps_its_element_of_time(descent):
    states = decayed_states(5, (0.1, 0.1, 0.1), 1.0)
    slope = np.array([0.5, -2.0])
    table = replace(table_of(states), weight_decay=np.full((2, 3), 0.1), loss_time_derivative=slope)
    model, _ = without_decay(table, descent, model_and_tensors(table, descent))
    angle = VARIABLES["angle"].values(Updates(table, model, descent))
    for row in range(2):
        with mp.workdps(60):
            y, g, _ = exact_rest(states, row, [*DECAY_TENSORS], dict.fromkeys(DECAY_TENSORS, 0.1), "gradient")
            y, g = [*y, -mpf(slope[row])], [*g, mpf(1)]
            if descent == "corrected":
                _, moved, _ = exact_rest(states, row, [*DECAY_TENSORS], dict.fromkeys(DECAY_TENSORS, 0), "gradient")
                moved = [*moved, mpf(1)]
                change = mpf(float(states[row + 1]["loss"])) - mpf(float(states[row]["loss"]))
                factor = (-change / mpf(RATE) - exact_dot(y, moved)) / exact_dot(moved, moved)
                y = [a + factor * b for a, b in zip(y, moved, strict=True)]
            assert abs(angle[row] - exact_angle_between(y, g)) <= 1e-12


def test_groups_with_different_rates_decay_by_their_own_rate():
    states = decayed_states(6, (0.1, 0.1, 0.1), 1.0)
    decays, rates = np.full((2, 3), 0.1), np.tile([RATE, RATE / 2, RATE / 8], (2, 1))
    table = replace(table_of(states), weight_decay=decays, tensor_learning_rate=rates)
    model, tensors = without_decay(table, "gradient", model_and_tensors(table, "gradient"))
    # The same shares of the parameters decay at one rate and another coefficient.
    same = replace(table_of(states), weight_decay=decays * rates / RATE)
    expected, of_each = without_decay(same, "gradient", model_and_tensors(same, "gradient"))
    np.testing.assert_allclose(model.pair.across_square, expected.pair.across_square, rtol=1e-14)
    np.testing.assert_allclose(model.pair.alignment, expected.pair.alignment, rtol=1e-13)
    np.testing.assert_allclose(tensors.pair.alignment, of_each.pair.alignment * RATE / rates, rtol=1e-13)
