"""Measure the peak memory of a call."""

import gc
import re
import tracemalloc
from pathlib import Path

MEBIBYTE = 1 << 20


def _status(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(call):
    """Return the peak bytes added by a call: counted by Python, and by the system, which also counts libraries."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
    before = _status("VmRSS")
    tracemalloc.start()
    call()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return traced, _status("VmHWM") - before


def read_in_slices(log, tensor, out):
    """Read a complete parameter of the first step through one buffer."""
    step = log.steps()[0]
    with log.open(step) as reader:
        shape = reader.content().arrays["parameter"][tensor].shape
        elements = 1
        for length in shape:
            elements *= length
        for start in range(0, elements, out.size):
            reader.read("parameter", tensor, start, out[: elements - start])


def assert_out_of_core(log, tensor, out):
    """Check that reading a tensor of 64 MiB through a small buffer takes only a few MiB, for library caches."""
    read_in_slices(log, tensor, out)  # imports and fills the caches of libraries
    traced, resident = peak_of(lambda: read_in_slices(log, tensor, out))
    assert traced < 4 * MEBIBYTE, f"{traced / MEBIBYTE:.1f} MiB"
    assert resident < 16 * MEBIBYTE, f"{resident / MEBIBYTE:.1f} MiB"
