"""Search a folder for logs, and find the format that a folder without a log resembles most."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.step_folder import Kind
from natgrad.sources.formats import FORMATS, find_format, unnumbered_format
from natgrad.sources.recognition import run_parts, single_log
from natgrad.sources.run_file import find_run_file
from natgrad.sources.step_names import parse_name, words
from natgrad.storage import LocalStorage

__all__ = [
    "FoundLog",
    "array_suffixes",
    "is_step_file",
    "logs_below",
    "names_below",
    "nearest_format",
    "skeleton",
    "step_suffixes",
    "typical",
    "unknown_files",
]

_DEPTH = 5
_ENTRIES_LIMIT = 1 << 16
_TYPICAL = 8
"""Number of entries with names of the same form that are examined."""

_EXAMINED = 64
"""Number of files of a folder that are examined."""

_SNIFFED = 2
_ARRAY_DEPTH = 3


@dataclass(frozen=True)
class FoundLog:
    """A log that was found by its content.

    Attributes
    ----------
    path : Path
        File or folder.
    format : str
        Name of its format, or ``run file``. Empty for a folder without a known log, in which files may be steps, or
        several folders have names that differ only in numbers.
    scalars : bool
        It contains scalars, but no tensors.
    is_second : bool
        The folder also contains a log of another format, which is the one that is read by default.
    """

    path: Path
    format: str
    scalars: bool = False
    is_second: bool = False


def skeleton(name: str) -> str:
    """Return the form of a name: all numbers are replaced by ``#``."""
    return re.sub(r"[0-9]+", "#", name)


def typical(paths: Iterable[Path]) -> list[Path]:
    """Return the first few paths with names of the same form; a folder may have thousands of them."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(skeleton(path.name), []).append(path)
    return [path for group in found.values() for path in group[:_TYPICAL]]


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the regular files in a folder, without hidden ones, sorted by name."""
    folders, files = [], []
    with suppress(OSError), os.scandir(folder) as entries:
        for _, entry in zip(range(_ENTRIES_LIMIT), entries, strict=False):
            with suppress(OSError):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(folder / entry.name)
                elif stat.S_ISREG(entry.stat().st_mode):
                    files.append(folder / entry.name)
    return sorted(folders), sorted(files)


def logs_below(folder: Path, stop: Callable[[], bool] = lambda: False) -> Iterator[FoundLog]:
    """Yield the logs in a folder and below it, the folder itself first. Only the beginnings of files are read.

    Folders that are steps of a log that was found, Zarr groups and natgrad stores are not searched. Linked folders
    are searched once.

    Parameters
    ----------
    folder : Path
    stop : callable
        The search ends when it returns True.
    """
    queue, seen = deque([(folder, 0, "")]), set[tuple[int, int]]()
    while queue and not stop():
        path, depth, above = queue.popleft()
        try:
            status = path.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if find_run_file(LocalStorage(path)) is not None:
            yield FoundLog(path, "run file")
            continue
        name = _format_of(path) or unnumbered_format(path)
        parts = [] if name is not None and FORMATS[name].scalars is None else run_parts(path)
        name = _format_of(single_log(parts[0])) if parts else name
        scalars = name is not None and FORMATS[name].scalars is not None
        # The folder of a logger contains others that are read together with it.
        logger = name if scalars and name is not None else above
        if name is not None and not (scalars and name == above):
            yield FoundLog(path, name, scalars)
            if not scalars and not parts:
                yield from (FoundLog(path, other, is_second=True) for other in _other_formats(path, name))
        if any((path / name).exists() for name in ("zarr.json", ".zgroup", "trajectory.zarr", "steps.zarr")):
            continue
        folders, files = _entries(path)
        if name is None and (_numbered(folders, files) or (path == folder and _holds_arrays(folder))):
            yield FoundLog(path, "")
        if stop():
            return
        has_steps = name is not None and not scalars
        suffixes = step_suffixes() if has_steps else ()
        for file in typical(file for file in files if not file.name.endswith(suffixes))[:_EXAMINED]:
            found = _format_of(file)
            if found is not None and found != logger:
                yield FoundLog(file, found, FORMATS[found].scalars is not None)
        below = [
            entry
            for entry in folders
            if entry not in parts and not (has_steps and parse_name(entry.name).number is not None)
        ]
        if depth < _DEPTH:
            queue += [(entry, depth + 1, logger) for entry in typical(below)]


def _other_formats(folder: Path, name: str) -> Iterator[str]:
    """Yield the formats of other steps in a folder, such as ``grads_<N>.npz`` next to ``checkpoint-<N>``."""
    folders, files = _entries(folder)
    entries = typical([*folders, *files])
    taken: set[Path] = set()
    for format in (name, *(other for other in FORMATS if other != name)):
        own = {entry for entry in entries if any(kind.holds(entry) for kind in FORMATS[format].kinds)}
        if format != name and own and not own & taken:
            yield format
        taken |= own


