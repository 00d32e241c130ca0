"""Register the accessor ``natgrad`` of xarray, on results as a DataTree and on their groups as a Dataset.

Importing this module registers it. `natgrad.open_results` and the engine ``natgrad`` of xarray do that; xarray also
imports the engine, and so this module, when it looks for the engine of any file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import xarray as xr

from natgrad.schema.summary import Summary

if TYPE_CHECKING:
    import pandas as pd

    from natgrad.reporting.plots import Plots
    from natgrad.results.frames import TableOptions

# The engine imports this module in every program that uses xarray, so others are imported where they are used.

__all__ = ["DataTreeAccessor", "DatasetAccessor", "ResultsSummary"]


@dataclass(frozen=True, repr=False)
class ResultsSummary(Summary):
    """Summary of results in a few numbers; see `natgrad.results.summary.overview`.

    Attributes
    ----------
    values : mapping
    """

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.values)


@xr.register_dataset_accessor("natgrad")
class DatasetAccessor:
    """Rank, summarize, draw and export a group of results.

    Parameters
    ----------
    dataset : Dataset
        For example ``tree["tensor"].to_dataset()``. Its values may be on disk; they are read part by part.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    @property
    def plot(self) -> Plots:
        """Drawings: ``plot.angle()``, ``plot.spectrum()`` and ``plot.heatmap()``."""
        from natgrad.reporting.plots import Plots

        return Plots(self._dataset)

    def worst(self, n: int = 10, *, descent: str = "gradient", window: int = 1) -> pd.DataFrame:
        """Return the tensors with the smallest share of effective updates and, among them, the largest mean angle.

        Parameters
        ----------
        n : int
            Number of tensors.
        descent : str
            Estimate of the negative gradient.
        window : int
            Number of updates in a window.

        Returns
        -------
        DataFrame
            By ``tensor``: the number of ``updates`` with an angle, the ``effective_share`` of them, and
            ``mean_angle`` and ``max_angle`` in radians. Tensors without an angle are omitted.

        Raises
        ------
        InputError
            If the results have no tensors, or not this descent or window.
        """
        import pandas as pd

        from natgrad.results.ranking import RankedTensor, rank_dataset

        ranked = rank_dataset(self._dataset, descent=descent, window=window)[:n]
        columns = list(RankedTensor.__dataclass_fields__)
        return pd.DataFrame([asdict(one) for one in ranked], columns=columns).set_index("tensor")

    def summary(self, *, descent: str = "gradient", window: int = 1) -> ResultsSummary:
        """Return the number of updates with each status, and minimum, median and maximum of some variables.

        Parameters
        ----------
        descent : str
            Estimate of the negative gradient.
        window : int
            Number of updates in a window.

        Raises
        ------
        InputError
            If the results do not have this descent or window.
        """
        from natgrad.results.summary import group_overview

        return ResultsSummary(group_overview(self._dataset, descent, window))

    def to_dataframe(self, **options: Unpack[TableOptions]) -> pd.DataFrame:
        """Return a table with one row per step, and per run and tensor if the results contain several.

        Parameters
        ----------
        variables : sequence of str, optional
            Columns. Default: all variables with steps, except those of the metric family.
        descent : str, optional
            Estimate of the negative gradient (default ``gradient``); None for all, each in separate rows.
        window : int, optional
            Number of updates in a window (default 1); None for all, each in separate rows.

        Raises
        ------
        InputError
            If the results do not have one of them.
        """
        from natgrad.results.frames import to_dataframe

        return to_dataframe(self._dataset, **options)

    def to_csv(self, path: str | Path, **options: Unpack[TableOptions]) -> Path:
        """Write the table of `to_dataframe` to a CSV file, part by part, and return its path."""
        from natgrad.results.frames import to_csv

        return to_csv(self._dataset, path, **options)

    def to_parquet(self, path: str | Path, **options: Unpack[TableOptions]) -> Path:
        """Write the table of `to_dataframe` to a Parquet file, part by part, and return its path."""
        from natgrad.results.frames import to_parquet

        return to_parquet(self._dataset, path, **options)

    def __repr__(self) -> str:
        return f"<natgrad accessor>\n{self.summary()}"

    def _repr_html_(self) -> str:
        """Return the summary as a table, for notebooks."""
        return self.summary()._repr_html_()


@xr.register_datatree_accessor("natgrad")
class DataTreeAccessor(DatasetAccessor):
    """Rank, summarize, draw and export results.

    On the root of results, tensors are ranked and mapped in the group ``/tensor``, and everything else describes
    the group ``/model``. On another node, everything describes the node.

    Parameters
    ----------
    tree : DataTree
        From `natgrad.open_results` or ``xarray.open_datatree``.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree
        self._is_root = {"model", "tensor"} <= {*tree.children}
        super().__init__(self._group("model"))

    def _group(self, name: str) -> xr.Dataset:
        return (self._tree[name] if self._is_root else self._tree).to_dataset()

    @property
    def plot(self) -> Plots:
        """Drawings: ``plot.angle()``, ``plot.spectrum()`` and ``plot.heatmap()``."""
        from natgrad.reporting.plots import Plots

        return Plots(self._dataset, self._group("tensor"))

    def worst(self, n: int = 10, *, descent: str = "gradient", window: int = 1) -> pd.DataFrame:
        """Return the tensors with the least effective updates; see `DatasetAccessor.worst`."""
        return DatasetAccessor(self._group("tensor")).worst(n, descent=descent, window=window)

    def summary(self, *, descent: str = "gradient", window: int = 1) -> ResultsSummary:
        """Return the summary that ``natgrad info`` prints; for another descent or window, that of the model."""
        if not self._is_root or (descent, window) != ("gradient", 1):
            return super().summary(descent=descent, window=window)
        from natgrad.results.summary import overview

        return ResultsSummary(overview(self._tree))
