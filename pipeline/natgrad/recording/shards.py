"""Add the ledgers of tensors whose parts are in several processes (FSDP2).

The products of a tensor are the sums of those of its parts, but the residuals must have one ratio first; see
`natgrad.kernel.ledger_sums.combine`. Two reductions of small matrices give the same result in all processes: the
first one adds the products that determine the ratio, and the second one all products. They use the CPU, so that no
device is synchronized.

If the recording fails in one process, the others would wait for it. The first reduction therefore also adds a flag,
and takes place at every update, so that the recording ends in all processes together. No reduction takes longer
than `_SECONDS`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.ledger_sums import best_ratio, convert
from natgrad.schema.errors import InputError
from natgrad.schema.names import RECORDED_VECTORS

__all__ = ["Shards", "is_sharded", "local_part"]

_SECONDS = 60.0

_POSITIONS = _DISPLACEMENT, _GRADIENT, _ = (
    RECORDED_VECTORS.index("displacement"),
    RECORDED_VECTORS.index("gradient"),
    RECORDED_VECTORS.index("residual"),
)


def local_part(tensor: Any) -> Any:
    """Return the part of a tensor in this process: the tensor itself, unless it is distributed (DTensor)."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Return True for a distributed tensor (DTensor)."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


class Shards:
    """Processes that have parts of the parameters of a model.

    All processes create it at the same time.

    Parameters
    ----------
    parameters : iterable of tensors
        All parameters of the optimizers.

    Attributes
    ----------
    rank : int
        Number of this process.

    Raises
    ------
    InputError
        If a process has a part that another one has as well, as with HSDP and tensor parallelism.
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        from torch import distributed

        self.rank, processes = distributed.get_rank(), distributed.get_world_size()
        self._limit = 0
        for parameter in parameters:
            self._limit += 1
            if is_sharded(parameter):
                _require_parts(parameter, processes)
        self._group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_SECONDS))
        self._ended, self._pending = False, None

    def add(self, ledgers: dict[str, Any], parameters: Mapping[str, Any]) -> None:
        """Replace the ledgers of the parts in this process by those of the tensors.

        Parameters
        ----------
        ledgers : dict
            Gram matrix and ratio of each tensor by name; empty if the update is not recorded.
        parameters : mapping
            The parameters. One that is not distributed is counted in the first process only.

        Raises
        ------
        InputError
            If the recording has ended in another process.
        """
        gram = np.zeros((self._limit, 4, 4))
        ratio = np.zeros(self._limit)
        for index, (name, (products, its_ratio)) in enumerate(ledgers.items()):
            if self.rank == 0 or is_sharded(parameters[name]):
                gram[index], ratio[index] = products, its_ratio
        sums = np.concatenate([[0.0], gram[:, _GRADIENT, _DISPLACEMENT], gram[:, _DISPLACEMENT, _DISPLACEMENT]])
        failed, *sums = self._sum(sums)
        if failed:
            self._ended = True
            raise InputError(
                f"the recording has ended in {failed:.0f} other processes",
                why="an error that these processes report",
            )
        if not ledgers:
            return
        along, square = np.reshape(sums, (2, self._limit))
        common = best_ratio(along, square)
        convert(gram, ratio, common, _POSITIONS)
        gram = self._sum(gram)
        for index, name in enumerate(ledgers):
            ledgers[name] = gram[index], float(common[index])

    def abort(self) -> None:
        """Tell the other processes, at their next update, that the recording has ended in this one."""
        if not self._ended:
            self._ended = True
            flag = np.zeros(1 + 2 * self._limit)
            flag[0] = 1.0
            # The others may wait for this process before they reach their next update.
            with suppress(Exception):  # they have ended as well
                self._pending = self._start(flag)

    def _sum(self, array: NDArray[np.float64]) -> Any:
        try:
            tensor, work = self._start(array)
            work.wait()
        except Exception:
            self._ended = True
            raise
        return tensor.numpy()

    def _start(self, array: NDArray[np.float64]) -> Any:
        """Start a reduction, and return the tensor with its result and what to wait for."""
        import torch
        from torch import distributed

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor, distributed.all_reduce(tensor, group=self._group, async_op=True)


def _require_parts(parameter: Any, processes: int) -> None:
    kinds = [type(placement).__name__ for placement in parameter.placements]
    mesh = parameter.device_mesh
    if mesh.size() != processes or not all("Shard" in kind for kind in kinds):
        raise InputError(
            f"a parameter of shape {tuple(parameter.shape)} is distributed as {', '.join(kinds)} over "
            f"{mesh.size()} of {processes} processes",
            where="argument optimizer",
            why="with HSDP, tensor or pipeline parallelism, some of its elements may be in several processes, and "
            "would be counted several times",
            remedy="shard all parameters over all processes (fully_shard with a one-dimensional mesh), or record "
            "the checkpoints of the run instead (natgrad formats)",
        )
