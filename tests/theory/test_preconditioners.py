"""Compare the eigenvalues of optimizers' metrics with those of dense matrices."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.errors import InputError
from natgrad.theory.preconditioners import (
    ASYMMETRY,
    adam_eigenvalues,
    balanced_damping,
    condition_number,
    factor_eigenvalues,
    kronecker_eigenvalues,
    rotated_eigenvalues,
    symmetric_factor,
)
from natgrad.theory.symmetric_operators import Kronecker

U = 2.0**-53


def definite(size, seed, condition=100.0):
    """Return a symmetric positive definite matrix with eigenvalues from 1 to the condition number."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    matrix = (basis * np.geomspace(1.0, condition, size)) @ basis.T
    return (matrix + matrix.T) / 2.0


def test_the_metric_of_adam_is_corrected_for_its_bias():
    low, high = adam_eigenvalues([0.0, 0.75, 0.75], [4.0, 3.0, 3.0], 0.5, 0.25, [1, 2, 0])
    # 1 - beta2^updates is 1/2 and 3/4.
    assert low.tolist()[:2] == [0.25, 1.25]
    assert high.tolist()[:2] == [math.sqrt(8.0) + 0.25, 2.25]
    assert np.isnan([low[2], high[2]]).all()
    assert np.isnan(adam_eigenvalues(-1.0, 1.0, 0.9, 1e-8, 1)[0])


@given(size=st.integers(1, 5), seed=st.integers(0, 100))
def test_a_factor_that_is_symmetric_to_rounding_is_made_symmetric(size, seed):
    matrix = definite(size, seed)
    skew = np.random.default_rng(seed).standard_normal((size, size))
    skew -= skew.T
    norm = np.linalg.norm(skew)
    for share, accepted in ((0.9, True), (1.1, size == 1)):
        roundoff = 1e-6
        added = matrix + (skew / norm * share * size * roundoff * np.linalg.norm(matrix) if norm else 0.0)
        if accepted:
            np.testing.assert_allclose(
                symmetric_factor(added, roundoff, definite=False), matrix, rtol=4 * U, atol=U
            )
        else:
            with pytest.raises(InputError, match="a factor is not symmetric"):
                symmetric_factor(added, roundoff, definite=False)


@pytest.mark.parametrize("turned", [False, True])
def test_the_asymmetry_of_a_root_is_measured_in_its_own_metric(turned):
    # Two pairs of directions. |S^(-1/2) K S^(-1/2)| is the larger of the two, not the root of the sum of squares.
    values, basis = np.array([1.0, 100.0, 4.0, 9.0]), np.eye(4)
    if turned:
        basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    for share, accepted in ((0.99, True), (1.01, False)):
        skew = np.zeros((4, 4))
        skew[0, 1], skew[2, 3] = share * ASYMMETRY * 10.0, share * ASYMMETRY * 6.0
        factor = basis @ (np.diag(values) + skew - skew.T) @ basis.T
        if accepted:
            expected = (basis * values) @ basis.T
            np.testing.assert_allclose(symmetric_factor(factor, U, definite=True), expected, atol=1e-13)
        else:
            with pytest.raises(InputError, match=r"its asymmetric part is 0\.101, measured in the metric"):
                symmetric_factor(factor, U, definite=True)


@pytest.mark.parametrize(
    ("factor", "options", "why"),
    [
        ([[1.0, np.nan], [0.0, 1.0]], {"definite": False}, "is not finite"),
        ([1.0, 0.0], {"definite": True}, "is not positive definite: its smallest element is 0"),
        ([[0.0, 0.0], [0.0, 0.0]], {"definite": True}, "is zero: it has not been computed yet"),
        ([[1.0, 0.0], [0.0, 0.0]], {"definite": True}, "is not positive definite"),
        ([[1.0, 0.0], [0.0, 1e-16]], {"definite": True}, "is not positive definite"),
    ],
)
def test_an_invalid_factor_is_refused(factor, options, why):
    with pytest.raises(InputError, match=why):
        symmetric_factor(np.array(factor), U, **options)


