"""Compare the products of single updates with exact arithmetic, and with those of the pass."""

import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from natgrad.kernel import gram, ledger_sums, updates
from natgrad.kernel.in_situ import SEGMENT
from natgrad.schema.names import RECORDED_VECTORS, VECTORS
from natgrad.theory import geometry
from reference import exact_gram, exact_vectors

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
KEPT = np.ix_(*[[VECTORS.index(name) for name in RECORDED_VECTORS]] * 2)
FUNCTIONS = {"compiled": updates.refresh_products, "portable": updates.portable_products}


def words(array):
    """Return an array as tensors of torch are passed: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def draw(lengths, dtypes, gradient_dtypes, seed, size=1e-2):
    """Return the parameters before and after an update, and the gradient, of tensors of some lengths."""
    rng = np.random.default_rng(seed)
    before, after, gradient = [], [], []
    for length, dtype, its in zip(lengths, itertools.cycle(dtypes), itertools.cycle(gradient_dtypes), strict=False):
        old, moved, descent = rng.standard_normal((3, length))
        before.append(old.astype(DTYPES[dtype]))
        after.append((old + size * moved).astype(DTYPES[dtype]))
        gradient.append((descent - moved).astype(DTYPES[its]))
    return before, after, gradient


def computed(name, before, after, gradient):
    copies = [array.copy() for array in before]
    found = FUNCTIONS[name](*([words(one) for one in arrays] for arrays in (copies, after, gradient)))
    if name == "compiled":
        for copy, new in zip(copies, after, strict=True):
            np.testing.assert_array_equal(words(copy), words(new))
    return found


PAIRS = (*((dtype, dtype) for dtype in DTYPES), ("bfloat16", "float32"))
LENGTHS = (0, 1, 7, 64, 600, gram.BLOCK, gram.BLOCK + 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_entry_is_exact_to_rounding_in_every_dtype_and_the_copy_is_refreshed(name):
    # Tensors of all dtypes in one call.
    lengths = [length for length in LENGTHS for _ in PAIRS]
    before, after, gradient = draw(lengths, *zip(*PAIRS, strict=True), seed=1)
    found, ratio = computed(name, before, after, gradient)
    for tensor, length in enumerate(lengths):
        require_exact(found[tensor], ratio[tensor], before[tensor], after[tensor], gradient[tensor], length)


def require_exact(found, ratio, before, after, gradient, length, segments=1):
    if not length:
        assert not found.any()
        assert ratio == 0.0
        return
    expected = exact_gram(exact_vectors(before, after, gradient, gradient, ratio))[KEPT]
    norms = np.sqrt(np.diagonal(expected))
    # As in the tests of the kernel, the rounding of a difference and of the residual is relative to their parts.
    norms[3] += norms[2] + abs(ratio) * norms[1]
    bound = 2.0 * segments * ledger_sums.roundoff_bound(length) * np.outer(norms, norms)
    assert (abs(found - expected) <= bound).all()
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize(("name", "length"), [("compiled", SEGMENT + 1), ("portable", (1 << 16) + 1)])
def test_a_tensor_of_several_segments_is_exact_to_rounding(name, length):
    before, after, gradient = draw([5, length, 9], ["float64"], ["float32"], seed=3)
    found, ratio = computed(name, before, after, gradient)
    # Each of the parts has its own ratio, and converting them to a common ratio rounds each of them.
    require_exact(found[1], ratio[1], before[1], after[1], gradient[1], length, segments=2)
    for tensor in (0, 2):
        alone = computed(name, *([arrays[tensor]] for arrays in (before, after, gradient)))
        np.testing.assert_array_equal(alone[0][0], found[tensor])
        assert alone[1][0] == ratio[tensor]


def offline(before, after, gradient):
    """Return the products that the pass computes of two states."""
    out, ratio = np.empty((1, 1, 5, 5)), np.empty((1, 1))
    states = [[np.stack([old, new])] for old, new in ((before, after), (gradient, gradient))]
    gram.products(*states, np.array([0, before.size]), out, ratio)
    return out[0, 0][KEPT], ratio[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 700, gram.BLOCK + 3, SEGMENT])
def test_a_tensor_of_one_segment_has_the_bits_of_the_pass(dtype, length):
    before, after, gradient = draw([length], [dtype], [dtype], seed=length)
    found, ratio = computed("compiled", before, after, gradient)
    expected, its_ratio = offline(before[0], after[0], gradient[0])
    np.testing.assert_array_equal(found[0], expected)
    assert ratio[0] == its_ratio


def angle(products, length):
    return float(geometry.angle(geometry.pair(products, RECORDED_VECTORS, 0.1, length)))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("across", [0.0, 1e-9, 1e-4, 1.0, 1e3])
def test_angles_agree_with_those_of_the_pass_to_1e_14(name, across, sign):
    rng = np.random.default_rng(8)
    length = 3 * SEGMENT + 11
    before, step, noise = rng.standard_normal((3, length))
    # The rate of the update changes along the tensor, so that its segments have different ratios.
    moved = 0.1 * step * (1 + across * np.linspace(-1, 1, length))
    after, gradient = before + moved, sign * step + across * noise
    found, _ = computed(name, [before], [after], [gradient])
    expected, _ = offline(before, after, gradient)
    assert abs(angle(found[0], length) - angle(expected, length)) <= 1e-14


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "square"), [(0.0, 0.0), (5e-324, 5e-324), (1e-200, 5e-324), (1e200, np.inf), (np.inf, np.nan)]
)
def test_squares_distinguish_zero_underflow_overflow_and_not_finite(name, value, square):
    for length, element in ((1, 0), (40, 39), (5000, 2500)):
        zeros, one = np.zeros(length), np.zeros(length)
        one[element] = value
        found, ratio = computed(name, [zeros, one, one], [one, zeros, one], [zeros, one, one])
        squares = np.diagonal(found, axis1=1, axis2=2)
        np.testing.assert_array_equal(squares[0, :2], [0.0, square])
        np.testing.assert_array_equal(squares[1, :2], [square, square])
        np.testing.assert_array_equal(squares[2, :3], [square, np.nan if np.isnan(square) else 0.0, square])
        np.testing.assert_array_equal(ratio, 0.0)


def test_every_bit_of_the_copy_is_that_of_the_parameter():
    after = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.uint16, np.float16):
        before = np.zeros(1 << 16, dtype)
        updates.refresh_products([before], [after.view(dtype)], [after.view(dtype)])
        np.testing.assert_array_equal(before.view(np.uint16), after)


@pytest.mark.parametrize(
    "arrays",
    [
        (np.ones(3), np.ones(4), np.ones(3)),
        (np.ones(3), np.ones(3, np.float32), np.ones(3)),
        (np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2))),
        (np.ones(3), np.ones(6)[::2], np.ones(3)),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(arrays):
    before = arrays[0].copy()
    with pytest.raises(ValueError, match=r"^arrays "):
        updates.refresh_products(*([array] for array in arrays))
    np.testing.assert_array_equal(arrays[0], before)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
from natgrad.kernel import updates
assert not updates.is_compiled()
before, after = np.zeros(3), np.arange(3.0)
gram, ratio = updates.refresh_products([before], [after], [-after])
assert (before == after).all()
print(gram[0].tolist(), ratio.tolist(), "llvmlite" in sys.modules)
"""


