"""Read a log that is one folder with a file or folder per step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.names import STATES
from natgrad.sources.base import StepReader
from natgrad.sources.bounds import read_limited
from natgrad.sources.changes import changed_lately, identity
from natgrad.sources.checkpoints.npz_file import NpzFile
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.checkpoints.several_files import SeveralFiles
from natgrad.sources.checkpoints.zip_members import first_member
from natgrad.sources.configured import nearby, read_or_note
from natgrad.sources.container import Container, first_bytes, read_errors
from natgrad.sources.families import usual_families
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import CHECKPOINT, NATIVE, Names
from natgrad.sources.step_names import AUTOMATIC, STEP_FIELD, Naming, StepName, parse_name, role_of, step_number
from natgrad.sources.steps import ListingChanged, LoggedStep, LoggedTensor, NotYet, Unreadable, vanished
from natgrad.storage import LocalStorage, Storage, network_errors

__all__ = ["NATIVE_KINDS", "Kind", "StepFolder", "is_entry", "not_latest_yet", "step_entries"]

_log = logger(__name__)
_TRACKER_LIMIT = 1 << 12


@dataclass(frozen=True)
class Kind:
    """A kind of step in a folder.

    Attributes
    ----------
    layout : str
        Used in messages, such as ``step_<N>.npz``.
    contains : callable
        Function of a path that returns True if it is of this kind, regardless of its name. For a file, the suffix
        decides.
    open : callable
        Function of a step and names that returns a `Container`.
    names : Names
        Meaning of its keys.
    unfinished : callable
        Function of a path that returns why it cannot be read yet, empty if it can.
    suffixes : tuple of str
        Endings of its names; empty if they have none.
    clean : callable
        Function of a name that returns it without a mark of files that are being written.
    content : callable
        Function of a path that returns True if its first bytes are those of this kind. It decides for names that
        match a pattern and have another suffix.
    one_array : bool
        A file contains one array, so that a step may have several files with parameters.
    """

    layout: str
    contains: Callable[[Path], bool]
    open: Callable[[LoggedStep, Names], Container]
    names: Names = NATIVE
    unfinished: Callable[[Path], str] = lambda path: ""
    suffixes: tuple[str, ...] = ()
    clean: Callable[[str], str] = lambda name: name
    content: Callable[[Path], bool] = lambda path: False
    one_array: bool = False

    @property
    def layouts(self) -> str:
        """The layout, with all suffixes."""
        return ", ".join((self.layout, *self.suffixes[1:]))

    def stem(self, name: str) -> str | None:
        """Return a name without the suffix, or None if the suffix is not one of this kind."""
        name = self.clean(name)
        if not self.suffixes:
            return name
        suffix = max((suffix for suffix in self.suffixes if name.endswith(suffix)), key=len, default=None)
        return None if suffix is None else name.removesuffix(suffix)

    def step_name(self, path: Path, naming: Naming = AUTOMATIC) -> StepName | None:
        """Return the step number in the name of a path, or None if the path is not of this kind.

        A path without a step number is examined only if its name has a number that may be intended as one, or if
        the number is in the file. A path that no longer exists has no kind.
        """
        stem = self.stem(path.name)
        if stem is None and naming.pattern and self.content(path):
            stem = path.name
        if stem is None:
            return None
        found = naming.parse(path.parts, stem)
        if found.number is None and not found.problem and not naming.keyed:
            return None
        try:
            return found if self.contains(path) else None
        except FileNotFoundError:  # the run removed the folder after it was listed
            return None

    def number(self, path: Path, naming: Naming = AUTOMATIC) -> int | None:
        """Return the step in the name of a path of this kind, otherwise None."""
        found = self.step_name(path, naming)
        return None if found is None else found.number

    def holds(self, path: Path, naming: Naming = AUTOMATIC) -> bool:
        """Return True if a path is a step of this kind."""
        found = self.step_name(path, naming)
        return found is not None and (found.number is not None or naming.keyed)


def not_latest_yet(path: Path, tracker: str) -> str:
    """Return why a step cannot be read yet, if a tracker file in the same folder names an earlier step as the last.

    Parameters
    ----------
    path : Path
        Path of the step.
    tracker : str
        Name of the tracker file.

    Returns
    -------
    str
        Empty if the step can be read, or if it has not changed recently: not every run writes a tracker file.
    """
    try:
        name = read_limited(path.parent / tracker, _TRACKER_LIMIT).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""
    last, number = step_number(name), step_number(path.name)
    if last is None or number is None or number <= last:
        return ""
    recent = changed_lately(identity(LoggedStep(number, LocalStorage(path)))["time"])
    return f"{tracker} still contains {name[:80]}: the step is being written" if recent else ""


def is_entry(path: Path) -> bool:
    """Return True: the suffix determines the kind of a file."""
    return True


NATIVE_KINDS = {
    "safetensors": Kind(
        "step_<N>.safetensors",
        is_entry,
        lambda step, names: SafetensorsFile(step),
        suffixes=(".safetensors",),
        content=lambda path: first_bytes(path, 9)[8:] == b"{",
    ),
    "npz": Kind(
        "step_<N>.npz",
        is_entry,
        lambda step, names: NpzFile(step),
        suffixes=(".npz",),
        content=lambda path: first_member(path).endswith(".npy"),
    ),
}
"""The native format: ``step_<N>.safetensors`` and ``step_<N>.npz``."""


class StepFolder:
    """A run logged in one folder.

    Parameters
    ----------
    location : Storage
        The folder. In an object store, kinds detect their steps only by name.
    kinds : sequence of Kind
        Kinds of steps to look for.
    mapping : mapping, optional
        Key by quantity. Takes precedence over the kinds and the mapping file of the folder.
    own_map_file : bool
        Do not read the mapping file here, because it has another meaning for these kinds.

    Raises
    ------
    InputError
        If the mapping or the mapping file is not valid.
    """

    def __init__(
        self,
        location: Storage,
        kinds: Sequence[Kind] = tuple(NATIVE_KINDS.values()),
        mapping: Mapping[str, str] | None = None,
        *,
        own_map_file: bool = False,
    ) -> None:
        self.location = location
        names = (kind.names if own_map_file else kind.names.of_folder(self.location) for kind in kinds)
        self._kinds = tuple(
            replace(kind, names=kind_names.mapped(mapping or {}))
            for kind, kind_names in zip(kinds, names, strict=True)
        )

    @property
    def _naming(self) -> Naming:
        return self._kinds[0].names.naming

    def with_pattern(self, pattern: str) -> StepFolder:
        """Use a pattern of names (``--pattern``), which takes precedence over that of the mapping file."""
        self._kinds = tuple(replace(kind, names=replace(kind.names, pattern=pattern)) for kind in self._kinds)
        return self

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`.

        Files are opened only if the user specified the key of their step number.
        """
        files: dict[tuple[int, int], _Files] = {}
        unnumbered: dict[Storage, str] = {}
        for entry in step_entries(self.location, self._naming):
            try:
                listed = self._listed(entry, unnumbered)
            except ListingChanged:  # the run has removed this step
                continue
            if listed is None:
                continue
            step, attempt = listed
            files.setdefault((step.number, attempt), _Files(self._naming)).add(step, self._array(step.storage))
        if unnumbered:
            self._report(unnumbered, alone=not files)
        if not files:
            names = ", ".join(kind.layouts for kind in self._kinds)
            pattern = f" whose names match the pattern {self._naming.pattern!r}" * bool(self._naming.pattern)
            raise NotYet(
                f"there are no step files ({names}) in this folder{pattern}",
                where=str(self.location),
                why="it is empty, or the log has another format or other names",
                remedy="pass the folder that contains the step files, or the names of the files with --pattern; "
                "natgrad inspect shows what this folder contains and which command reads it",
            )
        skipped = [step.storage.name for of_step in files.values() for step in of_step.skipped()]
        if skipped:
            _log.warning(
                "%d files are not read because other files of the same steps contain the model; the first is %s "
                "(to read these instead, select them with --pattern)",
                len(skipped),
                skipped[0],
            )
        _leave_unfinished(files)
        return _newest_attempt({key: of_step.combined() for key, of_step in files.items()})

    def _listed(self, entry: Storage, unnumbered: dict[Storage, str]) -> tuple[LoggedStep, int] | None:
        """Return an entry as a step with its attempt, or None if it is not a complete step."""
        found = None if entry.name.startswith(".") else self._kind(entry)
        if found is None:
            return None
        kind, name = found
        if name.number is None and not self._naming.keyed:
            unnumbered[entry] = name.problem
            return None
        reason = "" if entry.local_path is None else kind.unfinished(entry.local_path)
        if reason:
            self._require_writer(entry, reason)
            _log.warning("%s is left for the next pass: %s", entry, reason)
            return None
        if not self._naming.keyed:
            assert name.number is not None
            origin = f"{name.taken!r} in {entry.name!r}"
            return LoggedStep(name.number, entry, origin=origin, step_span=kind.names.step_span), name.attempt
        number = self._number_in_file(kind, entry, unnumbered)
        origin = f"the key {kind.names.keys['step'][0]!r} in {entry.name!r}"
        step = None if number is None else LoggedStep(number, entry, origin=origin, step_span=kind.names.step_span)
        return None if step is None else (step, name.attempt)

    def _array(self, file: Storage) -> str | None:
        """Return the name of the array in a file of one array, without the step; None for other files."""
        found = self._kind(file)
        if found is None or not found[0].one_array:
            return None
        path = _path(file)
        return self._naming.without_step(path.parts, found[0].stem(path.name) or path.name)

    def _number_in_file(self, kind: Kind, entry: Storage, unnumbered: dict[Storage, str]) -> int | None:
        """Return the step number in a file. A file without a number in its name need not be a step."""
        key = kind.names.keys["step"][0]
        step = LoggedStep(-1, entry)
        try:
            with NamedStep(kind.open(step, kind.names), kind.names) as reader:
                number = reader.number("step")
        except ListingChanged:
            raise
        except InputError as error:
            if _has_digits(step):
                raise
            unnumbered[entry] = error.what
            return None
        if number is not None and number == int(number) and number >= 0:
            return int(number)
        if number is None and (not _has_digits(step) or role_of(entry.name) in ("optimizer", "other")):
            unnumbered[entry] = f"it has no key {key!r}"
            return None
        raise InputError(
            f"{key!r} is {number}, which is not a step number",
            where=str(entry),
            remedy="specify the key of the step number with --map step=KEY",
        )

    def _report(self, unnumbered: Mapping[Storage, str], *, alone: bool) -> None:
        """Warn about entries that may be steps but have no number, or refuse the log if there are no others."""
        first, reason = next(iter(unnumbered.items()))
        if not alone:
            _log.warning(
                "%d entries are skipped because they have no step number; the first is %s: %s",
                len(unnumbered),
                first,
                reason,
            )
            return
        raise InputError(
            f"no name in this folder has a step number: {first.name!r}, for example",
            where=str(self.location),
            why=reason,
            remedy=self._remedy(first),
        )

    def _remedy(self, entry: Storage) -> str:
        """Return how to number a step: by a key that its file contains, or by a pattern of its name."""
        kind, _ = self._kind(entry) or (None, None)
        remedies = []
        if kind is not None and not self._naming.keyed:
            step = LoggedStep(-1, entry)
            with suppress(InputError), NamedStep(kind.open(step, CHECKPOINT), CHECKPOINT) as reader:
                key = reader.key("step")
                if key:
                    remedies.append(f"take the number from the files with --map step={key}")
        pattern = "" if self._naming.pattern or kind is None else _suggestion(entry.name, kind)
        if pattern:
            remedies.append(
                f"or, if this number is to be used as the step, --pattern {pattern!r}"
                if remedies
                else f"use --pattern {pattern!r} if this number is to be used as the step"
            )
        return ", ".join(remedies) or "mark the number with --pattern, or name its key (--map step=KEY)"

    def _require_writer(self, entry: Storage, reason: str) -> None:
        """Refuse an incomplete step that is no longer being written."""
        if not changed_lately(identity(LoggedStep(-1, entry))["time"]):
            raise InputError(
                f"a step was never completed: {reason}",
                where=str(entry),
                why="the run was stopped while it wrote the step, or while it removed it (checkpoint rotation)",
                remedy="remove it, or write it again",
            )

    def _kind(self, entry: Storage) -> tuple[Kind, StepName] | None:
        """Return the kind of an entry, with the step number in its name; None if it is of no kind."""
        named = ((kind, kind.step_name(_path(entry), self._naming)) for kind in self._kinds)
        return next(((kind, name) for kind, name in named if name is not None), None)

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step; see `natgrad.sources.base.Source`."""
        kind = self._kind_of(step, step.storage)
        if step.others:
            return self._open_files(step, kind.names)
        names = kind.names.of_file(step.storage.name, self.location.name)
        return NamedStep(kind.open(step, names), names)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration in files next to the step, and in the step itself; see `Configured`."""

        def saved() -> dict[str, Scalar]:
            with self.open(step) as reader:
                return reader.configuration() if isinstance(reader, NamedStep) else {}

        return {**nearby(self.location, step, notes), **read_or_note(saved, step.storage, notes)}

    def _open_files(self, step: LoggedStep, names: Names) -> NamedStep:
        """Open a step that consists of several files."""
        merged = SeveralFiles(step)
        arrays = {file: self._array(file) for file in (step.storage, *step.others)}
        several = len({_role(file, array) for file, array in arrays.items()}) < len(arrays)
        optimizers = [file.name for file in step.others if role_of(file.name) == "optimizer"]
        try:
            with read_errors(step, "the files of a step"):
                for file in (step.storage, *step.others):
                    role = "" if file == step.storage and role_of(file.name) == "other" else role_of(file.name)
                    if role == "optimizer" and len(optimizers) > 1:
                        merged.unread[role] = f"it is in several files: {', '.join(optimizers)}"
                        continue
                    kind = self._kind_of(step, file)
                    try:
                        container = kind.open(replace(step, storage=file, others=()), names)
                    except Unreadable as error:
                        if role != "optimizer":
                            raise
                        merged.unread[role] = f"{file.name}: {error.what}"
                        continue
                    if several and (array := arrays[file]) is not None:
                        merged.include(container, rename=partial(_renamed, array))
                        continue
                    names, rename = names.of_part(role, container)
                    merged.include(container, role, rename)
                    merged.ordered = container.ordered if file == step.storage else merged.ordered
        except BaseException:
            merged.close()
            raise
        return NamedStep(merged, names)

    def _kind_of(self, step: LoggedStep, file: Storage) -> Kind:
        found = self._kind(file)
        if found is None:
            raise vanished(f"{file.name} of this step no longer exists", step)
        return found[0]


