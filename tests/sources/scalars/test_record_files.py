"""Test that the rows of CSV files are the same whether they are decoded together or one by one."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.sources.scalars.columns import LINE_KEY, RESTART_KEY, each_record, number_of
from natgrad.sources.scalars.record_files import complete_lines, read_csv
from natgrad.storage import LocalStorage

HEADER = ["step", "loss", "note"]
values = st.sampled_from(
    [
        "",
        "1",
        "2.5",
        "-0",
        " 1",
        "+1",
        "01",
        "1e400",
        "x",
        "a,b",
        "two\nlines",
        "two\r\nlines",
        "return\rx",
        '"quoted"',
        " ",
    ]
)
rows = st.one_of(
    st.lists(values, min_size=3, max_size=3),
    st.just(HEADER),
    st.just([]),
    st.lists(values, min_size=2, max_size=4),
)


def written(rows, end):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([HEADER, *rows])
    return text.getvalue()


def one_by_one(text):
    """Return the records of a file, and the error that ends them."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    next(reader)
    found = []
    for row in reader:
        if row == HEADER:
            found.append({RESTART_KEY: None})
        elif row and len(row) != len(HEADER):
            return found, f"line {reader.line_num} has {len(row)} values, but the header has {len(HEADER)}"
        elif row:
            found.append({LINE_KEY: reader.line_num, "step": row[0], "loss": row[1]})
    return found, ""


def shown_value(value):
    if isinstance(value, str) and number_of(value) is None:
        return io.StringIO(value, newline=None).read()
    return number_of(value)


def as_read(records):
    """Return records with numbers instead of their texts, and without empty values."""
    return [{key: shown_value(value) for key, value in record.items() if value != ""} for record in records]


@given(st.lists(rows, max_size=12), st.sampled_from(["\n", "\r\n", "\r"]), st.integers(0, 2))
def test_rows_are_decoded_together_as_one_by_one(tmp_path_factory, rows, end, repeats):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    # Many equal rows, so that there are several batches.
    text = written([*[["1", "2", "3"]] * (5000 * repeats), *rows], end)
    path.write_text(text, newline="")
    found, problem = [], ""
    try:
        for record in each_record(read_csv(LocalStorage(path), lambda key: key != "note", [])):
            found.append(record)
    except ValueError as error:
        problem = str(error)
    expected = one_by_one(text)
    assert problem == expected[1]
    found, expected = as_read(found), as_read(expected[0])
    assert found == expected[: len(found)] if problem else found == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("count", "limit"), [(20_000, 1 << 24), (100, 9)])
def test_lines_are_the_same_wherever_a_block_ends(tmp_path, end, count, limit):
    lines = [f"{'x' * (number % 7)}é{end}" for number in range(count)]
    path, notes = tmp_path / "log.csv", []
    path.write_text("".join(lines), newline="", encoding="utf-8")
    expected = [line.removesuffix(end) + "\n" for line in lines]
    for longest in range(limit, limit + 8):
        assert list(complete_lines(LocalStorage(path), notes, lambda line: False, longest)) == expected
    assert not notes
    with pytest.raises(ValueError, match="a line of more than 5 characters"):
        list(complete_lines(LocalStorage(path), notes, lambda line: False, 5))
