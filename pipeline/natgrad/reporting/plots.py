"""Draw results in notebooks, with matplotlib or hvPlot.

A curve of many steps is drawn as the median and the range of consecutive steps, which are read part by part. A
drawing of any run therefore takes bounded time and memory, and is never a solid area.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.reporting.binning import Bins
from natgrad.reporting.binning import binned as reduced
from natgrad.results.ranking import rank_dataset, select, step_parts
from natgrad.schema.errors import InputError
from natgrad.schema.names import RUN, STEP, TENSOR

__all__ = ["ENGINES", "Plots", "binned"]

ENGINES = ("matplotlib", "hvplot")
"""Libraries that draw."""

COLUMNS = 1000
"""Number of steps above which consecutive steps share a bin."""

_SPECTRUM = ("eigenvalue_max", "eigenvalue_mid", "eigenvalue_min")


class Plots:
    """Drawings of a group of results.

    Each method draws with matplotlib, or with ``engine="hvplot"``, which must be installed, and returns the axes of
    matplotlib or the object of HoloViews.

    Parameters
    ----------
    dataset : Dataset
        A group of results. Its values may be on disk.
    rows : Dataset, optional
        Group that heat maps show. Default: the same.
    """

    def __init__(self, dataset: xr.Dataset, rows: xr.Dataset | None = None) -> None:
        self._dataset = dataset
        self._rows = dataset if rows is None else rows

    def angle(
        self,
        *,
        descent: str = "gradient",
        window: int = 1,
        tensors: int = 6,
        ax: Any = None,
        engine: str = "matplotlib",
    ) -> Any:
        """Draw the angle between update and negative gradient by step, of the model, runs or the worst tensors.

        Parameters
        ----------
        descent : str
            Estimate of the negative gradient.
        window : int
            Number of updates in a window.
        tensors : int
            Number of tensors to draw, if the results have tensors.
        ax : matplotlib.axes.Axes, optional
            Axes to draw into. Default: new axes.
        engine : str
            ``matplotlib`` or ``hvplot``.

        Returns
        -------
        matplotlib.axes.Axes or holoviews object

        Raises
        ------
        InputError
            If the results do not have the descent or the window, or the library is not installed.
        """
        angle = select(self._dataset, descent, window)["angle"]
        if TENSOR in angle.dims:
            worst = rank_dataset(self._dataset, descent=descent, window=window)[:tensors]
            angle = angle.sel({TENSOR: [one.tensor for one in worst]})
        return _curves(_by_label(angle), "angle", engine, ax, limit=np.pi / 2, limit_label="pi/2: effective below")

    def spectrum(
        self, *, descent: str = "gradient", window: int = 1, ax: Any = None, engine: str = "matplotlib"
    ) -> Any:
        """Draw the eigenvalues of the optimal metric by step, on a logarithmic axis.

        Parameters
        ----------
        descent, window, ax, engine
            See `angle`.

        Raises
        ------
        InputError
            See `angle`, and if the results have several runs or tensors.
        """
        chosen = select(self._dataset, descent, window)[list(_SPECTRUM)]
        _require_dimensions(chosen["eigenvalue_max"], (STEP,), "a spectrum")
        return _curves({name: chosen[name] for name in _SPECTRUM}, "eigenvalue", engine, ax, logarithmic=True)

    def heatmap(
        self,
        variable: str = "angle",
        *,
        descent: str = "gradient",
        window: int = 1,
        ax: Any = None,
        engine: str = "matplotlib",
    ) -> Any:
        """Draw a variable of all tensors, or of all runs, by step.

        Parameters
        ----------
        variable : str
            For example ``angle``, ``condition_number``, ``status`` or ``update_to_weight``.
        descent, window, ax, engine
            See `angle`.

        Raises
        ------
        InputError
            See `angle`, and if the results do not have tensors or runs, or both.
        """
        if variable not in self._rows.data_vars:
            raise InputError(
                f"the results have no variable {variable!r}",
                where="variable",
                why=f"they have {', '.join(map(str, self._rows.data_vars))}",
                remedy="choose one of them",
            )
        chosen = select(self._rows, descent, window)[variable]
        rows = next((axis for axis in (TENSOR, RUN) if axis in chosen.dims), TENSOR)
        _require_dimensions(chosen, (rows, STEP), "a heat map")
        found = binned(chosen)["median"].transpose(rows, STEP)
        if engine == "hvplot":
            return _hvplot(found.to_dataset(name=variable)).heatmap(x=STEP, y=rows, C=variable, rot=0)
        axes = _axes(engine, ax)
        values = np.ma.masked_invalid(found.values)
        edges = np.arange(found.sizes[STEP] + 1) - 0.5
        scale = "log" if variable in ("condition_number", "update_to_weight") and (values > 0).any() else "linear"
        if scale == "log":
            values = np.ma.masked_less_equal(values, 0)
        mesh = axes.pcolormesh(edges, np.arange(found.sizes[rows] + 1) - 0.5, values, norm=scale, rasterized=True)
        shown = np.unique(np.linspace(0, found.sizes[STEP] - 1, 8).astype(int))
        axes.set_xticks(shown, [str(step) for step in found[STEP].values[shown]])
        labels = np.unique(np.linspace(0, found.sizes[rows] - 1, 40).astype(int))
        axes.set_yticks(labels, _names(found[rows].values[labels]))
        axes.invert_yaxis()
        axes.set_xlabel("step")
        axes.figure.colorbar(mesh, ax=axes, label=_label(self._rows[variable], variable))
        return axes


def binned(variable: xr.DataArray, columns: int = COLUMNS) -> xr.Dataset:
    """Reduce consecutive steps to their median, minimum and maximum, and read them part by part.

    Parameters
    ----------
    variable : DataArray
        Has the dimension ``step``.
    columns : int
        Maximum number of bins. Up to this number of steps, each step has its own bin.

    Returns
    -------
    Dataset
        ``median``, ``least`` and ``greatest``, NaN in bins without a finite value. ``step`` is the first step of
        each bin.
    """
    leading = variable.transpose(STEP, ...)
    bins = Bins.of(0, leading.sizes[STEP], columns)
    shape = (len(bins.edges) - 1, *leading.shape[1:])

    def blocks() -> Iterator[NDArray[np.float64]]:
        for part in step_parts(leading.to_dataset(name="values")):
            values = part["values"].values.astype(np.float64)
            yield np.where(np.isfinite(values), values, np.nan).reshape(len(values), -1)

    found: dict[str, Any] = {name: np.empty(shape) for name in ("median", "least", "greatest")}
    if leading.size:
        found = {name: values.T.reshape(shape) for name, values in vars(reduced(blocks(), bins)).items()}
    labels = {name: label for name, label in leading.coords.items() if STEP not in label.dims}
    return xr.Dataset(
        {name: (leading.dims, values) for name, values in found.items()},
        {**labels, STEP: leading[STEP].values[bins.edges[:-1]]},
    )


def _by_label(variable: xr.DataArray) -> dict[str, xr.DataArray]:
    """Return one variable by step for each run or tensor."""
    others = [str(axis) for axis in variable.dims if axis != STEP]
    if not others:
        return {"": variable}
    _require_dimensions(variable, (others[0], STEP), "a figure of curves")
    labels = variable[others[0]].values.tolist()
    return {str(label): variable.isel({others[0]: index}) for index, label in enumerate(labels)}


def _require_dimensions(variable: xr.DataArray, dimensions: Sequence[str], what: str) -> None:
    if {*variable.dims} != {*dimensions}:
        others = [str(axis) for axis in variable.dims if axis not in dimensions]
        lacking = [axis for axis in dimensions if axis not in variable.dims]
        raise InputError(
            f"{what} has the dimensions {' and '.join(dimensions)}",
            where=f"variable {variable.name} with the dimensions {', '.join(map(str, variable.dims))}",
            remedy=f'use the group /{lacking[0]}: tree["{lacking[0]}"].natgrad'
            if lacking
            else "; ".join(f"select one {axis}: .sel({axis}=...)" for axis in others),
        )


# Engines -----------------------------------------------------------------------------------------------------


def _curves(
    variables: Mapping[str, xr.DataArray],
    name: str,
    engine: str,
    ax: Any,
    *,
    limit: float | None = None,
    limit_label: str = "",
    logarithmic: bool = False,
) -> Any:
    """Draw variables by step, each as its median and its range."""
    reduced = {label: binned(variable) for label, variable in variables.items()}
    described = next(iter(variables.values()), None)
    label_of_axis = name if described is None else _label(described, name)
    if engine == "hvplot":
        together = None
        for label, found in reduced.items():
            plot = _hvplot(found)
            title = _names([label])[0] or name
            curve = plot.line(x=STEP, y="median", label=title, logy=logarithmic, ylabel=label_of_axis)
            band = plot.area(x=STEP, y="least", y2="greatest", label=title, alpha=0.2, logy=logarithmic)
            together = curve * band if together is None else together * curve * band
        return together
    axes = _axes(engine, ax)
    for label, found in reduced.items():
        (line,) = axes.plot(found[STEP], found["median"], linewidth=1, label=_names([label])[0] or None)
        axes.fill_between(
            found[STEP], found["least"], found["greatest"], color=line.get_color(), alpha=0.2, linewidth=0
        )
    if limit is not None:
        axes.axhline(limit, color="gray", linestyle="--", linewidth=0.8, label=limit_label)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label_of_axis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return axes


def _axes(engine: str, ax: Any) -> Any:
    """Return axes of matplotlib."""
    if engine not in ENGINES:
        raise InputError(
            f"unknown engine {engine!r}", where="engine", remedy=f"choose one of: {', '.join(ENGINES)}"
        )
    if ax is not None:
        return ax
    return _library("matplotlib.pyplot").subplots(layout="constrained")[1]


def _hvplot(dataset: xr.Dataset) -> Any:
    """Return the plots of hvPlot for a dataset."""
    return _library("hvplot").hvPlot(dataset)


def _library(module: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"this drawing requires {package}, which is not installed",
            where="engine",
            remedy=f"install it: pip install {package}, or choose the other engine",
        ) from error


def _names(labels: Sequence[str] | NDArray[Any]) -> list[str]:
    """Return names as they are drawn. matplotlib would read text between dollar signs as a formula."""
    return [str(label).replace("$", r"\$") for label in labels]


def _label(variable: xr.DataArray, name: str) -> str:
    units = variable.attrs.get("units", "1")
    return name.replace("_", " ") + ("" if units == "1" else f" ({units})")
