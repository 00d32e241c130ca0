"""Read states from files into a small buffer and compute their inner products there, in one compiled loop.

A state consists of pieces, each of which is contiguous in one file. A chunk of a store contains a state in one
piece, and the file of a log in one piece for each of its tensors, or fewer. Pieces that follow each other in one
file are read together, whether they are of one state or of several.

Two states of a read block fit into the cache of a core, so memory is read only once. Short states are read
together.

The loop also computes the CRC-32C of the bytes of each state while they are in the cache. The caller compares them
with the recorded checksums.

The loop is compiled because neither Python nor the interpreter lock is then needed between states. Threads do not
wait for each other, and short states do not incur the cost of calls from Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from natgrad.kernel import crc
from natgrad.kernel.compiled import entry, inner, pointer, words_of
from natgrad.kernel.gram import row_products
from natgrad.kernel.located import Located

__all__ = ["buffer_bytes", "products", "read"]

# The function of the C library. Python's function acquires and releases the interpreter lock at each call.
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.intc, types.CPointer(types.uint8), types.uintp, types.int64)
)
_BYTE = np.empty(0, np.uint8)


@inner()
def _read_bytes(descriptor: Any, address: Any, size: int, offset: int) -> bool:
    """Read exactly size bytes to memory at address. Return False on a short read."""
    while size > 0:
        # A read of many bytes, or an interrupted one, may return in parts.
        count = _pread(descriptor, pointer(address, 0, _BYTE), np.uintp(size), offset)
        if count <= 0:
            return False
        address += np.uintp(count)
        offset += count
        size -= count
    return True


@entry()
def _read_states(
    descriptors: Any,
    offsets: Any,
    starts: Any,
    own: int,
    array: int,
    first: int,
    stop: int,
    low: int,
    width: int,
    size: int,
    stride: int,
    address: Any,
) -> int:
    """Read ``width`` elements of ``size`` bytes, from element ``low``, of each state to addresses ``stride`` apart.

    The pieces of several arrays are in one table. Those of this array begin at ``own``, and their starts at
    ``own + array``, because each array before it has one more start than pieces. Bytes that are contiguous in a
    file and in memory are read together.

    Returns the first state that cannot be read, or -1 if all were read.
    """
    piece_of_low = own
    while starts[array + piece_of_low + 1] <= low:
        piece_of_low += 1
    # The bytes that wait to be read: they may continue with those of the next piece.
    waiting, waiting_state, waiting_descriptor, waiting_offset, waiting_address = 0, first, 0, 0, address
    for state in range(first, stop):
        target = address + np.uintp((state - first) * stride)
        element, piece = low, piece_of_low
        while element < low + width:
            end = min(starts[array + piece + 1], low + width)
            descriptor = descriptors[state, piece]
            offset = offsets[state, piece] + (element - starts[array + piece]) * size
            count = (end - element) * size
            if (
                waiting > 0
                and descriptor == waiting_descriptor
                and offset == waiting_offset + waiting
                and target == waiting_address + np.uintp(waiting)
            ):
                waiting += count
            else:
                if waiting > 0 and not _read_bytes(waiting_descriptor, waiting_address, waiting, waiting_offset):
                    return waiting_state
                waiting, waiting_state = count, state
                waiting_descriptor, waiting_offset, waiting_address = descriptor, offset, target
            target += np.uintp(count)
            element, piece = end, piece + 1
    if waiting > 0 and not _read_bytes(waiting_descriptor, waiting_address, waiting, waiting_offset):
        return waiting_state
    return -1


@inner()
def _read_batch(
    descriptors: Any,
    offsets: Any,
    starts: Any,
    pieces: Any,
    itemsizes: Any,
    begin: int,
    end: int,
    low: int,
    width: int,
    stride: int,
    buffer: Any,
    addresses: Any,
    registers: Any,
) -> Any:
    """Read a part of states of every array to its buffer, and record their addresses after that of the last batch.

    The registers of the checksums of the states advance by the bytes read, unless there are none.

    Returns the array and state of the first failure, or (-1, -1) if all were read.
    """
    batch = addresses.shape[1] - 1
    for array in range(itemsizes.size):
        size = itemsizes[array]
        # Batches alternate between the halves of a buffer, because the last state of a batch is needed again.
        address = buffer + np.uintp(begin // batch % 2 * batch * stride * size)
        # A Hessian-vector product belongs to an update, so the last state has none.
        stop = min(end, descriptors.shape[0] - 1) if array == 2 else end
        failed = _read_states(
            descriptors,
            offsets,
            starts,
            pieces[array],
            array,
            begin,
            stop,
            low,
            width,
            size,
            stride * size,
            address,
        )
        if failed >= 0:
            return array, failed
        if registers is not None:
            for state in range(begin, stop):
                first = address + np.uintp((state - begin) * stride * size)
                registers[array, state] = crc.update(registers[array, state], first, width * size)
        addresses[array, 0] = addresses[array, batch]
        for state in range(batch):
            addresses[array, 1 + state] = address + np.uintp(state * stride * size)
        buffer += np.uintp(2 * batch * stride * size)
    return -1, -1


@entry()
def _stream(
    descriptors: Any,
    offsets: Any,
    starts: Any,
    pieces: Any,
    itemsizes: Any,
    like: Any,
    lows: Any,
    cuts: Any,
    segments: Any,
    stride: int,
    leads: Any,
    buffer: Any,
    addresses: Any,
    registers: Any,
    p: Any,
    g: Any,
    h: Any,
    gram: Any,
    ratio: Any,
) -> Any:
    """Return the array and state of the first failure, or (-1, -1). p, g and h are the rows of ``addresses``."""
    updates, batch = leads.size, addresses.shape[1] - 1
    last_segment = 0
    for block in range(lows.size):
        own = segments[cuts[block] : cuts[block + 1]]
        first_segment, last_segment = last_segment, last_segment + own.size - 1
        for begin in range(0, updates + 1, batch):
            end = min(begin + batch, updates + 1)
            failed = _read_batch(
                descriptors,
                offsets,
                starts,
                pieces,
                itemsizes,
                begin,
                end,
                lows[block],
                own[-1],
                stride,
                buffer,
                addresses,
                registers,
            )
            if failed[0] >= 0:
                return failed
            first = max(begin - 1, 0)
            while first < end - 1:
                last = first + 1
                if leads[first]:
                    while last < end - 1 and leads[last]:
                        last += 1
                    at, after = first - begin + 1, last - begin + 1
                    row_products(
                        p[at : after + 1],
                        g[at : after + 1],
                        None if h is None else h[at:after],
                        like,
                        own,
                        gram[first:last, first_segment:last_segment],
                        ratio[first:last, first_segment:last_segment],
                    )
                first = last
    return -1, -1


def buffer_bytes(stride: int, batch: int, itemsizes: Sequence[int]) -> int:
    """Return the bytes of the buffer of `products`."""
    return 2 * batch * stride * sum(itemsizes)


def products(
    files: Sequence[Located],
    dtypes: Sequence[np.dtype[Any]],
    boundaries: Sequence[NDArray[np.int64]],
    stride: int,
    batch: int,
    leads: NDArray[np.bool_],
    buffer: NDArray[np.uint8],
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    checksums: NDArray[np.uint32] | None = None,
) -> tuple[int, int] | None:
    """Read states and compute the inner products of neighbouring ones, as `natgrad.kernel.gram.products` does.

    Parameters
    ----------
    files : sequence of `Located`
        States of parameter and gradient, updates + 1 of each, and of the Hessian-vector product if it is logged.
        If there are no gradients, only the parameter, which is then used instead of the gradient as well: the
        products of the gradient are then meaningless.
    dtypes : sequence of dtype
        Dtype of each.
    boundaries : sequence of int64 arrays, shape (segments of the read block + 1,)
        For each read block of the states: the first elements of its segments, and the end of the last segment.
    stride : int
        Elements from one state in the buffer to the next: the length of the longest read block. If a state in its
        file is one read block of this length, states are read together.
    batch : int
        Number of states that are read before their products are computed.
    leads : bool array, shape (updates,)
        True if an update leads from a state to the next. Otherwise its products are NaN.
    buffer : uint8 array, of `buffer_bytes`
        Overwritten.
    gram, ratio : float64 arrays, shape (updates, segments, vectors, vectors) and (updates, segments)
        Written, the segments of all read blocks one after the other.
    checksums : uint32 array, shape (arrays, updates + 1), optional
        Written: CRC-32C of the bytes of all read blocks of each state. A Hessian-vector product of the last state
        is not read, and its checksum is undefined. Requires `natgrad.kernel.crc.HARDWARE`.

    Returns
    -------
    (int, int) or None
        Array and state for which reading failed, because the file is too short or the system reports an error. The
        outputs are then undefined.

    Raises
    ------
    ValueError
        If a read block is longer than ``stride``, the buffer is too small, or checksums are requested, but the
        processor has no instruction for them.
    """
    if checksums is not None and not crc.HARDWARE:
        raise ValueError("the processor has no instruction for CRC-32C, or the compiler may not use it")
    if max(int(block[-1] - block[0]) for block in boundaries) > stride:
        raise ValueError(f"a read block is longer than {stride} elements")
    needed = buffer_bytes(stride, batch, [dtype.itemsize for dtype in dtypes])
    if buffer.nbytes < needed:
        raise ValueError(f"the buffer has {buffer.nbytes} bytes, but {needed} are needed")
    words = [words_of([np.empty((0, 0), dtype)])[0].dtype for dtype in dtypes]
    like = tuple(np.empty(0, dtype) for dtype in (*words, words[0], words[0])[:3])
    # Single columns would be joined in the order of Fortran, for which the loop would be compiled again.
    joined = (np.concatenate(parts, axis=1) for parts in list(zip(*files, strict=True))[:2])
    descriptors, offsets = map(np.ascontiguousarray, joined)
    addresses = np.zeros((3, batch + 1), np.uintp)
    p, g, h = addresses if len(files) > 1 else (addresses[0], addresses[0], addresses[2])
    if checksums is not None:
        checksums[:] = crc.START
    found = _stream(
        descriptors,
        offsets,
        np.concatenate([located.starts for located in files]),
        np.cumsum([0, *(located.descriptors.shape[1] for located in files)]),
        np.array([dtype.itemsize for dtype in dtypes]),
        like,
        np.array([block[0] for block in boundaries]),
        np.cumsum([0, *map(len, boundaries)]),
        np.concatenate([block - block[0] for block in boundaries]),
        stride,
        leads,
        np.uintp(buffer.__array_interface__["data"][0]),
        addresses,
        checksums,
        p,
        g,
        h if len(files) > 2 else None,
        gram,
        ratio,
    )
    if found[0] >= 0:
        return int(found[0]), int(found[1])
    if checksums is not None:
        np.invert(checksums, out=checksums)
    gram[~leads], ratio[~leads] = np.nan, np.nan
    return None


def read(file: Located, first: int, out: NDArray[Any]) -> int | None:
    """Read a part of each state, starting at an element.

    Parameters
    ----------
    file : Located
    first : int
        First element of each state to read.
    out : array, shape (states, elements)
        Written; elements of a state are contiguous.

    Returns
    -------
    int or None
        The first state that cannot be read.
    """
    if not out.size:
        return None
    size, stride = out.itemsize, out.strides[0]
    address = np.uintp(out.__array_interface__["data"][0])
    failed = _read_states(*file, 0, 0, 0, len(out), first, out.shape[1], size, stride, address)
    return None if failed < 0 else int(failed)
