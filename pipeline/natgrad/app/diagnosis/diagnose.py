"""Find the command that processes a folder or file, and what prevents others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from natgrad.app.diagnosis.candidates import (
    Attempts,
    Deadline,
    ReadPart,
    Tried,
    best_proposals,
    readings,
    try_with_advice,
    with_proven_shift,
    with_recovered_gradients,
)
from natgrad.app.diagnosis.proposals import Part, Proposal, scan_command
from natgrad.schema.errors import InputError
from natgrad.sources.formats import find_format
from natgrad.sources.opening import format_of, holds_run
from natgrad.sources.search import FoundLog, logs_below, nearest_format, unknown_files
from natgrad.sources.steps import NotYet
from natgrad.storage import LocalStorage, Storage

__all__ = ["Diagnosis", "diagnose", "no_log"]

_SECONDS = 6.0
"""Time after which no further command is tried. The description of the log takes some seconds more."""

_READINGS = 2
_COMMANDS = 6
_ENTRIES_NEARBY = 32


@dataclass(frozen=True)
class Diagnosis:
    """Proposals for a source, and the reasons why others are refused.

    Attributes
    ----------
    chosen : Tried, optional
        The best proposal that is accepted.
    command : str, optional
        Its command, or the one that processes all runs below the folder.
    run_file : tuple of str, optional
        Path and content of a run file with the same logs.
    others : list of str
        Other commands that are accepted, for other runs or with fewer logs.
    parts : list of ReadPart
        Logs that can be read, alone or together with others.
    error : InputError, optional
        Why there is no command, or why the sources cannot be processed as they are.
    refused : mapping of str to InputError
        What else was tried.
    nearest : str, optional
        The format that the sources resemble most, and why they are not of this format.
    ended : bool
        The search ended because of the time.
    nearby : list of Part
        Logs of the best proposal that are next to the folder.
    """

    chosen: Tried | None
    command: str | None
    run_file: tuple[str, str] | None
    others: list[str]
    parts: list[ReadPart]
    error: InputError | None
    refused: Mapping[str, InputError]
    nearest: str | None
    ended: bool
    nearby: list[Part]


def diagnose(paths: Sequence[Storage], options: Mapping[str, Any]) -> Diagnosis:
    """Try to process sources as they are. If this fails or quantities are missing, search them for logs.

    Parameters
    ----------
    paths : sequence of Storage
    options : mapping
        Options of a `Part`, and ``exact_names`` and ``sweep``. With options, only these are tried.

    Raises
    ------
    InputError
        If there is no such file or folder, or no log can be read with the options.
    """
    stop, attempts = Deadline(_SECONDS), Attempts()
    flags = {name: options[name] for name in ("exact_names", "sweep")}
    reading = {name: value for name, value in options.items() if name not in flags}
    parts = tuple(Part(str(path), **reading) for path in paths)
    asked = try_with_advice(Proposal(parts, shared=True, **flags), attempts)
    error = attempts.main()
    for path in paths:
        if error is not None and path.local_path is not None and not path.local_path.exists():
            raise error
    attempts.commands.clear()
    accepted = [] if asked is None else [asked]
    read, nearby = list[ReadPart](), list[ReadPart]()
    if any(flags.values()) or not parts[0].plain:
        if asked is None and len(paths) == 1 and not flags["sweep"]:
            read = readings(FoundLog(Path(str(paths[0])), parts[0].format or ""), attempts, stop, parts[0])
        if error is not None and asked is None and not read:
            raise error
    elif asked is None or asked.lacking:
        for path in paths:
            read += _read_below(path, attempts, stop)
        folder = _run_file_folder(paths)
        accepted += best_proposals(read, folder, attempts, stop)
        if read and len(paths) == 1 and all(tried.lacking for tried in accepted):
            nearby = _read_nearby(paths[0], stop)
            accepted += best_proposals(read, folder, attempts, stop, nearby) if nearby else []
            read += [part for tried in accepted for part in tried.parts if part in nearby and part not in read]
    recovering = (with_recovered_gradients(tried, attempts) for tried in accepted[:_READINGS])
    accepted += [tried for tried in recovering if tried is not None]
    accepted.sort(key=lambda tried: tried.rank)  # stable: the sources as they are come first
    chosen = next(iter(accepted), None)
    if chosen is not None and "gradient" not in chosen.lacking:
        accepted = [tried for tried in accepted if not _reads_gradients_as_parameters(tried, chosen)]
    if chosen is not None and parts[0].plain:
        chosen = accepted[0] = with_proven_shift(chosen, attempts)
    commands = list(dict.fromkeys(tried.proposal.command for tried in accepted))
    scan = None if asked is not None or len(paths) != 1 else _scan(paths[0], accepted)
    if scan is not None:
        commands.insert(0, scan)
    # The sources themselves are often refused only because the logs are in their folders.
    main = error if asked is not None or attempts.main() is None else attempts.main()
    return Diagnosis(
        chosen,
        commands[0] if commands else None,
        None if chosen is None or scan is not None else chosen.proposal.run_file,
        commands[1:_COMMANDS],
        read,
        main,
        attempts.refused() if error is None else {" ".join(map(str, paths)): error, **attempts.refused()},
        _nearest(paths, error) if error is not None else None,
        stop(),
        [] if chosen is None else [part.part for part in nearby if part.part in chosen.proposal.parts],
    )


def _reads_gradients_as_parameters(tried: Tried, chosen: Tried) -> bool:
    """Return True if a proposal finds no gradients in a log, but more parameters than the chosen one."""
    same = tried.proposal.parts[0].location == chosen.proposal.parts[0].location
    counts = [len(one.rehearsal.content.arrays.get("parameter", ())) for one in (tried, chosen)]
    return same and "gradient" in tried.lacking and counts[0] > counts[1]


def _read_below(path: Storage, attempts: Attempts, stop: Deadline) -> list[ReadPart]:
    """Read the logs at a location and below it, each in its best ways."""
    local = path.local_path
    if local is None:
        found = [FoundLog(Path(str(path)), format_of(path))]
    elif local.is_dir():
        found = list(logs_below(local, stop))
    else:
        # A file of one step is part of the log in its folder.
        found = [*logs_below(local), *([FoundLog(local.parent, "")] if holds_run(local.parent) else [])]
    read: list[ReadPart] = []
    for log in found:
        # Files next to each other may contain one state each, or one run each; the folder was read before them.
        if (
            log.path.is_file()
            and not log.scalars
            and any(part.part.location == str(log.path.parent) for part in read)
        ):
            continue
        if log.format != "run file" and not (read and stop()):
            # The only file of a folder without a known log is found by itself.
            found_parts = readings(log, attempts, stop)[:_READINGS]
            read += [part for part in found_parts if log.format or not part.scalars]
    return [part for part in read if "/" not in part.part.pattern or not _holds_runs(part, read)]


def _read_nearby(path: Storage, stop: Deadline) -> list[ReadPart]:
    """Read the logs next to a folder, which may contain what it lacks.

    If one of them has parameters, they are other runs. The entries of a long listing are probably not related.
    """
    local = path.local_path
    if local is None or not local.is_dir():
        return []
    folder = local.absolute()
    try:
        entries = sorted(islice(folder.parent.iterdir(), _ENTRIES_NEARBY + 1))
    except OSError:
        return []
    read: list[ReadPart] = []
    for entry in entries if len(entries) <= _ENTRIES_NEARBY else ():
        if entry != folder and not entry.name.startswith("."):
            read += [] if stop() else _read_below(LocalStorage(entry), Attempts(), stop)
    return [] if stop() or any("parameter" in part.quantities for part in read) else read


def _holds_runs(part: ReadPart, read: Sequence[ReadPart]) -> bool:
    """Return True if there are logs of several states below a log, so that its folders are runs and not steps.

    Numbers that only a pattern selects may also be those of layers.
    """
    folder = Path(part.part.location)
    return any(
        folder in Path(other.part.location).parents
        and len(other.steps) > 1
        and not (other.scalars or other.part.pattern)
        for other in read
    )


def _run_file_folder(paths: Sequence[Storage]) -> Path | None:
    """Return the folder in which a run file can be proposed."""
    local = paths[0].local_path
    if len(paths) > 1 or local is None:
        return None
    return local if local.is_dir() else local.parent


def _scan(root: Storage, accepted: Sequence[Tried]) -> str | None:
    """Return the command that processes several runs below a folder; None if they are not of equal completeness.

    A scan reads each run from its own folder, with the same options.
    """
    if not accepted:
        return None
    best = accepted[0].lacking
    runs = [tried for tried in accepted if len(tried.proposal.parts) == 1 and tried.lacking == best]
    parts = [tried.proposal.parts[0] for tried in runs]
    alike = [part for part in parts if part.flags() == parts[0].flags()]
    folders = {part.location for part in alike if holds_run(Path(part.location), in_one_file=True)}
    if len(folders) < 2 or str(root) in folders or len(accepted[0].proposal.parts) > 1:
        return None
    allow_gaps, recover = (
        any(getattr(tried.proposal, name) for tried in runs) for name in ("allow_gaps", "recover")
    )
    return scan_command(str(root), alike, allow_gaps=allow_gaps, recover=recover)


def _nearest(paths: Sequence[Storage], error: InputError) -> str | None:
    """Return the format that the sources resemble most, and why they are not of this format."""
    for path in paths:
        local = path.local_path
        if local is None or not local.is_dir():
            continue
        of_format = find_format(local)
        found = (of_format, error.what) if of_format is not None else nearest_format(local)
        if found is not None:
            name, why = found
            return f"{name}: {why}"
    return None


def no_log(path: Storage, contents: Mapping[str, str], error: InputError) -> InputError:
    """Return the error for a folder in which no log was found; other errors are returned unchanged."""
    if not isinstance(error, NotYet):
        return error
    found = "; ".join(f"{kind}: {names}" for kind, names in contents.items())
    local = path.local_path
    unknown = next(iter(unknown_files(local)), None) if local is not None and local.is_dir() else None
    return InputError(
        "no log was found that can be processed",
        where=str(path),
        why=f"{error.what}; it contains {found}"
        + (f"; the content of {unknown.name!r} is of no known format" if unknown else ""),
        remedy="read these files with the library that wrote them, and save their arrays as step_<N>.npz or "
        "step_<N>.safetensors (natgrad.Recorder)"
        if unknown
        else error.remedy,
    )
