"""Share the recording between the callbacks of several trainers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natgrad.recording.torch import Watch, watch
from natgrad.schema.configuration import flat_configuration

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

    def _begin(self, optimizers: Any, model: Any, taken: int, configuration: Mapping[str, Any]) -> None:
        """Begin the recording, after some steps that an earlier training has taken.

        The configuration of the trainer may contain objects, which are omitted.
        """
        found: dict[str, Any] = {"model": model, "configuration": flat_configuration(configuration)}
        found |= {"first_step": taken} if taken else {}
        self.watch = watch(optimizers, self._folder, **found | self._options)

    def _end(self) -> None:
        """End the recording."""
        if self.watch is not None:
            self.watch.close()
