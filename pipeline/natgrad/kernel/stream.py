"""Rows of files through the kernel: each is read into a small buffer and computed from there, in one compiled loop.

Two rows of a piece stay in the cache of a core, so memory is read once and nothing else crosses it; and where rows
are short, many of them are read at once. Between a row and the next there is no Python, and no interpreter lock:
threads do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from natgrad.kernel.gram import entry, inner, pointer, row_products, words_of

__all__ = ["Located", "buffer_bytes", "products", "read"]

Located = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Where rows lie: of each the descriptor of an open file, and its first byte there; two arrays of shape (rows,)."""

# The system's call, not that of Python, which needs the interpreter lock before and after each.
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.intc, types.CPointer(types.uint8), types.uintp, types.int64)
)
_BYTE = np.empty(0, np.uint8)


@inner()
def _read_bytes(descriptor: Any, address: Any, size: int, offset: int) -> bool:
    """Read to an address; whether all came."""
    while size > 0:
        # A read of many bytes, or one that was interrupted, may come in parts.
        count = _pread(descriptor, pointer(address, 0, _BYTE), np.uintp(size), offset)
        if count <= 0:
            return False
        address += np.uintp(count)
        offset += count
        size -= count
    return True


@entry()
def _read_rows(
    descriptors: Any, offsets: Any, first: int, stop: int, shift: int, size: int, stride: int, address: Any
) -> int:
    """Read a part of rows to addresses ``stride`` bytes apart: whole ones that follow each other, at once.

    Returns the first row that cannot be read, -1 where all can.
    """
    row = first
    while row < stop:
        last = row + 1
        while (
            size == stride
            and last < stop
            and descriptors[last] == descriptors[row]
            and offsets[last] == offsets[row] + (last - row) * stride
        ):
            last += 1
        together = (last - row) * size
        if not _read_bytes(descriptors[row], address, together, offsets[row] + shift):
            return row
        address += np.uintp((last - row) * stride)
        row = last
    return -1


@inner()
def _read_batch(
    descriptors: Any,
    offsets: Any,
    itemsizes: Any,
    begin: int,
    end: int,
    low: int,
    width: int,
    stride: int,
    buffer: Any,
    addresses: Any,
) -> Any:
    """Read a part of rows of every array to its buffer, and note where each lies, after the last one before.

    Returns array and row of what cannot be read, (-1, -1) where all can.
    """
    batch = addresses.shape[1] - 1
    for array in range(descriptors.shape[0]):
        size = itemsizes[array]
        # Batches take turns in the two halves of a buffer: the last row of the one before is needed once more.
        address = buffer + np.uintp(begin // batch % 2 * batch * stride * size)
        # An hvp belongs to an update: of the last state there is none to be read.
        stop = min(end, descriptors.shape[1] - 1) if array == 2 else end
        failed = _read_rows(
            descriptors[array], offsets[array], begin, stop, low * size, width * size, stride * size, address
        )
        if failed >= 0:
            return array, failed
        addresses[array, 0] = addresses[array, batch]
        for row in range(batch):
            addresses[array, 1 + row] = address + np.uintp(row * stride * size)
        buffer += np.uintp(2 * batch * stride * size)
    return -1, -1


@entry()
def _stream(
    descriptors: Any,
    offsets: Any,
    itemsizes: Any,
    like: Any,
    lows: Any,
    cuts: Any,
    starts: Any,
    stride: int,
    leads: Any,
    buffer: Any,
    addresses: Any,
    p: Any,
    g: Any,
    h: Any,
    gram: Any,
    ratio: Any,
) -> Any:
    """Return array and row of what cannot be read, (-1, -1) where all can; p, g and h are rows of ``addresses``."""
    rows, batch = leads.size, addresses.shape[1] - 1
    last_segment = 0
    for piece in range(lows.size):
        own = starts[cuts[piece] : cuts[piece + 1]]
        first_segment, last_segment = last_segment, last_segment + own.size - 1
        for begin in range(0, rows + 1, batch):
            end = min(begin + batch, rows + 1)
            failed = _read_batch(
                descriptors, offsets, itemsizes, begin, end, lows[piece], own[-1], stride, buffer, addresses
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
    """Bytes of the buffer of `products`."""
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
) -> tuple[int, int] | None:
    """Read rows and compute the inner products of neighbouring ones, as `natgrad.kernel.gram.products` does.

    Parameters
    ----------
    files : sequence of `Located`
        Rows of parameter and gradient, rows + 1 of each, and maybe of the Hessian-vector product.
    dtypes : sequence of dtype
        Of each.
    boundaries : sequence of int64 arrays, shape (segments of the piece + 1,)
        Of each piece of the rows, which is read by itself, the elements where its segments begin, and where the
        last ends.
    stride : int
        Elements from a row in the buffer to the next: those of the longest piece, or of a row in its file where
        that is one piece; then rows are read together.
    batch : int
        Rows read before they are computed.
    leads : bool array, shape (rows,)
        Whether an update leads from a row to the next. Where none does, products are NaN.
    buffer : uint8 array, of `buffer_bytes`
        Overwritten.
    gram, ratio : float64 arrays, shape (rows, segments, vectors, vectors) and (rows, segments)
        Written, the segments of all pieces one after the other.

    Returns
    -------
    (int, int) or None
        Array and row where reading ended: the file is too short, or the system reports an error. What is written
        has no meaning then.

    Raises
    ------
    ValueError
        Where a piece is longer than ``stride``, or the buffer too small.
    """
    if max(int(piece[-1] - piece[0]) for piece in boundaries) > stride:
        raise ValueError(f"a piece is longer than {stride} elements")
    needed = buffer_bytes(stride, batch, [dtype.itemsize for dtype in dtypes])
    if buffer.nbytes < needed:
        raise ValueError(f"a buffer of {buffer.nbytes} bytes in place of {needed}")
    words = [words_of([np.empty((0, 0), dtype)])[0].dtype for dtype in dtypes]
    like = tuple(np.empty(0, dtype) for dtype in (*words, words[0])[:3])
    descriptors, offsets = (np.stack([located[k] for located in files]) for k in (0, 1))
    addresses = np.zeros((3, batch + 1), np.uintp)
    p, g, h = addresses
    found = _stream(
        descriptors,
        offsets,
        np.array([dtype.itemsize for dtype in dtypes]),
        like,
        np.array([piece[0] for piece in boundaries]),
        np.cumsum([0, *map(len, boundaries)]),
        np.concatenate([piece - piece[0] for piece in boundaries]),
        stride,
        leads,
        np.uintp(buffer.__array_interface__["data"][0]),
        addresses,
        p,
        g,
        h if len(files) > 2 else None,
        gram,
        ratio,
    )
    if found[0] >= 0:
        return int(found[0]), int(found[1])
    gram[~leads], ratio[~leads] = np.nan, np.nan
    return None


def read(file: Located, first: int, out: NDArray[Any]) -> int | None:
    """Read a part of rows, from an element on.

    Parameters
    ----------
    file : Located
    first : int
        Element of a row.
    out : array, shape (rows, elements)
        Written; elements of a row are contiguous.

    Returns
    -------
    int or None
        The row that cannot be read.
    """
    descriptors, offsets = file
    size, stride = out.shape[1] * out.itemsize, out.strides[0]
    address = np.uintp(out.__array_interface__["data"][0])
    failed = _read_rows(descriptors, offsets, 0, len(out), first * out.itemsize, size, stride, address)
    return None if failed < 0 else int(failed)
