"""Read the results of one run for drawings and tables, a part of the steps at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.objective import Objective
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT, DESCENTS, STEP, WINDOW

__all__ = ["EIGENVALUES", "Array", "RunResults", "at", "blocks", "extent", "number"]

Array = NDArray[np.float64]

EIGENVALUES = ("eigenvalue_max", "eigenvalue_mid", "eigenvalue_min")

SIZES = ("parameter_norm", "displacement_norm", "update_to_weight")
"""Variables that exist with or without gradients."""

_BLOCK_VALUES = 1 << 20
"""Number of values that are read at a time, if they are not stored in chunks."""


@dataclass(frozen=True)
class RunResults:
    """Results of a run for the model, the tensors and, if they exist, replicates, groups and the rest.

    The rest is the model with the updates without weight decay.
    """

    name: str
    attributes: Mapping[str, Any]
    model: xr.Dataset
    tensors: xr.Dataset
    replicates: xr.Dataset | None = None
    without_decay: xr.Dataset | None = None
    groups: xr.Dataset | None = None

    @classmethod
    def of(cls, name: str, tree: xr.DataTree) -> RunResults:
        """Return the results in a DataTree; raise InputError if it does not contain results."""
        try:
            model, tensors = tree["model"].to_dataset(), tree["tensor"].to_dataset()
            needed = ("angle", "angle_uncertainty", "condition_number", "gradient_norm", "status", *SIZES)
            for dataset, names in ((model, (*needed, *EIGENVALUES, "update_norm", "loss")), (tensors, needed)):
                for variable in names:
                    dataset[variable]
        except KeyError as error:
            raise InputError(
                f"the results lack the variable {error}",
                where=f"run {name}",
                remedy="compute them again: natgrad analyze OUT",
            ) from error
        replicates = tree["replicates/model"].to_dataset() if "replicates" in tree.children else None
        rest = tree["without_decay/model"].to_dataset() if "without_decay" in tree.children else None
        attributes = {str(key): value for key, value in tree.attrs.items()}
        groups = tree["group"].to_dataset() if "group" in tree.children else None
        return cls(name, attributes, model, tensors, replicates, rest, groups)

    @property
    def objective(self) -> Objective:
        """Agreement of losses and gradients with one objective."""
        return Objective.of(self.model, str(self.attributes.get("evaluation", "unknown")))

    @property
    def has_gradient(self) -> bool:
        """False if the log has no gradients."""
        return self.attributes.get("gradient_source") != "none"

    def __getitem__(self, variable: str) -> NDArray[Any]:
        """Return a variable of the model, for the gradient and window 1, by step."""
        return self.values(variable, DESCENTS[0], 1)

    def values(self, variable: str, descent: str, window: int) -> NDArray[Any]:
        """Return a variable of the model by step, for an estimate of the gradient and a window if it has them."""
        return np.asarray(at(self.model[variable], descent, window).values)

    @property
    def steps(self) -> Array:
        """Steps before the updates."""
        return np.asarray(self.model[STEP].values, dtype=np.float64)

    @property
    def windows(self) -> list[int]:
        """Windows m in the results."""
        return [int(m) for m in self.model[WINDOW].values]

    @property
    def loss_average(self) -> Array | None:
        """Mean loss over the largest window; None if no window has several updates."""
        if max(self.windows) == 1:
            return None
        return self.values("loss_average", DESCENTS[0], max(self.windows))


def at(variable: xr.DataArray, descent: str, window: int) -> xr.DataArray:
    """Select an estimate of the gradient and a window, where a variable has these dimensions."""
    chosen = {DESCENT: descent, WINDOW: window}
    return variable.sel({name: value for name, value in chosen.items() if name in variable.dims})


def blocks(variable: xr.DataArray, dimension: str, steps: slice) -> Iterator[NDArray[Any]]:
    """Yield the values of all rows, shape (steps, rows), for some steps at a time.

    Parameters
    ----------
    variable : DataArray
        Has the dimension ``step`` and, unless all rows have the same value, ``dimension``.
    dimension : str
        Dimension of the rows, for example ``tensor``.
    steps : slice
    """
    values = variable.transpose(STEP, ...)
    # A part is a chunk: reading it twice would decode it twice.
    chunks = variable.encoding.get("preferred_chunks", {})
    size = int(chunks.get(STEP) or max(_BLOCK_VALUES // max(variable.sizes.get(dimension, 1), 1), 1))
    start, stop, _ = steps.indices(variable.sizes[STEP])
    while start < stop:
        end = min(start - start % size + size, stop)
        yield np.asarray(values.isel({STEP: slice(start, end)}).values)
        start = end


def extent(values: NDArray[Any]) -> tuple[float, float, float] | None:
    """Return the smallest, median and largest finite value; None if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(np.median(finite)), float(finite.max())) if finite.size else None


def number(value: float) -> str:
    """Format a number with four digits.

    Examples
    --------
    >>> number(1.5), number(123456.0), number(2e-9)
    ('1.5', '1.235×10⁵', '2×10⁻⁹')
    """
    if not math.isfinite(value):
        return "–"
    plain = f"{value:.4g}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa.rstrip('0').rstrip('.')}×10{digits}"
    return plain if "e" not in plain else f"{value:.0f}"
