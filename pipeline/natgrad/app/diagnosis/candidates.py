"""Find the logs of a run in a folder, the options with which each is read, and the proposals that join them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from natgrad.app.diagnosis.proposals import Part, Proposal, advised
from natgrad.ingestion.rehearsal import Rehearsal
from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS, STATES, USUAL_SCALARS
from natgrad.sources.alignment import misalignment
from natgrad.sources.base import Keyed, Source, StepContent
from natgrad.sources.names import CHECKPOINT, ROOT
from natgrad.sources.opening import open_log
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.search import FoundLog
from natgrad.sources.step_names import role_of
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet
from natgrad.sources.suggestions import suggested_map, suggested_patterns
from natgrad.sources.tensor_names import matched_names
from natgrad.storage import open_storage

__all__ = [
    "Attempts",
    "Deadline",
    "ReadPart",
    "Tried",
    "best_proposals",
    "readings",
    "try_with_advice",
    "with_proven_shift",
    "with_recovered_gradients",
]

_TRIALS = 12
"""Number of sets of options that are tried for one log."""

_STEPS_DESCRIBED = 32


class Deadline:
    """A time at which a search ends.

    Parameters
    ----------
    seconds : float
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __call__(self) -> bool:
        """Return True after the time."""
        return time.monotonic() >= self._end


@dataclass
class Attempts:
    """Logs and commands that were tried without success, and why they are refused.

    Attributes
    ----------
    logs : dict
        Location and options of a log that cannot be read alone, to the reason.
    commands : dict
        Command that is refused to the reason.
    """

    logs: dict[str, InputError] = field(default_factory=dict)
    commands: dict[str, InputError] = field(default_factory=dict)

    def refused(self) -> dict[str, InputError]:
        """Return what was refused, with each reason only once."""
        found: dict[str, tuple[str, InputError]] = {}
        for what, error in (*self.commands.items(), *self.logs.items()):
            reason = f"{error.what}; {error.why}; {error.remedy}"
            found.setdefault(reason, (what, error))
        return dict(found.values())

    def main(self) -> InputError | None:
        """Return the reason that is closest to success: that of a command, then that of a log with steps."""
        of_logs = sorted(self.logs.values(), key=lambda error: isinstance(error, NotYet))
        return next(iter((*self.commands.values(), *of_logs)), None)


# One log ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadPart:
    """A log that can be read with some options, alone or together with others.

    Attributes
    ----------
    part : Part
    format : str
    steps : tuple of LoggedStep
    quantities : mapping
        Numbers of the examined steps that have each quantity, by its name.
    examined : tuple of int
        Numbers of the steps that were examined: all of them, or some at equal distances.
    scalars : bool
        It is a log of scalars.
    notes : tuple of str
    keys : mapping
        Keys of its first step; see `natgrad.sources.base.Keyed`.
    counts : mapping
        Number of tensors of each quantity, by its name.
    matched : bool
        Every gradient has the name of a parameter, if the log contains both.
    """

    part: Part
    format: str
    steps: tuple[LoggedStep, ...]
    quantities: Mapping[str, tuple[int, ...]]
    examined: tuple[int, ...]
    scalars: bool
    notes: tuple[str, ...]
    keys: Mapping[str, LoggedTensor | float]
    counts: Mapping[str, int]
    matched: bool

    @property
    def numbers(self) -> set[int]:
        """Numbers of its steps."""
        return {step.number for step in self.steps}

    @property
    def lacking(self) -> list[str]:
        """Usual quantities that it could provide, but does not."""
        usual = USUAL_SCALARS if self.scalars else (*STATES[:2], *USUAL_SCALARS)
        lacking = [name for name in usual if name not in self.quantities]
        if len(self.quantities.get(STATES[0], self.examined)) < len(self.examined):
            lacking = [STATES[0], *lacking]
        return lacking if self.matched else [*lacking, "gradient"]

    def text(self) -> str:
        """Describe the quantities that it provides, and for which steps."""
        first, last = min(self.numbers), max(self.numbers)
        parts = []
        for name, numbers in self.quantities.items():
            count = f" {self.counts[name]} tensors" if self.counts.get(name) else ""
            parts.append(f"{name}{count} {_at(numbers, self.examined, len(self.steps))}")
        unknown = list(self.keys)[:8] if not self.quantities else []
        parts += [f"no known quantity; its keys are {', '.join(unknown)}"] if unknown else []
        states = "steps" if self.scalars else "states"
        return f"{self.format}, {len(self.steps)} {states} {first} to {last}: " + ", ".join(parts)


