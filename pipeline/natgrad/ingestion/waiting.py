"""Decide how long repeated ingests wait for steps that are missing from a log, and record those they skip."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Gap", "StepWait"]

_GAPS_SHOWN = 20

_REMOVED = "the run removed checkpoints before they were read"
_ABSENT = "they were not logged in time"


@dataclass(frozen=True)
class Gap:
    """Steps that are missing between two logged steps of a run.

    Attributes
    ----------
    run : str
        Name of the run in a sweep; empty otherwise.
    last, next : int
        The logged steps on both sides.
    interval : int
        Number of updates between two logged steps.
    """

    run: str
    last: int
    next: int
    interval: int

    @property
    def missing(self) -> range:
        """The missing steps."""
        return range(self.last + self.interval, self.next, self.interval)


@dataclass
class StepWait:
    """State of repeated ingests of one log that wait for missing steps.

    Parameters
    ----------
    seconds : float
        How long to wait for a missing step while later steps are logged. Steps that the run has removed are not
        waited for.

    Attributes
    ----------
    new_steps : int
        Number of steps that all ingests stored.
    """

    seconds: float
    new_steps: int = 0
    _first_seen: dict[tuple[str, int], float] = field(default_factory=dict)
    _waiting: dict[str, tuple[Gap, int]] = field(default_factory=dict)
    _passing: list[tuple[Gap, bool]] = field(default_factory=list)
    _passed: list[tuple[Gap, bool]] = field(default_factory=list)
    _late: set[tuple[str, int]] = field(default_factory=set)

    def start(self) -> None:
        """Start another ingest, which determines again what to wait for."""
        self._waiting.clear()
        self._passing.clear()

    def finish(self, new_steps: int) -> None:
        """Record the number of steps that this ingest stored, and the gaps that it skipped."""
        self.new_steps += new_steps
        self._passed += self._passing
        self._passing.clear()

    def end(self) -> None:
        """Skip all gaps from now on, because the log is complete."""
        self.seconds = 0.0

    def passes(self, gap: Gap, removed: bool, later: int, warnings: list[str]) -> bool:
        """Return True if an ingest skips a gap, and add the warning for it.

        Parameters
        ----------
        gap : Gap
        removed : bool
            Whether the missing steps no longer exist.
        later : int
            Number of logged steps after the gap.
        warnings : list of str
        """
        if not gap.missing:
            return True
        since = self._first_seen.setdefault((gap.run, gap.last), time.monotonic())
        if not removed and time.monotonic() - since < self.seconds:
            self._waiting[gap.run] = gap, later
            return False
        self._passing.append((gap, removed))
        warnings.append(
            f"missing {_format_gaps([gap])}: {_REMOVED if removed else _ABSENT}; "
            f"the update from step {gap.last} to step {gap.next} has step_span {gap.next - gap.last}"
        )
        return True

    def skip(self, run: str, steps: Sequence[int], warnings: list[str]) -> None:
        """Skip steps that appeared after an ingest had skipped the gap, with a warning for each new one."""
        late = [step for step in steps if (run, step) not in self._late]
        self._late |= {(run, step) for step in late}
        if late:
            numbers = ", ".join(map(str, late[:_GAPS_SHOWN])) + (", ..." if len(late) > _GAPS_SHOWN else "")
            warnings.append(
                f"skipped steps {numbers}{f' of run {run}' if run else ''}: they appeared after later steps were "
                "stored; to include them, start from scratch with --overwrite"
            )

    @property
    def is_waiting(self) -> bool:
        """True if logged steps after a gap were not read."""
        return bool(self._waiting)

    @property
    def awaited(self) -> str:
        """Description of the steps that the last ingest waited for; empty if there are none."""
        return "; ".join(
            f"{_format_gaps([gap])} ({later} later steps from step {gap.next} on are logged)"
            for gap, later in self._waiting.values()
        )

    def warnings(self) -> list[str]:
        """Return the warnings about the steps that none of the ingests stored."""
        found = []
        for removed, why, remedy in (
            (True, _REMOVED, "use a shorter --interval, or keep more checkpoints"),
            (False, _ABSENT, "if they can appear later, use a longer --gap-timeout"),
        ):
            gaps = [gap for gap, was_removed in self._passed if was_removed == removed]
            if gaps:
                found.append(f"missing {_format_gaps(gaps)}: {why}; {remedy}")
        if self.is_waiting:
            found.append(f"later steps were not read, because following ended while waiting for {self.awaited}")
        return found


def _format_gaps(gaps: Sequence[Gap]) -> str:
    """Describe the missing steps, with the run of a sweep."""
    words = []
    for gap in gaps[:_GAPS_SHOWN]:
        first, last, every = gap.missing[0], gap.missing[-1], gap.interval
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        steps += f" (every {every})" if every > 1 and first != last else ""
        words.append(f"{steps} of run {gap.run}" if gap.run else steps)
    more = len(gaps) - _GAPS_SHOWN
    return ", ".join(words) + (f" and {more} more ranges" if more > 0 else "")
