"""Find the steps of a run in one file that has a group, a dict or a list entry for each step.

The keys of such a file have the step as one of their levels: ``step_10/params/w`` or ``10/params/w``, or, in a dict
of lists, ``params/10/w`` or ``params/w/10``. Without that level, they are the keys of a file of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import SCALARS, STATES
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.container import Container
from natgrad.sources.families import usual_families
from natgrad.sources.names import ROOT, Names
from natgrad.sources.step_names import Naming, is_step, words
from natgrad.sources.steps import LoggedStep

__all__ = ["GroupStep", "StepGroups", "step_groups"]

_CONSTANT = ("learning_rate", "lr", "decoupled_weight_decay", "weight_decay")
"""Settings that may be constant in a run."""

_POSITIONS = (0, 1, 2, -1)
"""Levels at which the step may be."""


@dataclass(frozen=True)
class StepGroups:
    """The keys of each step of a file.

    Attributes
    ----------
    keys : mapping
        By step, the keys of its contents, each by the key that a file of only this step would have.
    rows : mapping
        Position of each step among all steps, for arrays with one value for each step.
    origins : mapping
        Step to where its number was taken from.
    series : tuple of str
        Keys of arrays with one number for each step.
    unused : mapping
        Keys of other tensors, to why they belong to no step.
    """

    keys: Mapping[int, Mapping[str, str]]
    rows: Mapping[int, int]
    origins: Mapping[int, str]
    series: tuple[str, ...]
    unused: Mapping[str, str]


_Value = TypeVar("_Value")


class GroupStep(Container):
    """The part of a container that belongs to one step.

    Parameters
    ----------
    step : LoggedStep
    container : Container
        Container of the complete file. It is not closed together with this one.
    groups : StepGroups
    """

    def __init__(self, step: LoggedStep, container: Container, groups: StepGroups) -> None:
        super().__init__(step)
        self._container, self.budget = container, container.budget
        self._keys = groups.keys[step.number]
        of_step = {key: name for name, key in self._keys.items()}
        self.tensors = {
            name: container.tensors[key] for name, key in self._keys.items() if key in container.tensors
        }
        self.ordered = container.ordered
        self.numbers = self._part(container.numbers)
        self.texts, self.objects = self._part(container.texts), self._part(container.objects)
        self.unread = self._part(container.unread) | dict(groups.unused)
        self.ties = {
            of_step[key]: of_step[target]
            for key, target in container.ties.items()
            if key in of_step and target in of_step
        }
        fixed, remarks = constants(container)
        if not any(key in self.numbers or key in self.tensors for key in _CONSTANT):
            self.numbers |= fixed
            self.remarks = remarks
        row = groups.rows[step.number]
        for key in groups.series:
            values = container.vector(key)
            if row < len(values):
                self.numbers.setdefault(key, values[row])

    def _part(self, of_file: Mapping[str, _Value]) -> dict[str, _Value]:
        return {name: of_file[key] for name, key in self._keys.items() if key in of_file}

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        # Errors must name the step that is read, not the one that opened the file.
        self._container.step = self.step
        self._container.read(self._keys[key], start, out)

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return self._container.ranges(self._keys[key])


def constants(container: Container) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the settings of a file of all steps that are one number, and remarks on them.

    Parameters
    ----------
    container : Container
    """
    found = {
        key: value
        for key in _CONSTANT
        if key in container.numbers or (key in container.tensors and not container.tensors[key].shape)
        if (value := container.number(key)) is not None
    }
    return found, tuple(
        f"{key} is one number, {value:g}, which is used for all steps" for key, value in found.items()
    )


def step_groups(container: Container, names: Names) -> StepGroups | None:
    """Return the keys of each step of a file, or None if none of their levels is the step.

    Parameters
    ----------
    container : Container
        The open file.
    names : Names
        Keys of its quantities, and the rule by which steps are recognized.
    """
    for position in _POSITIONS:
        groups = _groups_at(position, container, names.naming)
        if groups and _are_steps(position, groups, container, names):
            return _numbered(groups, container, names)
    return None


