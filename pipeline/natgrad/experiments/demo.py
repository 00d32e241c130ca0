"""Write the logs of the demonstration: the two experiments of section 3.1 of the paper, each in two variants."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from natgrad.experiments.digits import images_installed, load_digits
from natgrad.experiments.feedback_alignment import log_feedback_alignment
from natgrad.experiments.linear_system import log_linear_system
from natgrad.schema.logs import logger

__all__ = ["WINDOW", "write_demo_logs"]

WINDOW = 20
"""Window, in updates (m in eq. (3)), over which the loss of the mini-batch run decreases on average."""

MINI_BATCH = 32

_log = logger(__name__)

# The first few seeds were compared: this one has the largest variation of the angle psi, from 26 to 83 degrees.
LINEAR_SEED = 1


def write_demo_logs(folder: Path) -> dict[str, Path]:
    """Log the runs that have not been logged yet. Existing logs are not changed.

    If the images for the feedback alignment runs are not installed, only the linear system is logged, and a warning
    explains how to get the rest.

    Parameters
    ----------
    folder : Path
        Folder for the logs, which take about 85 MB in total.

    Returns
    -------
    dict of str to Path
        Log folder of each run, by name, without the runs that cannot be logged.

    Raises
    ------
    InputError
        If the images are installed but cannot be loaded.
    """
    # The images are loaded once, for the first run that needs them.
    digits = cache(load_digits)
    linear: dict[str, Callable[[Path], object]] = {
        "linear-euler": lambda log: log_linear_system(log, method="euler", seed=LINEAR_SEED),
        "linear-exponential": lambda log: log_linear_system(log, method="exponential", seed=LINEAR_SEED),
    }
    networks: dict[str, Callable[[Path], object]] = {
        "feedback-alignment": lambda log: log_feedback_alignment(log, digits=digits()),
        "feedback-alignment-mini-batch": lambda log: log_feedback_alignment(
            log, mini_batch=MINI_BATCH, digits=digits()
        ),
    }
    logs = {name: Path(folder) / name for name in linear | networks}
    if not images_installed() and not all(logs[name].exists() for name in networks):
        _log.warning(
            "The feedback alignment runs are omitted, because their MNIST images are not installed. "
            'To include them: pip install "natgrad-pipeline[experiments]"'
        )
        logs = {name: logs[name] for name in linear}
    for name, log in logs.items():
        if log.exists():
            continue
        _log.info("logging %s", name)
        # The log is written to a temporary folder, which is then renamed, so an interruption leaves no partial log.
        partial = log.with_name(f".{name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        (linear | networks)[name](partial)
        partial.rename(log)
    return logs
