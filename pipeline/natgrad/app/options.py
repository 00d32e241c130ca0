"""Declare each option and argument once, for the command line, the flows and Python.

A set of options is a ``TypedDict``, from which a type checker derives the keyword arguments of a public function
(``**options: Unpack[ProcessOptions]``). An argument, such as OUT, is an annotation of a parameter (``out: Out``).
The `Option` in either has the description, the default and the validation. The command line, the parameter forms of
Prefect, and the signatures and docstrings of functions are derived from these declarations, and `with_options`
validates every value before the function runs.

This module imports nothing heavy, so ``natgrad --help`` is fast.
"""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from natgrad.app.progress import StageProgress
from natgrad.compute.clusters import configuration_errors
from natgrad.schema.arguments import number, plain, shown
from natgrad.schema.errors import InputError

__all__ = [
    "AnalyzeOptions",
    "DeclaredOption",
    "DemoOptions",
    "DemoOut",
    "HistoryOptions",
    "IngestOptions",
    "InspectOptions",
    "Json",
    "Last",
    "Limit",
    "Option",
    "Out",
    "Outs",
    "Page",
    "Pool",
    "ProcessOptions",
    "Progress",
    "Quiet",
    "ReadOptions",
    "ReplayOptions",
    "Root",
    "RunOptions",
    "RunsFolder",
    "ScanFlowOptions",
    "ScanOptions",
    "ScheduleOptions",
    "ScheduledScanOptions",
    "ShowVersion",
    "Source",
    "StatusRoot",
    "VersionOptions",
    "WorkerOptions",
    "declared",
    "declared_parameters",
    "selected",
    "validated",
    "with_options",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """Description, default and validation of an option or argument.

    Attributes
    ----------
    description : str
        One or two sentences. ``{name}`` refers to another option; it is replaced by ``--name`` on the command line.
        Doubled braces stand for braces.
    default : object
        Value if the option is not set.
    unset : str
        Description of the default, for help texts.
    flag : str
        Name on the command line. Default: the name with two leading dashes.
    metavar : str, optional
        Placeholder of the value in help texts.
    minimum, above, maximum : float, optional
        Bounds of a number; ``above`` is excluded.
    choices : callable, optional
        Returns the accepted values. It is called only for validation and forms, because it may load libraries.
    parse : callable, optional
        Returns the mapping that a list of strings such as ``QUANTITY=KEY`` denotes.
    check : callable, optional
        Takes a value of the right type and returns its normal form. It raises InputError for an invalid value.
    unordered : bool
        Order and repetitions of the items have no meaning. The normal form is sorted, without repetitions.
    required : bool
        There is no default.
    positional : bool
        The command line takes the value as an argument instead of an option.
    """

    description: str
    default: Any = None
    unset: str = ""
    flag: str = ""
    metavar: str | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    choices: Callable[[], Iterable[str]] | None = None
    parse: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    check: Callable[[Any], Any] | None = None
    unordered: bool = False
    required: bool = False
    positional: bool = False


_KIND_NAMES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    Path: "path",
    Callable: "callable",
}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


