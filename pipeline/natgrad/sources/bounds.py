"""Bound the time and memory of readers by the size of the files, and check the numbers in files.

A log may be damaged or malicious: a few bytes can declare exabytes, or describe a text that grows exponentially.
Every reader passes the numbers of headers, indices and pickles to `integer` and `shape_of`, parses JSON and TOML
with `parse_json` and `parse_toml`, shows parts of a file in messages with `shown`, and spends a `Budget`.
docs/reference/formats.md states the constants.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from natgrad.storage import LocalStorage, Storage, require_regular

__all__ = [
    "CHARACTERS",
    "EXPANDED_BYTES",
    "EXPANSION",
    "JSON_LIMIT",
    "OPERATIONS",
    "TENSOR_OPERATIONS",
    "Budget",
    "integer",
    "parse_json",
    "parse_json_at",
    "parse_toml",
    "read_limited",
    "shape_of",
    "shown",
    "surveyed",
]

OPERATIONS, BYTES_PER_OPERATION = 2_000_000, 32
"""Operations of a reader for any file, and bytes of the files for each further operation.

An operation takes about half a microsecond: an opcode of a pickle, a leaf of a tree, a list or an object in JSON.
"""

CHARACTERS, CHARACTERS_PER_BYTE = 1 << 26, 8
"""Characters in the names that a reader builds for any file, and for each byte of the files."""

EXPANDED_BYTES, EXPANSION = 1 << 28, 100
"""Bytes of the tensors of any step, and for each byte of its files. Compressed and repeated data count in full."""

TENSOR_OPERATIONS = 16
"""Operations that the description of a tensor takes."""

DIMENSIONS = 32
"""Maximum number of dimensions of a tensor."""

JSON_LIMIT = 1 << 27
"""Maximum size of a JSON file, in bytes."""

TOML_LIMIT, _TOML_LEVELS = 1 << 22, 64
"""Maximum size of a TOML file in bytes, and maximum number of dots in the keys of a line."""

_COUNT_LIMIT = (1 << 60) - 1
_SHOWN = 80


class Budget:
    """Operations, names and bytes that a reader may still spend on its files.

    Parameters
    ----------
    size : int
        Size of the files in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.operations = OPERATIONS + size // BYTES_PER_OPERATION
        self.characters = CHARACTERS + size * CHARACTERS_PER_BYTE
        self.expanded = EXPANDED_BYTES + size * EXPANSION

    def spend(self, operations: int = 0, characters: int = 0, expanded: int = 0) -> None:
        """Subtract operations, characters of names, or bytes of tensors.

        Raises
        ------
        ValueError
            If nothing is left: the contents are larger than those of any real file of this size.
        """
        self.operations -= operations
        self.characters -= characters
        self.expanded -= expanded
        if self.operations < 0 or self.characters < 0:
            raise ValueError(
                f"it describes more objects, or longer names, than {self.size} bytes can contain in a real log"
            )
        if self.expanded < 0:
            raise ValueError(
                f"its tensors would have more than {EXPANDED_BYTES + EXPANSION * self.size} bytes, which is "
                f"{EXPANSION} times the size of its files and {EXPANDED_BYTES} bytes"
            )