def _groups_at(position: int, container: Container, naming: Naming) -> dict[str, dict[str, str]]:
    """Return the keys by the name of the step at a level; empty unless all tensors of several dimensions have one.

    The levels before it are omitted if all keys have the same ones, which then only contain the steps.
    """
    found: dict[str, dict[str, str]] = {}
    above: set[str] = set()
    split: list[tuple[str, str, str, str]] = []
    everything = (container.tensors, container.numbers, container.texts, container.objects, container.unread)
    for key in dict.fromkeys(key for keys in everything for key in keys):
        levels = key.split("/")
        at = position if position >= 0 else len(levels) - 1
        if at < len(levels) and _number_of(levels[at], naming) is not None:
            split.append((levels[at], "/".join(levels[:at]), "/".join(levels[at + 1 :]), key))
            above.add(split[-1][1])
        elif key in container.tensors and len(container.tensors[key].shape) > 1:
            return {}
    only = len(above) == 1 and all(rest for _, _, rest, _ in split)
    for name, before, rest, key in split:
        inner = rest if only else "/".join(filter(None, (before, rest)))
        if not inner:
            return {}
        found.setdefault(name, {})[inner] = key
    return found


def _number_of(level: str, naming: Naming) -> int | None:
    """Return the step that a level of a key names: it is a number, has a word for steps, or fits the pattern."""
    if not (naming.pattern or is_step(level)):
        return None
    return naming.parse((level,), level).number if naming.depth == 1 else None


def _are_steps(position: int, groups: Mapping[str, Mapping[str, str]], container: Container, names: Names) -> bool:
    """Return True if names of groups are those of steps. Numbers may also be those of layers or of models."""
    if names.naming.pattern or (position == 0 and all(words(name) for name in groups)):
        return True
    kinds = [set(_kinds(group, container, names)) for group in groups.values()]
    if position == 0 and {"parameter", "gradient"} <= kinds[0]:
        return True
    # Steps have numbers: a dict of lists has lists of numbers that are as long as those of the tensors.
    scalars = [sum(kind in SCALARS or kind == "step" for kind in of_group) for of_group in kinds]
    return len(groups) > 1 and min(scalars[:-1]) > 0


def _kinds(group: Mapping[str, str], container: Container, names: Names) -> Iterator[str]:
    """Yield the quantities that the keys of a group may be under the usual names."""
    tensors = {name: container.tensors[key] for name, key in group.items() if key in container.tensors}
    for quantity in (*STATES, *SCALARS, "step"):
        for usual in names.keys.get(quantity, ()):
            if usual != ROOT and any(name == usual or name.startswith(f"{usual}/") for name in group):
                yield quantity
                break
    yield from usual_families({name: logged for name, logged in tensors.items() if logged.dtype in STORAGE_DTYPES})


def _numbered(groups: Mapping[str, Mapping[str, str]], container: Container, names: Names) -> StepGroups:
    """Return groups by the step in their names, or, if the names are only numbers, by that in their contents."""
    by_name = {name: _number_of(name, names.naming) for name in groups}
    origins = {name: repr(name) for name in groups}
    if names.naming.keyed or all(name.isdecimal() for name in groups):
        inner = {name: _inner_number(group, container, names) for name, group in groups.items()}
        if None not in inner.values() or names.naming.keyed:
            by_name = inner
            origins = {name: f"the step number in {name!r}" for name in groups}
    numbers: dict[int, str] = {}
    for name, number in by_name.items():
        if number is None or number < 0 or number in numbers:
            what = f"step {number} exists twice, in {numbers[number]!r} and {name!r}" if number in numbers else ""
            raise InputError(
                what or f"{name!r} has no step number",
                where=str(container.step.storage),
                why="every group, or entry of a list, in this file is a step",
                remedy="remove or rename one of them, or specify the key of the step number with --map step=KEY",
            )
        numbers[number] = name
    rows = {number: row for row, number in enumerate(sorted(numbers))}
    grouped = {key for group in groups.values() for key in group.values()}
    rest = {key: logged.shape for key, logged in container.tensors.items() if key not in grouped}
    scalars = {key for quantity in SCALARS for key in names.keys.get(quantity, ())}
    series = tuple(
        key for key, shape in rest.items() if key in scalars and shape in ((len(rows),), (len(rows) - 1,))
    )
    return StepGroups(
        {number: groups[name] for number, name in numbers.items()},
        rows,
        {number: origins[name] for number, name in numbers.items()},
        series,
        {key: "it belongs to no step" for key in rest if key not in (*series, *constants(container)[0])},
    )


def _inner_number(group: Mapping[str, str], container: Container, names: Names) -> int | None:
    for usual in names.keys["step"]:
        if usual in group and (group[usual] in container.numbers or group[usual] in container.tensors):
            value = container.number(group[usual])
            return int(value) if value is not None and value == int(value) else None
    return None
