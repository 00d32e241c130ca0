"""Divide the tensors of a model into groups: blocks, layers, and those whose names match a pattern.

The results of a group are those of the sum of its tensors, as the results of the model are those of all tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from natgrad.schema.errors import InputError

__all__ = ["BLOCK", "LAYER", "PATTERN", "TensorGroup", "groups_of"]

BLOCK, LAYER, PATTERN = "block", "layer", "pattern"
"""Kinds of groups."""

_SEPARATORS = re.compile(r"[./]")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose inner products are added.

    Attributes
    ----------
    name : str
    kind : str
        ``block``, ``layer`` or ``pattern``, or several of them, separated by commas.
    tensors : tuple of int
        Positions of the tensors in the layout, ascending.
    """

    name: str
    kind: str
    tensors: tuple[int, ...]


def groups_of(names: Sequence[str], requested: Sequence[str]) -> tuple[TensorGroup, ...]:
    """Return the groups of tensors.

    Parameters
    ----------
    names : sequence of str
        Names of all tensors.
    requested : sequence of str
        ``block``: the tensors whose names begin with the same numbered part, such as ``layers.3``; other tensors
        are in the group of their layer. ``layer``: the tensors of the same module, whose names differ in the last
        part only. Any other text is a pattern of names, in which ``*`` stands for any text. Blocks and layers are
        omitted if they are the same as the tensors or the model.

    Raises
    ------
    InputError
        If a pattern matches no tensor.

    Examples
    --------
    >>> names = ["wte.weight", "h.0.fc.weight", "h.0.fc.bias", "h.1.fc.weight", "h.1.fc.bias"]
    >>> [(group.name, group.tensors) for group in groups_of(names, ["block"])]
    [('wte', (0,)), ('h.0.*', (1, 2)), ('h.1.*', (3, 4))]
    >>> [(group.name, group.tensors) for group in groups_of(names, ["layer", "*.bias"])]
    [('wte', (0,)), ('h.0.fc', (1, 2)), ('h.1.fc', (3, 4)), ('*.bias', (2, 4))]
    """
    found: list[TensorGroup] = []
    for text in dict.fromkeys(requested):
        if text == BLOCK:
            found += _divided(names, [_block(name) for name in names], BLOCK)
        elif text == LAYER:
            found += _divided(names, [_layer(name) for name in names], LAYER)
        else:
            matches = tuple(at for at, name in enumerate(names) if name == text or fnmatchcase(name, text))
            if not matches:
                raise InputError(
                    f"no tensor has a name that matches {text!r}",
                    where="option groups",
                    why=f"the first tensors are {', '.join(map(repr, names[:4]))}",
                    remedy="correct the pattern: * stands for any text; or use block or layer",
                )
            found.append(TensorGroup(text, PATTERN, matches))
    return _merged(found)


def _merged(groups: Sequence[TensorGroup]) -> tuple[TensorGroup, ...]:
    """Merge groups of the same tensors, and give different groups different names."""
    found: dict[tuple[int, ...], TensorGroup] = {}
    for group in groups:
        same = found.get(group.tensors)
        if same is not None:
            found[group.tensors] = replace(same, kind=f"{same.kind}, {group.kind}")
        elif any(other.name == group.name for other in found.values()):
            found[group.tensors] = replace(group, name=f"{group.name} ({group.kind})")
        else:
            found[group.tensors] = group
    return tuple(found.values())


def _divided(names: Sequence[str], keys: Sequence[str], kind: str) -> list[TensorGroup]:
    members: dict[str, list[int]] = {}
    for at, key in enumerate(keys):
        members.setdefault(key, []).append(at)
    if not 1 < len(members) < len(names):
        return []
    return [TensorGroup(key, kind, tuple(tensors)) for key, tensors in members.items()]


def _layer(name: str) -> str:
    """Return the name of a tensor without its last part, or the name itself if it has only one."""
    ends = [match.start() for match in _SEPARATORS.finditer(name)]
    return name[: ends[-1]] if ends else name


def _block(name: str) -> str:
    """Return the name up to its first part that is a number, or otherwise up to the first that ends in one."""
    parts = list(_SEPARATORS.finditer(name))
    ends = [match.start() for match in parts]
    starts = [0, *(match.end() for match in parts)]
    modules = [(name[start:end], end) for start, end in zip(starts, ends, strict=False)]
    numbered = [end for text, end in modules if text.isdigit()] or [
        end for text, end in modules if text[-1:].isdigit()
    ]
    return f"{name[: numbered[0] + 1]}*" if numbered else _layer(name)
