"""Test that the fields of many messages are those of each message."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.sources.scalars.protocol_buffer import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    fields,
    fields_of_all,
    in_groups,
)


def varint(value):
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number, kind, value):
    """Return the bytes of a field."""
    start = varint(number << 3 | kind)
    if kind == VARINT:
        return start + varint(value)
    return start + (varint(len(value)) if kind == BYTES else b"") + value


any_field = st.one_of(
    st.builds(field, st.integers(1, 1 << 20), st.just(VARINT), st.integers(0, (1 << 64) - 1)),
    st.builds(field, st.integers(1, 20), st.just(BYTES), st.binary(max_size=200)),
    st.builds(field, st.integers(1, 20), st.just(FIXED64), st.binary(min_size=8, max_size=8)),
    st.builds(field, st.integers(1, 20), st.just(FIXED32), st.binary(min_size=4, max_size=4)),
)
messages = st.lists(any_field, max_size=5).map(b"".join)


def one_by_one(messages):
    try:
        return [(index, *each) for index, message in enumerate(messages) for each in fields(message)]
    except ValueError:
        return "refused"


def together(messages):
    data, sizes = b"".join(messages), np.array(list(map(len, messages)), np.int64)
    stop = np.cumsum(sizes, dtype=np.int64)
    try:
        found = fields_of_all(data, stop - sizes, stop)
    except ValueError:
        return "refused"
    values = [
        value if kind == VARINT else content
        for kind, value, content in zip(
            found.kind.tolist(), found.value.tolist(), found.contents(data), strict=True
        )
    ]
    return list(zip(found.message.tolist(), found.number.tolist(), found.kind.tolist(), values, strict=True))


@given(st.lists(messages, max_size=8), st.integers(1, 100), st.lists(st.binary(max_size=12), max_size=2))
def test_fields_of_many_messages_are_those_of_each(some, copies, others):
    """With many copies, several messages are decoded at a time."""
    assert together(some * copies + others) == one_by_one(some * copies + others)


@pytest.mark.parametrize(
    "message",
    [
        b"\x08",
        b"\x08" + b"\xff" * 10,
        b"\x08" + b"\xff" * 9 + b"\x02",
        b"\x03",
        b"\x00",
        b"\x0a\x05abc",
        b"\x0d123",
    ],
)
@pytest.mark.parametrize("copies", [1, 100])
def test_messages_that_are_not_valid_are_refused(message, copies):
    assert one_by_one([message] * copies) == together([message] * copies) == "refused"


@given(st.lists(st.integers(0, 1 << 18), max_size=12))
def test_groups_contain_all_messages_in_order(sizes):
    made = [bytes(size) for size in sizes]
    assert [message for group in in_groups(made) for message in group] == made
