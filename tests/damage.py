"""Files that are damaged, or made to do harm: what the readers of every format are tried with."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

reads_only = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Of a test whose examples may share a folder, as none of them leaves anything there."""

LENGTHS = st.none() | st.integers(0)
"""Where a file is cut, if it is."""


def changes(most=4):
    """Up to so many positions in a file and the bytes that are written there."""
    return st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=most)


def damage(whole, changes, length=None):
    """Change some bytes and cut them, anywhere: positions and lengths go round."""
    damaged = bytearray(whole)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    return bytes(damaged if length is None else damaged[: length % len(damaged)])


class Payload:
    """Leaves a trace where it is unpickled.

    Parameters
    ----------
    trace : Path
    """

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
