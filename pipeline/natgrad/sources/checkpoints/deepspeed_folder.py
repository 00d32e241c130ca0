"""Read checkpoint folders of DeepSpeed, ZeRO stages 0 to 3, in one process without DeepSpeed, slice by slice.

The flat float32 master weights are stored in one ``*_optim_states.pt`` per data parallel rank. Their names and
shapes are listed in the same order in ``param_shapes`` of ``*_model_states.pt``. Up to stage 2, the concatenated
ranks are the weights of a parameter group. In stage 3, every rank has its share of every parameter. The optimizer
state of a group has the same layout as its weights.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES, storage_dtype
from natgrad.sources.bounds import Budget, integer, shape_of, shown
from natgrad.sources.byte_ranges import ByteRange, part_of
from natgrad.sources.checkpoints import pickle_data
from natgrad.sources.checkpoints.step_folder import Kind, not_latest_yet
from natgrad.sources.checkpoints.torch_archive import (
    TorchArchive,
    TorchFile,
    TorchTensor,
    flat_numbers,
    group_texts,
    to_float,
    unread_objects,
)
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.steps import LoggedStep, where
from natgrad.storage import LocalStorage, open_regular

__all__ = ["DEEPSPEED_KIND", "DeepSpeedFolder"]

_FORM = "a DeepSpeed checkpoint"
_CLASSES = ("deepspeed.*",)
_MODEL_STATES = "_model_states.pt"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_optim_states\.pt")
_ARRAYS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Arrays that optimizers keep for each element."""
_ZERO = "zero"
"""Folder of a universal checkpoint (``ds_to_universal``)."""

_SHARDED = {
    r"layer_\d+-.*model_states\.pt": "its layers are split over pipeline stages",
    r"layer_\d+_expert_.*|expp_rank_.*": "its experts are split over ranks",
}

_UNIVERSAL = "merge it with DeepSpeed (python -m deepspeed.checkpoint.ds_to_universal) and save its tensors by name"


def _is_checkpoint(path: Path) -> bool:
    try:
        return path.is_dir() and any(file.name.endswith(_MODEL_STATES) for file in path.iterdir())
    except OSError:
        return False


DEEPSPEED_KIND = Kind(
    "global_step<N>/",
    _is_checkpoint,
    lambda step, names: DeepSpeedFolder(step, names.inert, masters=names.keys["parameter"][0] != "parameter"),
    replace(
        CHECKPOINT,
        keys={**CHECKPOINT.keys, "parameter": ("parameter", "module"), "step": ("global_steps",)},
    ),
    lambda path: not_latest_yet(path, "latest"),
)


@dataclass(frozen=True)
class _Segment:
    """A contiguous range of elements of a vector in a file."""

    path: Path
    position: int
    size: int


@dataclass(frozen=True)
class _OptimizerShard:
    """Optimizer state of a rank for a parameter group.

    Attributes
    ----------
    arrays : dict
        Arrays in `_ARRAYS`, each with its range and dtype.
    updates : float, optional
    options : int, optional
        Number of the optimizer group that has its options.
    """

    arrays: dict[str, tuple[_Segment, str]]
    updates: float | None
    options: int | None


@dataclass(frozen=True)
class _Rank:
    """Contents of the optimizer file of a rank.

    Attributes
    ----------
    stage_3 : bool
        True for stage 3.
    segments : list of _Segment
        Weights of each parameter group.
    dtype : str
        Dtype of the weights.
    gaps
        Numbers of padding elements after the parameters.
    shards : list of _OptimizerShard
        Optimizer state for each parameter group.
    options : dict
        Options of the optimizer groups, by their keys below ``param_groups``.
    flags : dict
        The same for options that are strings or Booleans.
    """

    stage_3: bool
    segments: list[_Segment]
    dtype: str
    gaps: Any
    shards: list[_OptimizerShard]
    options: dict[str, float]
    flags: dict[str, str]


