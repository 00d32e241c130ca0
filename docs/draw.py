"""Draw the figure of the README from the demonstration: ``make demo``, then ``python docs/draw.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import natgrad

RUN = Path("demo/runs/feedback-alignment")
FIGURE = Path(__file__).parent / "images" / "feedback_alignment.svg"

CONDITIONS = (1, 2, 5, 20, 100, 1000)
"""Condition numbers on the right axis."""

STYLE = {
    "axes.spines.right": True,
    "axes.spines.top": False,
    "font.size": 11,
    # The same results give the same bytes, and the text needs no font.
    "svg.fonttype": "path",
    "svg.hashsalt": "natgrad",
}


def draw(run: Path, file: Path) -> None:
    """Draw the angle of the model and of each tensor, with the condition number on the right axis.

    Parameters
    ----------
    run : Path
        Folder of a processed run.
    file : Path
        SVG to write.
    """
    results = natgrad.open_results(run)
    model, tensors = (results[group].sel(descent="gradient", window=1) for group in ("model", "tensor"))
    updates = model["step"] + 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.7), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.axhspan(90, 96, color="#b00020", alpha=0.12, linewidth=0)
        axes.text(
            updates[-1] * 0.95, 92.6, "no metric: the update ascends", ha="right", va="center", color="#b00020"
        )
        for name, colour, dash in zip(tensors["tensor"].values, ("#0072b2", "#009e73"), ("--", ":"), strict=False):
            angle = np.degrees(tensors["angle"].sel(tensor=name))
            axes.plot(updates, angle, color=colour, linestyle=dash, linewidth=1.8, label=name)
        axes.plot(updates, np.degrees(model["angle"]), color="#222222", linewidth=2.2, label="model")
        axes.set(xscale="log", xlim=(1, updates[-1]), ylim=(-3, 96), xlabel="update")
        axes.set_ylabel("angle ψ between update\nand negative gradient")
        axes.yaxis.set_major_locator(FixedLocator([0, 30, 60, 90]))
        axes.yaxis.set_major_formatter("{x:.0f}°")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.grid(axis="both", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.03, 0.33))
        right = axes.secondary_yaxis("right")
        right.set_ylabel("condition number κ\nof the best metric")
        right.yaxis.set_major_locator(FixedLocator([_angle(kappa) for kappa in CONDITIONS]))
        right.yaxis.set_minor_locator(NullLocator())
        right.yaxis.set_major_formatter(FuncFormatter(lambda _, place: f"{CONDITIONS[place or 0]:,}"))
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _angle(kappa: float) -> float:
    """Return the angle in degrees of a condition number: sin psi = (kappa - 1) / (kappa + 1)."""
    return float(np.degrees(np.arcsin((kappa - 1) / (kappa + 1))))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RUN, FIGURE)