def test_a_diagonal_is_its_own_symmetric_part():
    assert symmetric_factor([2.0, -1.0], U, definite=False).tolist() == [2.0, -1.0]
    assert symmetric_factor([2.0, 1e-30], U, definite=True).tolist() == [2.0, 1e-30]
    assert symmetric_factor([[1.0, 0.0], [0.0, 1e-14]], U, definite=True).tolist() == [[1.0, 0.0], [0.0, 1e-14]]


@given(
    size=st.integers(1, 4),
    seed=st.integers(0, 100),
    exponent=st.sampled_from([1.0, -1.0, 0.5, -0.25]),
    damping=st.sampled_from([0.0, 0.5]),
    kind=st.sampled_from(["matrix", "root", "diagonal", "diagonal root"]),
)
def test_the_eigenvalues_of_a_power_are_those_of_the_dense_matrix(size, seed, exponent, damping, kind):
    rng = np.random.default_rng(seed)
    if kind == "matrix":
        factor = dense = definite(size, seed)
    elif kind == "root":
        factor = rng.standard_normal((size, size)) + 3.0 * np.eye(size)
        dense = factor.T @ factor
    else:
        factor = rng.uniform(0.5, 4.0, size) * (1.0 if kind == "diagonal" else rng.choice([-1.0, 1.0], size))
        dense = np.diag(factor if kind == "diagonal" else factor**2)
    values = (np.linalg.eigvalsh(dense) + damping) ** exponent
    found = factor_eigenvalues(factor, exponent=exponent, damping=damping, root="root" in kind)
    # An eigenvalue has the rounding error of the largest one.
    tolerance = 64 * size * U * np.linalg.cond(dense)
    np.testing.assert_allclose(found, (values.min(), values.max()), rtol=tolerance)


@pytest.mark.parametrize(
    ("factor", "root", "smallest"),
    [
        # The smallest eigenvalue must exceed twice the rounding error, n u times the largest. Roots are squared.
        (np.diag([1.0, 1.0, 1.0, 8.0 * U]), False, True),
        (np.diag([1.0, 1.0, 1.0, 9.0 * U]), False, False),
        (np.diag([1.0, 1.0, 1.0, 7.9 * U]), True, True),
        (np.diag([1.0, 1.0, 1.0, 9.0 * U]), True, False),
        (np.array([1.0, 0.0]), False, True),
        (np.array([1.0, 1e-300]), False, False),
    ],
)
def test_an_inverse_needs_eigenvalues_beyond_rounding(factor, root, smallest):
    if smallest:
        with pytest.raises(InputError, match="is not positive definite: its eigenvalues are"):
            factor_eigenvalues(factor, exponent=-1.0, root=root)
    else:
        assert np.isfinite(factor_eigenvalues(factor, exponent=-1.0, root=root)).all()
    assert factor_eigenvalues(factor, root=root)[1] == 1.0
    with pytest.raises(InputError, match="is not finite"):
        factor_eigenvalues(factor * np.nan)


def test_the_damping_of_kfac_is_balanced_by_mean_eigenvalues():
    gradients, inputs = np.diag([1.0, 3.0]), np.diag([16.0, 40.0, 40.0])
    # The means are 2 and 32, so pi is 4.
    assert balanced_damping((gradients, inputs), 4.0, 0.0) == (0.5, 8.0)
    assert balanced_damping((gradients, inputs), 4.0, 1.0) == (1.0, 8.0)
    assert balanced_damping((gradients, inputs), 0.0, 0.25) == (0.25, 0.25)
    assert balanced_damping((gradients, 0.0 * inputs), 4.0, 0.0) == (math.inf, 0.0)
    for refused in ((0.0 * gradients, inputs, 4.0), (gradients, -inputs, 4.0), (gradients, inputs, -1.0)):
        with pytest.raises(InputError, match="cannot balance damping"):
            balanced_damping(refused[:2], refused[2], 0.0)


