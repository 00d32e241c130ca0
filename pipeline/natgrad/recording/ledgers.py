"""Record the ledger of each update: the inner products of the parameters, the displacement and the gradient.

The parameters after an update are at hand only after the step of the optimizer, and the gradient only until it is
changed. The optimizers of PyTorch leave it as it is, so that a reference suffices. It is copied in three cases:
an optimizer of another package may change it, a fused optimizer divides it by the scale, and a closure replaces it
when it is evaluated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.updates import is_compiled, refresh_products
from natgrad.recording.arrays import require_dense
from natgrad.recording.device import device_products
from natgrad.recording.ledger_writer import LedgerWriter, require_folder
from natgrad.recording.live import LastUpdate, last_update
from natgrad.recording.parameters import Selection
from natgrad.recording.shards import Shards, local_part
from natgrad.recording.updates import Update
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.ledger_log import SKIPPED, LedgerHeader, RecordedTensor, packed
from natgrad.schema.logs import logger

__all__ = ["LedgerRecording"]

_log = logger("natgrad.recording")


class _Copy:
    """A copy of the elements of a parameter in this process, in the order of its memory.

    Attributes
    ----------
    parameter : torch.nn.Parameter
    values : torch.Tensor
        The copy.
    gradient_dtype : str
        Dtype of the gradient.
    number : int
        Number of updates before the last state that was copied.
    """

    number = -1

    def __init__(self, parameter: Any, name: str) -> None:
        self.parameter, self._name = parameter, name
        part = local_part(parameter)
        require_dense(part, f"parameter {name!r}")
        if dtype_name(part) not in STORAGE_DTYPES:
            raise InputError(
                f"parameter {name!r} has dtype {part.dtype}",
                where=f"parameter {name!r}",
                remedy=f"record parameters of {', '.join(STORAGE_DTYPES)} only (parameters=PATTERNS)",
            )
        # The order of a product does not matter, but it must be the same for the parameter and the gradient.
        order = sorted(range(part.ndim), key=lambda axis: -part.stride(axis))
        self._order = None if part.is_contiguous() else order
        self.values, self.gradient_dtype = self.of(part).clone(), dtype_name(part)
        self._now = self.of(part)
        self._arrays: tuple[Any, NDArray[Any], NDArray[Any]] | None = None

    def of(self, tensor: Any) -> Any:
        """Return the elements of the parameter or its gradient in this order, without a copy if possible."""
        part = local_part(tensor).detach()
        return (part if self._order is None else part.permute(self._order)).contiguous()

    def now(self) -> Any:
        """Return the elements of the parameter."""
        part = local_part(self.parameter)
        if part.data_ptr() == self._now.data_ptr() and part.dtype is self._now.dtype:
            return self._now  # the same memory, so that it has the new values
        self._now = found = self.of(part)
        if (
            found.dtype != self.values.dtype
            or found.device != self.values.device
            or found.shape != self.values.shape
        ):
            raise InputError(
                f"parameter {self._name!r} was {self.values.dtype} on {self.values.device} with "
                f"{self.values.numel()} elements, and is {found.dtype} on {found.device} with {found.numel()}",
                why="the model was converted or moved during the recording",
                remedy="call natgrad.watch again after that, with first_step=N",
            )
        return found

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the copy and the parameter as flat arrays that share their memory, which must be on the host."""
        now = self.now()
        if self._arrays is None or self._arrays[0] is not now:
            self._arrays = now, flat_array(self.values), flat_array(now)
        return self._arrays[1:]

    def gradient(self) -> Any:
        """Return the elements of the gradient, or zeros without one; not a copy if possible."""
        gradient = self.parameter.grad
        if gradient is None:
            # The loss does not depend on this parameter, and the optimizer does not change it.
            return self.values.new_zeros(self.values.shape)
        part = local_part(gradient)
        require_dense(part, f"gradient {self._name!r}")
        if part.shape != local_part(self.parameter).shape:
            raise InputError(
                f"the gradient of {self._name!r} has shape {tuple(part.shape)} in this process, and the parameter "
                f"{tuple(local_part(self.parameter).shape)}",
                why="the gradient is not sharded as the parameter is",
                remedy='record complete states (mode="full"), or the checkpoints of the run',
            )
        self.gradient_dtype = dtype_name(part)
        return self.of(gradient)