def test_without_numba_the_products_are_those_of_numpy():
    assert updates.is_compiled()
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True)
    expected = [[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, -5.0, 0.0], [0.0, -5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert done.stdout.strip() == f"{expected} [-1.0] False"


@pytest.mark.parametrize(
    ("dtypes", "with_hvp"),
    [(("float64", "float64"), True), (("float32", "float64"), False), (("bfloat16", "float32"), True)],
)
def test_products_of_updates_with_both_gradients_are_exact_to_rounding(dtypes, with_hvp):
    rng = np.random.default_rng(0)
    shapes = [(3,), (0, 2), (SEGMENT // 1000 + 1, 1000), ()]
    before, after, slope, following, hvp = (
        [rng.standard_normal(shape).astype(DTYPES[dtypes[index > 1]]) for shape in shapes] for index in range(5)
    )
    found, ratio = updates.update_products(before, after, slope, following, hvp if with_hvp else None)
    assert found.shape == (4, 5 + with_hvp, 5 + with_hvp)
    assert not found[1].any()
    for tensor in (0, 2, 3):
        arrays = [kind[tensor].astype(np.float64) for kind in (before, after, slope, following)]
        expected = exact_gram(exact_vectors(*arrays, ratio[tensor], hvp[tensor] if with_hvp else None))
        norms = np.sqrt(np.diagonal(expected))
        # The gradient is summed as its two parts, so that their norms bound the errors.
        norms[[2, 4]] = norms[2] + norms[4] + abs(ratio[tensor]) * norms[1]
        bound = 2.0 * ledger_sums.roundoff_bound(arrays[0].size) * np.outer(norms, norms)
        assert (abs(found[tensor] - expected) <= bound).all()
