"""The logs of the demonstration: both experiments of section 3.1, each in two variants."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from natgrad.experiments.digits import load_digits
from natgrad.experiments.feedback_alignment import log_feedback_alignment
from natgrad.experiments.linear_system import log_linear_system

__all__ = ["WINDOW", "write_demo_logs"]

WINDOW = 20
"""Updates m of the window, eq. (3), over which the loss of the mini-batch run decreases on average."""

MINI_BATCH = 32

# Of this system the angle psi varies most among the first few: from 26 to 83 degrees.
LINEAR_SEED = 1


def write_demo_logs(folder: Path) -> dict[str, Path]:
    """Log the runs that are not there yet; a log that is there is whole, and is left as it is.

    Parameters
    ----------
    folder : Path
        Folder for the log folders; it takes about 85 MB.

    Returns
    -------
    dict of str to Path
        Name of a run to its log folder.

    Raises
    ------
    InputError
        Where the images of the feedback alignment runs cannot be loaded.
    """
    # Loaded for the first run that needs them, and once.
    digits = cache(load_digits)
    runs: dict[str, Callable[[Path], object]] = {
        "linear-euler": lambda log: log_linear_system(log, method="euler", seed=LINEAR_SEED),
        "linear-exponential": lambda log: log_linear_system(log, method="exponential", seed=LINEAR_SEED),
        "feedback-alignment": lambda log: log_feedback_alignment(log, digits=digits()),
        "feedback-alignment-mini-batch": lambda log: log_feedback_alignment(
            log, mini_batch=MINI_BATCH, digits=digits()
        ),
    }
    logs = {name: Path(folder) / name for name in runs}
    for name, log in logs.items():
        if log.exists():
            continue
        # Logged aside and renamed: so that a log under its name is whole, also after an interruption.
        aside = log.with_name(f".{name}.partial")
        if aside.exists():
            shutil.rmtree(aside)
        runs[name](aside)
        aside.rename(log)
    return logs
