"""The options with which a log is read (--map, --shift, or a run file); they are kept with the trajectory.

A quantity that is read under another key, or assigned to another step, has other values for steps that are stored
already, as if training had been restarted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS
from natgrad.sources.run_file import run_file_options
from natgrad.storage import Storage
from natgrad.store import Trajectory, exists

__all__ = ["agreed_options", "given_options"]

_OF_SCALAR_LOGS = frozenset((*SCALARS, "step", "run"))
"""Quantities of a mapping that apply to a log of scalars, where there are several sources."""

_OPTIONS = {"map": "--map", "shift": "--shift"}


def given_options(
    sources: Sequence[Storage], mapping: Mapping[str, str] | None, shift: Mapping[str, int] | None
) -> dict[str, Any]:
    """Return the options that were given, as the trajectory keeps them.

    Returns
    -------
    dict
        ``map`` and ``shift``, and whether there are ``several`` sources; of a run file, the ``sources`` that it
        lists, by their paths, each with the maps and shifts of its entries.

    Raises
    ------
    InputError
        If a run file cannot be read.
    """
    of_file = run_file_options(sources[0]) if len(sources) == 1 else None
    if of_file is not None:
        return {"sources": of_file}
    return {"map": dict(mapping or {}), "shift": dict(shift or {}), "several": len(sources) > 1}


def agreed_options(store: Storage, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the read options for resuming; they are fixed when the trajectory is created.

    Parameters
    ----------
    store : Storage
        The trajectory; where there is none, the given options count.
    given : mapping
        From `given_options`.

    Raises
    ------
    InputError
        If other options are given than the trajectory was made with, or if they do not determine which of
        several sources is meant.
    """
    trajectory = Trajectory(store) if exists(store) else None
    if trajectory is None or not trajectory.n_states or trajectory.read_options is None:
        return dict(given)
    made = trajectory.read_options
    if "sources" in given or "sources" in made:
        # A source by itself and a run file are not compared: the folder of a restarted run is given alone.
        for path, options in given.get("sources", {}).items():
            if made.get("sources", {}).get(path, options) != options:
                raise _refusal(
                    store, f"the run file had {made['sources'][path]} for {path!r}, and now it has {options}"
                )
        return dict(given)
    agreed: dict[str, Any] = {"several": given["several"]}
    for what, option in _OPTIONS.items():
        # With a log of scalars the keys of scalars are its own; without one they are those of the tensors' log.
        elsewhere = _OF_SCALAR_LOGS if what == "map" and given["several"] != made["several"] else frozenset()
        for quantity, value in given[what].items():
            before = made[what].get(quantity, 0 if what == "shift" else None)
            if before != value and quantity not in elsewhere:
                original = f"with {option} {quantity}={before}" if before else f"without {option} for {quantity}"
                raise _refusal(store, f"it was created {original}, but {option} {quantity}={value} is passed now")
        kept = {quantity: value for quantity, value in made[what].items() if quantity not in elsewhere}
        unclear = sorted(set(made[what]) - set(kept) - set(given[what])) if given["several"] else []
        if unclear:
            raise InputError(
                f"the trajectory was created from one SOURCE with --map {unclear[0]}={made['map'][unclear[0]]}, "
                "but now there are several sources",
                where=str(store),
                remedy="list the sources in a run file that maps the keys of each (map)",
            )
        agreed[what] = {**kept, **given[what]}
    return agreed


def _refusal(store: Storage, difference: str) -> InputError:
    return InputError(
        f"the read options of a trajectory cannot change: {difference}",
        where=str(store),
        why="the same steps would have different values, as if the training had been restarted",
        remedy="omit the option to keep the original setting of OUT, or start from scratch with --overwrite",
    )