def _at(numbers: Sequence[int], examined: Sequence[int], steps: int) -> str:
    """Return for which steps a quantity exists."""
    if len(numbers) == len(examined):
        return "at every step" if len(examined) == steps else f"at all {len(examined)} steps that were examined"
    return f"at {len(numbers)} of {len(examined)} steps, {numbers[0]} to {numbers[-1]}"


def _read(part: Part, format: str, stop: Callable[[], bool]) -> ReadPart:
    """List and describe a log."""
    try:
        return _described(part, format, stop)
    except OSError as error:
        raise InputError(
            f"cannot read the log: {error.strerror}", where=part.location, remedy="make its files readable"
        ) from error


def _described(part: Part, format: str, stop: Callable[[], bool]) -> ReadPart:
    log = open_log(open_storage(part.location), part.format, part.map, part.shift, pattern=part.pattern)
    listed = tuple(log.steps())
    scalars = isinstance(log, ScalarLog)
    chosen = listed if scalars else listed[:: -(-len(listed) // _STEPS_DESCRIBED)]
    quantities: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    notes: dict[str, None] = {}
    keys: Mapping[str, LoggedTensor | float] = {}
    examined: list[int] = []
    matched = True
    for step in dict.fromkeys((*chosen, listed[-1])):
        if examined and stop():
            break
        with log.open(step) as reader:
            if not examined:
                keys = _keys(log, reader)
            content = reader.content()
        for quantity, error in content.absent.items():
            if step != listed[-1] or not examined or quantity == STATES[0]:
                raise error
        parameters, gradients = (content.arrays.get(array, {}) for array in STATES[:2])
        matched &= not parameters or set(gradients) <= {
            *parameters,
            *matched_names(parameters, gradients, content.aliases),
        }
        examined.append(step.number)
        notes |= dict.fromkeys((*content.notes, *_differences(content, step)))
        for name in _provided(content):
            quantities.setdefault(name, []).append(step.number)
            counts.setdefault(name, len(content.arrays.get(name, ())))
    return ReadPart(
        replace(part, scalars=scalars),
        format,
        listed,
        {name: tuple(numbers) for name, numbers in quantities.items()},
        tuple(examined),
        scalars,
        tuple(notes),
        keys,
        counts,
        matched,
    )


def _keys(log: Source, reader: Any) -> Mapping[str, LoggedTensor | float]:
    source = log if isinstance(log, Keyed) else reader
    return source.keys() if isinstance(source, Keyed) else {}


def _provided(content: StepContent) -> list[str]:
    rates = content.optimizer is not None and bool(content.optimizer.rates)
    return [
        *(name for name, tensors in content.arrays.items() if tensors),
        *(name for name in SCALARS if name in content.scalars or (name == "learning_rate" and rates)),
    ]


def _differences(content: StepContent, step: LoggedStep) -> list[str]:
    return [
        f"{entry.quantity} of {entry.used} is {entry.value!r}, and that of {entry.other} is {entry.other_value!r} "
        f"at step {step.number}"
        for entry in content.differences
    ]


def readings(
    found: FoundLog, attempts: Attempts, stop: Callable[[], bool], only: Part | None = None
) -> list[ReadPart]:
    """Return the ways in which a log can be read, the best one first, and record refused ones.

    At first, the usual names and keys are tried; then what the readers advise, and what the names suggest.

    Parameters
    ----------
    found : FoundLog
    attempts : Attempts
    stop : callable
        The search ends when it returns True.
    only : Part, optional
        The only way that is tried.
    """
    known: list[ReadPart] = []
    format = found.format or "steps"
    if only is not None:
        with suppress(InputError):
            known.append(_read(only, format, stop))
        return known
    queue = [Part(str(found.path), found.format if found.is_second else None)]
    tried: list[Part] = []
    guesses: list[Part] = []
    while queue and len(tried) < _TRIALS and not (tried and stop()):
        part = queue.pop(0)
        if part in tried:
            continue
        tried.append(part)
        try:
            read = _read(part, format, stop)
        except InputError as error:
            if part not in guesses or "step" not in part.map:
                attempts.logs.setdefault(" ".join((part.location, *part.flags())), error)
            queue += [
                part.with_options(options) for options in advised(error.remedy) if "allow_gaps" not in options
            ]
            queue += [part.with_options({"map": by_name}) for by_name in _scalar_maps(part)]
            if not guesses and found.path.is_dir():
                guesses += [replace(part, pattern=pattern) for pattern in suggested_patterns(found.path)]
                guesses += [replace(part, map={"step": key}) for key in CHECKPOINT.keys["step"]]
                queue += guesses
            continue
        known.append(read)
        # Other names are tried only if these options found nothing.
        queue = [] if read.quantities else queue
        queue += [part.with_options({"map": options}) for options in _improvements(read)]
    # Gradients under an unusual key look like parameters if the key is not set.
    with_gradient = [read for read in known if "gradient" in read.quantities]
    known = with_gradient if with_gradient or role_of(found.path.stem) == STATES[1] else known
    return sorted(known, key=lambda read: (len(read.lacking), len(read.part.flags())))


def _scalar_maps(part: Part) -> Iterator[dict[str, str]]:
    """Yield maps for a log of scalars that has none of the usual keys."""
    with suppress(InputError):
        log = open_log(open_storage(part.location), part.format, pattern=part.pattern)
        if isinstance(log, Keyed):
            found = suggested_map(log.keys(), {*USUAL_SCALARS, "step"})
            unusual = {name: key for name, key in found.items() if part.map.get(name) != key}
            if unusual:
                yield unusual


def _improvements(read: ReadPart) -> Iterator[dict[str, str]]:
    """Yield maps with which a log may provide what it lacks: those that its notes advise, and by its keys."""
    for note in read.notes:
        for options in advised(note):
            if "train" in str(options.get("map", "")):
                yield options["map"]
    if "gradient" not in read.quantities and role_of(Path(read.part.location).stem) == STATES[1]:
        yield {STATES[1]: ROOT}
    lacking = set(read.lacking)
    by_name = suggested_map(read.keys, lacking)
    if by_name and any(read.part.map.get(name) != key for name, key in by_name.items()):
        yield by_name


# Runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """A proposal that is accepted.

    Attributes
    ----------
    proposal : Proposal
    rehearsal : Rehearsal
    parts : tuple of ReadPart
        Its logs, if they were read alone before.
    """

    proposal: Proposal
    rehearsal: Rehearsal
    parts: tuple[ReadPart, ...] = ()

    @property
    def lacking(self) -> list[str]:
        """Usual quantities that the first state lacks."""
        provided = _provided(self.rehearsal.content)
        return [name for name in (*STATES[:2], *USUAL_SCALARS) if name not in provided]

    @property
    def rank(self) -> tuple[bool, bool, int, int, int]:
        """Key by which the best proposal comes first: logged gradients, then scalars, steps, and few options."""
        lacking = self.lacking
        flags = sum(len(part.flags()) for part in self.proposal.parts)
        return "gradient" in lacking, self.proposal.recover, len(lacking), -len(self.rehearsal.steps), flags


def try_with_advice(proposal: Proposal, attempts: Attempts, parts: Sequence[ReadPart] = ()) -> Tried | None:
    """Try a proposal, and then once more with the options that its refusal advises; None if both are refused."""
    try:
        return Tried(proposal, proposal.try_out(), tuple(parts))
    except InputError as error:
        attempts.commands.setdefault(proposal.command, error)
        for options in advised(error.remedy):
            changed = proposal.with_advice(options)
            with suppress(InputError):
                return Tried(changed, changed.try_out(), tuple(parts))
    return None


def with_proven_shift(tried: Tried, attempts: Attempts) -> Tried:
    """Return a proposal with the shift of gradients that its first updates prove; itself if there is none.

    A loss that is logged with the gradients may need the same shift, which nothing proves: the user must decide.
    """
    advice = advised(_misaligned(tried))
    is_alone = "loss" in tried.rehearsal.content.scalars and len(tried.proposal.parts) == 1
    if is_alone or not advice or "shift" not in advice[0]:
        return tried
    changed = tried.proposal.with_advice(advice[0])
    try:
        shifted = replace(tried, proposal=changed, rehearsal=changed.try_out())
    except InputError as error:
        attempts.commands.setdefault(changed.command, error)
        return tried
    return tried if _misaligned(shifted) else shifted


def _misaligned(tried: Tried) -> str:
    with suppress(InputError), tried.rehearsal.log as log:
        return misalignment(log, tried.rehearsal.steps, tried.rehearsal.content)
    return ""


def with_recovered_gradients(tried: Tried, attempts: Attempts) -> Tried | None:
    """Return a proposal that recovers the gradients from the optimizer if a log lacks them; None if this fails."""
    if "gradient" not in tried.lacking:
        return None
    changed = replace(tried.proposal, recover=True)
    try:
        with tried.rehearsal.log as log, log.open(tried.rehearsal.steps[1]) as reader:
            state = reader.content().optimizer
        if state is None or not (state.rules or state.problem):
            return None
        return replace(tried, proposal=changed, rehearsal=changed.try_out())
    except InputError as error:
        attempts.commands.setdefault(changed.command, error)
    return None


def best_proposals(
    parts: Sequence[ReadPart],
    folder: Path | None,
    attempts: Attempts,
    stop: Callable[[], bool],
    nearby: Sequence[ReadPart] = (),
) -> list[Tried]:
    """Return an accepted proposal for each log with parameters, joined with what it lacks, the best one first.

    Parameters
    ----------
    parts : sequence of ReadPart
    folder : Path, optional
        Folder in which run files are proposed.
    attempts : Attempts
    stop : callable
    nearby : sequence of ReadPart
        Logs that are only joined to others.
    """
    found: list[Tried] = []
    for part in parts:
        if "parameter" not in part.quantities:
            continue
        accepted = []
        for joined in _joins(part, [*parts, *nearby]):
            if stop() and found:
                break
            proposal = Proposal(tuple(one.part for one in joined), folder=folder)
            tried = try_with_advice(proposal, attempts, joined)
            accepted += [tried] if tried is not None else []
            if tried is not None and "gradient" not in tried.lacking:
                break
        found += sorted(accepted, key=lambda tried: tried.rank)[:1]
    found.sort(key=lambda tried: tried.rank)
    first = {tried.proposal.parts[0].log: tried for tried in reversed(found)}
    return [tried for tried in found if first[tried.proposal.parts[0].log] is tried]


def _joins(part: ReadPart, parts: Sequence[ReadPart]) -> Iterator[list[ReadPart]]:
    """Yield the logs to join with a log of parameters, the most complete joins first."""
    near = sorted(parts, key=lambda other: -_shared_folders(part, other))
    others = [other for other in near if other.part.log != part.part.log]
    others = [other for other in others if _nearest_models(other, parts, part)]
    gradients: list[list[ReadPart]] = [[]]
    if "gradient" not in part.quantities:
        matching = [other for other in others if _gives_gradients(other) and len(_common(part, other)) > 1]
        gradients = [*([other] for other in matching), []]
    for gradient in gradients:
        provided = {name for one in (part, *gradient) for name in one.quantities}
        scalars = []
        for other in others:
            new = {name for name in SCALARS if name in other.quantities} - provided
            if other.scalars and new and _common(part, other):
                scalars.append(other)
                provided |= new
        yield [part, *gradient, *scalars]
        if scalars:
            yield [part, *gradient]


def _nearest_models(other: ReadPart, parts: Sequence[ReadPart], model: ReadPart) -> bool:
    """Return True if no log of parameters is nearer to a log than this one: others belong to other runs."""
    models = [part for part in parts if "parameter" in part.quantities]
    return _shared_folders(other, model) == max(_shared_folders(other, part) for part in models)


def _gives_gradients(part: ReadPart) -> bool:
    return "gradient" in part.quantities and "parameter" not in part.quantities


def _common(part: ReadPart, other: ReadPart) -> set[int]:
    return part.numbers & other.numbers


def _shared_folders(part: ReadPart, other: ReadPart) -> int:
    """Return the number of folders that both paths have in common."""
    pairs = zip(Path(part.part.location).parts, Path(other.part.location).parts, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), 1 << 10)