class _Files:
    """The files of one step, by their roles.

    Parameters
    ----------
    naming : Naming
    """

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._by_role: dict[str, list[LoggedStep]] = {}
        self._arrays: dict[str, str] = {}

    def add(self, step: LoggedStep, array: str | None) -> None:
        """Add a file, given as a step.

        Parameters
        ----------
        step : LoggedStep
        array : str, optional
            Name of the array in a file that contains only one.

        Raises
        ------
        InputError
            If the step has another file with the same content.
        """
        role = _role(step.storage, array)
        same = self._by_role.setdefault(role, [])
        if same and role == "" and self._naming.keyed and _has_digits(same[0]) != _has_digits(step):
            _log.info("%s and %s are the same step", same[0].storage, step.storage)
            self._by_role[role] = [same[0] if _has_digits(same[0]) else step]
        elif same and role not in ("optimizer", "other") and (array is None or self._arrays.get(array) == role):
            raise _twice(same[0], step)
        else:
            same.append(step)
        if array is not None:
            self._arrays[array] = role

    def skipped(self) -> list[LoggedStep]:
        """Return the files that are not read, because others contain the model."""
        return self._by_role.get("other", []) if set(self._by_role) > {"other"} else []

    def combined(self) -> LoggedStep:
        """Return the step with all files that are read. The first file is that of the model, if there is one."""
        others = self._by_role.get("other", [])
        if set(self._by_role) == {"other"} and len(others) > 1:
            raise _twice(*others[:2])
        read = [step for role in ("", "gradient", "hvp", "optimizer") for step in self._by_role.get(role, [])]
        first, *rest = read or others
        return replace(first, others=tuple(step.storage for step in rest))

    def lacks(self, other: _Files) -> str:
        """Return what this step lacks, but another one has, of model and optimizer; empty if it lacks nothing."""
        roles, of_other = (set(one._by_role) - {"other"} or {""} for one in (self, other))
        missing = of_other - roles
        gradients = usual_families(dict.fromkeys(other._arrays, LoggedTensor((), ""))).get(STATES[1], ("", {}))[1]
        arrays = [
            name
            for name, role in other._arrays.items()
            if role == "" and name not in self._arrays and name not in gradients.values()
        ]
        if "" in missing or arrays:
            return ", ".join(["model", *arrays[:1]])
        return "optimizer" if "optimizer" in missing else ""