class _Vector:
    """A vector that is split over several files."""

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self._segments = [segment for segment in segments if segment.size]
        self._ends = list(accumulate(segment.size for segment in self._segments))
        self.size = self._ends[-1] if self._ends else 0

    def fill(self, start: int, out: NDArray[Any]) -> None:
        """Fill an array with the elements that start at an index."""
        done = 0
        while done < out.size:
            index = bisect_right(self._ends, start + done)
            segment = self._segments[index]
            first = start + done - (self._ends[index] - segment.size)
            block = out[done : done + min(out.size - done, segment.size - first)]
            descriptor = open_regular(segment.path)
            try:
                Region(descriptor).fill(segment.position + first * out.itemsize, block)
            finally:
                os.close(descriptor)
            done += block.size

    def ranges(self, start: int, elements: int, itemsize: int) -> list[ByteRange]:
        """Return where the elements that start at an index are."""
        segments = [ByteRange(LocalStorage(each.path), each.position, each.size) for each in self._segments]
        return part_of(segments, itemsize, start, elements) or []


@dataclass(frozen=True)
class _TensorLocation:
    """Position of the elements of a tensor: ``share`` elements from ``offset`` of each vector, in this order."""

    vectors: Sequence[_Vector]
    offset: int
    share: int


class DeepSpeedFolder(Container):
    """One checkpoint.

    The keys below ``parameter`` are the master weights, if the ranks have them, and those below ``optimizer`` are
    the optimizer state, by tensor name. The other keys are those of the model states, including ``module`` and the
    ``client_state`` of the user.

    Parameters
    ----------
    step : LoggedStep
    inert : collection of str
        Classes whose pickled objects are skipped.
    masters : bool
        Also treat the master weights as a part of the optimizer state, because other parameters are used.

    Raises
    ------
    InputError
        If files are missing, corrupt or unexpected, if they do not contain what the shapes imply, or if tensors of
        the model are split in a way that the files do not record.
    """

    ordered = True

    def __init__(self, step: LoggedStep, inert: Collection[str] = (), *, masters: bool = False) -> None:
        super().__init__(step)
        self._inert, self._masters = (*_CLASSES, *inert), masters
        self._locations: dict[str, _TensorLocation] = {}
        self._universal: dict[str, LoggedStep] = {}
        self._model: TorchFile | None = None
        try:
            with read_errors(step, _FORM):
                sizes = {path.name: path.stat().st_size for path in step.path.iterdir()}
                universal = sum(path.stat().st_size for path in (step.path / _ZERO).glob("*/fp32.pt"))
                self.budget = Budget(sum(sizes.values()) + universal)
                self._describe(sorted(sizes))
        except BaseException:
            self.close()
            raise

    # Description

    def _describe(self, names: Sequence[str]) -> None:
        for pattern, why in _SHARDED.items():
            if any(re.fullmatch(pattern, name) for name in names):
                raise self._split(why)
        models = _ranked(_MODEL, names)
        optimizers = _ranked(_OPTIMIZER, names)
        if any(model_rank for _, model_rank in (*models, *optimizers)):
            raise self._split("its tensors are split over model parallel ranks, and no file records the axis")
        first = models.get((0, 0))
        if first is None:
            raise ValueError("it has no model states of rank 0")
        self._model = TorchFile(LoggedStep(self.step.number, self.step.storage / first), self._inert)
        states = self._model.tree
        self.numbers, self.texts = dict(self._model.numbers), dict(self._model.texts)
        self.objects |= self._model.objects
        partitioned = set()
        if optimizers:
            partitioned = self._add_partitions(states, [optimizers[key] for key in sorted(optimizers)])
        if _ZERO in names:
            self._add_universal()
        for key, logged in self._model.tensors.items():
            array, _, name = key.partition("/")
            # In stage 3, the parameters here are empty placeholders, and frozen ones are the share of rank 0.
            if not (array == "module" and name in partitioned) and array != "frozen_param_fragments":
                self.add(key, logged.shape, logged.dtype)
        self.ties |= {
            key: target
            for key, target in self._model.ties.items()
            if key in self.tensors and target in self.tensors
        }

    def _add_universal(self) -> None:
        """Add the float32 weights of a universal checkpoint, each in its own file ``zero/<tensor>/fp32.pt``."""
        for path in sorted((self.step.path / _ZERO).glob("*/fp32.pt")):
            name = path.parent.name
            file = LoggedStep(self.step.number, self.step.storage / _ZERO / name / path.name)
            with TorchFile(file, self._inert) as content:
                if "param" not in content.tensors:
                    raise ValueError(f"{_ZERO}/{name}/{path.name} has no tensor param")
                tensor = content.tensors["param"]
            self.add(f"parameter/{name}", tensor.shape, tensor.dtype)
            self._universal[f"parameter/{name}"] = file
        self.unread["optimizer"] = "the optimizer state of a universal checkpoint is not supported"

    def _split(self, why: str) -> InputError:
        return InputError(f"this checkpoint cannot be merged: {why}", where=where(self.step), remedy=_UNIVERSAL)

    def _add_partitions(self, states: Mapping[str, Any], files: Sequence[str]) -> set[str]:
        """Add the master weights. Return the names of those that the model states do not contain."""
        groups = states["param_shapes"]
        groups = [groups] if isinstance(groups, dict) else list(groups)
        shared = dict(states.get("shared_params") or {})
        ranks = [self._rank(file, len(files)) for file in files]
        if len({(rank.stage_3, rank.dtype) for rank in ranks}) != 1:
            raise ValueError("its ranks contain weights of different stages or dtypes")
        stage_3, dtype = ranks[0].stage_3, ranks[0].dtype
        segments = [rank.segments for rank in ranks]

        def locate(segments: Sequence[Sequence[_Segment]]) -> dict[str, tuple[tuple[int, ...], _TensorLocation]]:
            return (
                _locate_stage_3(groups, segments) if stage_3 else _locate_stage_2(groups, segments, ranks[0].gaps)
            )

        locations = locate(segments)
        for name, (shape, location) in locations.items():
            self.add(f"parameter/{name}", shape, dtype)
            self._locations[f"parameter/{name}"] = location
        for alias, name in shared.items():
            if not isinstance(alias, str) or not isinstance(name, str):
                raise ValueError(f"shared_params has {shown(alias)} or {shown(name)} as the name of a tensor")
            if name in locations and alias not in locations:
                self.add(f"parameter/{alias}", locations[name][0], dtype)
                self._locations[f"parameter/{alias}"] = locations[name][1]
                self.ties[f"parameter/{alias}"] = f"parameter/{name}"
        self._add_optimizer(groups, ranks, locate)
        return {*locations, *shared, *(states.get("frozen_param_shapes") or {})} if stage_3 else set()

    def _add_optimizer(
        self,
        groups: Sequence[Mapping[str, Any]],
        ranks: Sequence[_Rank],
        locate: Callable[[Sequence[Sequence[_Segment]]], dict[str, tuple[tuple[int, ...], _TensorLocation]]],
    ) -> None:
        """Add the optimizer state, under the keys that torch uses when it saves names."""
        if not all(rank.shards for rank in ranks):
            return
        for array in _ARRAYS:
            dtypes = {shard.arrays[array][1] for rank in ranks for shard in rank.shards if array in shard.arrays}
            if not dtypes:
                continue
            lacking = [
                index
                for rank in ranks
                for index, (segment, shard) in enumerate(zip(rank.segments, rank.shards, strict=True))
                if segment.size and array not in shard.arrays
            ]
            if lacking or len(dtypes) > 1:
                # The offsets of the remaining parts depend on the missing ones.
                why = f"group {lacking[0]} of a rank has none that matches its weights" if lacking else ""
                self.unread[f"optimizer/{array}"] = why or "it has several dtypes"
                continue
            none = _Segment(self.step.path, 0, 0)
            segments = [[shard.arrays.get(array, (none, ""))[0] for shard in rank.shards] for rank in ranks]
            self._add_state(array, locate(segments), dtypes.pop())
        if self._masters:
            self._add_state("master_param", locate([rank.segments for rank in ranks]), ranks[0].dtype)
        self.numbers |= {f"optimizer/{key}": value for key, value in ranks[0].options.items()}
        self.texts |= {f"optimizer/{key}": text for key, text in ranks[0].flags.items()}
        members: dict[int, int] = {}
        for group, shard in zip(groups, ranks[0].shards, strict=True):
            for name in group:
                if shard.updates is not None:
                    self.numbers[f"optimizer/state/{name}/step"] = shard.updates
                if shard.options is not None:
                    index = members[shard.options] = members.get(shard.options, -1) + 1
                    self.texts[f"optimizer/param_groups/{shard.options}/params/{index}"] = name

    def _add_state(
        self, array: str, locations: dict[str, tuple[tuple[int, ...], _TensorLocation]], dtype: str
    ) -> None:
        for name, (shape, location) in locations.items():
            self.add(f"optimizer/state/{name}/{array}", shape, dtype)
            self._locations[f"optimizer/state/{name}/{array}"] = location

    def _rank(self, file: str, ranks: int) -> _Rank:
        path = self.step.path / file
        descriptor = open_regular(path)
        try:
            archive = TorchArchive(Region(descriptor), self._inert, self.budget)
            self.objects |= unread_objects(archive.leaves())
            state = archive.tree["optimizer_state_dict"]
            stage_3 = "fp32_flat_groups" in state
            flat = state["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
            count = state["partition_count"]
            counts = {_count(number) for number in (count if isinstance(count, list) else [count])}
            if len(counts) != 1:
                raise self._split("its parameter groups are split over different numbers of ranks")
            if counts != {ranks}:
                raise ValueError(
                    f"it was written by {counts.pop()} ranks, but there are {ranks} *_optim_states.pt: one was "
                    "not saved, or remains from an earlier save"
                )
            flat = [flat] if isinstance(flat, TorchTensor) else flat
            if not all(isinstance(t, TorchTensor) and len(t.shape) == 1 and t.contiguous for t in flat):
                raise ValueError(
                    f"the master weights in {file} are not flat tensors (offloaded weights are not supported)"
                )
            dtypes = {tensor.dtype for tensor in flat}
            if len(dtypes) != 1:
                raise ValueError(
                    f"the master weights in {file} have the dtypes {', '.join(sorted(dtypes)) or 'none'}"
                )
            segments = [_Segment(path, archive.position(tensor), tensor.shape[0]) for tensor in flat]
            optimizer = state.get("optimizer_state_dict" if stage_3 else "base_optimizer_state")
            step = state.get("base_optimizer_state_step")
            padding = state.get("group_paddings") or []
            shards = _optimizer_shards(archive, path, optimizer, step, segments, padding)
            options = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
            leaves = list(pickle_data.flatten({"param_groups": _without_members(options)}, self.budget))
            return _Rank(
                stage_3,
                segments,
                dtypes.pop(),
                state.get("param_alignment_paddings"),
                shards,
                flat_numbers(leaves),
                group_texts(leaves),
            )
        finally:
            os.close(descriptor)

    # Reading

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        if key in self._universal:
            with TorchFile(self._universal[key], self._inert) as content:
                content.read("param", start, out)
            return
        if key not in self._locations:
            assert self._model is not None
            self._model.read(key, start, out)
            return
        location = self._locations[key]
        with read_errors(self.step, _FORM, key):
            done = 0
            while done < out.size:
                vector, first = divmod(start + done, location.share)
                block = out[done : done + min(out.size - done, location.share - first)]
                location.vectors[vector].fill(location.offset + first, block)
                done += block.size

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        if key in self._universal:
            with TorchFile(self._universal[key], self._inert) as content:
                return content.ranges("param")
        if key not in self._locations:
            assert self._model is not None
            return self._model.ranges(key)
        location, logged, found = self._locations[key], self.tensors[key], list[ByteRange]()
        left, itemsize = math.prod(logged.shape), storage_dtype(logged.dtype).itemsize
        for vector in location.vectors:
            found += vector.ranges(location.offset, min(location.share, left), itemsize)
            left = max(left - location.share, 0)
        return found

    def close(self) -> None:
        """Close the files."""
        if self._model is not None:
            self._model.close()


def _ranked(pattern: re.Pattern[str], names: Sequence[str]) -> dict[tuple[int, int], str]:
    """Return file names by data parallel and model parallel rank."""
    found: dict[tuple[int, int], str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            rank = int(match[1] or 0), int(match[2])
            if rank in found:
                raise ValueError(f"there are two files for rank {rank[0]}: {found[rank]} and {name}")
            found[rank] = name
    return found


def _count(number: Any) -> int:
    return integer(number, "a number of elements")


def _shapes(group: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for name, shape in group.items():
        if not isinstance(name, str):
            raise ValueError(f"param_shapes has {shown(name)} as the name of a tensor")
        shape = shape_of(shape, shown(name))
        yield name, shape, math.prod(shape)


def _without_members(groups: Any) -> list[Any]:
    """Return the options of the optimizer groups without their members, which are not tensors of the model."""
    groups = groups if isinstance(groups, list) else []
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _optimizer_shards(
    archive: TorchArchive,
    path: Path,
    optimizer: Any,
    step: Any,
    weights: Sequence[_Segment],
    padding: Sequence[Any],
) -> list[_OptimizerShard]:
    """Return the optimizer state of a rank for each group of weights; empty if it was not saved for each.

    The optimizer is one of torch whose parameters are the flat weights, or (elastic checkpoints) a list of their
    states. An array is used if its size is that of the weights, with or without the padding at the end.
    """
    groups: list[Any] = []
    if isinstance(optimizer, dict):
        groups = list(optimizer.get("param_groups") or [])
        states = optimizer.get("state") or {}
    else:
        states = dict(enumerate(optimizer)) if isinstance(optimizer, list) else {}
    # Torch numbers the parameters consecutively across groups, in the order in which DeepSpeed lists the weights.
    members = [(_count(member), number) for number, group in enumerate(groups) for member in group["params"]]
    owner = dict(members)
    if groups and (sorted(owner) != list(range(len(weights))) or len(owner) != len(members)):
        return []
    shards = []
    for index, segment in enumerate(weights):
        state, arrays = states.get(index) or {}, {}
        sizes = segment.size, segment.size + _count(padding[index] if index < len(padding) else 0)
        for array in _ARRAYS:
            tensor = state.get(array)
            if not isinstance(tensor, TorchTensor) or not tensor.contiguous or len(tensor.shape) != 1:
                continue
            if tensor.shape[0] in sizes and tensor.dtype in STORAGE_DTYPES:
                arrays[array] = _Segment(path, archive.position(tensor), segment.size), tensor.dtype
        updates = state.get("step", groups[owner[index]].get("step", step) if groups else step)
        if isinstance(updates, TorchTensor):
            updates = _scalar(archive, updates)
        known = isinstance(updates, int | float) and not isinstance(updates, bool)
        shards.append(_OptimizerShard(arrays, to_float(updates) if known else None, owner.get(index)))
    return shards


def _scalar(archive: TorchArchive, tensor: TorchTensor) -> float | None:
    """Return the value of a tensor with one number, or None for other tensors."""
    if math.prod(tensor.shape) != 1 or tensor.dtype not in ("float32", "float64", "int32", "int64"):
        return None
    value = np.zeros(1, tensor.dtype)
    archive.read(tensor, 0, value)
    return float(value[0])


def _locate_stage_2(
    groups: Sequence[Mapping[str, Any]], ranks: Sequence[Sequence[_Segment]], gaps: Any
) -> dict[str, tuple[tuple[int, ...], _TensorLocation]]:
    """Return the positions of parameters that are concatenated per group, split over ranks and padded."""
    if {len(segments) for segments in ranks} != {len(groups)}:
        raise ValueError(f"param_shapes has {len(groups)} groups, but the ranks have a different number")
    locations: dict[str, tuple[tuple[int, ...], _TensorLocation]] = {}
    for index, group in enumerate(groups):
        vector = _Vector([segments[index] for segments in ranks])
        paddings = gaps[index] if gaps else [0] * len(group)
        offset = 0
        for (name, shape, size), gap in zip(_shapes(group), paddings, strict=True):
            locations[name] = shape, _TensorLocation([vector], offset, max(size, 1))
            offset += size + _count(gap)
        # Some optimizers save padding to a multiple of twice the number of ranks.
        alignment = 2 * len(ranks)
        if not offset <= vector.size <= -(-offset // alignment) * alignment:
            raise ValueError(
                f"the shapes of group {index} have {offset} elements, but its ranks have {vector.size}"
            )
    return locations


def _locate_stage_3(
    groups: Sequence[Mapping[str, Any]], ranks: Sequence[Sequence[_Segment]]
) -> dict[str, tuple[tuple[int, ...], _TensorLocation]]:
    """Return the positions of parameters that are divided equally over the ranks; the last share is padded."""
    vectors = [_Vector(segments) for segments in ranks]
    locations: dict[str, tuple[tuple[int, ...], _TensorLocation]] = {}
    offset = 0
    for group in groups:
        for name, shape, size in _shapes(group):
            share = -(-size // len(ranks))
            locations[name] = shape, _TensorLocation(vectors, offset, max(share, 1))
            offset += share
    for rank, vector in enumerate(vectors):
        if vector.size != offset:
            raise ValueError(f"the shapes have {offset} elements per rank, but rank {rank} has {vector.size}")
    return locations
