"""Return the loggers of the package. They escape names in messages, because names may come from untrusted logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from natgrad.schema.errors import InputError
from natgrad.schema.text import printable

__all__ = ["collected_warnings", "logger"]

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


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def collected_warnings(*names: str) -> Iterator[list[str]]:
    """Collect the messages of loggers in a list instead of logging them, for a log that is only tried.

    Parameters
    ----------
    *names : str
        Names of loggers, each with those below it.
    """
    collector, loggers = _Collector(), [logging.getLogger(name) for name in names]
    before = [(one.handlers, one.propagate) for one in loggers]
    for one in loggers:
        one.handlers, one.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        for one, (handlers, propagate) in zip(loggers, before, strict=True):
            one.handlers, one.propagate = handlers, propagate