def surveyed(folder: Path) -> tuple[int, list[Path]]:
    """Check the files below a folder, for libraries that open files in it themselves.

    Returns
    -------
    size : int
        Size of the files in bytes.
    links : list of Path
        Links to folders, which are not followed.

    Raises
    ------
    NotRegularError
        If an entry is neither a regular file nor a folder.
    """
    size, links, folders = 0, [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_dir():
                    links.append(Path(entry.path))
                else:
                    size += require_regular(entry.path)
    return size, links


# Numbers and names -------------------------------------------------------------------------------------------


def integer(value: Any, what: str, *, least: int = 0, most: int = _COUNT_LIMIT) -> int:
    """Return a number from a file if it is an integer (not a Boolean) in a range.

    Parameters
    ----------
    value
        The number as decoded.
    what : str
        The meaning of the number, for the message.
    least, most : int
        Range; both ends are included.

    Raises
    ------
    ValueError
        If it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, which is not an integer from {least} to {most}")
    return value


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """Return a shape from a file if it is a tuple or list of valid lengths with a valid number of elements.

    Raises
    ------
    ValueError
        If it is not.
    """
    if type(value) in (tuple, list) and len(value) <= DIMENSIONS:
        # The usual case, without the texts for messages.
        are_lengths = all(type(length) is int and 0 <= length <= _COUNT_LIMIT for length in value)
        if are_lengths and math.prod(value) <= _COUNT_LIMIT:
            return tuple(value)
    if not isinstance(value, tuple | list) or len(value) > DIMENSIONS:
        found = f"{len(value)} dimensions" if isinstance(value, tuple | list) else shown(value)
        raise ValueError(f"the shape of {what} is {found}, not a list of at most {DIMENSIONS} lengths")
    shape = tuple(integer(length, f"a length in the shape of {what}") for length in value)
    integer(math.prod(shape), f"the number of elements of {what}")
    return shape


def shown(value: Any) -> str:
    """Return a short text for a value from a file, without control characters. Containers are not visited.

    Examples
    --------
    >>> shown("a" * 1000)[-5:], shown([[]]), shown(1 << 10_000)
    ('aa...', 'a list', 'an integer of 10001 bits')
    """
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN]) + ("..." if len(value) > _SHOWN else "")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * _SHOWN:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


# Text files --------------------------------------------------------------------------------------------------


def read_limited(file: Storage | Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises
    ------
    ValueError
        If it has more than ``limit`` bytes.
    OSError
        If it cannot be read, or is not a regular file.
    """
    storage = LocalStorage(file) if isinstance(file, Path) else file
    # A single request, without another one for the size: listing an object store reads small files in this way.
    (content,) = storage.get_ranges([(0, limit + 1)])
    if len(content) > limit:
        raise ValueError(f"{storage.name} has more than {limit} bytes")
    return content


def parse_json(content: bytes | str, name: str, budget: Budget | None = None) -> Any:
    """Return the value of a JSON document.

    Parameters
    ----------
    content : bytes or str
    name : str
        Its name, for messages.
    budget : Budget, optional
        By default, that of a file which contains only this text.

    Raises
    ------
    ValueError
        If it is not valid, nested too deeply or too complex, or if an object contains a key twice.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    if budget is not None or len(text) > OPERATIONS:  # a shorter text cannot exceed its own budget
        (budget or Budget(len(text))).spend(text.count("[") + text.count("{"))
    try:
        return _DECODER.decode(text)
    except (RecursionError, ValueError) as error:
        raise _json_error(name, error) from error


def parse_json_at(text: str, start: int, name: str) -> tuple[Any, int]:
    """Return the value at a position of a JSON document, and the position after it; see `parse_json`."""
    try:
        return _DECODER.raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        raise _json_error(name, error) from error


def _json_error(name: str, error: Exception) -> ValueError:
    # Entering a context takes as long as parsing a short text.
    return ValueError(f"{name} is nested too deeply" if isinstance(error, RecursionError) else f"{name}: {error}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {shown(_repeated(key for key, _ in pairs))} appears twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _repeated(names: Iterable[str]) -> str:
    known: set[str] = set()
    return next(name for name in names if name in known or known.add(name))  # type: ignore[func-returns-value]


_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"?|'[^']*'?")


def parse_toml(file: Storage | Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises
    ------
    ValueError
        If it is not valid, too long or nested too deeply.
    OSError
        If it cannot be read, or is not a regular file.
    """
    text = read_limited(file, TOML_LIMIT).decode("utf-8")
    # The parser takes memory that is quadratic in the number of parts of a dotted key.
    dotted = (line for line in text.split("\n") if line.count(".") > _TOML_LEVELS)
    if any(_QUOTED.sub("", line).count(".") > _TOML_LEVELS for line in dotted):
        raise ValueError(f"a line contains more than {_TOML_LEVELS} dots outside of quotes")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
