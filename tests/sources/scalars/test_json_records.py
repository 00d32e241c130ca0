"""Test that JSON objects give the same values whether they are decoded together or one by one."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natgrad.sources.scalars.columns import LINE_KEY, RUN_KEY, Batch, each_record
from natgrad.sources.scalars.json_records import json_object, json_records

keys = st.sampled_from(["step", "loss", "a", "b", "a/b", "x:", '"', '":', " :", "\\", "é", "\ud800", RUN_KEY])
numbers = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([-0.0, 2**53 + 1, 2**63, 2**64, 10**40, 10**400, 1e-320, float("nan"), float("inf")]),
)
leaves = st.one_of(numbers, st.booleans(), st.none(), keys, st.lists(numbers, max_size=2))
objects = st.recursive(
    st.dictionaries(keys, leaves, max_size=3), lambda children: st.dictionaries(keys, children | leaves, max_size=3)
)
texts = st.one_of(
    objects.map(json.dumps),
    objects.map(lambda value: json.dumps(value, ensure_ascii=False, separators=(" , ", " : "))),
    st.lists(st.tuples(keys, leaves), max_size=3).map(
        lambda pairs: "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"
    ),
    st.sampled_from(['{"a": -0}', '{"a": 1.}', '{"a": 01}', '{"a": 1e400}', "[1]", "1", "{", '{"a":1} x', "{}{}"]),
    st.integers(1000, 1100).map(lambda depth: '{"a":' * depth + "1" + "}" * depth),
)


def wanted(key):
    return key != "b"


def one_by_one(texts):
    """Return the records of texts, and the error that ends them."""
    found = []
    for number, text in enumerate(texts, 5):
        try:
            found.append({LINE_KEY: number, **json_object(text, wanted, f"line {number}")})
        except ValueError as error:
            return found, str(error)
    return found, ""


def as_read(records):
    """Return records without missing values, and with floats, which have the texts of NaN and of signed zeros."""
    return [
        {
            key: repr(float(value)) if is_number(value) else value
            for key, value in record.items()
            if value is not None
        }
        for record in records
    ]


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


@given(st.lists(texts, min_size=1, max_size=6))
@example(['{"a" :1,"a":2}', '{"x":"\\":"}'])
@example(['{"a":1,"a":2}', '{"x":"\\":"}'])
@example(['{"loss":{"a":1}}', '{"loss":null}', '{"x":1}'])
def test_objects_are_decoded_together_as_one_by_one(texts):
    found, problem = [], ""
    try:
        found += each_record(json_records(texts, wanted, "line", range(5, 5 + len(texts)), are_lines=True))
    except ValueError as error:
        problem = str(error)
    expected = one_by_one(texts)
    assert problem == expected[1]
    assert as_read(found) == as_read(expected[0])


@pytest.mark.parametrize(
    "texts",
    [
        ['{"step": 1, "loss": 0.5}', '{"step": 2, "lr": 0.1}'],
        ['{"step": 1, "train": {"loss": {"total": 1}}, "time": "12:30"}'] * 3,
        ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": -Infinity}'],
    ],
)
def test_objects_of_usual_logs_are_decoded_together(texts):
    (batch,) = json_records(texts, wanted, "line", range(len(texts)), are_lines=True)
    assert isinstance(batch, Batch)


def test_many_different_keys_take_time_proportional_to_the_text():
    texts = [f'{{"k{number}": 1}}' for number in range(3000)]
    assert len(list(json_records(texts, wanted, "line", range(3000), are_lines=True))) == 3000
