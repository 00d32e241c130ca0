"""Compare the kernel with exact arithmetic."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.kernel import gram, ledger_sums
from natgrad.schema.names import VECTORS, ledger_vectors
from reference import assert_gram_close, exact_gram, exact_vectors

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
DISPLACEMENT, GRADIENT, RESIDUAL = (VECTORS.index(v) for v in ("displacement", "gradient", "residual"))


def products(parameter, gradient, cuts=(), hvp=None):
    elements = parameter.shape[1]
    starts = np.array([0, *cuts, elements])
    count = len(ledger_vectors(hvp is not None))
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
    # One element, a block that is sampled, and more than a block.
    parameter, _ = states(3, 1700, parameter_dtype, seed=1)
    _, gradient = states(3, 1700, gradient_dtype, seed=2)
    hvp = states(3, 1700, gradient_dtype, seed=3)[1] if with_hvp else None
    out, ratio = products(parameter, gradient, cuts=(1, 600), hvp=hvp)
    for row, (segment, (low, high)) in itertools.product(range(2), enumerate([(0, 1), (1, 600), (600, 1700)])):
        part = slice(low, high)
        rows = parameter[row, part], parameter[row + 1, part], gradient[row, part], gradient[row + 1, part]
        assert_exact(out[row, segment], rows, ratio[row, segment], None if hvp is None else hvp[row, part])


def assert_exact(actual, rows, ratio, hvp):
    vectors = exact_vectors(*rows, ratio, hvp)
    expected = exact_gram(vectors)
    norms = np.sqrt(np.diagonal(expected))
    # A residual is the difference of two vectors in float64. Its rounding is relative to these, however small it
    # is.
    norms[RESIDUAL] += norms[GRADIENT] + abs(ratio) * norms[DISPLACEMENT]
    # Forming d, e and r in float64 costs up to three roundings of u times their (larger) parts.
    bound = 2.0 * ledger_sums.roundoff_bound(len(vectors[0])) * np.outer(norms, norms)
    error = abs(actual - expected)
    assert (error <= bound).all(), f"{len(vectors[0])} elements: {error} beyond {bound}"
    np.testing.assert_array_equal(actual, actual.T)


# The number of elements that the processor handles at a time, one less and one more.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@pytest.mark.parametrize("with_hvp", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_of_segments_of_few_elements_is_exact_to_rounding(dtype, with_hvp):
    assert_exact_segments(LENGTHS, dtype, with_hvp)


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        ("float32", gram.BLOCK),
        ("float64", gram.BLOCK - 1),
        ("bfloat16", gram.BLOCK + 1),
        ("float32", 511),
        ("float64", 512),
    ],
)
def test_every_entry_is_exact_to_rounding_where_a_sample_or_a_block_begins_or_ends(dtype, length):
    # The short segments before and after it form separate groups.
    assert_exact_segments((3, length, 5), dtype, with_hvp=True)


def assert_exact_segments(lengths, dtype, with_hvp):
    parameter, gradient = states(2, sum(lengths), dtype, seed=len(lengths))
    hvp = states(1, sum(lengths), dtype, seed=8)[1] if with_hvp else None
    cuts = np.cumsum(lengths)
    out, ratio = products(parameter, gradient, cuts=cuts[:-1], hvp=hvp)
    for segment, (stop, length) in enumerate(zip(cuts, lengths, strict=True)):
        part = slice(stop - length, stop)
        rows = parameter[0, part], parameter[1, part], gradient[0, part], gradient[1, part]
        assert_exact(out[0, segment], rows, ratio[0, segment], None if hvp is None else hvp[0, part])


def test_an_entry_of_a_hundred_thousand_float64_elements_is_within_1e_14():
    parameter, gradient = states(2, 100_000, "float64", seed=5)
    out, ratio = products(parameter, gradient)
    expected = exact_gram(exact_vectors(parameter[0], parameter[1], gradient[0], gradient[1], ratio[0, 0]))
    norms = np.sqrt(np.diagonal(expected))
    assert (abs(out[0, 0] - expected) <= 1e-14 * np.outer(norms, norms)).all()  # as promised


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
    with np.errstate(invalid="ignore"):  # some of the words are signalling NaNs
        square = words.astype(np.float64) ** 2
        product = np.where(np.isfinite(square), square, np.nan)
        marked = np.where((square == 0) & (words != 0), 5e-324, product)
    # The square is NaN only for words that are not finite, and 0 only for zero.
    np.testing.assert_array_equal(out[0, :, 0, 0], marked)
    # The difference of two infinities is NaN, and the products of the gradient are sums of those of its parts.
    np.testing.assert_array_equal(out[0, :, 0, GRADIENT], product)


def test_the_bits_of_an_update_do_not_depend_on_other_updates():
    parameter, gradient = states(9, 5000, "float32", seed=7)
    whole, ratio = products(parameter, gradient, cuts=(17, 2000))
    for row in range(8):
        one, its_ratio = products(parameter[row : row + 2], gradient[row : row + 2], cuts=(17, 2000))
        np.testing.assert_array_equal(one[0], whole[row])
        np.testing.assert_array_equal(its_ratio[0], ratio[row])


@pytest.mark.parametrize("with_hvp", [False, True])
def test_the_bits_of_a_segment_do_not_depend_on_other_segments(with_hvp):
    # Segments of up to a block, more than a cache block in total, with longer ones between them.
    lengths = [*LENGTHS, *[gram.BLOCK] * 9, gram.BLOCK + 1, 700, *[900] * 9, 0, 3000, 2]
    cuts = np.cumsum(lengths)
    parameter, gradient = states(4, cuts[-1], "float32", seed=13)
    hvp = states(3, cuts[-1], "float32", seed=14)[1] if with_hvp else None
    out, ratio = products(parameter, gradient, cuts=cuts[:-1], hvp=hvp)
    for segment, (stop, length) in enumerate(zip(cuts, lengths, strict=True)):
        part = slice(stop - length, stop)
        alone, its_ratio = products(
            parameter[:, part], gradient[:, part], hvp=None if hvp is None else hvp[:, part]
        )
        np.testing.assert_array_equal(alone[:, 0], out[:, segment])
        np.testing.assert_array_equal(its_ratio[:, 0], ratio[:, segment])


@given(cuts=st.lists(st.integers(1, 2999), unique=True, max_size=6).map(sorted), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_segments_add_up_to_the_complete_tensor(cuts, seed):
    parameter, gradient = states(2, 3000, "float32", seed)
    whole, _ = products(parameter, gradient)
    parts, ratios = products(parameter, gradient, cuts)
    total, common = ledger_sums.combine(parts, ratios)
    vectors = exact_vectors(parameter[0], parameter[1], gradient[0], gradient[1], common[0])
    # Two divisions differ by at most the bound; the residuals have different ratios.
    np.testing.assert_array_equal(total, np.swapaxes(total, -1, -2))
    assert_gram_close(total[0], exact_gram(vectors), 3000, slack=4.0)
    keep = [0, DISPLACEMENT, GRADIENT, 3]
    assert_gram_close(total[0][np.ix_(keep, keep)], whole[0, 0][np.ix_(keep, keep)], 3000)


def test_tensors_add_up_in_the_order_of_the_element_axis():
    parameter, gradient = states(3, 1000, "float64", seed=3)
    parts, ratios = products(parameter, gradient, cuts=(100, 400, 900))
    total, common = ledger_sums.add_segments(4, np.array([0, 2, 2, 3]), parts, ratios)
    np.testing.assert_array_equal(total[:, 0], parts[:, 0])
    np.testing.assert_array_equal(total[:, 1], 0.0)
    expected, ratio = ledger_sums.combine(parts[:, 1:3], ratios[:, 1:3])
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
    # The angle and the error of the sampled ratio are about 1e-7: the residual preserves it, gradient.gradient
    # cannot.
    assert relative < 1e-6


def test_an_update_that_moves_few_elements_has_a_ratio():
    elements = 100_000
    gradient = np.full((2, elements), 2.0)
    parameter = np.zeros((2, elements))
    parameter[1, 777] = -0.5
    _, ratio = products(parameter, gradient)
    assert ratio[0, 0] == -4.0


@pytest.mark.parametrize("elements", [64, 600, gram.BLOCK, gram.BLOCK + 1])
def test_a_poor_estimate_of_the_ratio_is_corrected_for_every_position_of_missed_elements(elements):
    # Update k moves element k most, by gradient / -3, and the others, which any sample contains, by the gradient.
    displacement = np.full((elements, elements), 1e-4)
    np.fill_diagonal(displacement, 1.0)
    gradient = np.where(np.eye(elements, dtype=bool), -3.0, 1e-4)
    pairs = [
        products(np.stack([np.zeros(elements), d]), np.stack([g, g]))
        for d, g in zip(displacement, gradient, strict=True)
    ]
    for out, ratio in pairs:
        # With the best ratio, -3 up to 4e-8 n, the residual consists of the small elements: (4e-4)**2 each.
        assert abs(ratio[0, 0] + 3.0) <= 1e-7 * elements
        assert out[0, 0, RESIDUAL, RESIDUAL] <= 1.7e-7 * elements


def test_a_zero_displacement_has_ratio_zero():
    parameter, gradient = np.ones((2, 10)), np.ones((2, 10))
    out, ratio = products(parameter, gradient)
    assert ratio[0, 0] == 0.0
    assert out[0, 0, DISPLACEMENT, DISPLACEMENT] == 0.0
    assert out[0, 0, RESIDUAL, RESIDUAL] == out[0, 0, GRADIENT, GRADIENT] == 10.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_affect_only_their_own_updates_and_segments(bad):
    parameter, gradient = states(4, 3000, "float32", seed=11)
    clean, clean_ratio = products(parameter, gradient, cuts=(1000,))
    gradient[2, 1500] = bad
    out, ratio = products(parameter, gradient, cuts=(1000,))
    np.testing.assert_array_equal(out[:, 0], clean[:, 0])
    np.testing.assert_array_equal(ratio[:, 0], clean_ratio[:, 0])
    np.testing.assert_array_equal(out[0], clean[0])
    # Update 1 contains it only as its next gradient: all products except those of gradient_change are unaffected.
    keep = np.ix_([0, 1, 2, 4], [0, 1, 2, 4])
    np.testing.assert_array_equal(out[1, 1][keep], clean[1, 1][keep])
    assert not np.isfinite(out[1, 1, 3, 3])
    assert not np.isfinite(out[2, 1, GRADIENT, GRADIENT])
    assert np.isfinite(ratio).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("elements", [1, 9, 40, 600, gram.BLOCK, 5000])
def test_a_displacement_that_is_not_finite_has_ratio_zero_at_every_position(elements, bad):
    # The square of 1e200 is infinite, so it has no ratio either, but the gradient is unaffected.
    for element in sorted({0, elements // 4, elements - 1}):
        parameter, gradient = states(2, elements, "float64", seed=17)
        clean, _ = products(parameter, gradient)
        parameter[1, element] = bad
        out, ratio = products(parameter, gradient)
        assert ratio[0, 0] == 0.0
        assert not np.isfinite(out[0, 0, DISPLACEMENT, DISPLACEMENT])
        kept = out[0, 0, GRADIENT, GRADIENT] == out[0, 0, RESIDUAL, RESIDUAL]
        assert kept if bad == 1e200 else np.isnan(out[0, 0, GRADIENT]).all()
        keep = np.ix_([0, 3], [0, 3])
        np.testing.assert_array_equal(out[0, 0][keep], clean[0, 0][keep])


@pytest.mark.parametrize("elements", [1, 8, 600, gram.BLOCK, 5000])
def test_a_gradient_that_is_not_finite_affects_only_its_own_products(elements):
    parameter, gradient = states(2, elements, "float32", seed=19)
    hvp = states(1, elements, "float32", seed=20)[1]
    clean, _ = products(parameter, gradient, hvp=hvp)
    gradient[0, -1] = np.nan
    out, ratio = products(parameter, gradient, hvp=hvp)
    assert np.isfinite(ratio).all()
    spoilt = [GRADIENT, VECTORS.index("gradient_change"), RESIDUAL]
    assert np.isnan(out[0, 0, spoilt]).all()
    keep = np.ix_(*[np.setdiff1d(np.arange(6), spoilt)] * 2)
    np.testing.assert_array_equal(out[0, 0][keep], clean[0, 0][keep])


@pytest.mark.parametrize("elements", [1, 40, gram.BLOCK, 5000])
@pytest.mark.parametrize(
    ("value", "square"), [(0.0, 0.0), (5e-324, 5e-324), (1e-200, 5e-324), (1e200, np.inf), (np.inf, np.nan)]
)
def test_the_square_of_every_vector_distinguishes_zero_underflow_overflow_and_not_finite(elements, value, square):
    # One element decides, at any position.
    for element in {0, elements // 2, elements - 1}:
        zeros = np.zeros((2, elements))
        changed = zeros.copy()
        changed[1, element] = value
        hvp = np.zeros((1, elements))
        hvp[0, element] = value
        out, ratio = products(changed, changed, hvp=hvp)
        squares = np.diagonal(out[0, 0])[[0, DISPLACEMENT, GRADIENT, 3, 5]]
        # The gradient is summed from its parts along and across the displacement.
        gradient = np.nan if np.isnan(square) else 0.0
        np.testing.assert_array_equal(squares, [0.0, square, gradient, square, square])
        out, _ = products(changed[::-1].copy(), changed[::-1].copy())
        squares = np.diagonal(out[0, 0])[[0, DISPLACEMENT, GRADIENT, 3]]
        np.testing.assert_array_equal(squares, square)
        assert ratio[0, 0] == 0.0


def test_a_sample_with_a_ratio_beyond_all_others_is_replaced():
    # The sampled elements hardly move, so their ratio is 2**80 or 2**600 times that of the tensor.
    for exponent in (-80, -600):
        size = 20_000
        rng = np.random.default_rng(2)
        step, noise = rng.standard_normal((2, size))
        gradient = -3.0 * step * (1 + 1e-9 * noise)
        for k in range(16):
            start = k * (size - 64) // 15
            step[start : start + 64] *= 2.0**exponent
            gradient[start : start + 64] *= 1e-12
        out, ratio = products(np.stack([np.zeros(size), step]), np.stack([gradient, gradient]))
        assert ratio[0, 0] == pytest.approx(-3.0, rel=1e-6)
        assert out[0, 0, RESIDUAL, RESIDUAL] <= 1e-16 * out[0, 0, GRADIENT, GRADIENT]


def test_padding_beyond_the_last_segment_is_not_read():
    parameter, gradient = states(3, 100, "float32", seed=2)
    out, _ = products(parameter, gradient)
    padded = [np.concatenate([a, np.full((3, 28), np.nan, a.dtype)], axis=1) for a in (parameter, gradient)]
    again, ratio = np.empty_like(out), np.empty(out.shape[:2])
    gram.products(padded[:1], padded[1:], np.array([0, 100]), again, ratio)
    np.testing.assert_array_equal(again, out)
