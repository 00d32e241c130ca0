"""Record runs of the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from natgrad.recording.callbacks import Watching
from natgrad.schema.errors import InputError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise InputError(
        "natgrad.WatchCallback needs transformers, which is not installed",
        remedy="pip install transformers; natgrad.watch records other training loops of PyTorch",
    ) from error

__all__ = ["WatchCallback"]


class WatchCallback(Watching, TrainerCallback):  # type: ignore[misc]
    """Record each training run of a Trainer, as `natgrad.watch` does.

    The arguments of the Trainer are the configuration of the run. If the training is resumed from a checkpoint, the
    log is continued.

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

    Examples
    --------
    >>> import transformers  # doctest: +SKIP
    >>> transformers.Trainer(..., callbacks=[WatchCallback("logs/a")]).train()  # doctest: +SKIP
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Begin the recording.

        Raises
        ------
        InputError
            If an option is not valid, or the folder contains another run; see `natgrad.watch`.
        """
        self._begin(optimizer, model, state.global_step, args.to_sanitized_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the recording."""
        self._end()
