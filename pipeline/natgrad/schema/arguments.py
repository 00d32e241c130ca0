"""Check numeric arguments, and format values for messages."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["number", "plain", "real_array", "shown"]

_LONGEST = 80
"""Maximum length of a value in a message, in characters."""

_LARGEST = 2**63 - 1
"""Largest integer that arrays and stores can represent."""


def plain(value: Any) -> Any:
    """Convert a NumPy scalar, or an array without dimensions, to a Python object; return other values unchanged.

    Examples
    --------
    >>> import numpy as np
    >>> plain(np.array(2)), plain(np.True_), plain("text")
    (2, True, 'text')
    """
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """Format a value for a message: its representation on one line, shortened if it is long.

    Examples
    --------
    >>> shown("a")
    "'a'"
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the __repr__ of an object may raise any exception
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def real_array(value: Any) -> NDArray[np.float64]:
    """Convert real numbers to a float64 array.

    Raises
    ------
    ValueError
        If the value is not an array of real numbers. Strings, booleans and complex numbers are rejected. The
        message states the rule and the value, but not the name of the argument.
    """
    # Imported here, because the command line uses this module and starts without NumPy.
    import numpy as np

    from natgrad.schema.layout import STORAGE_DTYPES

    try:
        array = np.asarray(value)
        if array.dtype.kind in "iuf" or array.dtype.name in STORAGE_DTYPES:
            return array.astype(np.float64, copy=False)
    except Exception as error:  # converting an array of another library may raise any exception
        raise ValueError(f"must consist of numbers, got {shown(value)} ({error})") from error
    raise ValueError(f"must consist of real numbers, got {shown(value)}")


def number(
    value: Any,
    kind: type,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Convert a number to an ``int`` or a ``float``.

    Parameters
    ----------
    value : object
        A Python or NumPy number. Strings, booleans and complex numbers are rejected.
    kind : {int, float}
    minimum, above, maximum : float, optional
        Bounds; ``above`` is excluded.

    Raises
    ------
    ValueError
        If the value is not such a number. The message states the rule and the value, but not the name of the
        argument.

    Examples
    --------
    >>> number(3, float, above=0)
    3.0
    >>> number(0.5, int)
    Traceback (most recent call last):
    ValueError: must be a whole number, got 0.5
    """
    found, wanted = plain(value), numbers.Integral if kind is int else numbers.Real
    if isinstance(found, bool) or not isinstance(found, wanted):
        raise ValueError(f"must be {'a whole number' if kind is int else 'a number'}, got {shown(value)}")
    try:
        result = kind(found)
    except OverflowError:  # an integer that is too large for a float
        result = math.inf
    if kind is int and abs(result) > _LARGEST:
        raise ValueError(f"must be from -2^63 to 2^63 - 1, got {shown(value)}")
    if kind is float and not math.isfinite(result):
        raise ValueError(f"must be finite, got {shown(value)}")
    if minimum is not None and result < minimum:
        raise ValueError(f"must be at least {minimum:g}, got {result}")
    if above is not None and result <= above:
        raise ValueError(f"must be greater than {above:g}, got {result}")
    if maximum is not None and result > maximum:
        raise ValueError(f"must be at most {maximum:g}, got {result}")
    return result
