"""Damaged and malicious files, for the tests of the readers of all formats."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

reads_only = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Settings of a test whose examples may share a folder, because none of them leaves files there."""

LENGTHS = st.none() | st.integers(0)
"""Position at which a file is cut, or None."""


def changes(most=4):
    """Return a strategy of positions in a file and the bytes that are written there."""
    return st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=most)


def damage(whole, changes, length=None):
    """Change some bytes and truncate them; positions and lengths wrap around."""
    damaged = bytearray(whole)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    return bytes(damaged if length is None else damaged[: length % len(damaged)])


class Payload:
    """Object that leaves a trace when it is unpickled.

    Parameters
    ----------
    trace : Path
    """

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