def _format_of(path: Path) -> str | None:
    """Return the format of a path; None if it has none or cannot be read, which opening it as a log reports."""
    try:
        return find_format(path)
    except (OSError, InputError):
        return None


def _numbered(folders: list[Path], files: list[Path]) -> bool:
    """Return True if several folders have names that differ only in numbers, or if files may be steps."""
    suffixes = step_suffixes()
    forms = Counter(skeleton(path.name) for path in folders)
    return any(count > 1 and "#" in form for form, count in forms.items()) or any(
        file.name.endswith(suffixes) or is_step_file(file) for file in typical(files)[:_EXAMINED]
    )


def _holds_arrays(folder: Path) -> bool:
    """Return True if there are files of one array below a folder: their folders may be those of one step."""
    return any(name.endswith(array_suffixes()) for name in names_below(folder, _ARRAY_DEPTH))


def step_suffixes() -> tuple[str, ...]:
    """Return the endings of the names of files that contain a step, in all formats."""
    kinds = (kind for known in FORMATS.values() for kind in known.kinds)
    return tuple(dict.fromkeys(suffix for kind in kinds for suffix in kind.suffixes))


def array_suffixes() -> tuple[str, ...]:
    """Return the endings of the names of files that contain one array."""
    return tuple(
        suffix for known in FORMATS.values() for kind in known.kinds if kind.one_array for suffix in kind.suffixes
    )


def nearest_format(folder: Path) -> tuple[str, str] | None:
    """Return the format that most entries of a folder resemble, and why they are not a log of this format.

    Returns
    -------
    tuple of str, optional
        Name of the format, and the reason. None if the entries resemble no format.
    """
    folders, files = _entries(folder)
    found: list[tuple[bool, int, str, str]] = []
    for name, known in FORMATS.items():
        for kind in known.kinds:
            similar = _similar(kind, folders, files)
            if similar:
                same_words = words(kind.layout.replace("<N>", "")) == words(similar[0].name)
                why = f"{_why(kind, similar[0])}; {name} is a {known.layout}"
                found.append((same_words, len(similar), name, why))
    if found:
        *_, name, why = max(found, key=lambda one: one[:2])
        return name, why
    return _nearest_by_content(files)


def _similar(kind: Kind, folders: list[Path], files: list[Path]) -> list[Path]:
    """Return the entries that have the ending of a kind, or the numbered folders if it has none."""
    if kind.suffixes:
        return [path for path in (*files, *folders) if kind.stem(path.name) is not None]
    return [path for path in folders if parse_name(path.name).number is not None]


def _why(kind: Kind, path: Path) -> str:
    """Return why an entry is not a step of a kind."""
    named = parse_name(kind.stem(path.name) or path.name)
    if named.number is None:
        return f"{path.name!r} is not a step: {named.problem or 'its name has no number that may be a step'}"
    return f"{path.name!r} has a step number, but not the content of {kind.layout}"


def _nearest_by_content(files: list[Path]) -> tuple[str, str] | None:
    """Return the same for files with unknown endings, some of which are examined."""
    for path in typical(files)[:_SNIFFED]:
        for name, known in FORMATS.items():
            for kind in known.kinds:
                if kind.suffixes and is_step_file(path) and kind.content(path):
                    return name, (
                        f"the content of {path.name!r} is that of {kind.layout}, but its name does not end in "
                        f"{', '.join(kind.suffixes)}, and no pattern selects several files"
                    )
    return None


def unknown_files(folder: Path) -> list[Path]:
    """Return files with a step in their names whose content is of no format; empty if others are of a format."""
    _, files = _entries(folder)
    steps = [path for path in typical(files)[:_EXAMINED] if parse_name(path.stem).number is not None]
    suffixes = step_suffixes()
    return [] if any(path.name.endswith(suffixes) or is_step_file(path) for path in steps) else steps


def is_step_file(path: Path) -> bool:
    """Return True if the content of a file is that of a step in some format, regardless of its name."""
    try:
        return any(kind.content(path) for known in FORMATS.values() for kind in known.kinds)
    except (OSError, InputError):
        return False


def names_below(folder: Path, depth: int) -> list[str]:
    """Return the relative names of the files in a folder and up to some levels below, of typical names only."""
    found: list[str] = []
    level = [folder]
    for _ in range(depth):
        below: list[Path] = []
        for entry in level[:_EXAMINED]:
            folders, files = _entries(entry)
            found += [path.relative_to(folder).as_posix() for path in typical(files)[:_EXAMINED]]
            below += typical(folders)
        level = below
    return sorted(found)