@given(seed=st.integers(0, 200), shift=st.sampled_from([0.0, 3.0, 30.0]), signs=st.booleans())
def test_the_eigenvalues_of_a_product_are_all_products_of_those_of_its_factors(seed, shift, signs):
    rng = np.random.default_rng(seed)
    parts = [np.sort(rng.uniform(-1.0 if signs else 0.5, 3.0, 2)) for _ in range(3)]
    dense = np.kron(np.kron(parts[0], parts[1]), parts[2]) + shift
    if dense.min() <= 0:
        with pytest.raises(InputError, match="the metric is not positive definite"):
            kronecker_eigenvalues([tuple(part) for part in parts], shift)
    else:
        found = kronecker_eigenvalues([tuple(part) for part in parts], shift)
        np.testing.assert_allclose(found, (dense.min(), dense.max()), rtol=1e-13)


def test_a_product_must_be_positive_beyond_its_rounding_error_and_finite():
    assert kronecker_eigenvalues([]) == (1.0, 1.0)
    assert kronecker_eigenvalues([(9.0 * U, 1.0)], rows=4) == (9.0 * U, 1.0)
    for factors in ([(8.0 * U, 1.0)], [(8.0 * U, 1.0), (1.0, 1.0)], [(1.0, math.inf)], [(math.nan, 1.0)]):
        with pytest.raises(InputError, match="the metric is not positive definite"):
            kronecker_eigenvalues(factors, rows=4)


def test_the_metric_of_soap_is_divided_by_its_bias():
    assert rotated_eigenvalues(4.0, 9.0, 1.0, 0.5) == (6.0, 8.0)
    assert rotated_eigenvalues(0.0, 0.0, 1.0, 1.0) == (1.0, 1.0)
    assert rotated_eigenvalues(4.0, 4.0, 0.0, 1.0) == (2.0, 2.0)
    nan, infinite = math.nan, math.inf
    refused = [(-1.0, 9.0, 1.0, 1.0), (9.0, 4.0, 1.0, 1.0), (4.0, infinite, 1.0, 1.0), (nan, 1.0, 1.0, 1.0)]
    refused += [(4.0, 9.0, 1.0, 0.0), (0.0, 9.0, 0.0, 1.0), (4.0, 9.0, 1.0, nan)]
    for arguments in refused:
        with pytest.raises(InputError, match="exp_avg_sq ranges from"):
            rotated_eigenvalues(*arguments)


def test_a_larger_learning_rate_of_a_tensor_is_a_smaller_metric_of_the_model():
    smallest, rate = [[1.0, 2.0], [1.0, 2.0], [1.0, np.nan]], [[1.0, 1.0], [1.0, 4.0], [1.0, 1.0]]
    tensors, model = condition_number(smallest, [[4.0, 6.0]] * 3, rate)
    np.testing.assert_equal(tensors, [[4.0, 3.0], [4.0, 3.0], [4.0, np.nan]])
    # The blocks of the second update are 1 to 4 and 1/2 to 3/2.
    np.testing.assert_equal(model, [6.0, 8.0, np.nan])
    assert np.isnan(condition_number([1.0, 1.0], [2.0, 2.0], [0.0, 1.0])[1])


def spd(rng, size):
    a = rng.standard_normal((size, size))
    return a @ a.T + 0.1 * np.eye(size)


