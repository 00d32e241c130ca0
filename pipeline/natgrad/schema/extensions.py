"""Load objects that other distributions register as entry points: log formats and result variables."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["Extension", "Named", "registered"]

from natgrad.schema.logs import logger

_log = logger(__name__)


class Named(Protocol):
    """An object with a name."""

    @property
    def name(self) -> str:
        """Name, which is unique among the objects of its kind."""
        ...


T = TypeVar("T", bound=Named)


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


def registered(group: str, kind: type[T], taken: Container[str]) -> dict[str, Extension[T]]:
    """Load the objects that installed distributions register under an entry-point group.

    An entry point is skipped with a warning if it cannot be loaded, is not an instance of ``kind``, or has a name
    that is already in use. A broken extension must not affect users who do not need it.

    Parameters
    ----------
    group : str
        Entry-point group, for example ``natgrad.formats``.
    kind : type
        Class of the objects of the group.
    taken : container of str
        Names that this package uses.

    Returns
    -------
    dict
        Extensions by object name, ordered by entry-point name.
    """
    # Imported here, to keep the start of the command line fast.
    from importlib.metadata import entry_points

    found: dict[str, Extension[T]] = {}
    for entry_point in sorted(entry_points(group=group), key=lambda entry_point: entry_point.name):
        distribution = entry_point.dist
        owner = "an unknown distribution" if distribution is None else distribution.name
        reason = ""
        try:
            value = entry_point.load()
        except Exception as error:  # code of other packages may raise any exception
            reason = f"it cannot be loaded ({type(error).__name__}: {error})"
        else:
            if not isinstance(value, kind):
                reason = f"it is not an instance of {kind.__module__}.{kind.__qualname__}, but {value!r}"
            elif value.name in taken or value.name in found:
                reason = f"the name {value.name!r} is already in use"
            else:
                version = "" if distribution is None else distribution.version
                found[value.name] = Extension(value, owner, version)
        if reason:
            _log.warning(
                "skipping entry point %r of %s (group %s): %s. Update or uninstall %s.",
                entry_point.name,
                owner,
                group,
                reason,
                owner,
            )
    return found
