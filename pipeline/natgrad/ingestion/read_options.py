"""How a log is read: what the user said with --map and --shift, or in a run file; kept with the trajectory.

A quantity that is read under another key, or taken for another step, gives other values for steps that are there
already, which would look as if training had been restarted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS
from natgrad.sources.run_file import run_file_readings
from natgrad.store import Trajectory, exists

__all__ = ["agreed_reading", "said_reading"]

_OF_SCALAR_LOGS = frozenset((*SCALARS, "step", "run"))
"""What a mapping may say of a log of scalars; with several sources, of that log."""

_OPTIONS = {"map": "--map", "shift": "--shift"}


def said_reading(
    sources: Sequence[Path], mapping: Mapping[str, str] | None, shift: Mapping[str, int] | None
) -> dict[str, Any]:
    """Return what is said now, as the trajectory keeps it.

    Returns
    -------
    dict
        ``map`` and ``shift``, and whether there are ``several`` sources; of a run file, the ``sources`` that it
        lists, by their paths, each with the maps and shifts of its entries.

    Raises
    ------
    InputError
        Where a run file cannot be read.
    """
    of_file = run_file_readings(sources[0]) if len(sources) == 1 else None
    if of_file is not None:
        return {"sources": of_file}
    return {"map": dict(mapping or {}), "shift": dict(shift or {}), "several": len(sources) > 1}


def agreed_reading(store: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return how to read on: as the trajectory was begun, whether it is said again or not.

    Parameters
    ----------
    store : Path
        The trajectory; where there is none, or an older version wrote it, what is said counts.
    said : mapping
        Of `said_reading`.

    Raises
    ------
    InputError
        Where something else is said than the trajectory was made with, or where it is not known which of several
        sources that means.
    """
    trajectory = Trajectory(store) if exists(store) else None
    if trajectory is None or not trajectory.n_states or trajectory.reading is None:
        return dict(said)
    made = trajectory.reading
    if "sources" in said or "sources" in made:
        # A source by itself and a run file are not compared: the folder of a restarted run is given alone.
        for path, reading in said.get("sources", {}).items():
            if made.get("sources", {}).get(path, reading) != reading:
                raise _refusal(store, f"for {path!r} its run file said {made['sources'][path]}, and now {reading}")
        return dict(said)
    agreed: dict[str, Any] = {"several": said["several"]}
    for what, option in _OPTIONS.items():
        # With a log of scalars the keys of scalars are its own; without one they are those of the tensors' log.
        elsewhere = _OF_SCALAR_LOGS if what == "map" and said["several"] != made["several"] else frozenset()
        for quantity, value in said[what].items():
            before = made[what].get(quantity, 0 if what == "shift" else None)
            if before != value and quantity not in elsewhere:
                told = f"with {option} {quantity}={before}" if before else f"without {option} of {quantity}"
                raise _refusal(store, f"it was made {told}, and {option} {quantity}={value} is given now")
        kept = {quantity: value for quantity, value in made[what].items() if quantity not in elsewhere}
        unclear = sorted(set(made[what]) - set(kept) - set(said[what])) if said["several"] else []
        if unclear:
            raise InputError(
                f"the trajectory was made with --map {unclear[0]}={made['map'][unclear[0]]} of its one SOURCE, and "
                "now there are several",
                where=str(store),
                remedy="say in a run file which keys of each are meant (map)",
            )
        agreed[what] = {**kept, **said[what]}
    return agreed


def _refusal(store: Path, how: str) -> InputError:
    return InputError(
        f"the trajectory is not read on in another way: {how}",
        where=str(store),
        why="the same steps would have other values, as if the training had been restarted",
        remedy="leave the option out, which goes on as OUT was made, or start anew with --overwrite",
    )