class LedgerRecording:
    """A log of ledgers.

    Parameters
    ----------
    folder : str or Path
    every : int
        Every n-th update is recorded.
    resume : bool
        Continue the log in the folder.
    evaluation : str
        See `natgrad.schema.ledger_log.LedgerHeader`.
    shards : Shards, optional
        Processes that have parts of the tensors. Only the first one writes.

    Raises
    ------
    InputError
        If the folder contains states, or ledgers and ``resume`` is False.
    """

    meaning_of_changes = "the change is not a part of any recorded update"
    seconds_waited = 0.0

    def __init__(
        self, folder: str | Path, every: int, *, resume: bool, evaluation: str, shards: Shards | None
    ) -> None:
        self.folder = Path(folder)
        self._every, self._evaluation, self._shards = every, evaluation, shards
        self._writes = shards is None or shards.rank == 0
        if self._writes:
            require_folder(self.folder, resume=resume)
        self._copies: dict[str, _Copy] = {}
        self._writer: LedgerWriter | None = None
        self._reported = False

    def includes(self, number: int) -> bool:
        """Return True for every n-th update."""
        return number % self._every == 0

    def before(self, update: Update, selection: Selection, *, changed: bool) -> None:
        """Bring the copies of the parameters up to date. Immediately after a recorded update they are."""
        for name, parameter in selection.trained.items():
            copy = self._copies.get(name)
            if copy is None:
                self._copies[name] = _Copy(parameter, name)
            elif changed or copy.number != update.number:
                copy.values.copy_(copy.now())

    def evaluated(self, update: Update, optimizer: Any, selection: Selection) -> None:
        """Take references to the gradients, or copy them if the optimizer may change them."""
        scale = getattr(optimizer, "grad_scale", None)
        keeps = type(optimizer).__module__.startswith("torch.optim.") and scale is None
        gradients = update.values("gradient")
        for name in selection.trained:
            gradient = self._copies[name].gradient()
            if scale is not None:
                # The scale is a power of two: the quotient is exact unless it is subnormal.
                gradient = (gradient.float() if gradient.element_size() < 4 else gradient) / scale
            gradients[name] = gradient if keeps or scale is not None else gradient.clone()

    def evaluated_again(self, update: Update, selection: Selection) -> None:
        """Copy the gradients, once."""
        kept, gradients = update.values("kept"), update.values("gradient")
        for name in selection.trained.keys() - kept.keys():
            kept[name] = gradients[name] = gradients[name].clone()

    def after(self, update: Update, selection: Selection) -> None:
        """Compute the ledger of the tensors of an optimizer. The copies are those of the parameters then."""
        names = list(selection.trained)
        if not names:
            return
        gradients = update.values("gradient")
        gram, ratio = self._products(
            [self._copies[name] for name in names], [gradients.pop(name) for name in names]
        )
        ledgers = update.values("ledger")
        for index, name in enumerate(names):
            ledgers[name] = gram[index], float(ratio[index])
            self._copies[name].number = update.number + 1

    def _products(
        self, copies: list[_Copy], gradients: list[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if any(copy.values.device.type != "cpu" for copy in copies):
            self._report(f"by PyTorch ({copies[0].values.device})")
            return device_products([one.values for one in copies], [one.now() for one in copies], gradients)
        self._report("by numba" if is_compiled() else "by NumPy, because numba is not installed")
        before, after = zip(*(copy.arrays() for copy in copies), strict=True)
        return refresh_products(before, after, [flat_array(gradient) for gradient in gradients])

    def _report(self, kernel: str) -> None:
        if not self._reported:
            self._reported = True
            _log.info("ledgers are computed %s", kernel)

    def complete(self, update: Update) -> None:
        """Add the ledgers of all parts of the tensors, if processes have parts of them."""
        if self._shards is not None:
            self._shards.add(update.values("ledger"), {name: one.parameter for name, one in self._copies.items()})

    def write(self, update: Update) -> None:
        """Append a record to the log."""
        if not self._writes:
            return
        ledgers = update.values("ledger")
        rates = {update.groups[name]: rate for name, rate in update.rates.items()}
        groups = {name: sorted(rates).index(group) for name, group in update.groups.items()}
        header = self._header(groups)
        if self._writer is None or self._writer.header != header:
            if self._writer is not None:
                self._writer.close()
            self._writer = LedgerWriter(self.folder, header)
        record = np.zeros((), header.record)
        loss = update.closure_loss if update.loss is None else update.loss
        record["step"], record["span"], record["flags"] = update.number, 1, SKIPPED if update.skipped else 0
        record["loss"] = math.nan if loss is None else float(loss)
        record["rates"] = [rates[group] for group in sorted(rates)]
        record["ratio"] = [ledgers[one.name][1] for one in header.tensors]
        record["gram"] = packed(np.stack([ledgers[one.name][0] for one in header.tensors]))
        self._writer.append(record)

    def _header(self, groups: dict[str, int]) -> LedgerHeader:
        tensors = tuple(
            RecordedTensor(
                name,
                tuple(copy.parameter.shape),
                dtype_name(copy.values),
                copy.gradient_dtype,
                groups[name],
            )
            for name, copy in self._copies.items()
        )
        return LedgerHeader(tensors, len(set(groups.values())), self._evaluation)

    def last(self, update: Update, selections: Sequence[Selection]) -> LastUpdate | None:
        """Return the values of the ledger of the update."""
        ledgers = update.values("ledger")
        gram = np.stack([ledgers[name][0] for name in update.rates])
        sizes = [self._copies[name].parameter.numel() for name in update.rates]
        return last_update(update.number, gram, sizes, update.rates)

    def finish(self, update: Update, selections: Sequence[Selection]) -> None:
        """Do nothing: the record of an update is complete."""

    def abort(self) -> None:
        """Tell the other processes that the recording ends."""
        if self._shards is not None:
            self._shards.abort()

    def close(self) -> None:
        """Flush the log to the disk."""
        self._copies.clear()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def dtype_name(tensor: Any) -> str:
    """Return the name of the dtype of a tensor."""
    return str(tensor.dtype).removeprefix("torch.")


def flat_array(tensor: Any) -> NDArray[Any]:
    """Return a contiguous tensor in host memory as an array that shares its memory: bfloat16 as uint16."""
    import torch

    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array.reshape(-1)
