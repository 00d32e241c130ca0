"""Test that the records of event files give the same scalars whether they are decoded together or one by one."""

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_protocol_buffer import field

from hostile import event_record
from natgrad.sources.scalars.columns import each_record
from natgrad.sources.scalars.event_file import read_events
from natgrad.sources.scalars.protocol_buffer import BYTES, FIXED32, VARINT
from natgrad.storage import LocalStorage

UNNAMED = field(5, BYTES, field(1, BYTES, b""))
"""An event with a value without a tag, because of which records are decoded one by one."""


def tensor(value):
    return field(8, BYTES, field(1, VARINT, 2) + field(6, BYTES, struct.pack("<d", value)))


names = st.sampled_from(["loss", "lr", "other", "é"]).map(lambda name: field(1, BYTES, name.encode()))
singles = st.floats(width=32).map(lambda value: field(2, FIXED32, struct.pack("<f", value)))
values = st.one_of(singles, st.floats().map(tensor), st.just(b""), st.just(field(8, BYTES, b"")))
summaries = st.lists(st.builds(lambda name, value: field(1, BYTES, name + value), names, values), max_size=3)
events = st.builds(
    lambda step, summary: step + field(5, BYTES, b"".join(summary)),
    st.one_of(st.just(b""), st.integers(0, (1 << 64) - 1).map(lambda step: field(2, VARINT, step))),
    summaries,
)


def read(path, content):
    path.write_bytes(content)
    notes = []
    found = each_record(read_events(LocalStorage(path), lambda key: key != "other", notes))
    assert not notes
    return [{key: float(value) for key, value in record.items()} for record in found]


@given(st.lists(st.one_of(events, st.binary(max_size=3).map(lambda text: field(9, BYTES, text))), max_size=8))
def test_events_are_decoded_together_as_one_by_one(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("log") / "tfevents"
    content = b"".join(map(event_record, some))
    np.testing.assert_equal(read(path, content), read(path, content + event_record(UNNAMED)))


def test_records_of_any_length_are_read(tmp_path):
    """A record may end anywhere in a block of a megabyte, or be longer than one."""
    sizes = [0, 1, (1 << 20) - 80, 16, 4, 12, (1 << 20) + 1, 3 << 20, 5]
    event = field(2, VARINT, 7) + field(5, BYTES, field(1, BYTES, field(1, BYTES, b"loss") + tensor(0.5)))
    content = b"".join(event_record(field(9, BYTES, bytes(size)) + event) for size in sizes)
    assert read(tmp_path / "tfevents", content) == [{"step": 7.0, "loss": 0.5}] * len(sizes)
