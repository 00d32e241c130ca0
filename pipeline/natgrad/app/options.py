"""Options of every interface: each is declared once, for the command line, for the flows and for Python.

A set of options is a ``TypedDict``: a type checker reads from it what keyword arguments a public function takes
(``**options: Unpack[ProcessOptions]``). The `Option` in the annotation of an entry holds the rest: description,
default and validation. From these the command line makes its options, the flows make Prefect's parameter form, and
`with_options` makes the signature and the docstring of a function.

Nothing heavy is imported here, so that ``natgrad --help`` answers at once.
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

SOURCE = "Folder or URL of a training log; several logs of one run; or a run file that lists them."
OUT = "Folder or URL of the run's stores, results and report."
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
        Value if the option is not given.
    unset : str
        Meaning of the default in words, for help texts.
    flag : str
        Name on the command line. Default: two dashes and the name.
    metavar : str, optional
        Placeholder of the value in help texts.
    minimum, above : float, optional
        Smallest value; largest value that is too small.
    choices : callable, optional
        Returns the accepted values. It is called for validation only, as it may load libraries.
    parse : callable, optional
        Reads the text of the command line, or validates values that need more than the checks above.
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
        Types of a value, or of each item.
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
        """Return a value in its normal form; None and empty collections become the default.

        Raises
        ------
        InputError
            If the value is not valid.
        """
        if value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0):
            # A copy: lists are given away.
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
                remedy=f"give one of these values, or leave {self.flag} out",
            )

    def _refusal(self, problem: str) -> InputError:
        return InputError(
            f"{self.flag} {problem}",
            where=f"option {self.name}",
            remedy=f"correct the value, or leave {self.flag} out to use the default ({self.default_text})",
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


# Values that need more than a range ---------------------------------------------------------------------------


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
        "Memory of each worker process: bytes, or text such as 2GB.",
        512 * MEBIBYTE,
        unset="512MiB",
        metavar="BYTES",
        minimum=1,
        parse=_memory_bytes,
    ),
]


class LogOptions(TypedDict, total=False):
    """How a log is opened."""

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
            "The value of a quantity that is logged at step s belongs to the state s+K, for example gradient=-1. "
            "Repeatable.",
            unset="no shift",
            metavar="QUANTITY=K",
            parse=_parsed_shift,
        ),
    ]
    sweep: Annotated[bool, Option("The log is a folder with the logs of many runs of one model.", False)]


class ReadOptions(LogOptions, total=False):
    """How a log is opened, and which of its steps and arrays are stored."""

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
            "Storage of a new OUT: plain, or icechunk (object stores only), which keeps every version.",
            unset="plain",
            metavar="KIND",
            choices=_storage_kinds,
        ),
    ]


class OverwriteOptions(TypedDict, total=False):
    """Replacement of what OUT holds."""

    overwrite: Annotated[bool, Option("Start again: drop the present contents of OUT.", False)]


class FollowOptions(TypedDict, total=False):
    """How to follow a log that is being written."""

    follow: Annotated[bool, Option("Continue with the steps that are logged later, until interrupted.", False)]
    interval: Annotated[
        float, Option("Seconds between two passes over the log, with --follow.", 10.0, metavar="SECONDS", minimum=0)
    ]
    idle_timeout: Annotated[
        float | None,
        Option("Seconds without a new step until --follow ends.", unset="never", metavar="SECONDS", minimum=0),
    ]


class WorkerOptions(TypedDict, total=False):
    """Workers of this machine."""

    workers: Annotated[
        int | None,
        Option(
            "Threads or processes on this machine, or processes of --cluster.",
            unset="the number of processors of this machine",
            metavar="N",
            minimum=1,
        ),
    ]
    memory_limit: _MemoryLimit


class AnalyzeOptions(WorkerOptions, total=False):
    """How results are computed, and where."""

    scheduler: Annotated[
        str | None,
        Option("Address of an existing Dask scheduler.", unset="workers of this machine", metavar="ADDRESS"),
    ]
    cluster: Annotated[
        str | None,
        Option(
            "Dask cluster to start: slurm, kubernetes, ...; see docs/cluster.md.",
            unset="workers of this machine",
            metavar="NAME",
            choices=_clusters,
        ),
    ]
    learning_rate: Annotated[
        float | None,
        Option("Learning rate of the steps whose log has none.", unset="that of the log", metavar="RATE", above=0),
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
            "Analyze a restarted run as it stood at this attempt, counted from 0.",
            unset="the newest",
            metavar="K",
            minimum=0,
        ),
    ]


class RunOptions(ReadOptions, AnalyzeOptions, total=False):
    """How one run is ingested and analyzed."""


class ProcessOptions(RunOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.process`."""


class IngestOptions(ReadOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.ingest`."""


class InspectOptions(LogOptions, total=False):
    """Options of `natgrad.inspect`."""

    memory_limit: _MemoryLimit


class ScanOptions(RunOptions, total=False):
    """Options of `natgrad.scan`: those of one run, for every run, and how many are processed at a time."""

    at_once: Annotated[int, Option("Runs that are processed at the same time.", 1, metavar="N", minimum=1)]


class VersionOptions(TypedDict, total=False):
    """Which version of OUT is read."""

    version: Annotated[
        str | None,
        Option(
            "Version of an Icechunk repository: id, tag or time (natgrad versions).",
            unset="the newest",
            metavar="VERSION",
        ),
    ]


class ScheduleOptions(TypedDict, total=False):
    """When a deployment scans."""

    cron: Annotated[
        str | None,
        Option("Times of the scans, for example '*/10 * * * *'.", metavar="CRON"),
    ]
    every: Annotated[
        float | None,
        Option(
            "Seconds between two scans, in place of --cron.",
            metavar="SECONDS",
            above=0,
        ),
    ]
    name: Annotated[str, Option("Name of the deployments: one for each ROOT.", "natgrad", metavar="NAME")]


# Reading the declarations -------------------------------------------------------------------------------------


@cache
def declared(kind: Any) -> dict[str, DeclaredOption]:
    """Return the options of a set by name, in the order in which help texts list them."""
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
    """Return all options of a set in their normal form, with defaults; no log and no store is opened.

    Parameters
    ----------
    kind : type
        Set of options, for example `ProcessOptions`.
    values : mapping
        Options that are given, as the command line, a flow or Python code has them.

    Raises
    ------
    InputError
        If a value is not valid, or two options exclude each other.
    TypeError
        If there is no such option.
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
            remedy="give --scheduler to use an existing Dask cluster, or --cluster to start one",
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
        # The type of the result stays text: its library may not be loaded.
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
    """Decorate a function that takes ``**options``: list them in its signature and its docstring.

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
