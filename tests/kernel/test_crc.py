"""Compare checksums of compiled code, and of its fallback, with the definition of CRC-32C."""

import os
import subprocess
import sys

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from natgrad.kernel import crc
from natgrad.kernel.compiled import entry
from natgrad.store import add_to_checksums


@entry()
def updated(register, address, size):
    return crc.update(register, address, size)


def compiled(parts):
    register = crc.START
    for part in parts:
        register = updated(register, np.uintp(part.__array_interface__["data"][0]), part.size)
    return int(register) ^ 0xFFFFFFFF


def fallback(parts):
    checksums = np.zeros(1, np.uint32)
    for part in parts:
        add_to_checksums(checksums, part[None])
    return int(checksums[0])


WAYS = [fallback, compiled] if crc.HARDWARE else [fallback]
"""Without the instruction, `compiled` would end the process; `natgrad.kernel.stream.products` refuses it."""

# Around words, lanes, three lanes and folded blocks.
SIZES = [0, 1, 7, 8, 9, 255, 256, 2047, 2048, 2049, 4095, 4096, 12287, 12288, 12289, 40_000, 524_288]


@pytest.mark.parametrize("checksum", WAYS)
def test_the_checksum_of_the_standard_is_found(checksum):
    # RFC 3720, appendix B.4.
    assert checksum([np.zeros(32, np.uint8)]) == 0x8A9136AA
    assert checksum([np.arange(32, dtype=np.uint8)]) == 0x46DD794E


@pytest.mark.parametrize("checksum", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_the_checksum_of_every_length_is_that_of_the_package(checksum, size, offset):
    content = np.random.default_rng(size).integers(0, 256, size + offset, dtype=np.uint8)[offset:]
    assert checksum([content]) == crc32c(content.tobytes())


@pytest.mark.parametrize("checksum", WAYS)
@given(cuts=st.lists(st.integers(0, 60_000), max_size=4).map(sorted), seed=st.integers(0, 99))
def test_parts_have_the_checksum_of_the_complete_bytes(checksum, cuts, seed):
    content = np.random.default_rng(seed).integers(0, 256, 60_000, dtype=np.uint8)
    assert checksum(np.split(content, cuts)) == crc32c(content.tobytes())


def test_an_instruction_that_the_compiler_must_not_use_is_not_used():
    # The compiler would end the process.
    code = "from natgrad.kernel import crc; print(crc.HARDWARE, crc.FOLDS)"
    without = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    found = subprocess.run([sys.executable, "-c", code], env=without, check=True, capture_output=True, text=True)
    assert found.stdout == "False False\n"
