"""Return the loggers of the package. They escape the names in messages, which come from logs of others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from natgrad.schema.errors import InputError
from natgrad.schema.text import printable

__all__ = ["logger"]

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class _EscapingLogger(_Adapter):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message with escaped arguments. The message itself is a constant of the program."""
        if self.isEnabledFor(level):
            kwargs.setdefault("stacklevel", 2)  # the caller, not this method
            self.logger.log(level, msg, *map(_escaped, args), **kwargs)


def _escaped(value: object) -> object:
    # The lines of an InputError are its parts, each of which is escaped.
    return value if isinstance(value, int | float | InputError) else printable(str(value))


def logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return a logger that escapes control characters in the arguments of its messages."""
    return _EscapingLogger(logging.getLogger(name), {})
