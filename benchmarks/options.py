"""Define the sizes of generated runs. This module has no imports, because pytest would warn about early imports."""

from dataclasses import dataclass

HIDDEN = 1024
STEP_BYTES = 8
"""Bytes of an element in a logged state: float32 parameter and gradient."""

SWEEP_STEPS, SWEEP_ELEMENTS = 200, 5000
RUN_BYTES = SWEEP_STEPS * SWEEP_ELEMENTS * STEP_BYTES
"""Bytes of training state of each run of a sweep."""

ONE_RUN, LOGGED_SWEEP = 250, 200
"""Number of runs of the sweep that has as many states as the single run, and maximum number of runs of the ingested
sweep. The single run and a complete sweep fit into memory together. Both logs and their stores fit on the disk."""

TALL_ELEMENTS, WIDE_STATES = 1000, 64

MANY_LOGS, IN_MEMORY = "many_logs", "in_memory"
MEMORY_DISK = "/dev/shm"
"""A file system in memory, so that writes do not wait for a disk."""


@dataclass(frozen=True)
class Scale:
    """Sizes of generated runs.

    Attributes
    ----------
    size : float
        Approximate gigabytes of the run that is logged and ingested.
    states : int
        Logged states of this run.
    sizes : tuple of float
        Gigabytes of the longer runs of the same model.
    tall : int
        Logged states of the run with 1,000 parameters.
    wide : int
        Parameters of the run with 64 states.
    sweep : int
        Runs of the sweep.
    """

    size: float = 4.0
    states: int = 40
    sizes: tuple[float, ...] = (1.0, 4.0, 16.0, 32.0)
    tall: int = 1_000_000
    wide: int = 10_000_000
    sweep: int = 500

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the model: square layers with biases, which cross chunk boundaries."""
        layers = max(1, round(self.size * 1e9 / (self.states * STEP_BYTES * (HIDDEN + 1) * HIDDEN)))
        return {f"layer.{k}.{name}": shape for k in range(layers) for name, shape in _LAYER.items()}


_LAYER = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
