"""Declare each option once, for the command line, the flows and Python.

A set of options is a ``TypedDict``, from which a type checker derives the keyword arguments of a public function
(``**options: Unpack[ProcessOptions]``). The `Option` in the annotation of an entry has its description, default and
validation. The command line, the parameter forms of Prefect, and the signatures and docstrings of functions
(`with_options`) are derived from these declarations.

This module imports nothing heavy, so ``natgrad --help`` is fast.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

from natgrad.schema.errors import InputError

__all__ = [
    "OUT",
    "ROOT",
    "RUNS",
    "SOURCE",
    "AnalyzeOptions",
    "DeclaredOption",
    "IngestOptions",
    "InspectOptions",
    "Option",
    "ProcessOptions",
    "ReadOptions",
    "RunOptions",
    "ScanOptions",
    "ScheduleOptions",
    "VersionOptions",
    "WorkerOptions",
    "declared",
    "selected",
    "signature_of",
    "validated",
    "with_options",
]

SOURCE = "Folder or URL of a training log, several logs of one run, or a run file that lists them."
OUT = "Folder or URL for the stores, results and report of the run."
ROOT = "Folder below which the runs are logged."
RUNS = "Folder for the results: one folder for each run."

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """Description, default and validation of an option.

    Attributes
    ----------
    description : str
        One or two sentences.
    default : object
        Value if the option is not set.
    unset : str
        Meaning of the default in words, for help texts.
    flag : str
        Name on the command line. Default: the name with two leading dashes.
    metavar : str, optional
        Placeholder of the value in help texts.
    minimum, above : float, optional
        Inclusive and exclusive lower bound of the value.
    choices : callable, optional
        Returns the accepted values. It is called only for validation and forms, because it may load libraries.
    parse : callable, optional
        Parses the text of the command line, and validates values for which the checks above are not sufficient.
    """

    description: str
    default: Any = None
    unset: str = ""
    flag: str = ""
    metavar: str | None = None
    minimum: float | None = None
    above: float | None = None
    choices: Callable[[], Iterable[str]] | None = None
    parse: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class DeclaredOption:
    """An option with its name and the types of its values.

    Attributes
    ----------
    name : str
        Name of the keyword argument.
    option : Option
    kinds : tuple of type
        Types of the value, or of each item.
    container : type or None
        ``list`` or ``dict`` for options with several values.
    optional : bool
        Whether None is a value.
    """

    name: str
    option: Option
    kinds: tuple[type, ...]
    container: type | None
    optional: bool

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    def validated(self, value: Any) -> Any:
        """Return a value in its normal form. None and empty collections are replaced by the default.

        Raises
        ------
        InputError
            If the value is not valid.
        """
        if value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0):
            # A copy, because the caller may change a list.
            return copy(self.option.default)
        if self.option.parse is not None:
            return self.option.parse(value)
        if self.container is None:
            return self._item(value)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise self._refusal(f"must be a list, got {value!r}")
        return [self._item(item) for item in value]

    def _item(self, value: Any) -> Any:
        (kind,) = self.kinds
        if kind is bool:
            if not isinstance(value, bool):
                raise self._refusal(f"must be True or False, got {value!r}")
            return value
        if kind in (int, float):
            return self._number(value, kind)
        if kind is Path and isinstance(value, Path):
            return value
        if not isinstance(value, str):
            raise self._refusal(f"must be text, got {value!r}")
        if self.option.choices is not None:
            self._require_choice(value, tuple(self.option.choices()))
        return value

    def _number(self, value: Any, kind: type) -> Any:
        try:
            if isinstance(value, bool | str):
                raise TypeError
            number = operator.index(value) if kind is int else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            words = "a whole number" if kind is int else "a number"
            raise self._refusal(f"must be {words}, got {value!r}") from error
        if not math.isfinite(number):
            raise self._refusal(f"must be finite, got {number}")
        if self.option.minimum is not None and number < self.option.minimum:
            raise self._refusal(f"must be at least {self.option.minimum:g}, got {number}")
        if self.option.above is not None and number <= self.option.above:
            raise self._refusal(f"must be greater than {self.option.above:g}, got {number}")
        return number

    def _require_choice(self, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            known = ", ".join(choices)
            choose = "the only choice is" if len(choices) == 1 else "choose one of"
            raise InputError(
                f"unknown value {value!r} for {self.flag}; {choose}: {known}",
                where=f"option {self.name}",
                remedy=f"use one of these values, or omit {self.flag}",
            )

    def _refusal(self, problem: str) -> InputError:
        return InputError(
            f"{self.flag} {problem}",
            where=f"option {self.name}",
            remedy=f"correct the value, or omit {self.flag} to use the default ({self.default_text})",
        )

    @property
    def default_text(self) -> str:
        """Default for help texts."""
        if self.option.unset or self.option.default is None:
            return self.option.unset or "none"
        if isinstance(self.option.default, list):
            return " ".join(f"{item:g}" for item in self.option.default)
        return str(self.option.default)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the option, for forms."""
        names = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
        kinds = [
            {
                "type": names[kind],
                **({"minimum": self.option.minimum} if self.option.minimum is not None and kind is not str else {}),
                **({"exclusiveMinimum": self.option.above} if self.option.above is not None else {}),
                **({"enum": list(self.option.choices())} if self.option.choices is not None else {}),
            }
            for kind in self.kinds
        ]
        schema: dict[str, Any] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        if self.container is list:
            schema = {"type": "array", "items": schema}
        elif self.container is dict:
            schema = {"type": "object", "additionalProperties": schema}
        if self.optional:
            schema = {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
        unset = f" Default: {self.option.unset}." if self.option.unset else ""
        return {**schema, "description": self.option.description + unset}

    def numpydoc(self) -> str:
        """Return the entry of a numpydoc section ``Parameters``."""
        words = " or ".join("path" if kind is Path else kind.__name__ for kind in self.kinds)
        if self.container is not None:
            words = f"sequence of {words}" if self.container is list else f"mapping of str to {words}"
        lines = textwrap.wrap(f"{self.option.description} Default: {self.default_text}.", 100)
        return "\n".join([f"{self.name} : {words}, optional", *(f"    {line}" for line in lines)])


# Validation of single options -------------------------------------------------------------------------------


def _parsed_map(value: Any) -> dict[str, str]:
    from natgrad.sources.names import QUANTITIES, parse_map

    mapping = dict(value) if isinstance(value, Mapping) else parse_map(value)
    for quantity, key in mapping.items():
        if quantity not in (*QUANTITIES, "run") or not isinstance(key, str) or not key:
            raise InputError(
                f"--map: {quantity}={key} does not name a quantity and its key",
                where="option mapping",
                remedy=f"write QUANTITY=KEY; the quantities are {', '.join((*QUANTITIES, 'run'))}",
            )
    return mapping


def _parsed_shift(value: Any) -> dict[str, int]:
    from natgrad.sources.names import checked_shift, parse_shift

    shift = dict(value) if isinstance(value, Mapping) else parse_shift(value)
    checked_shift(shift)
    return shift


def _memory_bytes(value: Any) -> int:
    from natgrad.compute.clusters import memory_bytes

    return memory_bytes(value if isinstance(value, str) else f"{value}B")


def _formats() -> Iterable[str]:
    from natgrad.sources.formats import FORMATS

    return tuple(FORMATS)


def _included() -> Iterable[str]:
    from natgrad.ingestion import INCLUDES

    return INCLUDES


def _storage_kinds() -> Iterable[str]:
    from natgrad.storage import KINDS

    return KINDS


def _clusters() -> Iterable[str]:
    from natgrad.compute.clusters import CLUSTERS

    return tuple(CLUSTERS)


# The options --------------------------------------------------------------------------------------------------

MEBIBYTE = 1 << 20

_MemoryLimit = Annotated[
    int | str,
    Option(
        "Memory limit of each worker process, in bytes or as text such as 2GB.",
        512 * MEBIBYTE,
        unset="512MiB",
        metavar="BYTES",
        minimum=1,
        parse=_memory_bytes,
    ),
]


class LogOptions(TypedDict, total=False):
    """Options for opening a log."""

    format: Annotated[
        str | None,
        Option(
            "Log format (see 'natgrad formats').", unset="detected automatically", metavar="NAME", choices=_formats
        ),
    ]
    mapping: Annotated[
        Mapping[str, str] | None,
        Option(
            "Key under which a quantity (parameter, gradient, hvp, loss, learning_rate, step) is stored in the log "
            "files. Repeatable.",
            unset="the usual keys of the format",
            flag="--map",
            metavar="QUANTITY=KEY",
            parse=_parsed_map,
        ),
    ]
    shift: Annotated[
        Mapping[str, int] | None,
        Option(
            "A value of the quantity logged at step s belongs to the state of step s+K, for example gradient=-1. "
            "Repeatable.",
            unset="no shift",
            metavar="QUANTITY=K",
            parse=_parsed_shift,
        ),
    ]
    sweep: Annotated[bool, Option("Read a folder that contains the logs of many runs of one model.", False)]


class ReadOptions(LogOptions, total=False):
    """Options for opening a log and for storing its steps and arrays."""

    allow_gaps: Annotated[bool, Option("Accept steps that are not evenly spaced.", False)]
    include: Annotated[
        Sequence[str] | None,
        Option(
            "Also store the optimizer state (--include optimizer). Repeatable.",
            unset="parameters, gradients and hvp only",
            metavar="NAME",
            choices=_included,
        ),
    ]
    store: Annotated[
        str | None,
        Option(
            "Storage of a new OUT: plain, or icechunk (object stores only), which keeps all versions.",
            unset="plain",
            metavar="KIND",
            choices=_storage_kinds,
        ),
    ]


class OverwriteOptions(TypedDict, total=False):
    """Option to replace the contents of OUT."""

    overwrite: Annotated[bool, Option("Start from scratch and replace the stores in OUT.", False)]


class FollowOptions(TypedDict, total=False):
    """Options for following a log that is being written."""

    follow: Annotated[bool, Option("Keep running, and process new steps as they are logged.", False)]
    interval: Annotated[
        float, Option("Seconds between two passes over the log, with --follow.", 10.0, metavar="SECONDS", minimum=0)
    ]
    gap_timeout: Annotated[
        float,
        Option(
            "Seconds for which --follow waits for a missing step while later ones are logged. It then goes on "
            "without the step, with a warning. Steps that the run has removed are not waited for.",
            60.0,
            metavar="SECONDS",
            minimum=0,
        ),
    ]
    idle_timeout: Annotated[
        float | None,
        Option(
            "Seconds without a new step after which --follow ends.", unset="no limit", metavar="SECONDS", minimum=0
        ),
    ]


class WorkerOptions(TypedDict, total=False):
    """Options for the workers of this machine."""

    workers: Annotated[
        int | None,
        Option(
            "Number of threads or processes on this machine, or of processes of --cluster.",
            unset="the number of processors of this machine",
            metavar="N",
            minimum=1,
        ),
    ]
    memory_limit: _MemoryLimit


class AnalyzeOptions(WorkerOptions, total=False):
    """Options for computing the results."""

    scheduler: Annotated[
        str | None,
        Option("Address of an existing Dask scheduler.", unset="workers of this machine", metavar="ADDRESS"),
    ]
    cluster: Annotated[
        str | None,
        Option(
            "Dask cluster to start: slurm, kubernetes, ...; see docs/howto/cluster.md.",
            unset="workers of this machine",
            metavar="NAME",
            choices=_clusters,
        ),
    ]
    learning_rate: Annotated[
        float | None,
        Option("Learning rate of steps without a logged one.", unset="not known", metavar="RATE", above=0),
    ]
    gammas: Annotated[
        Sequence[float] | None,
        Option(
            "Weight of the metric family, eq. (22). Repeatable.",
            [0.01, 0.1, 1.0, 10.0, 100.0],
            flag="--gamma",
            metavar="GAMMA",
            above=0,
        ),
    ]
    windows: Annotated[
        Sequence[int] | None,
        Option("Window of m updates, eq. (3). Repeatable.", [1], flag="--window", metavar="M", minimum=1),
    ]
    attempt: Annotated[
        int | None,
        Option(
            "Attempt of a restarted run to analyze, counted from 0.",
            unset="the newest",
            metavar="K",
            minimum=0,
        ),
    ]


class RunOptions(ReadOptions, AnalyzeOptions, total=False):
    """Options for ingesting and analyzing one run."""


class ProcessOptions(RunOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.process`."""


class IngestOptions(ReadOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.ingest`."""


class InspectOptions(LogOptions, total=False):
    """Options of `natgrad.inspect`."""

    memory_limit: _MemoryLimit


class ScanOptions(RunOptions, total=False):
    """Options of `natgrad.scan`: those of each run, and the number of runs that are processed at a time."""

    at_once: Annotated[
        int, Option("Number of runs that are processed at the same time.", 1, metavar="N", minimum=1)
    ]


class VersionOptions(TypedDict, total=False):
    """Option for reading a version of OUT."""

    version: Annotated[
        str | None,
        Option(
            "Version of an Icechunk repository: id, tag or time (see 'natgrad versions').",
            unset="the newest",
            metavar="VERSION",
        ),
    ]


class ScheduleOptions(TypedDict, total=False):
    """Options for the schedule of a deployment."""

    cron: Annotated[
        str | None,
        Option("Schedule of the scans in cron syntax, for example '*/10 * * * *'.", metavar="CRON"),
    ]
    every: Annotated[
        float | None,
        Option(
            "Seconds between two scans, instead of --cron.",
            metavar="SECONDS",
            above=0,
        ),
    ]
    name: Annotated[
        str, Option("Name of the deployments. Use a different name for each ROOT.", "natgrad", metavar="NAME")
    ]


# Reading the declarations -------------------------------------------------------------------------------------


@cache
def declared(kind: Any) -> dict[str, DeclaredOption]:
    """Return the options of a set by name, in the order of help texts."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, option = get_args(hint)
        members = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
        kinds = tuple(member for member in members if member is not NoneType)
        container = None
        if get_origin(kinds[0]) is not None:
            container = {Sequence: list, Mapping: dict}[get_origin(kinds[0])]
            kinds = get_args(kinds[0])[-1:]
        found[name] = DeclaredOption(name, option, kinds, container, NoneType in members)
    return found


def validated(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a set in their normal form, with defaults. This opens no log and no store.

    Parameters
    ----------
    kind : type
        Set of options, for example `ProcessOptions`.
    values : mapping
        Options that are set, from the command line, a flow or Python code.

    Raises
    ------
    InputError
        If a value is not valid, or two options exclude each other.
    TypeError
        If an option is unknown.
    """
    options = declared(kind)
    for name in values:
        if name not in options:
            close = difflib.get_close_matches(name, options, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the options are {', '.join(options)}"
            raise TypeError(f"unknown option {name!r}{hint}")
    checked = {name: option.validated(values.get(name)) for name, option in options.items()}
    if checked.get("scheduler") is not None and checked.get("cluster") is not None:
        raise InputError(
            "--scheduler and --cluster exclude each other",
            where="options scheduler, cluster",
            remedy="use --scheduler for an existing Dask cluster, or --cluster to start one",
        )
    return checked


def selected(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a mapping that are options of a set."""
    return {name: values[name] for name in declared(kind) if name in values}


def signature_of(
    function: Callable[..., Any],
    kind: Any,
    parameter_type: Callable[[DeclaredOption], Any],
    default: Callable[[DeclaredOption], Any] | None = None,
) -> inspect.Signature:
    """Return the signature of a function with ``**options`` replaced by the options of a set.

    Parameters
    ----------
    function : callable
    kind : type
        Set of options.
    parameter_type : callable
        Returns the annotation of an option.
    default : callable, optional
        Returns the default of an option in the signature. Default: that of its declaration.
    """
    signature = inspect.signature(function)
    own = [
        # The return type remains text, because its library may not be loaded.
        one.replace(annotation=eval(one.annotation, function.__globals__))
        if isinstance(one.annotation, str)
        else one
        for one in signature.parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    others = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.option.default if default is None else default(option),
            annotation=parameter_type(option),
        )
        for name, option in declared(kind).items()
    ]
    return signature.replace(parameters=[*own, *others])


def with_options(kind: Any, parameter_type: Callable[[DeclaredOption], Any] | None = None) -> Callable[[F], F]:
    """Decorate a function that takes ``**options``: add the options to its signature and its docstring.

    The line ``**options`` in the docstring is replaced by an entry for each option.
    """
    hints = get_type_hints(kind)

    def decorate(function: F) -> F:
        signature = signature_of(function, kind, parameter_type or (lambda option: hints[option.name]))
        function.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
        entries = "\n".join(option.numpydoc() for option in declared(kind).values())
        if function.__doc__:
            function.__doc__ = inspect.cleandoc(function.__doc__).replace("**options", entries, 1)
        return function

    return decorate
