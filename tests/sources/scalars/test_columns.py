"""Test that many values are added as they would be one by one."""

from hypothesis import given
from hypothesis import strategies as st

from natgrad.sources.scalars.columns import Column, Labels

texts = st.one_of(
    st.sampled_from(["", " ", "1", " 2.5\t", "1_0", "nan", "-inf", "1e400", "x", "0x1", "٣", "\u2003"]),
    st.floats().map(repr),
    st.text(max_size=3),
)
batches = st.lists(st.lists(texts, max_size=5), max_size=4)


def outcome(column, add):
    """Return the contents of a column after values were added, or the error."""
    try:
        add(column)
    except ValueError as error:
        return str(error)
    found = [column.records.tolist()]
    if isinstance(column, Labels):
        return [*found, column.codes.tolist(), column.texts]
    return [*found, column.values.tobytes(), column.invalid]


def one_by_one(batches, add):
    for record, (line, text) in enumerate(
        ((10 * n + i, t) for n, b in enumerate(batches) for i, t in enumerate(b)), 1
    ):
        add(record, line, text)


@given(batches, st.integers(0, 20))
def test_values_are_added_together_as_one_by_one(batches, limit):
    def together(column):
        record = 1
        for number, batch in enumerate(batches):
            column.extend(record, batch, range(10 * number, 10 * number + len(batch)))
            record += len(batch)

    def apart(column):
        one_by_one(batches, lambda record, line, text: column.append(record, text, line))

    assert outcome(Column(limit), together) == outcome(Column(limit), apart)


@given(batches)
def test_labels_are_added_together_as_one_by_one(batches):
    def together(column):
        record = 1
        for batch in batches:
            column.extend(record, batch)
            record += len(batch)

    def apart(column):
        one_by_one(batches, lambda record, line, text: column.append(record, text))

    assert outcome(Labels(), together) == outcome(Labels(), apart)
