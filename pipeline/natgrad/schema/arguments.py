"""Check the values of arguments: numbers, and how values are shown in messages."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["number", "plain", "real_array", "shown"]

_LONGEST = 80
"""Largest number of characters of a value in a message."""

_LARGEST = 2**63 - 1
"""Largest whole number that arrays and stores can hold."""


def plain(value: Any) -> Any:
    """Return the Python object of a NumPy scalar or an array without dimensions; other values are not changed.

    Examples
    --------
    >>> import numpy as np
    >>> plain(np.array(2)), plain(np.True_), plain("text")
    (2, True, 'text')
    """
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """Return a value for a message: its representation on one line, shortened if it is long.

    Examples
    --------
    >>> shown("a")
    "'a'"
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the representation of an object may raise anything
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def real_array(value: Any) -> NDArray[np.float64]:
    """Return real numbers as a float64 array.

    Raises
    ------
    ValueError
        If the value is not an array of real numbers. Text, True and False, and complex numbers are not real numbers
        here. The text states the rule and the value, without the name of the argument.
    """
    # The command line uses this module, and starts without NumPy.
    import numpy as np

    from natgrad.schema.layout import STORAGE_DTYPES

    try:
        array = np.asarray(value)
        if array.dtype.kind in "iuf" or array.dtype.name in STORAGE_DTYPES:
            return array.astype(np.float64, copy=False)
    except Exception as error:  # the conversion of a foreign array may raise anything
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
    """Return a number as an ``int`` or a ``float``.

    Parameters
    ----------
    value : object
        A number of Python or NumPy. Text, True and False, and complex numbers are not numbers here.
    kind : {int, float}
    minimum, above, maximum : float, optional
        Bounds; ``above`` is excluded.

    Raises
    ------
    ValueError
        If the value is not such a number. The text states the rule and the value, without the name of the argument.

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
    except OverflowError:  # of a whole number that no float can hold
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
