"""Round numbers to the bits that are guaranteed, so that compression can remove the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["round_bits"]

_MANTISSA = np.finfo(np.float64).nmant


def round_bits(values: ArrayLike, bits: int, *, upwards: bool = False) -> NDArray[np.float64]:
    """Round numbers to some bits of the mantissa.

    Parameters
    ----------
    values : array_like of float
    bits : int
        Bits of the mantissa that are kept, from 1 to 51, without the leading one. The others are 0.
    upwards : bool
        Round to the next larger magnitude instead of the nearest number, with ties to even.

    Returns
    -------
    float64 array
        The relative error is at most ``2**-(bits + 1)``, or ``2**-bits`` if it is rounded upwards. Numbers that
        would overflow or that are below the normal range, zeros, infinities and NaN are returned unchanged.
    """
    values = np.asarray(values, np.float64)
    dropped = _MANTISSA - bits
    words = values.view(np.int64) if values.ndim else values.reshape(1).view(np.int64)
    rest = np.int64((1 << dropped) - 1)
    # In the words of a magnitude, a carry out of the mantissa increases the exponent, as it must.
    added = rest if upwards else (rest >> 1) + ((words >> dropped) & 1)
    rounded = ((words + added) & ~rest).view(np.float64).reshape(values.shape)
    normal = np.isfinite(rounded) & (np.abs(values) >= np.finfo(np.float64).tiny)
    return np.where(normal & np.isfinite(values), rounded, values)
