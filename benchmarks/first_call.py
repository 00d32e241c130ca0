"""Print the seconds of the first call of the kernel, minus those of the second call."""

import sys
import tempfile
import time

import numpy as np

from natgrad.kernel import stream
from natgrad.kernel.located import Located


def seconds_of_a_call() -> float:
    dtypes = [np.dtype("<f4")] * 2
    with tempfile.TemporaryFile() as file:
        file.write(np.ones((2, 64), "<f4").tobytes())
        file.flush()
        descriptors, offsets = np.full((2, 1), file.fileno(), np.int32), np.array([[0], [256]])
        located = Located(descriptors, offsets, np.array([0, 64]))
        buffer = np.empty(stream.buffer_bytes(64, 1, [4, 4]), np.uint8)
        products, ratio = np.empty((1, 1, 5, 5)), np.empty((1, 1))
        begin = time.perf_counter()
        stream.products(
            [located] * 2, dtypes, [np.array([0, 64])], 64, 1, np.ones(1, bool), buffer, products, ratio
        )
        return time.perf_counter() - begin


if __name__ == "__main__":
    sys.stdout.write(f"{seconds_of_a_call() - seconds_of_a_call()}\n")