def _role(file: Storage, array: str | None) -> str:
    """Return the role of a file; see `natgrad.sources.step_names.role_of`."""
    return role_of(file.name if array is None else array)


def _renamed(name: str, key: str) -> str:
    """Return the name of an array under a key of the file that contains it."""
    return name or key


def _twice(one: LoggedStep, other: LoggedStep) -> InputError:
    return InputError(
        f"step {one.number} exists twice: {one.storage.name} and {other.storage.name}",
        where=f"{other.storage}, step {one.number}",
        why="the run was logged twice into one folder, in two formats or with padded numbers, or the number "
        "starts again in each epoch",
        remedy="keep one of the files, select files with --pattern, or specify the key of the step number with "
        "--map step=KEY",
    )


def _leave_unfinished(files: dict[tuple[int, int], _Files]) -> None:
    """Remove the last step if it is being written: it lacks a model or optimizer, which the one before has."""
    if len(files) < 2:
        return
    *_, before, last = sorted(files)
    missing = files[last].lacks(files[before])
    step = files[last].combined()
    with suppress(ListingChanged):
        if not missing or not changed_lately(identity(step)["time"]):
            return
        _log.warning(
            "step %d is left for the next pass: its %s is still being written (%s)",
            step.number,
            missing,
            step.storage.name,
        )
        del files[last]


