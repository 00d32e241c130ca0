"""Objects that other distributions register under an entry-point group: log formats and result variables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Extension", "registered"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Extension(Generic[T]):
    """A registered object and the distribution that registered it.

    Attributes
    ----------
    value : object
    distribution, version : str
        Name and version of the distribution.
    """

    value: T
    distribution: str
    version: str


def registered(group: str, kind: type[T]) -> Iterator[Extension[T]]:
    """Yield the objects that installed distributions register under an entry-point group.

    An entry point that cannot be loaded, or that is not an instance of ``kind``, is skipped with a warning: a
    broken extension must not stop those who do not need it.

    Parameters
    ----------
    group : str
        Entry-point group, for example ``natgrad.formats``.
    kind : type
        Class that every object of the group is an instance of.
    """
    # Imported here: the command line starts without it.
    from importlib.metadata import entry_points

    for entry_point in sorted(entry_points(group=group), key=lambda found: found.name):
        distribution = entry_point.dist.name if entry_point.dist is not None else "an unknown distribution"
        try:
            value = entry_point.load()
        except Exception as error:  # the code of others may raise anything
            reason = f"{type(error).__name__}: {error}"
        else:
            if isinstance(value, kind):
                version = entry_point.dist.version if entry_point.dist is not None else ""
                yield Extension(value, distribution, version)
                continue
            reason = f"it is {value!r}, not a {kind.__module__}.{kind.__qualname__}"
        _log.warning(
            "entry point %s of group %s in %s is skipped, because it cannot be used: %s. Update or uninstall %s.",
            entry_point.name,
            group,
            distribution,
            reason,
            distribution,
        )
