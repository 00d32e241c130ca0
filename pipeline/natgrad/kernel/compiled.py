"""Compile functions, and give compiled code the words of states of any dtype.

Numba compiles the kernel, because a compiled extension would need a build for every platform. The intrinsics exist
because numba has neither bfloat16 nor float16, and because passing array slices to a compiled function takes longer
than summing a short segment (reference counts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

__all__ = ["REORDER", "addresses", "entry", "inner", "not_finite", "pointer", "widen", "words_of"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def entry(**options: Any) -> Callable[[_Function], _Function]:
    """Compile a function that is called from Python, without a wrapper for calls by address.

    Parameters
    ----------
    **options
        Additional options of `numba.njit`.
    """
    compiler: Any = njit  # its annotations lack the options for wrappers
    function: Callable[[_Function], _Function] = compiler(cache=True, nogil=True, no_cfunc_wrapper=True, **options)
    return function


def inner(**options: Any) -> Callable[[_Function], _Function]:
    """Compile a function that is only called from compiled code. Without a Python wrapper it compiles faster.

    Parameters
    ----------
    **options
        Additional options of `numba.njit`.
    """
    return entry(no_cpython_wrapper=True, **options)


REORDER = {"reassoc", "contract", "nsz"}
"""Option ``fastmath``: sums may be reordered, to use vector registers. NaN and infinity are preserved."""


# Stored words to float64 --------------------------------------------------------------------------------------
# bfloat16 is passed as uint16 and float16 as int16, because the compiler has neither type.


def _bfloat16(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # The upper half of a float32.
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _float16(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


_from_bfloat16: Any = intrinsic(_bfloat16)
_from_float16: Any = intrinsic(_float16)


def widen(word: Any) -> Any:
    """Return the value of a stored word in float64, exactly."""


@overload(widen, strict=False)
def _widen_compiled(word: Any) -> Any:
    if isinstance(word, types.Float):
        return lambda word: np.float64(word)
    if word == types.uint16:
        return lambda word: np.float64(_from_bfloat16(word))
    return lambda word: np.float64(_from_float16(word))


def _to_pointer(typing_context: Any, address: Any, first: Any, like: Any) -> Any:
    """Generate the code of `pointer`."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(builder.inttoptr(arguments[0], context.get_value_type(pointer)), [arguments[1]])

    return pointer(types.uintp, types.intp, like), generate


pointer: Any = intrinsic(_to_pointer)
"""Return a pointer to the elements of a state, starting at ``first``: ``pointer(address, first, like)``.

It is for compiled code; ``like`` is an array or pointer with elements of the same type. A slice of an array would
also work, but compiled code counts references when an array is passed to a function, which takes longer than
summing a short segment. For the same reason, functions that run once per short segment are always inlined. Inlining
more functions would cost more compile time than it saves.
"""


@inner()
def not_finite(x: Any, n: int) -> int:
    """Count the elements that are NaN or infinite."""
    count = 0
    for i in range(n):
        value = widen(x[i])
        count += not abs(value) < np.inf
    return count


def words_of(blocks: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Return views of blocks in a dtype that the compiler has: float16 as int16, bfloat16 as uint16."""
    dtype = blocks[0].dtype
    words = np.int16 if dtype == np.float16 else np.uint16 if dtype.name == "bfloat16" else None
    return blocks if words is None else [block.view(words) for block in blocks]


def addresses(blocks: Sequence[NDArray[Any]], elements: int) -> NDArray[np.uintp]:
    """Return the address of each state of the blocks. The compiled code reads there without further checks."""
    for block in blocks:
        if block.dtype != blocks[0].dtype or block.strides[1] != block.itemsize or block.shape[1] < elements:
            raise ValueError(f"states must have one dtype, be contiguous, and have at least {elements} elements")
    first = [block.__array_interface__["data"][0] for block in blocks]
    rows = [start + np.arange(len(block)) * block.strides[0] for start, block in zip(first, blocks, strict=True)]
    return np.concatenate(rows).astype(np.uintp)