def step_entries(location: Storage, naming: Naming) -> list[Storage]:
    """Return the entries of a folder whose names may be those of steps.

    Raises
    ------
    InputError
        If the folder cannot be listed.
    """
    folders = [location]
    for level in range(naming.depth):
        try:
            with network_errors(location):
                names = [(folder, name) for folder in folders for name in folder.list()]
                if location.local_path is not None and not names:
                    location.stat()
        except OSError as error:
            raise InputError(
                f"cannot list the log folder: {error.strerror}",
                where=str(location),
                remedy="pass the folder that contains the step files",
            ) from error
        folders = [folder / name for folder, name in names if naming.admits(level, name)]
    return folders


def _newest_attempt(found: Mapping[tuple[int, int], LoggedStep]) -> list[LoggedStep]:
    """Return the steps of the newest attempt.

    Lightning keeps the file of a step and adds ``-v1`` to the name of the file that a restarted run writes. From
    the first such step on, a file without it is of the newest attempt only if it was written later.
    """
    newest: dict[int, int] = {}
    for number, attempt in sorted(found):
        newest[number] = attempt
    kept = dict(newest)
    for last in sorted({attempt for _, attempt in found if attempt}):
        files = [(number, step) for (number, attempt), step in found.items() if attempt == last]
        first = min(number for number, _ in files)
        begun = min(identity(step)["time"] for _, step in files)
        left = [
            number
            for number, attempt in kept.items()
            if number > first and attempt < last and identity(found[number, attempt])["time"] < begun
        ]
        for number in left:
            del kept[number]
        if left:
            _log.warning(
                "%d steps after step %d, the first with the ending -v%d of a restarted run, are skipped because "
                "they were written before it; the first is %d",
                len(left),
                first,
                last,
                min(left),
            )
    return [found[number, attempt] for number, attempt in sorted(kept.items())]


def _suggestion(name: str, kind: Kind) -> str:
    """Return a pattern for a name whose number was not used; other numbers are replaced by stars."""
    stem = kind.stem(name) or ""
    start, stop = parse_name(stem).span
    start_text, end_text = (re.sub(r"[0-9][0-9.]*", "*", text) for text in (stem[:start], stem[stop:]))
    pattern = f"{start_text}{STEP_FIELD}{end_text}{kind.clean(name).removeprefix(stem)}"
    return pattern if stop and Naming(pattern).parse((name,), stem).number is not None else ""


def _has_digits(step: LoggedStep) -> bool:
    return any(character.isdecimal() for character in step.storage.name)


def _path(entry: Storage) -> Path:
    """Return the path in which kinds look for the number of a step: the local path, or the name of an object."""
    return entry.local_path or Path(entry.name)