@dataclass(frozen=True)
class DeclaredOption:
    """An option or argument with its name and the types of its values.

    Attributes
    ----------
    name : str
        Name of the parameter.
    option : Option
    kinds : tuple of type
        Types of the value, or of each item. ``Path`` stands for a path or URL as text or as a path object.
    single : bool
        Whether the value may be one item.
    containers : frozenset of type
        ``list``, ``dict``: the value may be a sequence, or a mapping whose keys are text.
    optional : bool
        Whether None is a value.
    """

    name: str
    option: Option
    kinds: tuple[Any, ...]
    single: bool
    containers: frozenset[type]
    optional: bool

    @classmethod
    def of(cls, name: str, annotation: Any) -> DeclaredOption | None:
        """Return the declaration in an annotation of a parameter, None if it has no `Option`."""
        if get_origin(annotation) is not Annotated:
            return None
        inner, option = get_args(annotation)
        members = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
        kinds: list[Any] = []
        containers = set()
        for member in members:
            origin = get_origin(member)
            if origin in (Sequence, Mapping):
                containers.add(list if origin is Sequence else dict)
                item = get_args(member)[-1]
                kinds += get_args(item) if get_origin(item) in (Union, UnionType) else (item,)
            elif member is not NoneType:
                kinds.append(origin or member)
        single = any(get_origin(member) not in (Sequence, Mapping) for member in members if member is not NoneType)
        distinct = tuple(kind for kind in dict.fromkeys(kinds) if not (kind is str and Path in kinds))
        return cls(name, option, distinct, single, frozenset(containers), NoneType in members)

    @property
    def flag(self) -> str:
        """Name on the command line."""
        if self.option.positional:
            return self.option.metavar or self.name.upper()
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def repeatable(self) -> bool:
        """True if there can be several values."""
        return bool(self.containers)

    # Validation

    def validated(self, value: Any) -> Any:
        """Return a value in its normal form. None and empty collections are replaced by the default.

        Raises
        ------
        InputError
            If the value is not valid, or it is missing and there is no default.
        """
        found = None if value is None else self._normal(value)
        if found is None:
            if self.option.required:
                raise self._refusal(f"is required, got {shown(value)}")
            # A copy, because the caller may change a list.
            return copy(self.option.default)
        return found if self.option.check is None else self.option.check(found)

    def _normal(self, value: Any) -> Any:
        """Return a value of the right type, or None if it is empty."""
        if dict in self.containers and isinstance(value, Mapping):
            entries = {self._text(key): self._item(value[key]) for key in value}
            return dict(sorted(entries.items()) if self.option.unordered else entries) or None
        if self.single and not (self.containers and _is_list(value)):
            if str in self.kinds and isinstance(value, str) and not value:
                # A form may send an empty text for a value that is not set.
                return None if self.optional else self._refuse("must not be empty")
            return self._item(value)
        if not _is_list(value):
            raise self._refusal(
                f"must be a list{' or mapping' if dict in self.containers else ''}, got {shown(value)}"
            )
        if self.option.parse is not None:
            texts = [self._text(item) for item in value]
            return self._normal(self.option.parse(texts)) if texts else None
        items = [self._item(item) for item in value]
        return (sorted(set(items)) if self.option.unordered else items) or None

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refusal(f"must consist of text, got {shown(value)}")
        return str(value)

    def _item(self, value: Any) -> Any:
        found = plain(value)
        if Path in self.kinds and isinstance(found, str | os.PathLike):
            return self._location(found)
        if str in self.kinds and isinstance(found, str):
            if self.option.choices is not None:
                self._require_choice(found, tuple(self.option.choices()))
            return str(found)
        if bool in self.kinds and isinstance(found, bool):
            return found
        if Callable in self.kinds and callable(found):
            return found
        for kind in (int, float):
            if kind in self.kinds:
                option = self.option
                try:
                    return number(found, kind, minimum=option.minimum, above=option.above, maximum=option.maximum)
                except ValueError as error:
                    raise self._refusal(str(error)) from error
        wanted = {bool: "True or False", Path: "a path or URL", str: "text", Callable: "a function"}
        return self._refuse(f"must be {' or '.join(wanted[kind] for kind in self.kinds)}, got {shown(value)}")

    def _location(self, value: str | os.PathLike[Any]) -> str | Path:
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise self._refusal(f"must be a path or URL, got {shown(value)}")
        from natgrad.storage import open_storage

        location = value if isinstance(value, Path) else text
        path = open_storage(location).local_path
        try:
            if path is not None:
                os.lstat(path)
        except OSError as error:  # the path may not exist yet
            if error.errno == errno.ENAMETOOLONG:
                raise self._refusal(f"must be a path, but its name is too long: {shown(value)}") from error
        return location

    def _require_choice(self, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            known = ", ".join(choices)
            choose = "the only choice is" if len(choices) == 1 else "choose one of"
            raise InputError(
                f"unknown value {value!r} for {self.flag}; {choose}: {known}",
                where=f"option {self.name}",
                remedy="use one of these values, or omit the option",
            )

    def _refuse(self, problem: str) -> Any:
        raise self._refusal(problem)

    def _refusal(self, problem: str) -> InputError:
        role = "argument" if self.option.positional else "option"
        omit = "" if self.option.required else f", or omit the {role} to use the default ({self.default_text})"
        return InputError(f"{self.flag} {problem}", where=f"{role} {self.name}", remedy=f"correct the value{omit}")

    # Descriptions

    def description(self, *, command_line: bool = False) -> str:
        """Return the description for the command line, or for Python and forms."""
        pattern = (lambda match: f"--{match[1].replace('_', '-')}") if command_line else (lambda match: match[1])
        text = re.sub(r"(?<!\{)\{(\w+)\}", pattern, self.option.description)
        text = text.replace("{{", "{").replace("}}", "}")
        return f"{text} Repeatable." if command_line and self.repeatable and not self.option.positional else text

    @property
    def default_text(self) -> str:
        """Default for help texts."""
        if self.option.unset or self.option.default is None:
            return self.option.unset or "none"
        if isinstance(self.option.default, list):
            return " ".join(item if isinstance(item, str) else f"{item:g}" for item in self.option.default)
        return str(self.option.default)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the option, for forms."""
        limits = {
            "minimum": self.option.minimum,
            "exclusiveMinimum": self.option.above,
            "maximum": self.option.maximum,
            "enum": None if self.option.choices is None else list(self.option.choices()),
        }
        items: list[dict[str, Any]] = [
            {
                "type": _JSON_TYPES[kind],
                **({"format": "path"} if kind is Path else {}),
                **{
                    name: limit
                    for name, limit in limits.items()
                    if limit is not None and (kind in (int, float) or name == "enum")
                },
            }
            for kind in self.kinds
        ]
        item = items[0] if len(items) == 1 else {"anyOf": items}
        forms = [
            *(items if self.single else []),
            *([{"type": "array", "items": item}] if list in self.containers and self.option.parse is None else []),
            *([{"type": "object", "additionalProperties": item}] if dict in self.containers else []),
            *([{"type": "null"}] if self.optional else []),
        ]
        schema: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
        unset = f" Default: {self.option.unset}." if self.option.unset else ""
        return {**schema, "description": self.description() + unset}

    def numpydoc(self) -> str:
        """Return the entry of a numpydoc section ``Parameters``."""
        item = " or ".join(_KIND_NAMES[kind] for kind in self.kinds)
        forms = [
            *([item] if self.single else []),
            *([f"sequence of {item}"] if list in self.containers and self.option.parse is None else []),
            *([f"mapping of str to {item}"] if dict in self.containers else []),
        ]
        words = " or ".join(forms) if len(forms) < 3 else f"{', '.join(forms[:-1])} or {forms[-1]}"
        default = "" if self.option.required else f" Default: {self.default_text}."
        lines = textwrap.wrap(self.description() + default, 100)
        optional = "" if self.option.required else ", optional"
        return "\n".join([f"{self.name} : {words}{optional}", *(f"    {line}" for line in lines)])


def _is_list(value: Any) -> bool:
    """Return True for a collection of known size that is neither text nor a mapping, such as a list or an array."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | os.PathLike):
        return False
    # An array without dimensions has these methods too, but no size.
    return isinstance(value, Sized) and isinstance(value, Iterable) and getattr(value, "shape", None) != ()


# Validation of single options -------------------------------------------------------------------------------


def _parsed_map(pairs: Sequence[str]) -> Mapping[str, str]:
    from natgrad.sources.names import parse_map

    return parse_map(pairs)


def _checked_map(mapping: dict[str, str]) -> dict[str, str]:
    from natgrad.sources.names import MAPPED

    for quantity, key in mapping.items():
        if quantity not in MAPPED or not key:
            raise InputError(
                f"--map: {quantity}={key} does not name a quantity and its key",
                where="option mapping",
                remedy=f"write QUANTITY=KEY; the quantities are {', '.join(MAPPED)}",
            )
    return mapping


def _parsed_decay(texts: Sequence[str]) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            # A later value of a pattern replaces an earlier one, and its place in the order.
            values.pop(pattern if equals else "*", None)
            values[pattern if equals else "*"] = float(value)
        except ValueError:
            raise InputError(
                f"--weight-decay must be LAMBDA or TENSOR=LAMBDA, got {text!r}",
                where="option weight_decay",
                remedy="write, for example, --weight-decay 0.01 --weight-decay '*.bias=0'",
            ) from None
    return values


def _decay_by_pattern(value: float | Mapping[str, float]) -> Mapping[str, float]:
    return value if isinstance(value, Mapping) else {"*": value}


def _parsed_shift(pairs: Sequence[str]) -> Mapping[str, int]:
    from natgrad.sources.names import parse_shift

    return parse_shift(pairs)


def _checked_shift(shift: dict[str, int]) -> dict[str, int]:
    from natgrad.sources.names import checked_shift

    return checked_shift(shift, "option shift")


def _checked_pattern(pattern: str) -> str:
    from natgrad.sources.step_names import checked_pattern

    return checked_pattern(pattern, "option pattern")


def _memory_bytes(value: int | str, option: str = "memory_limit") -> int:
    from natgrad.compute.clusters import memory_bytes

    return value if isinstance(value, int) else memory_bytes(value, option)


def _deployment_name(name: str) -> str:
    if re.search("[/%&<>]", name):
        raise InputError(
            f"--name must not contain any of / % & < >, got {name!r}",
            where="option name",
            why="Prefect does not accept them in the name of a deployment",
            remedy="use letters, digits and dashes",
        )
    return name


def _scheduler_address(address: str) -> str:
    if not _ADDRESS.fullmatch(address):
        raise InputError(
            f"{address!r} is not the address of a Dask scheduler",
            where="option scheduler",
            remedy="use protocol, host and port, for example tcp://host:8786",
        )
    return address


def _objective_name(name: str) -> str:
    from natgrad.objectives.objective import split_name

    split_name(name)
    return name


def _formats() -> Iterable[str]:
    from natgrad.sources.formats import FORMATS

    return tuple(FORMATS)


def _included() -> Iterable[str]:
    from natgrad.ingestion import INCLUDES

    return INCLUDES


def _gradients() -> Iterable[str]:
    from natgrad.schema.names import GRADIENTS

    return GRADIENTS


def _storage_kinds() -> Iterable[str]:
    from natgrad.storage import KINDS

    return KINDS


def _report_url(value: str) -> str:
    folder, separator, url = value.partition("=")
    if not (folder and separator and url.startswith(("http://", "https://"))):
        raise InputError(
            f"report_url must be FOLDER=URL, got {value!r}",
            where="option report_url",
            remedy="use a folder and the address at which a web server shows it: /data/runs=http://lab:8000",
        )
    return value


def _evaluations() -> Iterable[str]:
    from natgrad.schema.names import EVALUATIONS

    return EVALUATIONS


def _alignments() -> Iterable[str]:
    from natgrad.results.comparison import ALIGNMENTS

    return ALIGNMENTS


def _clusters() -> Iterable[str]:
    from natgrad.compute.clusters import CLUSTERS

    return tuple(CLUSTERS)


# The arguments ------------------------------------------------------------------------------------------------

Location = str | Path

Source = Annotated[
    Location | Sequence[Location],
    Option(
        "Folder or URL of a training log, several logs of one run, or a run file that lists them.",
        metavar="SOURCE",
        required=True,
        positional=True,
    ),
]
Out = Annotated[
    Location,
    Option(
        "Folder or URL for the stores, results and report of the run.",
        metavar="OUT",
        required=True,
        positional=True,
    ),
]
Outs = Annotated[
    Location | Sequence[Location] | Mapping[str, Location],
    Option(
        "Folders or URLs of one or more runs. Without names, each run is named after its folder.",
        metavar="OUT",
        required=True,
        positional=True,
    ),
]
Root = Annotated[
    Location, Option("Folder below which the runs are logged.", metavar="ROOT", required=True, positional=True)
]
RunsFolder = Annotated[
    Location,
    Option("Folder for the results: one folder for each run.", metavar="OUT", required=True, positional=True),
]
StatusRoot = Annotated[
    Location, Option("Folder that contains the OUT of many runs.", metavar="ROOT", required=True, positional=True)
]
DemoOut = Annotated[
    Location, Option("Folder for the logs, the runs and the report.", "demo", metavar="OUT", positional=True)
]
Progress = Annotated[
    StageProgress | None,
    Option(
        "Called with the stage (replay, ingest, analyze), the number of items done and the total number of items.",
        unset="no calls",
    ),
]

# Options of single commands

Page = Annotated[
    Location | None,
    Option("File of the page. It is replaced.", unset="report.html in the first OUT", metavar="FILE"),
]
Serve = Annotated[
    bool,
    Option(
        "Show the page at an address of this machine, until Ctrl-C, instead of writing it. It then has the values "
        "of every update of every tensor.",
        False,
    ),
]
Port = Annotated[
    int | None,
    Option("Port of the address, with {serve}.", unset="a free one", metavar="PORT", minimum=1, maximum=65535),
]
ComparisonPage = Annotated[
    Location | None,
    Option("File of the page. It is replaced.", unset="comparison.html in the first OUT", metavar="FILE"),
]
Align = Annotated[
    str,
    Option(
        "Quantity by which runs are aligned: step, loss (the smallest so far) or length (of the path of updates).",
        "step",
        metavar="KIND",
        choices=_alignments,
    ),
]
Last = Annotated[int | None, Option("Number of versions to list.", unset="all", metavar="N", minimum=1)]
Limit = Annotated[int, Option("Number of flows that run at the same time.", 1, metavar="N", minimum=1)]
Pool = Annotated[str, Option("Work pool whose workers run the flows.", metavar="NAME", required=True)]
Json = Annotated[bool, Option("Print one JSON object on standard output.", False, flag="--json")]
Quiet = Annotated[bool, Option("Show only warnings and errors.", False)]
ShowVersion = Annotated[bool, Option("Print the version.", False, flag="--version")]

# The options --------------------------------------------------------------------------------------------------

_MEBIBYTE = 1 << 20

_YEAR = 366 * 86_400.0

_ADDRESS = re.compile(r"(?:[a-z]+://)?(?:\[[^]/]+\]|[^:/]+):\d+(?:/.*)?")

_Evaluation = Annotated[
    str,
    Option(
        "Data on which the loss and the gradient of a step are evaluated: batch (the mini-batch of the step), "
        "fixed (the same data at every step) or unknown. Losses of different batches are not compared.",
        "unknown",
        metavar="KIND",
        choices=_evaluations,
    ),
]

_MemoryLimit = Annotated[
    int | str,
    Option(
        "Memory limit of each worker process, in bytes or as text such as 2GB.",
        512 * _MEBIBYTE,
        unset="512MiB",
        metavar="BYTES",
        minimum=1,
        check=_memory_bytes,
    ),
]


class RunLogOptions(TypedDict, total=False):
    """Options for opening the log of one run."""

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
            "files. line=FORM states the form of the lines of a text log.",
            unset="the usual keys of the format",
            flag="--map",
            metavar="QUANTITY=KEY",
            parse=_parsed_map,
            check=_checked_map,
            unordered=True,
        ),
    ]
    shift: Annotated[
        Mapping[str, int] | None,
        Option(
            "A value of the quantity logged at step s belongs to the state of step s+K. For example, K is -1 for "
            "gradients that are logged after the update.",
            unset="no shift",
            metavar="QUANTITY=K",
            parse=_parsed_shift,
            check=_checked_shift,
            unordered=True,
        ),
    ]
    pattern: Annotated[
        str | None,
        Option(
            "Names of the steps in the folder of the log: {{step}} stands for the number, * for any other text, "
            "for example 'weights-{{step}}-*.pt'.",
            unset="the usual names",
            metavar="NAME",
            check=_checked_pattern,
        ),
    ]
    exact_names: Annotated[
        bool,
        Option(
            "Do not match parameters with gradients whose names differ by what DDP, torch.compile, FSDP or PEFT "
            "add.",
            False,
        ),
    ]


