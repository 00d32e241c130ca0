"""Match the names of gradients with those of parameters if they differ by what a wrapper or library adds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.names import REPLICATE_STATES, STATES
from natgrad.sources.base import Ranged, Recorded, Source, StepContent, StepReader, before_restarts
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.configured import configuration_of
from natgrad.sources.names import SINGLE_ARRAY
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import Storage

__all__ = ["MatchedNames", "matched_names"]

_ADDED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "default", "modules_to_save")
"""Levels of names that DDP, torch.compile, FSDP, activation checkpointing and PEFT add."""

_LEVEL = re.compile(rf"(?:^|(?<=[./]))(?:{'|'.join(_ADDED)})(?:[./]|$)")


def _plain(name: str) -> str:
    """Return a name without added levels, and with dots between levels.

    Examples
    --------
    >>> [_plain(name) for name in ("module.fc.weight", "q.lora_A.default.weight", "lora_embedding_A.default")]
    ['fc.weight', 'q.lora_A.weight', 'lora_embedding_A']
    >>> _plain("fc/weight")
    'fc.weight'
    """
    return _LEVEL.sub("", name).rstrip("./").replace("/", ".")


def matched_names(
    parameters: Mapping[str, LoggedTensor],
    others: Mapping[str, LoggedTensor],
    aliases: Mapping[str, str],
    *,
    replicates: bool = False,
) -> dict[str, str]:
    """Return the names of tensors that have no parameter of the same name, each with the parameter it matches.

    A tensor matches a parameter if their names are equal without the levels that wrappers and libraries add,
    regardless of the separator of levels, or if the file of the parameters states that both names are of one
    tensor. No other tensor or parameter may have that name, and the shapes must agree.

    Parameters
    ----------
    parameters, others : mapping
        Tensors of the parameters and of another array, by name.
    aliases : mapping
        Other names of parameters.
    replicates : bool
        The tensors have an additional first dimension.
    """
    free = [name for name in parameters if name not in others]
    missing = [name for name in others if name not in parameters]
    if not free or not missing:
        return {}
    candidates: dict[str, set[str]] = {}
    for name, target in (*((name, name) for name in free), *aliases.items()):
        if target in free:
            candidates.setdefault(_plain(name), set()).add(target)
    found: dict[str, list[str]] = {}
    for name in missing:
        for target in candidates.get(_plain(name), ()):
            found.setdefault(target, []).append(name)
    if len(parameters) == len(others) == 1 and SINGLE_ARRAY in (free[0], missing[0]):
        found = {free[0]: missing}
    matches = {names[0]: target for target, names in found.items() if len(names) == 1}
    single = [name for name in matches if len(candidates.get(_plain(name), {1})) == 1]
    return {
        name: matches[name]
        for name in single
        if others[name].shape[int(replicates) :] == parameters[matches[name]].shape
    }


class MatchedNames:
    """A log in which the tensors of all arrays have the names of the parameters.

    Parameters
    ----------
    source : Source
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def location(self) -> Path | Storage:
        """Location of the log, for messages."""
        return self._source.location

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        return self._source.steps()

    def earlier(self) -> list[MatchedNames]:
        """Return the log as it was before each restart; see `natgrad.sources.base.Restarted`."""
        return [MatchedNames(source) for source in before_restarts(self._source)]

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step; see `natgrad.sources.base.Source`."""
        with self._source.open(step) as reader:
            yield _MatchedStep(reader)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of a run; see `natgrad.sources.configured.Configured`."""
        return configuration_of(self._source, step, notes)


class _MatchedStep:
    """Reader of one step that renames the tensors of arrays."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader
        self._ranged = reader if isinstance(reader, Ranged) else None
        self._logged: dict[str, dict[str, str]] | None = None

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        content = self._reader.content()
        arrays, notes = dict(content.arrays), list(content.notes)
        parameters = arrays.get(STATES[0], {})
        self._logged = {}
        for array in (*STATES[1:], *REPLICATE_STATES):
            matches = matched_names(
                parameters, arrays.get(array, {}), content.aliases, replicates=array in REPLICATE_STATES
            )
            if not matches:
                continue
            self._logged[array] = {target: name for name, target in matches.items()}
            arrays[array] = {matches.get(name, name): tensor for name, tensor in arrays[array].items()}
            first = next(iter(matches))
            notes.append(
                f"{len(matches)} tensors of {array} have names that differ from those of their parameters and are "
                "matched, the "
                f"first is {first!r} with {matches[first]!r}; --exact-names switches this off"
            )
        return replace(content, arrays=arrays, notes=tuple(notes))

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self._reader.read(array, self._logged_name(array, tensor), start, out)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return None if self._ranged is None else self._ranged.ranges(array, self._logged_name(array, tensor))

    def placement(self, arrays: Collection[str]) -> Placement | None:
        """Return where the ranges of some arrays begin; see `natgrad.sources.base.Ranged`."""
        found = None if self._ranged is None else self._ranged.placement(arrays)
        return None if found is None else found.of((found.table, self._names))

    def products(self, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ledger of the update from this step; see `natgrad.sources.base.Recorded`."""
        assert isinstance(self._reader, Recorded)
        return self._reader.products([self._logged_name(STATES[0], tensor) for tensor in tensors])

    def _logged_name(self, array: str, tensor: str) -> str:
        return self._names.get(array, {}).get(tensor, tensor)

    @property
    def _names(self) -> dict[str, dict[str, str]]:
        if self._logged is None:
            self.content()
        assert self._logged is not None
        return self._logged
