"""How much is generated. Nothing is imported here: pytest would warn of what was loaded before it."""

from dataclasses import dataclass

HIDDEN = 1024
STEP_BYTES = 8
"""Bytes that an element takes in a logged state: float32 parameter and gradient."""

SWEEP_STEPS, SWEEP_ELEMENTS = 200, 5000
RUN_BYTES = SWEEP_STEPS * SWEEP_ELEMENTS * STEP_BYTES
"""Bytes of training state of each run of a sweep."""

ONE_RUN, LOGGED_SWEEP = 250, 200
"""Runs whose states one run by itself has, and those of the sweep that is ingested, at most.
Memory keeps the first beside a whole sweep, and the disk two logs and what is made of them."""

TALL_ELEMENTS, WIDE_STATES = 1000, 64

MANY_LOGS, IN_MEMORY = "many_logs", "in_memory"
MEMORY_DISK = "/dev/shm"
"""A file system in memory: what is written there need not wait for a disk."""


@dataclass(frozen=True)
class Scale:
    """How much is generated.

    Attributes
    ----------
    size : float
        Gigabytes of the run that is logged and ingested, about.
    states : int
        Its logged states.
    sizes : tuple of float
        Gigabytes of the longer runs of the same model.
    tall : int
        Logged states of the run of 1,000 parameters.
    wide : int
        Parameters of the run of 64 states.
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
        """Tensors of the model: a row of square layers with biases, across the boundaries of chunks."""
        layers = max(1, round(self.size * 1e9 / (self.states * STEP_BYTES * (HIDDEN + 1) * HIDDEN)))
        return {f"layer.{k}.{name}": shape for k in range(layers) for name, shape in _LAYER.items()}


_LAYER = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
