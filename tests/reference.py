"""The ledger by definition: whole vectors, exact sums, no tiles.

A float64 is a rational number, so every product and every sum below is exact until the one rounding at the end.
"""

import numpy as np
from mpmath import mp, mpf

from pipeline.gram import roundoff_bound


def exact(values):
    """Values as exact numbers."""
    return [mpf(float(x)) for x in np.asarray(values).ravel()]


def exact_dot(x, y):
    """Inner product of two lists of exact numbers, exact to 60 digits beyond any cancellation met here."""
    with mp.workdps(120):
        return mp.fsum(a * b for a, b in zip(x, y, strict=True))


def exact_vectors(parameter, next_parameter, gradient, next_gradient, ratio, hvp=None):
    """Vectors of the ledger, in its order."""
    with mp.workdps(120):
        p, q, g, h = map(exact, (parameter, next_parameter, gradient, next_gradient))
        displacement = [b - a for a, b in zip(p, q, strict=True)]
        change = [b - a for a, b in zip(g, h, strict=True)]
        residual = [a - mpf(float(ratio)) * b for a, b in zip(g, displacement, strict=True)]
        vectors = [p, displacement, g, change, residual]
        return vectors if hvp is None else [*vectors, exact(hvp)]


def exact_gram(vectors):
    """Gram matrix of exact vectors, rounded once."""
    return np.array([[float(exact_dot(x, y)) for y in vectors] for x in vectors])


def assert_gram_close(actual, expected, elements, slack=1.0):
    """Compare Gram matrices: each entry x.y within the bound of rounding, a multiple of |x||y|.

    ``slack`` counts roundings that an entry meets beside those of the sum: forming a difference or a residual
    in float64 costs a few units roundoff of the vectors it is made of.
    """
    norms = np.sqrt(np.einsum("...ii->...i", expected))
    scale = norms[..., :, None] * norms[..., None, :]
    bound = slack * roundoff_bound(elements) * scale
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"entry {worst}: {actual[worst]!r} against {expected[worst]!r}, bound {bound[worst]}"


def promised_angle_error():
    """Largest absolute error of psi, in radian, for float64 data and up to 1e5 elements (DESIGN, section 3)."""
    return 1e-13


def promised_relative_error(cosine):
    """Largest relative error of a condition number or eigenvalue (DESIGN, section 3)."""
    return 1e-10 if abs(cosine) >= 1e-3 else 1e-13 / abs(float(cosine))
