"""Compute the ledger by its definition: complete vectors, exact sums, no tiles.

A float64 is a rational number, so every product and sum below is exact until the single rounding at the end.
"""

import itertools
import operator

import numpy as np
import pytest
from mpmath import mp, mpf

from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.names import ledger_vectors
from natgrad.theory import geometry

U = unit_roundoff("float64")


def exact(values):
    """Return values as exact numbers."""
    return [mpf(float(x)) for x in np.asarray(values).ravel()]


def exact_dot(x, y):
    """Return the inner product of two lists of exact numbers, to 60 digits after any cancellation in the tests."""
    with mp.workdps(120):
        return mp.fsum(a * b for a, b in zip(x, y, strict=True))


def exact_vectors(parameter, next_parameter, gradient, next_gradient, ratio, hvp=None):
    """Return the vectors of the ledger, in order."""
    with mp.workdps(120):
        p, q, g, h = map(exact, (parameter, next_parameter, gradient, next_gradient))
        displacement = [b - a for a, b in zip(p, q, strict=True)]
        change = [b - a for a, b in zip(g, h, strict=True)]
        factor = mpf(float(ratio))
        residual = [a - factor * b for a, b in zip(g, displacement, strict=True)]
        vectors = [p, displacement, g, change, residual]
        return vectors if hvp is None else [*vectors, exact(hvp)]


def fixed_point(vector):
    """Return integers and an exponent: the numbers are the integers times two to the power of the exponent."""
    exponent = min((x.exp for x in vector if x), default=0)
    return [(1 if x > 0 else -1) * int(x.man) << (x.exp - exponent) if x else 0 for x in vector], exponent


def exact_gram(vectors):
    """Return the Gram matrix of exact vectors, rounded once. Integers take a third of the time of `exact_dot`."""
    numbers = [fixed_point(vector) for vector in vectors]
    gram = np.empty((len(vectors), len(vectors)))
    for (i, (x, low)), (j, (y, its_low)) in itertools.combinations_with_replacement(enumerate(numbers), 2):
        gram[i, j] = gram[j, i] = float(mp.ldexp(sum(map(operator.mul, x, y)), low + its_low))
    return gram


def assert_gram_close(actual, expected, elements, slack=1.0):
    """Compare Gram matrices: each entry x.y within the bound of rounding, a multiple of |x||y|.

    ``slack`` counts roundings of an entry in addition to those of the sum: forming a difference or a residual
    in float64 costs a few units roundoff of its terms.
    """
    norms = np.sqrt(np.einsum("...ii->...i", expected))
    scale = norms[..., :, None] * norms[..., None, :]
    bound = slack * roundoff_bound(elements) * scale
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"entry {worst}: {actual[worst]!r} against {expected[worst]!r}, bound {bound[worst]}"
    )


def worst_case(terms, unit=U):
    """Return the largest relative error of ``terms`` consecutive roundings (Higham, lemma 3.1)."""
    return terms * unit / (1 - terms * unit)


def derivatives(loss, weights):
    """Derivatives of a loss with respect to every element of matrices, each ``(name, row, column), derivative``.

    Parameters
    ----------
    loss : callable
        Function of matrices by name, each a list of rows of exact numbers.
    weights : mapping
        Such matrices.
    """
    step = mpf(10) ** -20  # its square, the error of a central difference, is far below rounding
    for name, weight in weights.items():
        for row, column in np.ndindex(len(weight), len(weight[0])):
            beside = []
            for sign in (1, -1):
                moved = {other: [list(line) for line in lines] for other, lines in weights.items()}
                moved[name][row][column] += sign * step
                beside.append(loss(moved))
            yield (name, row, column), (beside[0] - beside[1]) / (2 * step)


def promised_angle_error():
    """Largest absolute error of psi, in radian, for float64 data and up to 1e5 elements."""
    return 1e-13


def promised_relative_error(cosine):
    """Largest relative error of a condition number or eigenvalue."""
    return 1e-10 if abs(cosine) >= 1e-3 else 1e-13 / abs(cosine)


def vectors_at(angle, size, seed=0, length=3.0):
    """Return float64 vectors y, g at approximately this angle; the reference gives the exact angle."""
    rng = np.random.default_rng([size, seed])
    g = rng.standard_normal(size)
    across = rng.standard_normal(size)
    across -= g * (across @ g) / (g @ g)
    y = np.cos(angle) * g / np.linalg.norm(g)
    if size > 1:
        y += np.sin(angle) * across / np.linalg.norm(across)
    return length * y, g


def exact_metric(y, g, gamma=None, alpha=None, directions=(), weights=()):
    """Return the matrix of eqs. (8), (22), with the user's directions, in the current precision."""
    y, g = mp.matrix(exact(y)), mp.matrix(exact(g))
    alignment = (y.T * g)[0]
    weight = mpf(gamma) * (y.T * y)[0] / alignment if gamma is not None else mpf(alpha)
    matrix = y * y.T / alignment + weight * (mp.eye(len(y)) - g * g.T / (g.T * g)[0])
    for direction, factor in zip(directions, weights, strict=True):
        column = mp.matrix(exact(direction))
        matrix += mpf(factor) * column * column.T
    return matrix


def pair_of(y, g, learning_rate=0.5):
    """Return the pair of a ledger with one row, computed by the definition and rounded once."""
    displacement = learning_rate * g  # exact: the rate is a power of two
    # The kernel's ratio is optimal up to 1e-6 of |y| (natgrad.kernel.gram).
    ratio = float(-(y @ g) / (g @ g) / learning_rate * (1 + 1e-6)) if g.any() else 0.0
    states = exact_vectors(np.zeros_like(g), displacement, -y, -y, ratio)
    return geometry.pair(exact_gram(states), ledger_vectors(hvp=False), learning_rate, len(g))


def assert_same_pair(update_square, alignment, angle, y, g, rounding=0.0):
    """Compare with explicit vectors: y.g within rounding of |y||g|, and the angle within the guaranteed error.

    In addition to the sums, at most four roundings (difference, rate, square, sum of parts) affect an entry.
    ``rounding`` is an additional relative error of the square.
    """
    expected = pair_of(y, g)
    bound = 4 * roundoff_bound(len(g))
    assert float(update_square) == pytest.approx(float(expected.update_square), rel=bound + rounding)
    scale = float(expected.update_norm * expected.gradient_norm)
    assert float(alignment) == pytest.approx(float(expected.alignment), abs=bound * scale)
    assert float(angle) == pytest.approx(float(geometry.angle(expected)), abs=promised_angle_error())
