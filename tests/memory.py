"""Peak memory of a call."""

import gc
import re
import tracemalloc
from pathlib import Path

MEBIBYTE = 1 << 20


def _status(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(call):
    """Bytes above those before a call: as Python counts them, and as the system does, which sees libraries too."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark is now that of now
    before = _status("VmRSS")
    tracemalloc.start()
    call()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return traced, _status("VmHWM") - before


def read_in_slices(log, tensor, out):
    """Read all of a parameter of the first step through one buffer."""
    step = log.steps()[0]
    with log.open(step) as reader:
        shape = reader.content().arrays["parameter"][tensor].shape
        elements = 1
        for length in shape:
            elements *= length
        for start in range(0, elements, out.size):
            reader.read("parameter", tensor, start, out[: elements - start])


def assert_out_of_core(log, tensor, out):
    """Reading a tensor of 64 MiB through a small buffer takes a few MiB: the libraries' own caches."""
    read_in_slices(log, tensor, out)  # imports, and what a library keeps
    traced, resident = peak_of(lambda: read_in_slices(log, tensor, out))
    assert traced < 4 * MEBIBYTE, f"{traced / MEBIBYTE:.1f} MiB"
    assert resident < 16 * MEBIBYTE, f"{resident / MEBIBYTE:.1f} MiB"
