"""The errors that every package raises: bad input, and resources that are temporarily unavailable."""

from __future__ import annotations

from typing import Any

__all__ = [
    "InputError",
    "Unavailable",
]


class InputError(ValueError):
    """Input that is refused: what, where, why usually, and what to do.

    Parameters
    ----------
    what : str
        What is wrong, with the values found.
    where : str, optional
        File, step and tensor.
    why : str, optional
        Why this usually happens.
    remedy : str, optional
        What to do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        lines = [what]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  why:   {why}"] if why else []
        lines += [f"  do:    {remedy}"] if remedy else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all four parts, as the error may cross to another process."""
        return (_input_error, (type(self), self.what, self.where, self.why, self.remedy))


class Unavailable(InputError):
    """What is refused now and may be taken later, unchanged: a lock that is held, a scheduler that is lost."""


def _input_error(kind: type[InputError], what: str, where: str, why: str, remedy: str) -> InputError:
    return kind(what, where=where, why=why, remedy=remedy)
