"""Compute CRC-32C checksums in compiled code, with the instruction of the processor.

The read loop checks the bytes of a state while they are in the cache. The instruction takes three cycles but starts
every cycle, so three lanes of bytes are processed together. The checksum register is linear over GF(2): that of
joined lanes is the register of the first, shifted by the length of the second, plus that of the second.

Processors with carry-less multiplication of vectors (VPCLMULQDQ) fold blocks of 256 bytes first: a block x that
precedes another one by n bits is replaced by x t^n modulo the polynomial, which is 64 bits wide for each half of
128 bits and is added to the next block. The checksum of the last sum is that of all blocks (Gopal and others, Fast
CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction, Intel, 2009).

x86-64 has the instruction with SSE4.2, and AArch64 with the CRC extension, which are optional. `HARDWARE` states
whether this processor has it. Elsewhere callers use the package crc32c.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from crc32c import crc32c
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from natgrad.kernel.compiled import inner, pointer

__all__ = ["HARDWARE", "START", "update"]

_INSTRUCTIONS = {
    "x86_64": ("sse4.2", "llvm.x86.sse42.crc32.64.64", 64),
    "AMD64": ("sse4.2", "llvm.x86.sse42.crc32.64.64", 64),
    "aarch64": ("crc", "llvm.aarch64.crc32cx", 32),
    "arm64": ("crc", "llvm.aarch64.crc32cx", 32),
}
"""For each machine: the feature, the LLVM intrinsic of eight bytes, and the bits of its register."""

_FEATURE, _NAME, _BITS = _INSTRUCTIONS.get(platform.machine(), ("", "", 64))

# Settings of numba can exclude instructions that the processor has. The compiler then aborts the process.
_FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))

HARDWARE: bool = f"+{_FEATURE}" in _FEATURES
"""True if the processor has the instruction, and the compiler may use it."""

START = np.uint32(0xFFFFFFFF)
"""Register before the first byte. The checksum is the complement of the register after the last byte."""

_LANE = 4096
"""Bytes of a lane. Combining lanes takes as long as about 100 bytes."""


def _shifts(size: int) -> NDArray[np.uint32]:
    """Return the tables, one for each byte of the register, that shift it by a number of zero bytes."""
    zeros = bytes(size)
    bits = [np.uint32(~crc32c(zeros, ~(1 << bit) & 0xFFFFFFFF) & 0xFFFFFFFF) for bit in range(32)]
    tables = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for value in range(256):
            for bit in range(8):
                if value >> bit & 1:
                    tables[byte, value] ^= bits[8 * byte + bit]
    return tables


_SHIFT = _shifts(_LANE)


def _instruction(typing_context: Any, register: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, own = ir.IntType(64), ir.IntType(_BITS)
        function = builder.module.declare_intrinsic(_NAME, (), ir.FunctionType(own, [own, wide]))
        start = arguments[0] if own == wide else builder.trunc(arguments[0], own)
        found = builder.call(function, [start, arguments[1]])
        return found if own == wide else builder.zext(found, wide)

    return types.uint64(types.uint64, types.uint64), generate


_eight: Any = intrinsic(_instruction)

FOLDS: bool = HARDWARE and {"+vpclmulqdq", "+avx512f"} <= _FEATURES
"""True if the processor multiplies vectors of 512 bits without carries, and the compiler may use it."""

_VECTORS, _VECTOR = 4, 64
_FOLDED = _VECTORS * _VECTOR
"""Bytes of the vectors that are folded at a time."""


def _power(exponent: int) -> int:
    """Return t^exponent modulo the polynomial, with reflected bits, as a factor of a product of 64 bits."""
    value = 1
    for _ in range(exponent):
        value = value << 1 ^ (0x11EDC6F41 if value >> 31 else 0)
    return int(f"{value:032b}"[::-1], 2) << 1


def _folding(typing_context: Any, register: Any, address: Any, blocks: Any, out: Any) -> Any:
    """Generate the loop that adds the register to the first bytes and folds all blocks to one, written to out."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        vector = ir.VectorType(word, _VECTOR // 8)
        register, first, blocks, array = arguments
        out = builder.ptrtoint(context.make_array(signature.args[3])(context, builder, array).data, word)
        multiply = builder.module.declare_intrinsic(
            "llvm.x86.pclmulqdq.512", (), ir.FunctionType(vector, [vector, vector, ir.IntType(8)])
        )
        factors = [_power(8 * _FOLDED + 32), _power(8 * _FOLDED - 32)]
        factor = ir.Constant(vector, [ir.Constant(word, value) for value in factors * (_VECTOR // 16)])

        def at(start: Any, index: int) -> Any:
            here = builder.add(start, ir.Constant(word, index * _VECTOR))
            return builder.inttoptr(here, vector.as_pointer())

        def load(start: Any) -> list[Any]:
            found = [builder.load(at(start, index)) for index in range(_VECTORS)]
            for instruction in found:
                instruction.align = 1
            return found

        before, begun = builder.block, load(first)
        added = builder.insert_element(ir.Constant(vector, None), register, ir.Constant(ir.IntType(32), 0))
        begun[0] = builder.xor(begun[0], added)
        loop, done = (builder.append_basic_block(name) for name in ("fold", "folded"))
        builder.branch(loop)
        builder.position_at_end(loop)
        count, here = builder.phi(word), builder.phi(word)
        sums = [builder.phi(vector) for _ in range(_VECTORS)]
        following = builder.add(here, ir.Constant(word, _FOLDED))
        remaining = builder.sub(count, ir.Constant(word, 1))
        more = builder.append_basic_block("fold.more")
        builder.cbranch(builder.icmp_unsigned("==", remaining, ir.Constant(word, 0)), done, more)
        builder.position_at_end(more)
        added = [
            builder.xor(
                builder.xor(
                    builder.call(multiply, [total, factor, ir.Constant(ir.IntType(8), 0x00)]),
                    builder.call(multiply, [total, factor, ir.Constant(ir.IntType(8), 0x11)]),
                ),
                block,
            )
            for total, block in zip(sums, load(following), strict=True)
        ]
        builder.branch(loop)
        for phi, value, next_value in zip(
            (count, here, *sums), (blocks, first, *begun), (remaining, following, *added), strict=True
        ):
            phi.add_incoming(value, before)
            phi.add_incoming(next_value, more)
        builder.position_at_end(done)
        for index, total in enumerate(sums):
            builder.store(total, at(out, index)).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, types.uintp, types.uintp, out), generate


_fold: Any = intrinsic(_folding)

_WORD, _BYTE = np.empty(0, np.uint64), np.empty(0, np.uint8)


@inner()
def _shifted(register: Any) -> Any:
    low = _SHIFT[0, register & 255] ^ _SHIFT[1, (register >> 8) & 255]
    return np.uint64(low ^ _SHIFT[2, (register >> 16) & 255] ^ _SHIFT[3, (register >> 24) & 255])


@inner()
def update(register: Any, address: Any, size: int) -> Any:
    """Return the register after the bytes at an address; see `START`."""
    a = np.uint64(register)
    if FOLDS and size >= 8 * _FOLDED:
        last, blocks = np.empty(_FOLDED // 8, np.uint64), size // _FOLDED
        _fold(a, address, np.uintp(blocks), last)
        a = np.uint64(0)
        for word in last:
            a = _eight(a, word)
        address += np.uintp(blocks * _FOLDED)
        size -= blocks * _FOLDED
    while size >= 3 * _LANE:
        x, y, z = (
            pointer(address, 0, _WORD),
            pointer(address + np.uintp(_LANE), 0, _WORD),
            pointer(address + np.uintp(2 * _LANE), 0, _WORD),
        )
        b = c = np.uint64(0)
        for i in range(_LANE // 8):
            a, b, c = _eight(a, x[i]), _eight(b, y[i]), _eight(c, z[i])
        a = _shifted(_shifted(a) ^ b) ^ c
        address += np.uintp(3 * _LANE)
        size -= 3 * _LANE
    x = pointer(address, 0, _WORD)
    for i in range(size // 8):
        a = _eight(a, x[i])
    rest = pointer(address, size // 8 * 8, _BYTE)
    for i in range(size % 8):
        a ^= np.uint64(rest[i])
        for _ in range(8):
            a = (a >> np.uint64(1)) ^ (np.uint64(0x82F63B78) if a & np.uint64(1) else np.uint64(0))
    return np.uint32(a)
