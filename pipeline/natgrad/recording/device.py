"""Compute the inner products of updates with PyTorch, on the device of the tensors.

The vectors are formed in float64, some million elements at a time, and all sums are moved to the host together. The
device is therefore synchronized once for all tensors, and the error is bounded by
`natgrad.kernel.ledger_sums.roundoff_bound`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.ledger_sums import add_segments
from natgrad.kernel.updates import mark_squares

__all__ = ["device_products"]

_BLOCK = 1 << 22
"""Elements that are converted to float64 at a time, which takes 256 MiB with all vectors."""


def device_products(
    before: Sequence[Any], after: Sequence[Any], gradient: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the products of the vectors of an update, and copy the parameters after it to those before it.

    Parameters
    ----------
    before, after, gradient : sequences of torch.Tensor
        Contiguous tensors on a device that has float64. Those before the update are overwritten.

    Returns
    -------
    gram, ratio : float64 arrays
        As of `natgrad.kernel.updates.refresh_products`.
    """
    import torch

    rows, counts = [], []
    with torch.no_grad():
        for tensors in zip(before, after, gradient, strict=True):
            blocks = [tensor.reshape(-1).split(_BLOCK) for tensor in tensors] if tensors[0].numel() else [()] * 3
            counts.append(len(blocks[0]))
            rows += [_block_products(*block) for block in zip(*blocks, strict=True)]
            tensors[0].copy_(tensors[1])
        found = torch.stack(rows).cpu().numpy() if rows else np.zeros((0, 21))
    gram, ratio = found[:, :16].reshape(-1, 4, 4).copy(), found[:, 16]
    mark_squares(gram, found[:, 17:])
    return add_segments(len(counts), np.repeat(np.arange(len(counts)), counts), gram, ratio, (1, 2, 3))


def _block_products(before: Any, after: Any, gradient: Any) -> Any:
    """Return the products of a block, the ratio of the residual, and the largest element of each vector."""
    parameter, moved, descent = (tensor.double() for tensor in (before, after, gradient))
    displacement = moved - parameter
    square = displacement @ displacement
    # A smaller square is not accurate, see `natgrad.kernel.gram`.
    ratio = (descent @ displacement / square).where(square >= 2.0**-980, 0.0).nan_to_num(0.0, 0.0, 0.0)
    # Without a ratio the residual is the gradient, even if the displacement is not finite.
    residual = (descent - ratio * displacement).where(ratio != 0.0, descent)
    vectors = parameter.new_empty((4, parameter.numel()))
    for row, vector in enumerate((parameter, displacement, descent, residual)):
        vectors[row] = vector
    found = parameter.new_empty(21)
    found[:16], found[16], found[17:] = (vectors @ vectors.T).flatten(), ratio, vectors.abs().amax(dim=1)
    return found
