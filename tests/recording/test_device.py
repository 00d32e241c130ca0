"""Compare the products that PyTorch computes with exact arithmetic. The tensors are in host memory."""

import numpy as np
import pytest

from lazy import Lazy
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.recording.device import device_products
from reference import exact_gram, exact_vectors

torch = Lazy("torch")
DTYPES = ("float16", "bfloat16", "float32", "float64")
KEPT = np.ix_([0, 1, 2, 4], [0, 1, 2, 4])


def test_every_entry_is_exact_to_rounding_in_every_dtype_and_the_copy_is_refreshed():
    generator = torch.Generator().manual_seed(0)
    lengths = [length for length in (0, 1, 40, 1500) for _ in DTYPES]
    before, after, gradient = (
        [
            torch.randn(length, generator=generator, dtype=torch.float64).to(getattr(torch, DTYPES[index % 4]))
            for index, length in enumerate(lengths)
        ]
        for _ in range(3)
    )
    copies = [tensor.clone() for tensor in before]
    gram, ratio = device_products(copies, after, gradient)
    for tensor, length in enumerate(lengths):
        assert torch.equal(copies[tensor], after[tensor])
        if not length:
            assert not gram[tensor].any()
            continue
        vectors = [one[tensor].double().numpy() for one in (before, after, gradient, gradient)]
        expected = exact_gram(exact_vectors(*vectors, ratio[tensor]))[KEPT]
        norms = np.sqrt(np.diagonal(expected))
        # As in the test of the kernel: forming a difference and the residual costs roundings of their parts.
        norms[3] += norms[2] + abs(ratio[tensor]) * norms[1]
        assert (abs(gram[tensor] - expected) <= 2.0 * roundoff_bound(length) * np.outer(norms, norms)).all()
    assert device_products([], [], [])[0].shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("value", "square"), [(0.0, 0.0), (1e-200, 5e-324), (1e200, np.inf), (np.inf, np.nan), (np.nan, np.nan)]
)
def test_squares_obey_the_convention_of_the_kernel(value, square):
    zeros, one = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    one[2] = value
    gram, ratio = device_products([zeros.clone()], [one], [one])
    np.testing.assert_array_equal(np.diagonal(gram[0])[:3], [0.0, square, square])
    assert ratio[0] == 0.0
