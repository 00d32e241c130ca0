"""Figures of results over steps: loss, angle and condition number, of the model and its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.reporting.figures.canvas import (
    COLUMNS,
    COMPARED_COLOURS,
    COMPARED_DASHES,
    EIGENVALUES,
    HEIGHT,
    INK,
    SMALL_COLUMNS,
    WIDTH,
    Array,
    Picture,
    angle_limits,
    curve,
    draw_angle,
    drawable,
    extent,
    half_angle,
    log_limits,
    mark,
    number,
    picture,
    placeholder,
    positive,
    step_axis,
)
from natgrad.reporting.figures.chart import Axis, Chart, Line, Note, Panel
from natgrad.results.objective import Objective
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT, DESCENTS, STEP, TENSOR, WINDOW
from natgrad.schema.variables import Status

__all__ = [
    "COMPARED_RUNS",
    "SHOWN_TENSORS",
    "RunResults",
    "angle_curve",
    "comparison",
    "condition_curve",
    "relative_update_curve",
    "small_panels",
]

SHOWN_TENSORS = 12
"""Number of tensors that are drawn separately: those with the largest gradient, or the largest displacement."""

SIZES = ("parameter_norm", "displacement_norm", "update_to_weight")
"""Variables that exist with or without gradients."""

_BLOCK_VALUES = 1 << 20
"""Number of values of all tensors that are read at a time, if they are not stored in chunks."""

COMPARED_RUNS = 18
"""Number of runs that can be distinguished in one panel, by colour and dashes."""


@dataclass(frozen=True)
class RunResults:
    """Results of a run for the model, the tensors and, if the results have them, the replicates and the rest.

    The rest is the model with the updates without weight decay.
    """

    name: str
    attributes: Mapping[str, Any]
    model: xr.Dataset
    tensors: xr.Dataset
    replicates: xr.Dataset | None = None
    without_decay: xr.Dataset | None = None
    _columns: dict[str, dict[str, Array]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _largest: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

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
        return cls(name, {str(key): value for key, value in tree.attrs.items()}, model, tensors, replicates, rest)

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
        return np.asarray(_at(self.model[variable]).values)

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
        return np.asarray(self.model["loss_average"].sel({WINDOW: max(self.windows)}).values)

    def tensor(self, variable: str, name: str) -> Array:
        """Return a variable of a tensor, for the gradient and window 1, by step."""
        columns = self._columns.setdefault(variable, {})
        if name not in columns:
            # The tensors that are shown are read together, because a chunk contains the values of all tensors.
            wanted = [*dict.fromkeys([name, *self.largest_tensors()])]
            position = {str(known): index for index, known in enumerate(self.tensors[TENSOR].values)}
            at = [position[one] for one in wanted]
            blocks = [values[:, at] for values in self.blocks(variable)]
            columns |= dict(zip(wanted, np.concatenate(blocks).T, strict=True))
        return columns[name]

    def blocks(self, variable: str) -> Iterator[NDArray[Any]]:
        """Yield a variable of all tensors, for the gradient and window 1, a part of the steps at a time."""
        values = _at(self.tensors[variable]).transpose(STEP, TENSOR)
        # A part is a chunk: reading it twice would decode it twice.
        chunks = self.tensors[variable].encoding.get("preferred_chunks", {})
        rows = chunks.get(STEP) or max(_BLOCK_VALUES // max(self.tensors.sizes[TENSOR], 1), 1)
        for start in range(0, max(len(self.steps), 1), rows):
            yield np.asarray(values.isel({STEP: slice(start, start + rows)}).values)

    def largest_tensors(self) -> list[str]:
        """Return the tensors with the largest gradient, root mean square over the run, largest first.

        Without gradients, their displacements are compared.
        """
        names = [str(name) for name in self.tensors[TENSOR].values]
        if len(names) <= SHOWN_TENSORS:
            return names
        if not self._largest:
            sizes = np.zeros(len(names))
            with np.errstate(over="ignore", invalid="ignore"):
                for norms in self.blocks("gradient_norm" if self.has_gradient else "displacement_norm"):
                    sizes += (np.where(np.isfinite(norms), norms, 0.0) ** 2).sum(axis=0)
                order = np.argsort(-sizes, kind="stable")
            self._largest.extend(names[index] for index in order[:SHOWN_TENSORS])
        return list(self._largest)


def _at(variable: xr.DataArray) -> xr.DataArray:
    chosen = {DESCENT: DESCENTS[0], WINDOW: 1}
    return variable.sel({name: value for name, value in chosen.items() if name in variable.dims})


# Angle and condition number ----------------------------------------------------------------------------------


def angle_curve(run: RunResults) -> Picture:
    """Draw the angle of the model over the steps, with the uncertainty caused by rounding of the stored values."""
    panel = Panel(Axis(), Axis("angle ψ (rad)"), letter=True)
    step_axis(panel, run.steps)
    angle, uncertainty = run["angle"], run["angle_uncertainty"]
    spread = extent(angle)
    entries = draw_angle(panel, run.steps, angle, uncertainty, COLUMNS)
    angle_limits(panel, spread)
    if spread is None:
        placeholder(panel, "no update has an angle")
    else:
        panel.legend = entries
    extremes = (
        f" from {number(spread[0])} to {number(spread[2])} rad" if spread else "; it is not defined at any step"
    )
    return picture(
        Chart(WIDTH, HEIGHT, [[panel]]),
        f"Angle between update and negative gradient over the steps of {run.name}{extremes}.",
    )


def condition_curve(run: RunResults) -> Picture:
    """Draw the smallest condition number of the model over the steps."""
    return _logarithmic(
        run,
        Panel(Axis(), Axis("condition number κ (1)"), letter=True),
        "condition_number",
        title="Condition number of the optimal metric",
        missing="no effective update:\nno condition number",
        marked=run["status"] != Status.EFFECTIVE,
    )


def relative_update_curve(run: RunResults, letter: str) -> Picture:
    """Draw the norm of the change of the parameters, relative to that of the parameters, over the steps."""
    return _logarithmic(
        run,
        Panel(Axis(), Axis("|θ′ − θ| / |θ| (1)"), letter, letter=True),
        "update_to_weight",
        title="Change of the parameters relative to the parameters",
        missing="no update has a size",
    )


def _logarithmic(
    run: RunResults,
    panel: Panel,
    variable: str,
    *,
    title: str,
    missing: str,
    marked: NDArray[np.bool_] | None = None,
) -> Picture:
    """Draw a positive variable of the model over the steps, or a text where it is not defined at any step."""
    step_axis(panel, run.steps)
    values = positive(run[variable])
    spread = extent(values)
    if spread is None:
        placeholder(panel, missing)
    else:
        curve(panel, run.steps, values, colour=INK)
        log_limits(panel, spread[0], spread[2])
        if marked is not None and marked.any():
            panel.legend = [mark(panel, run.steps, marked)]
    extremes = f" from {number(spread[0])} to {number(spread[2])}" if spread else "; it is not defined at any step"
    return picture(Chart(WIDTH, HEIGHT, [[panel]]), f"{title} over the steps of {run.name}{extremes}.")


def small_panels(run: RunResults, names: Sequence[str], variable: str) -> Picture:
    """Draw the angle or condition number of each tensor, on common axes."""
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    height = 0.75 + (1.15 if rows > 1 else 1.6) * rows
    of_angle = variable == "angle"
    values = {name: run.tensor(variable, name) for name in names}
    if not of_angle:
        values = {name: positive(value) for name, value in values.items()}
    spread = extent(np.concatenate(list(values.values())))
    axes = Axis(), Axis()
    panels = []
    for index, (name, label) in enumerate(
        zip(names, _tensor_labels(names, 26 if columns == 2 else 52), strict=True)
    ):
        # The panel above a gap in the last row shows the step numbers.
        panel = Panel(*axes, label, tick_labels=(index + columns >= len(names), index % columns == 0))
        panels.append(panel)
        step_axis(panel, run.steps, limit=3)
        without = run.tensor("status", name) != Status.EFFECTIVE
        if extent(values[name]) is None:
            panel.notes.append(Note("none"))
        if of_angle:
            draw_angle(panel, run.steps, values[name], run.tensor("angle_uncertainty", name), SMALL_COLUMNS)
        else:
            curve(panel, run.steps, values[name], columns=SMALL_COLUMNS, colour=INK)
        if without.any() and not of_angle:
            mark(panel, run.steps, without, columns=SMALL_COLUMNS)
    if of_angle:
        angle_limits(panels[0], spread)
    elif spread is not None:
        log_limits(panels[0], spread[0], spread[2], limit=4)
    axes[0].label = ""
    chart = Chart(
        WIDTH,
        height,
        [panels[start : start + columns] for start in range(0, len(panels), columns)],
        x_label="step",
        y_label="angle ψ (rad)" if of_angle else "condition number κ (1)",
    )
    drawn = "Angle between update and negative gradient" if of_angle else "Condition number of the optimal metric"
    return picture(chart, f"{drawn} over the steps of {run.name}, for {len(names)} tensors: {', '.join(names)}.")


def comparison(runs: Sequence[RunResults]) -> Picture:
    """Draw angle and condition number of several runs, with a row for the model and for each common tensor.

    Parameters
    ----------
    runs : sequence of RunResults
        At most `COMPARED_RUNS`. Each has its own colour; the lines of the tenth and later runs are dashed.
    """
    shared = set.intersection(*({str(name) for name in run.tensors[TENSOR].values} for run in runs))
    tensors = [name for name in runs[0].largest_tensors() if name in shared]
    # If a model has one tensor, the tensor is the model.
    tensors = tensors if any(run.tensors.sizes[TENSOR] > 1 for run in runs) else []
    steps, of_angle, of_condition = Axis(), Axis("angle ψ (rad)"), Axis("κ (1)")
    rows = [
        [
            Panel(steps, of_angle, label, tick_labels=(label == labels[-1], True)),
            Panel(steps, of_condition, tick_labels=(label == labels[-1], True)),
        ]
        for labels in [("model", *_tensor_labels(tensors, 52))]
        for label in labels
    ]
    step_axis(rows[0][0], np.unique(np.concatenate([run.steps for run in runs])))
    conditions, angles, legend = [], [], []
    for index, run in enumerate(runs):
        style: dict[str, Any] = {
            "colour": COMPARED_COLOURS[index % len(COMPARED_COLOURS)],
            "dash": COMPARED_DASHES[index // len(COMPARED_COLOURS) % len(COMPARED_DASHES)],
        }
        legend.append(Line(np.empty(0), np.empty(0), label=drawable(run.name, 30), **style))
        for row, name in zip(rows, (None, *tensors), strict=True):
            angle, condition = (
                run[variable] if name is None else run.tensor(variable, name)
                for variable in ("angle", "condition_number")
            )
            angles.append(angle)
            conditions.append(positive(condition))
            for panel, values in zip(row, (angle, conditions[-1]), strict=True):
                curve(panel, run.steps, values, columns=SMALL_COLUMNS, **style)
    for row in rows:
        half_angle(row[0])
    angle_spread, spread = extent(np.concatenate(angles)), extent(np.concatenate(conditions))
    angle_limits(rows[0][0], angle_spread)
    if spread is not None:
        log_limits(rows[0][1], spread[0], spread[2], limit=5)
    legend_rows = math.ceil(len(runs) / 3)
    height = 0.45 + 1.3 * (1 + len(tensors)) + 0.2 * legend_rows
    names = ", ".join(run.name for run in runs)
    of = f" and of the tensors {', '.join(tensors)}" if tensors else ""
    return picture(
        Chart(2 * WIDTH, height, rows, legend=legend, columns=3),
        f"Angle and condition number of the model{of} over the steps, in the runs {names}.",
    )


def _tensor_labels(names: Sequence[str], limit: int) -> list[str]:
    """Return the number and name of each tensor. Long names are shortened by the parts that all names share.

    Examples
    --------
    >>> _tensor_labels(["encoder.layers.1.attention.weight", "encoder.layers.23.attention.weight"], 20)
    ['1  …1…', '2  …23…']
    """
    parts = [name.split(".") for name in names]
    start = end = 0
    if len(names) > 1 and max(map(len, names)) > limit - 4:
        # One part of each name is always kept, even if all names share it.
        spare = min(map(len, parts)) - 1
        while start < spare and len({part[start] for part in parts}) == 1:
            start += 1
        while end < spare - start and len({part[-1 - end] for part in parts}) == 1:
            end += 1
    kept = [".".join(part[start : len(part) - end]) for part in parts]
    shown = [f"{'…' if start else ''}{drawable(name, limit - 6)}{'…' if end else ''}" for name in kept]
    return [f"{number}  {name}" for number, name in enumerate(shown, start=1)]