@pytest.mark.parametrize("exponent", [1.0, 1.5, -1.0, 0.5, -0.25])
def test_a_kronecker_product_of_powers_equals_that_of_dense_matrices(exponent):
    rng = np.random.default_rng(1)
    first, diagonal, last = spd(rng, 3), rng.uniform(0.5, 2.0, 2), spd(rng, 4)
    damping, dense = (0.1, 0.2, 0.3), np.ones((1, 1))
    for matrix, term in zip((first, np.diag(diagonal), last), damping, strict=True):
        values, vectors = np.linalg.eigh(matrix + term * np.eye(len(matrix)))
        dense = np.kron(dense, vectors @ np.diag(values**exponent) @ vectors.T)
    dense = dense + 0.5 * np.eye(24)
    product = Kronecker(first, diagonal, last, exponent=exponent, damping=damping, shift=0.5)
    values, _ = product.eigenvalues()
    truth = np.linalg.eigvalsh(dense)[::-1]
    # Powers with condition numbers up to 200, three factors of 9 terms, and 24 terms in LAPACK.
    tolerance = (200 * 9 + 24) * 2 * U * truth[0]
    np.testing.assert_allclose(product @ np.eye(24), dense, rtol=0, atol=tolerance)
    np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance)
    ends = [
        factor_eigenvalues(factor, exponent=exponent, damping=term)
        for factor, term in zip((first, diagonal, last), damping, strict=True)
    ]
    np.testing.assert_allclose(kronecker_eigenvalues(ends, 0.5), truth[[-1, 0]], rtol=0, atol=tolerance)


def test_a_product_with_negative_eigenvalues_is_refused_or_has_exact_extremes():
    assert kronecker_eigenvalues([(-1.0, 2.0), (1.0, 3.0)], shift=4.0) == (1.0, 10.0)
    for ends in ([(-1.0, 2.0), (1.0, 3.0)], [(0.0, 1.0)], [(1.0, np.inf), (0.0, 1.0)], [(np.nan, 1.0)]):
        with pytest.raises(InputError, match="not positive definite"):
            kronecker_eigenvalues(ends)
    assert kronecker_eigenvalues([]) == (1.0, 1.0)
    assert factor_eigenvalues([1e-320, 1.0], exponent=-1.0) == (1.0, np.inf)
    for exponent in (1.0, -1.0):
        with pytest.raises(InputError, match="not finite"):
            factor_eigenvalues([1.0, np.inf], exponent=exponent)
    with pytest.raises(InputError, match="not positive definite"):
        factor_eigenvalues(np.diag([1.0, 2.0**-53]), exponent=-1.0)
    with pytest.raises(InputError, match="cannot balance damping"):
        balanced_damping((np.eye(2), np.eye(2)), -1.0, 1e-8)


def test_the_symmetry_tolerance_is_relative_to_the_factor():
    rng = np.random.default_rng(2)
    vectors = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    values = np.array([1e-3, 1e-2, 0.1, 1.0, 1.0, 1.0])
    factor = (vectors * values) @ vectors.T
    factor = (factor + factor.T) / 2
    # The largest values agree to a hundredth, although arithmetic mixes directions; the smallest ones do not.
    large = np.outer(vectors[:, 4], vectors[:, 5]) - np.outer(vectors[:, 5], vectors[:, 4])
    small = np.outer(vectors[:, 0], vectors[:, 1]) - np.outer(vectors[:, 1], vectors[:, 0])
    np.testing.assert_allclose(symmetric_factor(factor + 0.01 * large, U, definite=True), factor, atol=1e-17)
    for skew, amount in ((large, 2 * ASYMMETRY), (small, 0.01)):
        with pytest.raises(InputError, match="not symmetric"):
            symmetric_factor(factor + amount * skew, U, definite=True)
    with pytest.raises(InputError, match="not symmetric"):
        symmetric_factor(factor + 1e-6 * large, U, definite=False)
    symmetric_factor(factor + 1e-8 * large, 2.0**-24, definite=False)


def test_eigenvalues_of_a_rotated_metric_need_its_complete_state():
    assert rotated_eigenvalues(0.25, 4.0, 0.5, 0.5) == (2.0, 5.0)
    for known in (
        (-1.0, 4.0, 0.5, 0.5),
        (np.nan, np.nan, 0.5, 0.5),
        (0.0, 4.0, 0.0, 0.5),
        (0.25, 4.0, 0.5, np.nan),
    ):
        with pytest.raises(InputError, match="exp_avg_sq ranges from"):
            rotated_eigenvalues(*known)
