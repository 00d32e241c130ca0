"""Define the configuration of a run: its plain values by key, such as ``optimizer.lr``."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from natgrad.schema.errors import InputError

__all__ = ["CONFIGURATION_FILE", "Scalar", "declared_configuration", "flat_configuration"]

Scalar = bool | int | float | str

CONFIGURATION_FILE = "configuration.json"
"""File next to a log in which a recorder stores the configuration of the run."""

_VALUES_LIMIT, _VISITS_LIMIT, _LEVELS_LIMIT = 1000, 20_000, 16
_TEXT_LIMIT, _LIST_LIMIT = 200, 16
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,14})")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def flat_configuration(tree: Any) -> dict[str, Scalar]:
    """Return the plain values of a nested configuration by key, with levels joined by dots.

    Text that is a number becomes one: MLflow stores all values as text, and YAML reads ``1e-3`` as text. Long texts
    are shortened. Keys that start with an underscore are private, lists of more than 16 items are data, and values
    of other types have no meaning here: they are omitted, as are values after the first 1,000.

    Parameters
    ----------
    tree
        Nested mappings and lists, which may contain themselves.

    Examples
    --------
    >>> flat_configuration({"optimizer": {"lr": "1e-3", "betas": [0.9, 0.95]}, "seed": 1, "resume": None})
    {'seed': 1, 'optimizer.lr': 0.001, 'optimizer.betas.0': 0.9, 'optimizer.betas.1': 0.95}
    """
    found: dict[str, Scalar] = {}
    waiting: deque[tuple[str, Any, int]] = deque([("", tree, 0)])
    for _ in range(_VISITS_LIMIT):
        if not waiting or len(found) >= _VALUES_LIMIT:
            break
        path, node, level = waiting.popleft()
        items: list[tuple[Any, Any]] = []
        if isinstance(node, Mapping):
            items = list(node.items())[:_VALUES_LIMIT]
        elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
            items = list(enumerate(node)) if len(node) <= _LIST_LIMIT else []
        elif path and (value := _scalar(node)) is not None:
            found[path] = value
        if level < _LEVELS_LIMIT:
            for key, item in items:
                if not (name := str(key)[:_TEXT_LIMIT]).startswith("_"):
                    waiting.append((f"{path}.{name}" if path else name, item, level + 1))
    return found


def _scalar(value: Any) -> Scalar | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)[:_TEXT_LIMIT] if abs(value) < 1 << 256 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and not re.fullmatch("[+-]?[0-9]+", text) and math.isfinite(float(text)):
        return float(text)
    return value if len(value) <= _TEXT_LIMIT else value[: _TEXT_LIMIT - 1] + "…"


def declared_configuration(configuration: Any) -> dict[str, Any]:
    """Return the configuration that a user passes to a recorder, as JSON can store it.

    Parameters
    ----------
    configuration : mapping
        Nested mappings and lists of numbers, text, paths, Booleans and None, for example ``vars(args)``.

    Raises
    ------
    InputError
        If it is not a mapping, or a value has another type.
    """
    if not isinstance(configuration, Mapping):
        raise InputError(
            f"configuration must be a mapping, got {type(configuration).__name__}",
            remedy="pass a dict, for example configuration=vars(args)",
        )
    return {str(key): _plain(value, str(key), 1) for key, value in configuration.items()}


def _plain(value: Any, key: str, level: int) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if level < _LEVELS_LIMIT and isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}", level + 1) for name, item in value.items()}
    if level < _LEVELS_LIMIT and isinstance(value, list | tuple):
        return [_plain(item, f"{key}.{index}", level + 1) for index, item in enumerate(value)]
    raise InputError(
        f"the value of {key!r} in the configuration is an object of type {type(value).__name__}",
        why="a configuration consists of numbers, text, paths, lists and mappings"
        f" of at most {_LEVELS_LIMIT} levels",
        remedy="convert the value, for example with str, or omit it",
    )
