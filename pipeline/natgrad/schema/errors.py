"""Define the errors of all packages: for invalid input, and for resources that are temporarily unavailable."""

from __future__ import annotations

from typing import Any

from natgrad.schema.text import printable

__all__ = [
    "InputError",
    "Unavailable",
]


class InputError(ValueError):
    """Error for invalid input, which states what is wrong, where, why, and what to do.

    Control characters in its parts are escaped, because the parts may contain names from a log.

    Parameters
    ----------
    what : str
        The problem, with the values found.
    where : str, optional
        File, step and tensor.
    why : str, optional
        The likely cause.
    remedy : str, optional
        What the user can do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        what, where, why, remedy = map(printable, (what, where, why, remedy))
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        lines = [what]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  why:   {why}"] if why else []
        lines += [f"  do:    {remedy}"] if remedy else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all four parts, because the error may be sent to another process."""
        return (_input_error, (type(self), self.what, self.where, self.why, self.remedy))


class Unavailable(InputError):
    """Error for input that may be accepted later without a change, for example when a lock is released."""


def _input_error(kind: type[InputError], what: str, where: str, why: str, remedy: str) -> InputError:
    return kind(what, where=where, why=why, remedy=remedy)
