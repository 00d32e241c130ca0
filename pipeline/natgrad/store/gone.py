"""Find the states whose files in the log were changed or removed since they were committed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from natgrad.schema.names import ATTEMPT
from natgrad.store.references import References

if TYPE_CHECKING:
    from natgrad.store.trajectory import Trajectory

__all__ = ["changed_states", "missing_states"]


def changed_states(references: References, states: Iterable[int]) -> list[int]:
    """Return the states for which a file of the log is missing or changed."""
    files = {state: references.files_of(state) for state in sorted(states)}
    changed = {index for index in set().union(*files.values()) if not references.files[index].is_unchanged()}
    return [state for state, own in files.items() if not changed.isdisjoint(own)]


def missing_states(run: Trajectory) -> list[str]:
    """Return the ranges of states whose files have changed or are missing, for users.

    Neither the ledger nor the results need them. The objects of a log in an object store are not compared.
    """
    # A request for each object of a log would take minutes.
    changed = changed_states(run.references, range(run.n_states)) if run.references.is_local else []
    missing = run.gone | set(changed)
    # The attempt of each state that is missing.
    marks = [attempt if state in missing else None for state, attempt in enumerate(run.scalar(ATTEMPT).tolist())]
    found, start = [], 0
    for attempt, group in itertools.groupby(marks):
        stop = start + len(list(group))
        if attempt is not None:
            found.append(f"{run.named(start, stop)} of attempt {attempt}")
        start = stop
    return found
