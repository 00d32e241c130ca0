"""Record runs of Lightning."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from natgrad.recording.callbacks import Watching
from natgrad.schema.errors import InputError

__all__ = ["LightningWatch"]


def _callback() -> Any:
    """Return the base class of callbacks, of the package that the training program has imported."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    raise InputError(
        "natgrad.LightningWatch needs Lightning, which is not installed",
        remedy="pip install lightning; natgrad.watch records other training loops of PyTorch",
    )


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _callback()


class LightningWatch(Watching, _Callback):
    """Record each fit of a Lightning Trainer, as `natgrad.watch` does.

    The loss is that which the training step returns, and the hyperparameters that the module saves are the
    configuration of the run. If the training is resumed from a checkpoint, the log is continued.

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
    >>> import lightning  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[LightningWatch("logs/a")]).fit(module, data)  # doctest: +SKIP
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the recording.

        Raises
        ------
        InputError
            If an option is not valid, or the folder contains another run; see `natgrad.watch`.
        """
        # Lightning counts the steps of all optimizers.
        self._begin(
            trainer.optimizers, pl_module, trainer.global_step // len(trainer.optimizers), pl_module.hparams
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the recording."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the recording of a training that fails."""
        self.on_train_end(trainer, pl_module)
