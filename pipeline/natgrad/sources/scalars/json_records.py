"""Decode many JSON objects together, with nested keys joined by slashes.

orjson takes a fifth of the time of Python's parser, but refuses NaN, infinity and numbers beyond float64: texts
with them are decoded by Python's. Both accept a key that appears twice. Texts for which this cannot be excluded,
and those that are not valid, are decoded one by one by `natgrad.sources.bounds.parse_json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import orjson

from natgrad.sources.bounds import OPERATIONS, Budget, parse_json, shown
from natgrad.sources.scalars.columns import LINE_KEY, RUN_KEY, Batch, Decoded, columns_of

__all__ = ["NUMBER_CHARACTERS", "json_numbers", "json_object", "json_records"]

NUMBER_CHARACTERS = b"+-.0123456789Ee"
"""Characters of plain numbers, without those of NaN and infinity."""

_SPACED_COLONS = (" :", "\t:", "\r:", "\n:")
_CELLS = 4
"""Cells of a batch for each pair of its objects, above which the objects are decoded one by one."""


def json_records(
    texts: Sequence[str], wanted: Callable[[str], bool], name: str, numbers: Sequence[int], *, are_lines: bool
) -> Decoded:
    """Yield the wanted values of JSON objects, as one batch if possible.

    Parameters
    ----------
    texts : sequence of str
        The objects.
    wanted : callable
        Predicate of keys.
    name : str
        Name of a text in messages, such as "line", which is followed by its number.
    numbers : sequence of int
        Number of each text.
    are_lines : bool
        These are the numbers of lines.

    Raises
    ------
    ValueError
        If a text is not a JSON object, is nested too deeply or contains a key twice.
    """
    columns = _columns(texts, wanted)
    if columns is not None:
        yield Batch(len(texts), columns, numbers if are_lines else None)
        return
    for text, number in zip(texts, numbers, strict=True):
        line = {LINE_KEY: number} if are_lines else {}
        yield line | json_object(text, wanted, f"{name} {number}")


def _columns(texts: Sequence[str], wanted: Callable[[str], bool]) -> dict[str, list[Any]] | None:
    """Return the wanted values by key, with None where an object lacks one.

    Returns None if an object may contain a key twice, or must be decoded by another parser.
    """
    text = "\n".join(texts)
    # Each pair has a quotation mark and a colon. Strings may contain more of them: no key appears twice if there
    # are as many as different keys.
    pairs = text.count('":')
    are_spaced = text.count(":") != pairs and any(colon in text for colon in _SPACED_COLONS)
    if are_spaced or text.count("[") + text.count("{") > OPERATIONS:
        return None
    try:
        objects = list(map(orjson.loads, texts))
    except orjson.JSONDecodeError:
        try:
            objects = list(map(json.loads, texts))
        except (RecursionError, ValueError):
            return None
    if set(map(type, objects)) != {dict}:
        return None
    left = pairs
    cells = _CELLS * pairs + len(texts)
    columns: dict[str, list[Any]] = {}
    levels: list[tuple[str, list[dict[str, Any]]]] = [("", objects)]
    while levels:
        prefix, level = levels.pop()
        left -= sum(map(len, level))
        values_of = columns_of(level, cells)
        if values_of is None:
            return None
        cells -= len(values_of) * len(level)
        for key, values in values_of.items():
            kinds = set(map(type, values))
            if dict in kinds:
                levels.append((f"{prefix}{key}/", [value if type(value) is dict else {} for value in values]))
                values = [None if type(value) is dict else value for value in values]
            name = prefix + key
            if any(key in each and type(each[key]) is not dict for each in level) and wanted(name):
                if name in columns or (name == RUN_KEY and not kinds <= {str, type(None)}):
                    return None
                columns[name] = values
    return columns if not left else None


def json_numbers(texts: Sequence[bytes]) -> list[float] | None:
    """Return the values of JSON numbers; None if there may be other texts. Large integers are floats."""
    joined = b",".join(texts)
    if joined.translate(None, NUMBER_CHARACTERS) != b"," * (len(texts) - 1):
        return None
    try:
        return cast(list[float], orjson.loads(b"[%b]" % joined))
    except orjson.JSONDecodeError:
        return None


def json_object(text: str, wanted: Callable[[str], bool], position: str) -> dict[str, Any]:
    """Return the wanted values of a JSON object.

    Raises
    ------
    ValueError
        See `json_records`; ``position`` is used in the message.
    """
    values = parse_json(text, position)
    if not isinstance(values, dict):
        raise ValueError(f"{position} is not a JSON object")
    if not any(isinstance(value, dict) for value in values.values()):
        return {key: value for key, value in values.items() if wanted(key)}
    found: dict[str, Any] = {}
    for key, value in _flat(values, Budget(len(text))):
        if wanted(key):
            if key in found:
                raise ValueError(f"{position} contains {shown(key)} twice")
            found[key] = value
    return found


def _flat(values: Mapping[str, Any], budget: Budget) -> Iterator[tuple[str, Any]]:
    stack = [("", values)]
    while stack:
        prefix, level = stack.pop()
        budget.spend(characters=len(prefix) * len(level))
        for key, value in level.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}/", value))
            else:
                yield prefix + key, value
