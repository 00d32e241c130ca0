"""Open logs by format or by content: a single log, joined logs, a sweep, or a log in an object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import ledger_names
from natgrad.schema.logs import logger
from natgrad.sources.base import Source
from natgrad.sources.checkpoints.stacked_file import StackedFile
from natgrad.sources.checkpoints.step_folder import NATIVE_KINDS, StepFolder
from natgrad.sources.container import not_regular
from natgrad.sources.continued import Continued
from natgrad.sources.formats import FORMATS, find_format, one_file_format, unnumbered_format
from natgrad.sources.joined import JoinedSource
from natgrad.sources.ledger_log import LedgerLog
from natgrad.sources.names import CHECKPOINT, SCALAR_LOG_QUANTITIES, checked_shift
from natgrad.sources.recognition import holds_tensors, run_parts, single_log
from natgrad.sources.recovered import Recovered
from natgrad.sources.replayed import Replayed, Replays
from natgrad.sources.run_file import find_run_file, listed_logs
from natgrad.sources.scalars.scalar_log import Kind as ScalarKind
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.step_names import Naming
from natgrad.sources.steps import NotYet
from natgrad.sources.sweep import Sweep
from natgrad.sources.tensor_names import MatchedNames
from natgrad.storage import LocalStorage, NotRegularError, Storage, network_errors, require_regular

__all__ = ["format_of", "holds_run", "open_log", "open_source", "open_sources"]

_log = logger(__name__)

_TEXT = "text"
"""Format of text whose lines have a stated form."""

_OBJECT_KINDS = {"steps": tuple(NATIVE_KINDS.values()), **{name: (kind,) for name, kind in NATIVE_KINDS.items()}}
"""Tensor formats that can be read from object stores."""

_OBJECT_SCALARS = {
    name: kind for name in ("csv", "jsonl", "parquet", "tensorboard", _TEXT) if (kind := FORMATS[name].scalars)
}
"""Scalar formats that can be read from object stores."""

_LEDGERS = "ledgers"
"""Logs of ledgers, which can also be read from object stores."""

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".gz", ".parquet")
"""Suffixes of scalar log files."""


# The logs of a run -------------------------------------------------------------------------------------------


def open_source(
    location: Storage,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    *,
    pattern: str = "",
) -> Source:
    """Open a training log.

    Parameters
    ----------
    location : Storage
        A log, a run file (`natgrad.sources.run_file`), or a folder that contains a ``run.toml``.
    format : str, optional
        One of `natgrad.sources.formats.FORMATS`. Detected from the content by default.
    mapping : mapping, optional
        Key in the log by quantity; see `natgrad.sources.names`.
    shift : mapping, optional
        Quantity to K: values logged at step s belong to state s + K.
    pattern : str
        Names of the steps; see `natgrad.sources.step_names.Naming`.

    Raises
    ------
    InputError
        If there is no log, the format is unknown, or the log contains only scalars.
    """
    shift = checked_shift(shift or {})
    source = _open(location, format, mapping, shift, pattern)
    if isinstance(source, ScalarLog) and format is None and location.is_folder() and source.growing():
        raise NotYet(
            "no step files in this folder yet",
            where=str(location),
            why=f"it contains only the scalars in {source.location}",
            remedy="run again later (natgrad process and ingest wait for it with --follow), or pass the log with "
            "the tensors as an additional SOURCE",
        )
    return _joined([source], [shift])


def open_log(
    location: Storage,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    *,
    pattern: str = "",
) -> Source:
    """Open a log that need not contain the parameters of a run, such as a log of scalars; see `open_source`."""
    return _open(location, format, mapping, checked_shift(shift or {}), pattern)


def open_sources(
    locations: Sequence[Storage],
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    *,
    sweep: bool = False,
    pattern: str = "",
    exact_names: bool = False,
    recover: int | None = None,
    replays: Replays | None = None,
) -> Source:
    """Open the logs of one run, joined by step if there are several, or open a folder of many runs.

    Parameters
    ----------
    locations, format, mapping, shift
        See `open_source`. If there are several logs, the arrays in ``mapping`` apply to the log with tensors, the
        scalars and ``step`` apply to the log of scalars, and ``shift`` applies to all logs.
    sweep : bool
        The location is a folder that contains one log for each of several runs.
    pattern : str
        Names of the steps. If there are several logs, it applies to the log with tensors.
    exact_names : bool
        Do not match names of tensors that differ by a known rule; see `natgrad.sources.tensor_names`.
    recover : int, optional
        Recover the gradients from states of the optimizer that are at most this many updates apart.
    replays : Replays, optional
        Evaluations of an objective at the states of the log, which has no gradients.

    Raises
    ------
    InputError
        See `open_source`. For a sweep, also if the folder contains no runs.
    """
    source = _open_sources(locations, format, mapping, shift, sweep=sweep, pattern=pattern)
    source = source if exact_names else MatchedNames(source)
    if replays is not None:
        return Replayed(source, replays)
    return source if recover is None else Recovered(source, recover)


def _open_sources(
    locations: Sequence[Storage],
    format: str | None,
    mapping: Mapping[str, str] | None,
    shift: Mapping[str, int] | None,
    *,
    sweep: bool,
    pattern: str,
) -> Source:
    if sweep:
        return _open_sweep(locations, format, mapping, shift, pattern)
    if len(locations) == 1:
        return open_source(locations[0], format, mapping, shift, pattern=pattern)
    shift = checked_shift(shift or {})
    scalars_only = [_is_scalar_log(location, mapping or {}) for location in locations]
    mappings = _split_mapping(scalars_only, mapping or {})
    patterns = _split_pattern(scalars_only, pattern)
    if mappings is None or patterns is None or format:
        raise InputError(
            "it is ambiguous which SOURCE --format, --map and --pattern refer to",
            where=", ".join(map(str, locations)),
            remedy="list the sources in a run file, each with its own format, map and pattern",
        )
    sources = [
        _open(each, None, part, shift, own) for each, part, own in zip(locations, mappings, patterns, strict=True)
    ]
    return _joined(sources, [shift] * len(sources))


def _split_mapping(scalars_only: Sequence[bool], mapping: Mapping[str, str]) -> list[dict[str, str]] | None:
    """Return the part of a mapping that applies to each log, or None if this is ambiguous."""
    parts: list[dict[str, str]] = [{} for _ in scalars_only]
    for quantity, key in mapping.items():
        # A log of scalars cannot contain parameters or gradients, and it takes precedence for scalars.
        of_scalars = quantity in SCALAR_LOG_QUANTITIES
        matching = [part for part, only in zip(parts, scalars_only, strict=True) if only == of_scalars]
        if len(matching) != 1:
            return None
        matching[0][quantity] = key
    return parts


def _split_pattern(scalars_only: Sequence[bool], pattern: str) -> list[str] | None:
    """Return the pattern that applies to each log, or None if this is ambiguous."""
    if not pattern:
        return [""] * len(scalars_only)
    patterns = ["" if only else pattern for only in scalars_only]
    return patterns if patterns.count(pattern) == 1 else None


def _joined(sources: Sequence[Source], shifts: Sequence[Mapping[str, int]]) -> Source:
    """Join the sources of a run, each with its shifts. At least one source must contain tensors."""
    if all(isinstance(source, ScalarLog) for source in sources):
        raise InputError(
            "a log of scalars does not contain any tensors",
            where=", ".join(str(source.location) for source in sources),
            why="the analysis needs parameters and gradients; loss and learning rate only supplement them",
            remedy="pass the log that contains the tensors as an additional SOURCE",
        )
    return sources[0] if len(sources) == 1 and not shifts[0] else JoinedSource(sources, shifts)


def _open_sweep(
    locations: Sequence[Storage],
    format: str | None,
    mapping: Mapping[str, str] | None,
    shift: Mapping[str, int] | None,
    pattern: str,
) -> Source:
    """Open each subfolder as the log of a run, and each file that is a complete log."""
    if len(locations) != 1 or not locations[0].is_folder():
        raise InputError(
            "a sweep must be one folder that contains a folder or file for each run",
            where=", ".join(map(str, locations)),
            remedy="pass the folder that contains the runs, or omit --sweep",
        )
    (folder,) = locations
    runs: dict[str, Source] = {}
    for entry in (folder / name for name in folder.list()):
        path = entry.local_path
        stacked = path is not None and path.is_file() and holds_run(path)
        if not entry.name.startswith(".") and (entry.is_folder() or stacked):
            runs[entry.name] = open_source(entry, format, mapping, shift, pattern=pattern)
        else:
            _log.info("skipping %s: it is not a run of the sweep", entry)
    if not runs:
        raise InputError(
            "this folder contains no runs",
            where=str(folder),
            remedy="pass the folder that contains the run folders",
        )
    return Sweep(folder, runs)


# One log -----------------------------------------------------------------------------------------------------


def _open(
    location: Storage,
    format: str | None,
    mapping: Mapping[str, str] | None,
    shift: Mapping[str, int],
    pattern: str = "",
    *,
    in_run_file: bool = False,
) -> Source:
    """Open one log of tensors or scalars. Shifts are applied here only to logs of scalars."""
    mapping = dict(mapping or {})
    format = format or (_TEXT if "line" in mapping else None)
    if format is not None and format not in FORMATS:
        raise InputError(
            f"unknown format {format!r}",
            where=str(location),
            remedy=f"choose one of: {', '.join(FORMATS)} (see natgrad formats)",
        )
    run_file = None if in_run_file else find_run_file(location)
    if run_file is not None:
        if format or mapping or shift or pattern:
            raise InputError(
                "it is ambiguous which source of the run file --format, --map, --shift and --pattern refer to",
                where=str(location),
                remedy="write format, map, shift and pattern into the [[source]] table of that source in the "
                "run file",
            )
        logs = listed_logs(run_file)
        sources = [
            _open(log.location, log.format, log.map, log.shift, log.pattern, in_run_file=True) for log in logs
        ]
        return _joined(sources, [log.shift for log in logs])
    path = location.local_path
    if path is None:
        return _open_objects(location, format, mapping, shift, pattern)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), remedy="pass the folder of a training log")
    if not path.is_dir():
        try:
            require_regular(path)
        except NotRegularError as error:
            raise not_regular(error, "the log", str(path)) from error
    parts = run_parts(path)
    if parts and (format is None or FORMATS[format].scalars is None):
        found = find_format(path, _naming(path, mapping, pattern))
        if found is None or FORMATS[found].scalars is not None:
            storages = map(LocalStorage, parts)
            return Continued(location, [_open(part, format, mapping, shift, pattern) for part in storages])
    path = path if pattern or "step" in mapping else single_log(path)
    naming = _naming(path, mapping, pattern)
    found = format or find_format(path, naming) or unnumbered_format(path)
    known = FORMATS[found or (one_file_format(path) if path.is_file() else None) or "steps"]
    if known.scalars is not None:
        return _scalar_log(LocalStorage(path), known.scalars, mapping, shift, named=format is not None)
    if not path.is_dir() and not (known.files or known.find(path)):
        raise InputError(
            "this is a file, but a log of this format is a folder",
            where=str(path),
            why="only files of these endings, and logs of scalars, can be single files: "
            + ", ".join(dict.fromkeys(ending for one in FORMATS.values() for ending in one.files)),
            remedy="pass the folder that contains the step files",
        )
    source = known.open(path, mapping)
    return _with_pattern(source, pattern) if pattern else source


def _naming(path: Path, mapping: Mapping[str, str], pattern: str) -> Naming:
    """Return how the steps in a folder are recognized, by the options and the mapping file in it."""
    names = CHECKPOINT
    if path.is_dir():
        with suppress(InputError):  # the mapping file of some formats has other keys; opening the log checks it
            names = names.of_folder(LocalStorage(path))
    return Naming(pattern or names.pattern, keyed="step" in mapping or names.naming.keyed)


def _with_pattern(source: Source, pattern: str) -> Source:
    if not isinstance(source, StepFolder | StackedFile):
        raise InputError(
            "--pattern applies only to a log with a file, folder or group for each step",
            where=str(source.location),
            remedy="omit --pattern",
        )
    return source.with_pattern(pattern)


def _open_objects(
    location: Storage, format: str | None, mapping: Mapping[str, str], shift: Mapping[str, int], pattern: str
) -> Source:
    """Open a log in an object store."""
    with network_errors(location):
        found = location.list() or [file.name for file in location.files()]
    if not found:
        raise InputError(
            "no such object or folder", where=str(location), remedy="pass the folder of a training log"
        )
    name, log = (format, location) if format else _detect_in_objects(location)
    if name in _OBJECT_SCALARS:
        return _scalar_log(log, _OBJECT_SCALARS[name], mapping, shift, named=format is not None)
    if name == _LEDGERS:
        return LedgerLog(log, mapping)
    kinds = _OBJECT_KINDS.get(name, ())
    named = pattern or any(kind.step_name(Path(name)) is not None for name in found for kind in kinds)
    if not kinds or not (named or "step" in mapping):
        raise InputError(
            f"no {' or '.join(kind.layout for kind in kinds)} here"
            if kinds
            else f"format {name!r} can be read only from local files",
            where=f"{location}, which contains {found[0]!r}, for example",
            why="only step_<N>.safetensors, step_<N>.npz, logs of ledgers and logs of scalars can be read from an "
            f"object store (--format {', '.join((*_OBJECT_KINDS, _LEDGERS, *_OBJECT_SCALARS))}); the other formats "
            "need local files",
            remedy="copy the log to a local folder first (aws s3 sync URL FOLDER), and pass that folder",
        )
    folder = StepFolder(location, kinds, mapping)
    return folder.with_pattern(pattern) if pattern else folder


def _scalar_log(
    location: Storage, kind: ScalarKind, mapping: Mapping[str, str], shift: Mapping[str, int], *, named: bool
) -> ScalarLog:
    """Open a log of scalars. An explicit format applies to the file regardless of its name."""
    if named and location.files() == [location]:
        kind = replace(kind, files=lambda location: [location])
    return ScalarLog(location, kind, mapping, shift)


# Recognition -------------------------------------------------------------------------------------------------


def format_of(location: Storage) -> str:
    """Return the name of the format of a log, detected from its content, or ``run file`` for a run file."""
    if find_run_file(location) is not None:
        return "run file"
    if location.local_path is None:
        return _detect_in_objects(location)[0]
    parts = run_parts(location.local_path)
    return find_format(single_log(parts[0] if parts else location.local_path)) or "steps"


def holds_run(path: Path, *, in_one_file: bool = False) -> bool:
    """Return True if a path is a log with tensors or a run file or, optionally, contains one file that is a log."""
    if find_run_file(LocalStorage(path)) is not None:
        return True
    return holds_tensors(single_log(path) if in_one_file else path) or bool(run_parts(path))


def _is_scalar_log(location: Storage, mapping: Mapping[str, str]) -> bool:
    """Return True if a location contains a log of scalars, based on its content, or text with lines of a form."""
    name = format_of(location)
    text = "line" in mapping and location.files() == [location] and not find_run_file(location)
    known = FORMATS.get(_TEXT if text and name == "steps" else name)
    return known is not None and known.scalars is not None


def _detect_in_objects(location: Storage) -> tuple[str, Storage]:
    """Return the name of the format of a log in an object store, detected from its content, and its location."""
    with network_errors(location):
        found = location.files()
        if ledger_names(file.name for file in found):
            return _LEDGERS, location
        if not any(kind.number(Path(file.name)) is not None for file in found for kind in _OBJECT_KINDS["steps"]):
            for name, kind in _OBJECT_SCALARS.items():
                if kind.files(location):
                    return name, location
            candidates = [file for file in found if file.suffix in _SUFFIXES]
            for name, kind in _OBJECT_SCALARS.items() if len(candidates) == 1 else ():
                if kind.files(candidates[0]):
                    return name, candidates[0]
    return "steps", location
