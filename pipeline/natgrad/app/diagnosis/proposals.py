"""Write a proposal to process a log as a command or a run file, and try it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from natgrad.ingestion.rehearsal import Rehearsal, rehearse
from natgrad.schema.logs import collected_warnings
from natgrad.schema.names import FROM_OPTIMIZER
from natgrad.sources.base import Source
from natgrad.sources.names import SCALAR_LOG_QUANTITIES
from natgrad.sources.opening import open_sources
from natgrad.sources.recovered import LARGEST_SPAN
from natgrad.sources.run_file import RUN_FILE
from natgrad.storage import Location, open_all, open_storage

__all__ = ["LOG_READERS", "Part", "Proposal", "advised", "scan_command"]


RECOVER = ["--gradient", FROM_OPTIMIZER]
"""Option that recovers gradients."""

LOG_READERS = ("natgrad.sources.checkpoints", "natgrad.sources.joined", "natgrad.sources.opening")
"""Loggers of the warnings about a log. Those about the installation are not collected."""


@dataclass(frozen=True)
class Part:
    """A log of a run, and how it is read.

    Attributes
    ----------
    location : str
        Path or URL.
    format : str, optional
    map, shift : mapping
    pattern : str
        Values of ``--format``, ``--map``, ``--shift`` and ``--pattern``.
    scalars : bool
        It is a log of scalars.
    """

    location: str
    format: str | None = None
    map: Mapping[str, str] = field(default_factory=dict)
    shift: Mapping[str, int] = field(default_factory=dict)
    pattern: str = ""
    scalars: bool = False

    @property
    def log(self) -> tuple[str, str | None]:
        """Location and format: a folder may contain logs of several formats."""
        return self.location, self.format

    @property
    def plain(self) -> bool:
        """Return True if it has no options."""
        return not (self.format or self.map or self.shift or self.pattern)

    def with_options(self, options: Mapping[str, Any]) -> Part:
        """Return a copy with more options."""
        return replace(
            self,
            map={**self.map, **options.get("map", {})},
            shift={**self.shift, **options.get("shift", {})},
            pattern=options.get("pattern", self.pattern),
        )

    def flags(self) -> list[str]:
        """Return the options as on the command line."""
        words = ["--format", self.format] if self.format else []
        words += [word for pair in self.map.items() for word in ("--map", "=".join(pair))]
        words += [word for name, steps in self.shift.items() for word in ("--shift", f"{name}={steps}")]
        return words + (["--pattern", self.pattern] if self.pattern else [])

    def entry(self, path: str) -> str:
        """Return the entry of a run file."""
        lines = ["[[source]]", f"path = {_quoted(path)}"]
        lines += [f"format = {_quoted(self.format)}"] if self.format else []
        for name, table in (("map", self.map), ("shift", self.shift)):
            pairs = ", ".join(f"{key} = {_quoted(value)}" for key, value in table.items())
            lines += [f"{name} = {{ {pairs} }}"] if pairs else []
        lines += [f"pattern = {_quoted(self.pattern)}"] if self.pattern else []
        return "".join(f"{line}\n" for line in lines)


def _quoted(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string is a basic string of TOML


@dataclass(frozen=True)
class Proposal:
    """A way to process a run: its logs, with their options.

    Attributes
    ----------
    parts : tuple of Part
        If it is ambiguous to which of several parts an option of the command line refers, they are written into a
        run file.
    shared : bool
        The options of the parts are those of the command line, which the user passed.
    allow_gaps, exact_names, sweep : bool
        Options of the command line.
    recover : bool
        Recover the gradients from the states of the optimizer (``--gradient from-optimizer``).
    folder : Path, optional
        Folder of the run file. Without one, there can be only one part with options.
    """

    parts: tuple[Part, ...]
    shared: bool = False
    allow_gaps: bool = False
    exact_names: bool = False
    sweep: bool = False
    recover: bool = False
    folder: Path | None = None

    @cached_property
    def _options(self) -> Part | None:
        """The options of the command line, without a location; None if they are ambiguous or cannot be written."""
        if self.shared or len(self.parts) == 1:
            merged = self.parts[0]
        else:
            logs, tensors = ([part for part in self.parts if part.scalars == only] for only in (True, False))
            of_logs, of_tensors = ({name for part in group for name in part.map} for group in (logs, tensors))
            ambiguous = any(part.format or part.shift for part in self.parts)
            ambiguous |= any(len(group) > 1 and not all(one.plain for one in group) for group in (logs, tensors))
            ambiguous |= not of_logs <= {*SCALAR_LOG_QUANTITIES} or not of_tensors.isdisjoint(SCALAR_LOG_QUANTITIES)
            if ambiguous or any(part.pattern for part in logs):
                return None
            mapping = {name: key for part in self.parts for name, key in part.map.items()}
            merged = Part("", map=mapping, pattern="".join(part.pattern for part in tensors))
        writable = all(len(key.split()) == 1 for name, key in merged.map.items() if name != "line")
        return merged if writable else None

    @property
    def needs_run_file(self) -> bool:
        """Return True if the options of the parts cannot be written on the command line."""
        return self._options is None

    @property
    def run_file(self) -> tuple[str, str] | None:
        """Path and content of a run file that lists the parts; None for a single part that needs none."""
        if self.folder is None or self.shared or (len(self.parts) == 1 and not self.needs_run_file):
            return None
        entries = [part.entry(_relative(part.location, self.folder)) for part in self.parts]
        return str(self.folder / RUN_FILE), "\n".join(entries)

    @property
    def command(self) -> str:
        """The command, in which OUT stands for the folder of the results."""
        words, flags = self._words()
        flags += (
            ["--allow-gaps"] * self.allow_gaps + ["--exact-names"] * self.exact_names + ["--sweep"] * self.sweep
        )
        return shlex.join(["natgrad", "process", *words, "OUT", *flags, *RECOVER * self.recover])

    @property
    def replay_command(self) -> str:
        """The command that evaluates an objective at the states, in which MODULE:FACTORY stands for its factory."""
        words, flags = self._words()
        flags += ["--exact-names"] * self.exact_names
        return shlex.join(["natgrad", "replay", *words, "OUT", *flags, "--objective", "MODULE:FACTORY"])

    def _words(self) -> tuple[list[str], list[str]]:
        """Return the sources and the options of the parts, as on the command line."""
        own, options = self.run_file, self._options
        if options is None and own is not None:
            return [own[0]], []
        return [part.location for part in self.parts], [] if options is None else options.flags()

    def try_out(self) -> Rehearsal:
        """Read the first states as the command would.

        Raises
        ------
        InputError
            If the command would be refused.
        """
        with collected_warnings(*LOG_READERS) as warnings, self.opened() as log:
            found = rehearse(log, allow_gaps=self.allow_gaps)
        return replace(found, warnings=tuple(dict.fromkeys((*warnings, *found.warnings))))

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """Open the logs as the command does.

        Raises
        ------
        InputError
            See `natgrad.sources.opening.open_sources`.
        """
        options, recover = self._options, LARGEST_SPAN if self.recover else None
        if options is not None:
            yield open_sources(
                open_all([part.location for part in self.parts]),
                options.format,
                options.map,
                options.shift,
                sweep=self.sweep,
                pattern=options.pattern,
                exact_names=self.exact_names,
                recover=recover,
            )
            return
        with tempfile.TemporaryDirectory() as folder:
            # The same run file as the proposed one, with absolute paths.
            file = Path(folder) / RUN_FILE
            entries = [part.entry(str(open_storage(part.location).absolute())) for part in self.parts]
            file.write_text("\n".join(entries))
            yield open_sources([open_storage(file)], exact_names=self.exact_names, recover=recover)

    def with_advice(self, options: Mapping[str, Any]) -> Proposal:
        """Return a copy with the options that an error advises, which apply to the first log."""
        changed = replace(self, allow_gaps=self.allow_gaps or options.get("allow_gaps", False))
        if not set(options) - {"allow_gaps"}:
            return changed
        first, *others = self.parts
        return replace(changed, parts=(first.with_options(options), *others))


def _relative(location: str, folder: Path) -> str:
    path = open_storage(location).local_path
    if path is None:
        return location
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return str(path.resolve())


def scan_command(root: Location, parts: Sequence[Part], *, allow_gaps: bool = False, recover: bool = False) -> str:
    """Return the command that processes all runs below a folder, which are all read with the same options."""
    flags = ["--allow-gaps"] * allow_gaps + RECOVER * recover
    return shlex.join(["natgrad", "scan", str(root), "OUT", *parts[0].flags(), *flags])


_MAP = re.compile(r"--map ((?:'[^']*'|[^\s,;'\"])+)")
_SHIFT = re.compile(r"--shift ([a-z_]+)=([+-]?[0-9]+)")
_PATTERN = re.compile(r"--pattern ('[^']*'|\"[^\"]*\")")
_PLACEHOLDERS = {"KEY", "VALUE", "NAME"}


def advised(text: str) -> list[dict[str, Any]]:
    """Return the options that the remedy of an error, or a note, advises. Each is one alternative.

    Messages write options as on the command line, so that the advice can be followed literally.

    Examples
    --------
    >>> advised("take the number from the files with --map step=global_step, or use --pattern 'e_{step}.pt'")
    [{'map': {'step': 'global_step'}}, {'pattern': 'e_{step}.pt'}]
    >>> advised("specify the key with --map loss=KEY, or pass --allow-gaps")
    [{'allow_gaps': True}]
    """
    found: list[dict[str, Any]] = []
    for match in _MAP.finditer(text):
        quantity, _, key = match[1].replace("'", "").partition("=")
        if key and not any(word in key for word in _PLACEHOLDERS):
            found.append({"map": {quantity: key}})
    found += [{"pattern": ast.literal_eval(match[1])} for match in _PATTERN.finditer(text)]
    shifts = {match[1]: int(match[2]) for match in _SHIFT.finditer(text)}
    found += [{"shift": shifts}] if shifts else []
    found += [{"allow_gaps": True}] if "--allow-gaps" in text else []
    return [options for options in found if _valid(options)]


def _valid(options: Mapping[str, Any]) -> bool:
    return "{step}" in options.get("pattern", "{step}")
