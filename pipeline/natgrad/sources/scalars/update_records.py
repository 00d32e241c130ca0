"""Assign the records of trainers that log after an update to states, and read the log history of the Trainer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import JSON_LIMIT, integer, parse_json, read_limited
from natgrad.storage import Storage

__all__ = [
    "ROUNDED",
    "TRAINER_STATE",
    "UNKNOWN_VERSION",
    "are_rounded",
    "at_states",
    "logged_number",
    "rates_are_late",
    "read_history",
    "read_trainer_state",
]

TRAINER_STATE = "trainer_state.json"
"""File in which the Trainer saves its log history."""

_RATES_ON_TIME = (4, 51)
"""Version of transformers since which the log contains the rate of the update that was made."""

UNKNOWN_VERSION = (
    "the learning rates are those of the log of the Trainer, which is one update late if it was written by "
    "transformers before 4.51; no file states the version (if so, use --shift learning_rate=1)"
)
ROUNDED = "losses are rounded to 4 decimals by the Trainer: differences of losses are not exact"


def at_states(
    records: Iterable[Mapping[str, Any]], notes: list[str], *, step: str = "step", rate_of_next: bool = False
) -> Iterator[Mapping[str, Any]]:
    """Yield records of updates as records of states.

    Step s of such a record is the number of updates that were made: its loss is the mean over the states since the
    previous record. It is used if there is only one such state.

    Parameters
    ----------
    records : iterable of mapping
        With the keys ``step``, ``loss``, ``learning_rate`` and others. All steps are integers.
    notes : list of str
        Receives a note on losses that are omitted.
    step : str
        Key of the step.
    rate_of_next : bool
        The learning rate is that of the next update, not of the one before.
    """
    previous, omitted = 0, 0
    for record in records:
        number = int(record[step])
        found = dict(record) | {step: number - 1}
        if "loss" in found and number - previous != 1:
            omitted += 1
            del found["loss"]
        previous = number
        rate = found.pop("learning_rate", None) if rate_of_next else None
        yield found
        if rate is not None:
            yield {**record, "learning_rate": rate, "loss": None}
    if omitted:
        notes.append(
            f"{omitted} losses are omitted: each is a mean over several updates, as not every update was logged"
        )


# The log history of the Trainer --------------------------------------------------------------------------------


def read_history(file: Storage) -> dict[int, dict[str, Any]]:
    """Return the entries of the log history with a loss, by step. If a restart repeated a step, the last is used.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    try:
        entries = parse_json(read_limited(file, JSON_LIMIT), file.name)["log_history"]
        return {integer(entry["step"], "a step"): dict(entry) for entry in entries if "loss" in entry}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read the state of the Trainer: {error}",
            where=str(file),
            why="it is still being written, was removed by checkpoint rotation, or is corrupt",
            remedy="run again",
        ) from error


def rates_are_late(folder: Storage) -> bool | None:
    """Return True if the Trainer that saved a checkpoint logged each rate one update late; None if unknown."""
    try:
        content = read_limited(folder / "config.json", JSON_LIMIT)
        text = parse_json(content, "config.json")["transformers_version"]
        return tuple(map(int, re.findall(r"\d+", text)[:2])) < _RATES_ON_TIME
    except (OSError, ValueError, KeyError, TypeError):
        return None


def logged_number(value: Any) -> float:
    """Return a number of the log history as a float; NaN for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def are_rounded(history: Mapping[int, Mapping[str, Any]]) -> bool:
    """Return True if no loss has more than 4 decimals."""
    losses = [logged_number(entry["loss"]) for entry in history.values()]
    return all(loss == round(loss, 4) for loss in losses if math.isfinite(loss))


def read_trainer_state(log: Storage, wanted: Any, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the records of ``trainer_state.json``, by state."""
    history = read_history(log)
    late = rates_are_late(log.parent)
    if late is None and any("learning_rate" in entry for entry in history.values()):
        notes.append(UNKNOWN_VERSION)
    if history and are_rounded(history):
        notes.append(ROUNDED)
    records = (
        {"step": step, **{key: entry[key] for key in ("loss", "learning_rate") if key in entry}}
        for step, entry in sorted(history.items())
        if step > 0
    )
    yield from at_states(records, notes, rate_of_next=bool(late))