class LogOptions(RunLogOptions, total=False):
    """Options for opening a log."""

    sweep: Annotated[bool, Option("Read a folder that contains the logs of many runs of one model.", False)]


class ReadOptions(LogOptions, total=False):
    """Options for opening a log and for storing its steps and arrays."""

    allow_gaps: Annotated[bool, Option("Accept steps that are not evenly spaced.", False)]
    in_place: Annotated[
        bool,
        Option(
            "Read the states of a new OUT from the files of the log instead of copying them. The files must stay "
            "as they are; the ledger and the results do not need them.",
            False,
        ),
    ]
    gradient: Annotated[
        str | None,
        Option(
            "Where gradients come from: logged; from-optimizer, which recovers them from consecutive states of the "
            "optimizer; or replayed, the evaluations of natgrad replay in OUT.",
            unset="logged",
            metavar="NAME",
            choices=_gradients,
        ),
    ]
    largest_span: Annotated[
        int | None,
        Option(
            "Maximum number of updates between two states from which a gradient is recovered ({gradient} "
            "from-optimizer). It is a weighted mean over these updates.",
            unset="20",
            metavar="K",
            minimum=1,
        ),
    ]
    include: Annotated[
        Sequence[str] | None,
        Option(
            "Data to store in addition to parameters, gradients and hvp: optimizer, the state of the optimizer.",
            unset="nothing else",
            metavar="NAME",
            choices=_included,
            unordered=True,
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
        float,
        Option(
            "Seconds between two passes over the log, with {follow}.",
            10.0,
            metavar="SECONDS",
            minimum=0,
            maximum=_YEAR,
        ),
    ]
    gap_timeout: Annotated[
        float,
        Option(
            "Seconds for which {follow} waits for a missing step while later ones are logged. It then continues "
            "without the step, with a warning. Steps that the run has removed are not waited for.",
            60.0,
            metavar="SECONDS",
            minimum=0,
        ),
    ]
    idle_timeout: Annotated[
        float | None,
        Option(
            "Seconds without a new step after which {follow} ends.", unset="no limit", metavar="SECONDS", minimum=0
        ),
    ]


class WorkerOptions(TypedDict, total=False):
    """Options for the workers of this machine."""

    workers: Annotated[
        int | None,
        Option(
            "Number of threads or processes on this machine, or of processes of {cluster}.",
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
        Option(
            "Address of an existing Dask scheduler.",
            unset="workers of this machine",
            metavar="ADDRESS",
            check=_scheduler_address,
        ),
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
    worker_timeout: Annotated[
        float,
        Option(
            "Seconds for which a pass on a cluster waits if no worker can take its tasks.",
            600.0,
            metavar="SECONDS",
            minimum=0,
        ),
    ]
    learning_rate: Annotated[
        float | None,
        Option("Learning rate of steps without a logged one.", unset="not known", metavar="RATE", above=0),
    ]
    weight_decay: Annotated[
        float | Mapping[str, float] | None,
        Option(
            "Coefficient of decoupled weight decay (AdamW) where the log has none: of all tensors, or of those "
            "whose names match a pattern, TENSOR=LAMBDA; the last match applies. The results then also have the "
            "updates without decay.",
            unset="not known",
            metavar="[TENSOR=]LAMBDA",
            minimum=0,
            parse=_parsed_decay,
            check=_decay_by_pattern,
        ),
    ]
    evaluation: _Evaluation
    gammas: Annotated[
        Sequence[float] | None,
        Option(
            "Weights of the metric family, eq. (22). If they are set, the results of tensors also have the family.",
            unset="0.01, 0.1, 1, 10 and 100, for the model only",
            flag="--gamma",
            metavar="GAMMA",
            above=0,
            unordered=True,
        ),
    ]
    windows: Annotated[
        Sequence[int] | None,
        Option(
            "Windows of m updates, eq. (3). Windows of one update are always computed.",
            [1],
            flag="--window",
            metavar="M",
            minimum=1,
            unordered=True,
        ),
    ]
    groups: Annotated[
        Sequence[str],
        Option(
            "Groups of tensors in the results: block (the numbered parts of the model), layer (the tensors of a "
            "module), or a pattern of names, in which * stands for any text.",
            ["block"],
            metavar="PATTERN",
            unordered=True,
        ),
    ]
    trust_states: Annotated[
        bool,
        Option(
            "Do not compare the states that are read with their checksums. 'natgrad verify' does that, too.", False
        ),
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


class ReplayOptions(RunLogOptions, AnalyzeOptions, OverwriteOptions, total=False):
    """Options of `natgrad.replay`."""

    objective: Annotated[
        str,
        Option(
            "Function without arguments that returns the objective, as package.module:factory. Modules are also "
            "found in the current directory.",
            metavar="MODULE:FACTORY",
            required=True,
            check=_objective_name,
        ),
    ]
    keep_gradients: Annotated[
        bool,
        Option(
            "Keep the gradients in OUT, which then has states. By default, workers reduce them to inner products.",
            False,
        ),
    ]
    hvp: Annotated[
        bool,
        Option("Also evaluate the product of the Hessian with each displacement, at the state before it.", False),
    ]
    taylor_point: Annotated[
        bool,
        Option(
            "Also find lambda of eq. (11) for each update. The Hessian is then evaluated there, and its product is "
            "evaluated as with {hvp}.",
            False,
        ),
    ]
    hessian_eigenvalues: Annotated[
        bool, Option("Also compute the extreme eigenvalues of the Hessian for each update, by Lanczos.", False)
    ]
    threads: Annotated[
        int | None,
        Option(
            "Number of threads that libraries may use in each worker on this machine.",
            unset="the number of processors, divided by the number of workers, or that of existing evaluations",
            metavar="N",
            minimum=1,
        ),
    ]
    devices: Annotated[
        Sequence[str] | None,
        Option(
            "Device of CUDA (CUDA_VISIBLE_DEVICES) of a worker on this machine. Workers take the devices in turn.",
            unset="workers see all devices",
            flag="--device",
            metavar="DEVICE",
        ),
    ]


class InspectOptions(LogOptions, total=False):
    """Options of `natgrad.inspect`."""

    evaluation: _Evaluation
    memory_limit: _MemoryLimit


class ProcessLimits(TypedDict, total=False):
    """Options for the process of a run."""

    stall_timeout: Annotated[
        float,
        Option(
            "Seconds without progress after which a run is stopped. The run fails, and the others continue.",
            1800.0,
            metavar="SECONDS",
            above=0,
            maximum=_YEAR,
        ),
    ]
    process_memory: Annotated[
        int | str | None,
        Option(
            "Memory limit of the process of each run, in bytes or as text such as 8GB. A run that needs more "
            "fails. Only Linux enforces it.",
            unset="the memory of this machine, divided by the number of runs at a time",
            metavar="BYTES",
            minimum=1,
            check=functools.partial(_memory_bytes, option="process_memory"),
        ),
    ]


class ScanOptions(RunOptions, ProcessLimits, total=False):
    """Options of `natgrad.scan`: those of each run, and of the processes in which the runs are processed."""

    at_once: Annotated[
        int,
        Option("Number of runs that are processed at the same time, each in a process.", 1, metavar="N", minimum=1),
    ]


class LinkOptions(TypedDict, total=False):
    """Options for what Prefect shows about a run."""

    report_url: Annotated[
        str | None,
        Option(
            "Web server that shows the reports, for links in Prefect: FOLDER=URL, for example "
            "/data/runs=http://lab:8000 if /data/runs/a/report.html is at http://lab:8000/a/report.html.",
            unset="reports have no link, but their paths are shown",
            metavar="FOLDER=URL",
            check=_report_url,
        ),
    ]
    alert_angle: Annotated[
        float | None,
        Option(
            "Angle in radians. If the median angle of the last part of a run exceeds it, Prefect gets the event "
            "natgrad.angle-exceeded, on which an automation can act.",
            unset="no event is sent",
            metavar="RADIANS",
            minimum=0,
            maximum=3.141592653589793,
        ),
    ]


class HistoryOptions(TypedDict, total=False):
    """Option for the history of a Prefect server."""

    keep_days: Annotated[
        float | None,
        Option(
            "Days after which a scan deletes flow runs of natgrad, with their artifacts, from the Prefect server.",
            unset="they are kept",
            metavar="DAYS",
            minimum=0,
        ),
    ]


class ScanFlowOptions(ScanOptions, LinkOptions, HistoryOptions, total=False):
    """Options of a scan as a flow."""


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
            "Seconds between two scans, instead of {cron}.",
            metavar="SECONDS",
            minimum=1,
            maximum=_YEAR,
        ),
    ]
    name: Annotated[
        str,
        Option(
            "Name of the deployments. Use a different name for each ROOT.",
            "natgrad",
            metavar="NAME",
            check=_deployment_name,
        ),
    ]


class ScheduledScanOptions(ScheduleOptions, ScanFlowOptions, total=False):
    """Options of a scan on a schedule."""


class DemoOptions(TypedDict, total=False):
    """Options of the demonstration as flows."""

    workers: Annotated[int, Option("Number of Dask worker processes.", 2, metavar="N", minimum=1)]


# Reading the declarations -------------------------------------------------------------------------------------


@cache
def declared(kind: Any) -> dict[str, DeclaredOption]:
    """Return the options of a set by name, in the order of help texts."""
    return _declarations(get_type_hints(kind, include_extras=True))


def declared_parameters(function: Callable[..., Any]) -> dict[str, DeclaredOption]:
    """Return the options and arguments that the annotations of a function's parameters declare, by name."""
    return _declarations(get_type_hints(function, include_extras=True))


def _declarations(annotations: Mapping[str, Any]) -> dict[str, DeclaredOption]:
    found = {name: DeclaredOption.of(name, annotation) for name, annotation in annotations.items()}
    return {name: option for name, option in found.items() if option is not None}


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


class NoOptions(TypedDict):
    """The empty set, for functions that have arguments only."""


def with_options(
    kind: Any = NoOptions,
    parameter_type: Callable[[DeclaredOption], Any] | None = None,
    default: Callable[[DeclaredOption], Any] | None = None,
) -> Callable[[F], F]:
    """Decorate a function: declare its arguments and options, and validate all of them at each call.

    The options of the set replace the parameter ``**options`` in the signature. The line ``**options`` in the
    docstring is replaced by an entry for each argument and option. The function runs only if all arguments and
    options are valid, and receives them in their normal form, with defaults.

    Parameters
    ----------
    kind : type, optional
        Set of options, for example `ProcessOptions`. Default: none.
    parameter_type : callable, optional
        Returns the annotation of an option or argument in the signature. Default: its type.
    default : callable, optional
        Returns the default of an option in the signature. Default: that of its declaration.
    """
    types = get_type_hints(kind)

    def decorate(function: F) -> F:
        own, of_kind = declared_parameters(function), declared(kind)
        signature, hints = inspect.signature(function), get_type_hints(function)
        variadic = inspect.Parameter.VAR_KEYWORD
        rest = [one.name for one in signature.parameters.values() if one.kind is variadic]

        def annotation(option: DeclaredOption) -> Any:
            if parameter_type is not None:
                return parameter_type(option)
            return hints[option.name] if option.name in own else types[option.name]

        def parameter(option: DeclaredOption, of: inspect.Parameter) -> inspect.Parameter:
            value = option.option.default if default is None else default(option)
            missing = option.option.required
            return of.replace(default=inspect.Parameter.empty if missing else value, annotation=annotation(option))

        parameters = [
            parameter(own[one.name], one)
            if one.name in own
            else one.replace(annotation=hints.get(one.name, one.annotation))
            for one in signature.parameters.values()
            if one.name not in rest
        ]
        for name, option in of_kind.items():
            parameters.append(parameter(option, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)))

        @functools.wraps(function)
        def validating(*arguments: Any, **values: Any) -> Any:
            call = signature.bind(*arguments, **values)
            call.apply_defaults()
            call.arguments |= {name: option.validated(call.arguments[name]) for name, option in own.items()}
            for name in rest:
                call.arguments[name] = validated(kind, call.arguments[name])
            with configuration_errors():
                return function(*call.args, **call.kwargs)

        validating.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect reads it
            parameters=parameters, return_annotation=hints.get("return", inspect.Signature.empty)
        )
        entries = "\n".join(option.numpydoc() for option in (*own.values(), *of_kind.values()))
        if function.__doc__:
            validating.__doc__ = inspect.cleandoc(function.__doc__).replace("**options", entries, 1)
        # Tools that document functions describe the wrapped one.
        function.__signature__ = validating.__signature__  # type: ignore[attr-defined]
        function.__doc__ = validating.__doc__
        return cast(F, validating)

    return decorate
