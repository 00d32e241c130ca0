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
        Where a run file cannot be read.
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
        Where other options are given than the trajectory was made with, or where they do not determine which of
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
                raise _refusal(store, f"for {path!r} its run file had {made['sources'][path]}, and now {options}")
        return dict(given)
    agreed: dict[str, Any] = {"several": given["several"]}
    for what, option in _OPTIONS.items():
        # With a log of scalars the keys of scalars are its own; without one they are those of the tensors' log.
        elsewhere = _OF_SCALAR_LOGS if what == "map" and given["several"] != made["several"] else frozenset()
        for quantity, value in given[what].items():
            before = made[what].get(quantity, 0 if what == "shift" else None)
            if before != value and quantity not in elsewhere:
                told = f"with {option} {quantity}={before}" if before else f"without {option} of {quantity}"
                raise _refusal(store, f"it was made {told}, and {option} {quantity}={value} is given now")
        kept = {quantity: value for quantity, value in made[what].items() if quantity not in elsewhere}
        unclear = sorted(set(made[what]) - set(kept) - set(given[what])) if given["several"] else []
        if unclear:
            raise InputError(
                f"the trajectory was made with --map {unclear[0]}={made['map'][unclear[0]]} of its one SOURCE, and "
                "now there are several",
                where=str(store),
                remedy="say in a run file which keys of each are meant (map)",
            )
        agreed[what] = {**kept, **given[what]}
    return agreed


def _refusal(store: Storage, how: str) -> InputError:
    return InputError(
        f"the trajectory is not read on in another way: {how}",
        where=str(store),
        why="the same steps would have other values, as if the training had been restarted",
        remedy="leave the option out, which goes on as OUT was made, or start anew with --overwrite",
    )
