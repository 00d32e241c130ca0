"""Names from a log do not reach a terminal with their control characters; tables and lines show their values."""

import logging
import math
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.summary import summary_html, summary_lines
from natgrad.schema.text import printable, sparkline, table_lines

LEVELS = " ▁▂▃▄▅▆▇█"

HOSTILE = "w\x1b[2J\x1b]0;title\x07\nERROR done\r\u202etxt\u2028\x9b31m"


@given(text=st.text())
def test_printable_texts_are_unchanged_and_others_have_only_printable_characters(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_the_parts_of_an_error_are_lines_of_printable_characters():
    error = InputError(HOSTILE, where=HOSTILE, why=HOSTILE, remedy=HOSTILE)
    lines = str(error).split("\n")
    assert len(lines) == 4
    assert all(map(str.isprintable, (*lines, error.what, error.where, error.why, error.remedy)))


@pytest.mark.parametrize("value", [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE * 10}])
def test_a_summary_has_one_line_per_value(value):
    for line in summary_lines({"notes": value, HOSTILE: 1}):
        assert line.endswith("\n")
        assert line[:-1].isprintable()


def test_arguments_of_log_messages_are_escaped_and_errors_keep_their_lines(caplog):
    log = logger("natgrad.test")
    log.warning("%s of %d: %s", HOSTILE, 3, ValueError(HOSTILE))
    log.warning("%s", InputError("one", where="two"))
    first, second = caplog.messages
    assert first.isprintable()
    assert " of 3: " in first
    assert second == "one\n  where: two"
    assert {record.pathname for record in caplog.records} == {__file__}


@pytest.mark.parametrize(
    "name", ["app.follow", "app.scan", "compute.clusters", "ingestion.transfer", "sources.opening"]
)
def test_modules_log_with_an_escaping_logger(name):
    assert isinstance(import_module(f"natgrad.{name}")._log, logging.LoggerAdapter)
    assert not [
        other
        for other, module in list(sys.modules.items())
        if other.startswith("natgrad") and isinstance(getattr(module, "_log", None), logging.Logger)
    ]


def test_a_tensor_name_with_control_characters_is_escaped_on_the_command_line(tmp_path):
    state = {f"{array}/{HOSTILE}": np.ones(3) for array in ("parameter", "gradient")}
    for step in range(3):
        save_file(
            state | {"learning_rate": np.array(0.1), HOSTILE: np.ones(1)}, tmp_path / f"step_{step}.safetensors"
        )
    command = [sys.executable, "-c", "from natgrad.app.cli import main; main()", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert r"w\x1b[2J" in done.stdout
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    save_file({f"gradient/{HOSTILE}": np.ones(4)} | state, tmp_path / "step_1.safetensors")
    (tmp_path / "step_2.safetensors").write_bytes(b"x")
    failed = subprocess.run(
        [*command[:3], "process", str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert all(line.isprintable() for line in (failed.stdout + failed.stderr).split("\n"))


@given(st.lists(st.none() | st.floats(), max_size=20))
def test_a_sparkline_has_one_character_per_value_in_the_order_of_the_values(values):
    line = sparkline(values)
    assert len(line) == len(values)
    finite = [(value, LEVELS.index(c)) for value, c in zip(values, line, strict=True) if c != " "]
    assert len(finite) == sum(value is not None and math.isfinite(value) for value in values)
    ordered = sorted(finite)
    assert [level for _, level in ordered] == sorted(level for _, level in ordered)
    if ordered and ordered[0][0] / 2 < ordered[-1][0] / 2:
        assert (ordered[0][1], ordered[-1][1]) == (1, 8)


def test_a_list_of_mappings_is_a_table_in_text_and_html():
    rows = [{"tensor": "layer\x1b[31m", "mean_angle": 1.23456}, {"tensor": "x" * 200 + "end", "mean_angle": 2.0}]
    lines = "".join(summary_lines({"worst_tensors": rows, "steps": 3}))
    assert lines.splitlines()[0] == "worst tensors"
    assert "\x1b" not in lines
    assert "mean angle" in lines
    assert "1.235" in lines
    assert max(map(len, lines.splitlines())) < 90
    assert "end  2" in lines
    page = summary_html("title", {"worst_tensors": [{"tensor": "<b>"}]})
    assert "<th>tensor</th>" in page
    assert "&lt;b&gt;" in page


def test_a_course_is_a_line_with_its_range():
    (line,) = summary_lines({"angle_course": [0.5, None, 1.0]})
    assert line == "angle course  ▁ █  0.5 to 1 rad\n"
    assert [*summary_lines({"angle_course": None})] == ["angle course  None\n"]


def test_the_columns_of_a_table_are_aligned():
    assert [*table_lines([["a", "b"], ["long", "1"]])] == ["a     b\n", "long  1\n"]


def test_entries_of_a_mapping_are_short_texts_of_their_kind():
    values = {"objective": {"evaluation": "unknown", "residual": 0.05234882189702224, "warnings": []}}
    assert "".join(summary_lines(values)) == ("objective  evaluation unknown, residual 0.0523488, warnings none\n")
