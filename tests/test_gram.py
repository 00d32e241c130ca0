"""The kernel against exact arithmetic."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_gram_close, exact_dot, exact_gram, exact_vectors

from pipeline import gram
from pipeline.schema import VECTORS

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
DISPLACEMENT, GRADIENT, RESIDUAL = (VECTORS.index(v) for v in ("displacement", "gradient", "residual"))


def products(parameter, gradient, cuts=(), hvp=None):
    elements = parameter.shape[1]
    starts = np.array([0, *cuts, elements])
    count = len(gram.vectors(hvp is not None))
    out = np.full((len(parameter) - 1, len(starts) - 1, count, count), np.nan)
    ratio = np.full(out.shape[:2], np.nan)
    gram.products([parameter], [gradient], starts, out, ratio, None if hvp is None else [hvp])
    return out, ratio


def states(rows, elements, dtype, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.standard_normal((rows, elements)), axis=0)
    return (walk * scale).astype(DTYPES[dtype]), rng.standard_normal((rows, elements)).astype(DTYPES[dtype])


@pytest.mark.parametrize("with_hvp", [False, True])
@pytest.mark.parametrize(
    ("parameter_dtype", "gradient_dtype"),
    [*((d, d) for d in DTYPES), ("bfloat16", "float32"), ("float32", "float16")],
)
def test_every_entry_is_exact_to_rounding_from_every_storage_dtype(parameter_dtype, gradient_dtype, with_hvp):
    parameter, _ = states(3, 1500, parameter_dtype, seed=1)
    _, gradient = states(3, 1500, gradient_dtype, seed=2)
    hvp = states(3, 1500, gradient_dtype, seed=3)[1] if with_hvp else None
    out, ratio = products(parameter, gradient, cuts=(1, 700), hvp=hvp)
    for row, (segment, (low, high)) in itertools.product(range(2), enumerate([(0, 1), (1, 700), (700, 1500)])):
        part = slice(low, high)
        vectors = exact_vectors(
            parameter[row, part],
            parameter[row + 1, part],
            gradient[row, part],
            gradient[row + 1, part],
            ratio[row, segment],
            None if hvp is None else hvp[row, part],
        )
        # Forming d, e and r in float64 costs up to three roundings of u times their (larger) parts.
        assert_gram_close(out[row, segment], exact_gram(vectors), high - low, slack=2.0)


def test_an_entry_of_a_hundred_thousand_float64_elements_is_within_1e_14():
    parameter, gradient = states(2, 100_000, "float64", seed=5)
    out, ratio = products(parameter, gradient)
    vectors = exact_vectors(parameter[0], parameter[1], gradient[0], gradient[1], ratio[0, 0])
    for i, j in itertools.combinations_with_replacement(range(5), 2):
        norms = np.sqrt(float(exact_dot(vectors[i], vectors[i])) * float(exact_dot(vectors[j], vectors[j])))
        assert abs(out[0, 0, i, j] - float(exact_dot(vectors[i], vectors[j]))) <= 1e-14 * norms  # as promised


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_word_of_a_two_byte_dtype_has_its_value(dtype):
    if np.dtype(DTYPES[dtype]).itemsize != 2:
        words = np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 5e-324, 1e-45], dtype=np.float64)
        with np.errstate(over="ignore", under="ignore"):
            words = words.astype(DTYPES[dtype])
    else:
        words = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    column = np.ascontiguousarray(np.stack([words, words]))
    out, _ = products(column, column, cuts=range(1, len(words)))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the words
        square = words.astype(np.float64) ** 2
    np.testing.assert_array_equal(out[0, :, 0, 0], square)
    # The difference of two infinities is not a number, and the gradient's products are made of its parts.
    np.testing.assert_array_equal(out[0, :, 0, GRADIENT], np.where(np.isfinite(square), square, np.nan))


def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it():
    parameter, gradient = states(9, 5000, "float32", seed=7)
    whole, ratio = products(parameter, gradient, cuts=(17, 2000))
    for row in range(8):
        one, its_ratio = products(parameter[row : row + 2], gradient[row : row + 2], cuts=(17, 2000))
        np.testing.assert_array_equal(one[0], whole[row])
        np.testing.assert_array_equal(its_ratio[0], ratio[row])


@given(cuts=st.lists(st.integers(1, 2999), unique=True, max_size=6).map(sorted), seed=st.integers(0, 99))
def test_segments_add_up_to_the_whole(cuts, seed):
    parameter, gradient = states(2, 3000, "float32", seed)
    whole, _ = products(parameter, gradient)
    parts, ratios = products(parameter, gradient, cuts)
    total, common = gram.combine(parts, ratios)
    vectors = exact_vectors(parameter[0], parameter[1], gradient[0], gradient[1], common[0])
    # Two cuts differ by the bound at most; the residuals are of different ratios.
    np.testing.assert_array_equal(total, np.swapaxes(total, -1, -2))
    assert_gram_close(total[0], exact_gram(vectors), 3000, slack=4.0)
    keep = [0, DISPLACEMENT, GRADIENT, 3]
    assert_gram_close(total[0][np.ix_(keep, keep)], whole[0, 0][np.ix_(keep, keep)], 3000)


def test_tensors_add_up_in_the_order_of_the_element_axis():
    parameter, gradient = states(3, 1000, "float64", seed=3)
    parts, ratios = products(parameter, gradient, cuts=(100, 400, 900))
    total, common = gram.add_segments(4, np.array([0, 2, 2, 3]), parts, ratios)
    np.testing.assert_array_equal(total[:, 0], parts[:, 0])
    np.testing.assert_array_equal(total[:, 1], 0.0)
    expected, ratio = gram.combine(parts[:, 1:3], ratios[:, 1:3])
    np.testing.assert_array_equal(total[:, 2], expected)
    np.testing.assert_array_equal(common[:, 2], ratio)
    np.testing.assert_array_equal(total[:, 3], parts[:, 3])


@pytest.mark.parametrize("elements", [3, 4096, 4097, 50_000])
def test_the_residual_is_small_where_gradient_and_displacement_are_nearly_parallel(elements):
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((2, elements))
    parameter = np.stack([np.zeros(elements), -0.1 * gradient[0] * (1 + 1e-7 * rng.standard_normal(elements))])
    out, _ = products(parameter, gradient)
    relative = np.sqrt(out[0, 0, RESIDUAL, RESIDUAL] / out[0, 0, GRADIENT, GRADIENT])
    # The angle is about 1e-7 and the sampled ratio as exact: the residual keeps it, gradient.gradient cannot.
    assert relative < 1e-6


def test_an_update_that_moves_few_elements_has_a_ratio_all_the_same():
    elements = 100_000
    gradient = np.full((2, elements), 2.0)
    parameter = np.zeros((2, elements))
    parameter[1, 777] = -0.5
    _, ratio = products(parameter, gradient)
    assert ratio[0, 0] == -4.0


def test_no_displacement_has_ratio_zero():
    parameter, gradient = np.ones((2, 10)), np.ones((2, 10))
    out, ratio = products(parameter, gradient)
    assert ratio[0, 0] == 0.0
    assert out[0, 0, DISPLACEMENT, DISPLACEMENT] == 0.0
    assert out[0, 0, RESIDUAL, RESIDUAL] == out[0, 0, GRADIENT, GRADIENT] == 10.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_rows_and_segments_only(bad):
    parameter, gradient = states(4, 3000, "float32", seed=11)
    clean, clean_ratio = products(parameter, gradient, cuts=(1000,))
    gradient[2, 1500] = bad
    out, ratio = products(parameter, gradient, cuts=(1000,))
    np.testing.assert_array_equal(out[:, 0], clean[:, 0])
    np.testing.assert_array_equal(ratio[:, 0], clean_ratio[:, 0])
    np.testing.assert_array_equal(out[0], clean[0])
    # Row 1 meets it as its next gradient only: all but gradient_change stands.
    keep = np.ix_([0, 1, 2, 4], [0, 1, 2, 4])
    np.testing.assert_array_equal(out[1, 1][keep], clean[1, 1][keep])
    assert not np.isfinite(out[1, 1, 3, 3])
    assert not np.isfinite(out[2, 1, GRADIENT, GRADIENT])
    assert np.isfinite(ratio).all()


def test_padding_beyond_the_last_segment_is_not_read():
    parameter, gradient = states(3, 100, "float32", seed=2)
    out, _ = products(parameter, gradient)
    padded = [np.concatenate([a, np.full((3, 28), np.nan, a.dtype)], axis=1) for a in (parameter, gradient)]
    again, ratio = np.empty_like(out), np.empty(out.shape[:2])
    gram.products(padded[:1], padded[1:], np.array([0, 100]), again, ratio)
    np.testing.assert_array_equal(again, out)
