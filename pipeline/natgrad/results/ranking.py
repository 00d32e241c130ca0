"""Rank tensors by how far their updates are from descent, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT, STEP, TENSOR, WINDOW
from natgrad.schema.variables import Status

__all__ = ["BLOCK_BYTES", "RankedTensor", "rank", "rank_dataset", "select", "step_parts"]

BLOCK_BYTES = 32 << 20
"""Size of the values that are read at a time, unless a single step is larger."""

_DECIDED = (Status.EFFECTIVE, Status.ORTHOGONAL, Status.OBTUSE)
"""Statuses of updates with an angle."""


@dataclass(frozen=True)
class RankedTensor:
    """The updates of a tensor that have an angle.

    Attributes
    ----------
    tensor : str
        Name of the tensor.
    updates : int
        Number of these updates.
    effective_share : float
        Share of them that are effective, from 0 to 1.
    mean_angle, max_angle : float
        Mean and largest angle between the update and the negative gradient, in radians.
    """

    tensor: str
    updates: int
    effective_share: float
    mean_angle: float
    max_angle: float


def rank(names: Sequence[str], blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> list[RankedTensor]:
    """Rank tensors by the share of their updates that are effective, the smallest first, and by their mean angle.

    Parameters
    ----------
    names : sequence of str
        Names of the tensors.
    blocks : iterable of (int array, float array)
        ``status`` and ``angle`` of some updates, with shapes (update, tensor).

    Returns
    -------
    list of RankedTensor
        Tensors without an angle are omitted.
    """
    updates, effective = np.zeros((2, len(names)), np.int64)
    total, largest = np.zeros(len(names)), np.full(len(names), -np.inf)
    for status, angle in blocks:
        decided = np.isin(status, _DECIDED) & np.isfinite(angle)
        updates += decided.sum(axis=0)
        effective += (decided & (status == Status.EFFECTIVE)).sum(axis=0)
        total += np.where(decided, angle, 0.0).sum(axis=0)
        largest = np.maximum(largest, np.where(decided, angle, -np.inf).max(axis=0, initial=-np.inf))
    found = [
        RankedTensor(
            names[int(index)],
            int(updates[index]),
            float(effective[index] / updates[index]),
            float(total[index] / updates[index]),
            float(largest[index]),
        )
        for index in np.flatnonzero(updates)
    ]
    return sorted(found, key=lambda one: (one.effective_share, -one.mean_angle, one.tensor))


def rank_dataset(dataset: xr.Dataset, *, descent: str = "gradient", window: int = 1) -> list[RankedTensor]:
    """Rank the tensors of the group ``/tensor`` of results, or its groups of tensors.

    Parameters
    ----------
    dataset : Dataset
        Its values may be on disk; they are read block by block.
    descent : str
        Estimate of the negative gradient.
    window : int
        Number of updates in a window.

    Raises
    ------
    InputError
        If the dataset has no tensors, or not this descent or window.
    """
    if TENSOR not in dataset.dims:
        raise InputError(
            "these results have no dimension tensor",
            where=f"dataset with the dimensions {', '.join(map(str, dataset.dims))}",
            remedy='use the group /tensor: tree["tensor"].to_dataset()',
        )
    chosen = select(dataset[["status", "angle"]], descent, window)
    others = [axis for axis in chosen["angle"].dims if axis != TENSOR]
    names = [str(name) for name in dataset[TENSOR].values]

    def blocks() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for part in step_parts(chosen.transpose(*others, TENSOR)):
            yield part["status"].values.reshape(-1, len(names)), part["angle"].values.reshape(-1, len(names))

    return rank(names, blocks())


def step_parts(dataset: xr.Dataset, multiple: int = 1) -> Iterator[xr.Dataset]:
    """Read consecutive steps of a dataset, in parts of at most `BLOCK_BYTES` or of a single step.

    Parameters
    ----------
    dataset : Dataset
    multiple : int
        The number of steps of each part, except the last one, is a multiple of this.
    """
    steps = dataset.sizes[STEP]
    size = max(BLOCK_BYTES * steps // max(dataset.nbytes, 1) // multiple, 1) * multiple
    for start in range(0, steps, size):
        yield dataset.isel({STEP: slice(start, start + size)}).load()


def select(dataset: xr.Dataset, descent: str | None, window: int | None) -> xr.Dataset:
    """Return the results for one estimate of the gradient and one window; None keeps all of them.

    Raises
    ------
    InputError
        If the results do not have them.
    """
    for axis, value in ((DESCENT, descent), (WINDOW, window)):
        if value is None or axis not in dataset.dims:
            continue
        known = dataset[axis].values.tolist()
        if value not in known:
            raise InputError(
                f"the results have no {axis} {value!r}",
                where=axis,
                why=f"they have {', '.join(map(repr, known))}",
                remedy="choose one of them"
                + (f", or compute it: natgrad analyze OUT --window {value}" if axis == WINDOW else ""),
            )
        dataset = dataset.sel({axis: value})
    return dataset
