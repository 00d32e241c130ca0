"""Read folders in which every rank saved its part of the tensors with ``torch.save``, as verl does.

The files ``model_world_size_<W>_rank_<R>.pt`` contain a ``DTensor`` for each parameter, which is split along one
dimension over all ranks. Its complete values are the parts of all ranks, one after another.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import storage_dtype
from natgrad.sources.bounds import Budget, shown
from natgrad.sources.byte_ranges import ByteRange, of_boxes
from natgrad.sources.checkpoints.dcp_folder import copy_box
from natgrad.sources.checkpoints.step_folder import Kind, not_latest_yet
from natgrad.sources.checkpoints.torch_archive import DistributedTensor, TorchFile, TorchTensor
from natgrad.sources.container import Container, read_errors
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.steps import LoggedStep, Unreadable
from natgrad.storage import LocalStorage

__all__ = ["RANKS_KIND", "RankFiles"]

_FORM = "the files of the ranks"
_ROLES = ("actor", "critic")
_TRACKER = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"(model|optim)_world_size_([0-9]{1,4})_rank_([0-9]{1,4})\.pt")
_RANKS_LIMIT = 64
"""Maximum number of ranks, because all files are open at the same time."""


def _files(folder: Path) -> dict[str, dict[tuple[int, int], Path]]:
    """Return the files of the model and of the optimizer in a folder, by number of ranks and rank."""
    found: dict[str, dict[tuple[int, int], Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2]), int(match[3])] = path
    return found


def _folder(path: Path) -> Path | None:
    """Return the folder with the files of a step: the folder itself, or that of the actor or critic in it."""
    return next((folder for folder in (path, *(path / role for role in _ROLES)) if "model" in _files(folder)), None)


def _missing(files: Collection[tuple[int, int]]) -> str:
    """Return which files of a step are missing; empty if it is complete."""
    worlds = {world for world, _ in files}
    if len(worlds) != 1:
        return f"it has files of {' and '.join(map(str, sorted(worlds)))} ranks"
    (world,) = worlds
    missing = sorted(set(range(world)) - {rank for _, rank in files})
    return f"it lacks the files of {len(missing)} of {world} ranks, the first is {missing[0]}" if missing else ""


def _unfinished(path: Path) -> str:
    folder = _folder(path)
    missing = "it was removed" if folder is None else _missing(_files(folder)["model"])
    return f"{missing}: it is still being written" if missing else not_latest_yet(path, _TRACKER)


RANKS_KIND = Kind(
    "global_step_<N>/actor/model_world_size_<W>_rank_<R>.pt",
    lambda path: path.is_dir() and _folder(path) is not None,
    lambda step, names: RankFiles(step, names.inert),
    CHECKPOINT,
    _unfinished,
)


class RankFiles(Container):
    """The files of all ranks of one step.

    Parameters
    ----------
    step : LoggedStep
        Its folder contains the files, or a folder ``actor`` or ``critic`` with them. The actor takes precedence.
    inert : collection of str
        Classes whose objects are skipped.

    Raises
    ------
    InputError
        If a file is missing or corrupt, or if the files do not match each other.
    """

    ordered = True

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._inert = inert
        self._stack = ExitStack()
        # For each tensor, the parts with their file, the first index of each part, and the dimension of the split.
        self._parts: dict[str, tuple[list[tuple[TorchFile, TorchTensor]], list[int], int]] = {}
        try:
            with read_errors(step, _FORM):
                folder = _folder(step.path)
                if folder is None:
                    raise FileNotFoundError(f"there is no model_world_size_<W>_rank_<R>.pt in {step.path.name}")
                files = _files(folder)
                self._describe("", files["model"])
                others = [role for role in _ROLES if folder.name in _ROLES and (step.path / role).is_dir()]
                for role in others[1:]:
                    self.unread[role] = f"--pattern 'global_step_{{step}}/{role}' reads it instead of {folder.name}"
                if "optim" in files:
                    try:
                        self._describe("optimizer/", files["optim"])
                    except (Unreadable, ValueError) as error:
                        self.unread["optimizer"] = getattr(error, "what", str(error))
        except BaseException:
            self.close()
            raise

    def _describe(self, prefix: str, paths: dict[tuple[int, int], Path]) -> None:
        if missing := _missing(paths):
            raise ValueError(missing)
        if len(paths) > _RANKS_LIMIT:
            raise ValueError(
                f"it has {len(paths)} ranks, but the limit is {_RANKS_LIMIT}: merge them with "
                "python -m verl.model_merger merge, and pass the folder with the result"
            )
        files = [
            self._stack.enter_context(TorchFile(LoggedStep(self.step.number, LocalStorage(path)), self._inert))
            for _, path in sorted(paths.items())
        ]
        self.budget = Budget(self.budget.size + sum(file.budget.size for file in files))
        leaves = [dict(file.leaves()) for file in files]
        for key, first in leaves[0].items():
            if not isinstance(first, TorchTensor | DistributedTensor):
                continue
            ranks = [of_rank.get(key) for of_rank in leaves]
            if any(type(leaf) is not type(first) for leaf in ranks):
                raise ValueError(f"the ranks have different objects for {shown(key)}")
            self._add_parts(prefix + key, files, ranks)
        self.numbers |= {prefix + key: value for key, value in files[0].numbers.items()}
        self.texts |= {prefix + key: text for key, text in files[0].texts.items()}
        self.objects |= {
            prefix + key: item for key, item in files[0].objects.items() if prefix + key not in self.tensors
        }

    def _add_parts(self, key: str, files: list[TorchFile], leaves: list[Any]) -> None:
        first = leaves[0]
        if isinstance(first, TorchTensor):
            first = DistributedTensor("", local=first, shape=first.shape)
            leaves = [first]
        if first.dimension is None:
            leaves = leaves[:1]
        if len({(leaf.shape, leaf.dimension, leaf.local.dtype) for leaf in leaves}) > 1:
            raise ValueError(f"the ranks have different shapes or splits of {shown(key)}")
        dimension = first.dimension or 0
        firsts = [0]
        for leaf in leaves:
            shape = leaf.local.shape
            expected = (*first.shape[:dimension], *shape[dimension : dimension + 1], *first.shape[dimension + 1 :])
            # An empty part may have any shape.
            if shape != expected and 0 not in shape:
                raise ValueError(f"a part of {shown(key)} has shape {shape}, but the tensor has {first.shape}")
            firsts.append(firsts[-1] + (0 if 0 in shape or not shape else shape[dimension]))
        if first.shape and firsts[-1] != first.shape[dimension]:
            raise ValueError(f"the parts of {shown(key)} do not add up to its shape {first.shape}")
        self.add(key, first.shape, first.local.dtype)
        self._parts[key] = list(zip(files, (leaf.local for leaf in leaves), strict=False)), firsts, dimension

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        parts, firsts, dimension = self._parts[key]
        shape = self.tensors[key].shape
        missing = np.ones(out.size, np.bool_)
        for (file, tensor), (low, high) in zip(parts, pairwise(firsts), strict=True):
            if shape and high == low:
                continue
            offsets, sizes = _box(shape, dimension, low, high)

            def fetch(
                first: int, buffer: NDArray[Any], file: TorchFile = file, tensor: TorchTensor = tensor
            ) -> None:
                file.read_part(tensor, key, first, buffer)

            copy_box(offsets, sizes, shape, fetch, start, out, missing)

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        parts, firsts, dimension = self._parts[key]
        logged, boxes = self.tensors[key], []
        for (file, tensor), (low, high) in zip(parts, pairwise(firsts), strict=True):
            if logged.shape and high == low:
                continue
            ranges = file.ranges_of(tensor, key)
            if ranges is None:
                return None
            boxes.append((*_box(logged.shape, dimension, low, high), ranges[0]))
        return of_boxes(boxes, logged.shape, storage_dtype(logged.dtype).itemsize)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def _box(shape: tuple[int, ...], dimension: int, low: int, high: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the offsets and sizes of a part of a tensor along one dimension."""
    offsets = tuple(low if axis == dimension else 0 for axis in range(len(shape)))
    return offsets, tuple(high - low if axis == dimension else length for axis, length in enumerate(shape))
