"""Print the seconds that the kernel's first call takes, beyond those of its second."""

import sys
import time

import numpy as np

from pipeline import gram


def seconds_of_a_call() -> float:
    state, (starts, products, ratio) = (
        np.ones((2, 64), "<f4"),
        (np.array([0, 64]), np.empty((1, 1, 5, 5)), np.empty((1, 1))),
    )
    begin = time.perf_counter()
    gram.products([state], [state], starts, products, ratio)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.stdout.write(f"{seconds_of_a_call() - seconds_of_a_call()}\n")
