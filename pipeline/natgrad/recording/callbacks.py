"""Share the recording between the callbacks of several trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natgrad.recording.torch import Watch, watch

__all__ = ["Watching"]


class Watching:
    """Begin and end the recording of a training run.

    Parameters
    ----------
    folder : str or Path
        Folder of the log.
    **options
        Options of `natgrad.watch`, such as ``mode`` and ``every``.

    Attributes
    ----------
    watch : Watch or None
        The recording, which is None before the training begins.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__()
        self.watch: Watch | None = None
        self._folder, self._options = folder, options

    def _begin(self, optimizers: Any, model: Any, taken: int) -> None:
        """Begin the recording, after some steps that an earlier training has taken."""
        first_step = {"first_step": taken} if taken else {}
        self.watch = watch(optimizers, self._folder, **{"model": model, **first_step, **self._options})

    def _end(self) -> None:
        """End the recording."""
        if self.watch is not None:
            self.watch.close()
