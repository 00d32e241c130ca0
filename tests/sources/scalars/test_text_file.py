"""Scalars in the lines of text logs, in a stated form."""

import ast
import contextlib
import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_huggingface import train
from test_scalar_log import run_without_scalars, settled, stored

from natgrad.schema.errors import InputError
from natgrad.sources.names import parse_map
from natgrad.sources.opening import format_of
from natgrad.sources.scalars.columns import each_record
from natgrad.sources.scalars.text_file import LINE_FORMS, TEXT_KIND, known_form
from natgrad.storage import open_storage
from opened import ingest, open_source, open_sources

NANOGPT = """number of parameters: 0.01M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2649, time 29.31ms, mfu -100.00%
iter 1: loss 4.1000, time 9.31ms, mfu -100.00%
iter 2: loss nan, time 9.31ms, mfu 5.00%
iter 3: loss 3.9999, time 9.31ms, mfu 5.00%
"""
MEGATRON = """ > finished creating GPT datasets ...
 [2026-01-01 10:00:00] iteration        1/     100 | consumed samples:           16 | elapsed time per iteration (ms): 123.4 | learning rate: 2.000000E-04 | global batch size:    16 | lm loss: 1.082345E+01 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 |
 [2026-01-01 10:00:01] iteration        2/     100 | consumed samples:           32 | elapsed time per iteration (ms): 123.4 | learning rate: 3.000000E-04 | global batch size:    16 | lm loss: 9.5E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 |
 validation loss at iteration 2 | lm loss value: 9.0E+00 | lm loss PPL: 8.1E+03 |
 [2026-01-01 10:00:02] iteration        4/     100 | learning rate: 5.000000E-04 | lm loss: 8.5E+00 |
"""  # noqa: E501


def write_text(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return settled(path)


def joined(tmp_path, text, name="train.log", steps=5, **mapping):
    run = run_without_scalars(tmp_path / "run", steps)
    log = write_text(tmp_path / name, text)
    summary = ingest([run, log], tmp_path / "out", mapping=mapping)
    return stored(tmp_path / "out"), summary.warnings


@pytest.mark.parametrize("name", ["train.log", "train.txt", "slurm-1.out", "log", "train.log.gz"])
@pytest.mark.parametrize("line", ["nanogpt", "iter {step}: loss {loss}", "iter  {step}: loss {loss}, time {time}"])
def test_lines_of_nanogpt_are_read(tmp_path, name, line):
    found, warnings = joined(tmp_path, NANOGPT, name, line=line)
    assert [(step, loss) for step, loss, _ in found] == [(0, 4.2649), (1, 4.1), (2, None), (3, 3.9999), (4, None)]
    assert any("rounded to the digits that were printed" in warning for warning in warnings)


def test_lines_of_megatron_are_read_by_state(tmp_path):
    found, warnings = joined(tmp_path, MEGATRON, line="megatron")
    # The loss at iteration 1 is that of the initial state, and the rate is that of the next update.
    assert found == [(0, 10.82345, None), (1, 9.5, 2e-4), (2, None, 3e-4), (3, None, None), (4, None, 5e-4)]
    assert any("1 losses are omitted: each is a mean over several updates" in warning for warning in warnings)


def test_printed_lines_of_the_trainer_are_read_by_counting_them(tmp_path, capsys):
    folder, _ = train(tmp_path / "out")
    text = capsys.readouterr().out
    printed = [ast.literal_eval(line) for line in re.findall(r"\{'loss'.*?\}", text)]
    assert len(printed) == 4
    log = write_text(tmp_path / "train.log", text)
    assert format_of(open_storage(log)) == "text"
    with pytest.raises(InputError, match="the lines contain no step") as refused:
        open_sources([folder, log], mapping={"line": "trainer"}).steps()
    assert "--map step=line" in refused.value.remedy
    run = run_without_scalars(tmp_path / "run", 4)
    ingest([run, log], tmp_path / "store", mapping={"line": "trainer", "step": "line"})
    expected = [(i, float(values["loss"]), float(values["learning_rate"])) for i, values in enumerate(printed)]
    assert stored(tmp_path / "store") == expected
    # The same from the log history, which has more digits.
    history = folder / "checkpoint-4" / "trainer_state.json"
    assert format_of(open_storage(settled(history))) == "trainer-state"
    ingest([run, history], tmp_path / "history")
    entries = [entry for entry in json.loads(history.read_text())["log_history"] if "loss" in entry]
    assert stored(tmp_path / "history") == [(i, e["loss"], e["learning_rate"]) for i, e in enumerate(entries)]


def test_printed_dictionaries_are_read(tmp_path):
    lines = [
        f"10%|#   | {s}/4 {{'step': {s}, 'loss': '{4 - s}.5', \"lr\": 1e-0{s + 1}, 'note': 'a, b', 'x': [1, 2]}} ok"
        for s in range(3)
    ]
    found, _ = joined(tmp_path, "start\r" + "\r\n".join(lines) + "\n{'eval_loss': 3}\n", line="dictionary", steps=3)
    assert found == [(0, 4.5, 0.1), (1, 3.5, 0.01), (2, 2.5, 0.001)]


def test_labels_restarts_and_repeated_steps_follow_the_rules_of_scalar_logs(tmp_path):
    lines = ["train 0 1.0", "valid 0 9.0", "train 1 2.0", "train 2 3.0", "train 1 5.0"]
    form = "{split} {step} {loss}"
    _, warnings = joined(tmp_path / "a", "\n".join(lines) + "\n", line=form, steps=3)
    assert any("differ in split" in warning for warning in warnings)
    found, warnings = joined(tmp_path / "b", "\n".join(lines) + "\n", line=form, loss="loss[split=train]", steps=3)
    assert [loss for _, loss, _ in found] == [1.0, 5.0, None]
    assert any("the run was restarted" in warning for warning in warnings)
    found, warnings = joined(tmp_path / "c", "0 1.0\n0 1.5\n1 2.0\n", line="{step} {loss}", steps=2)
    assert [loss for _, loss, _ in found] == [None, 2.0]
    assert any("different values at 1 steps" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("iter step: loss loss", "must contain fields"),
        ("{step} {step}", "must contain fields"),
        ("{step}{loss}", "there must be text between two fields"),
        ("{step} {} {loss}", "must contain fields"),
        ("{step {loss}", "must contain fields"),
        ("nanoGPT", "must contain fields"),
    ],
)
def test_an_invalid_form_is_refused(tmp_path, line, what):
    log = write_text(tmp_path / "train.log", NANOGPT)
    with pytest.raises(InputError, match=what) as refused:
        open_sources([run_without_scalars(tmp_path / "run"), log], mapping={"line": line})
    assert "iter {step}: loss {loss}" in refused.value.remedy


def test_a_text_log_without_a_stated_form_is_refused_and_the_remedy_works(tmp_path):
    run = run_without_scalars(tmp_path / "run")
    for name, text in (("nanogpt", NANOGPT), ("megatron", MEGATRON)):
        log = write_text(tmp_path / f"{name}.log", text)
        with pytest.raises(InputError, match="the form of the lines of a text log must be stated") as refused:
            open_sources([run, log]).steps()
        (advice,) = re.findall(r"--map (line=\w+),", refused.value.remedy)
        assert len(open_sources([run, log], mapping=parse_map([advice])).steps()) == 6
    log = write_text(tmp_path / "other.log", NANOGPT)
    with pytest.raises(InputError, match="no line has the stated form"):
        open_sources([run, log], mapping={"line": "megatron"}).steps()
    twice = write_text(tmp_path / "twice.log", "iter 1: loss 2 iter 2: loss 3\n")
    with pytest.raises(InputError, match="line 1 matches the pattern twice"):
        open_sources([run, twice], mapping={"line": "nanogpt"}).steps()
    with pytest.raises(InputError, match="line=x cannot be mapped in a CSV file"):
        open_source(write_text(tmp_path / "log.csv", "step,loss\n0,1\n"), "csv", {"line": "x"})


@pytest.mark.parametrize(
    ("line", "form"),
    [
        (
            "[10:00] step={} epoch 1 loss: 2.5 lr=1e-3 3 it/s",
            "step={step} epoch {epoch} loss: {loss} lr={learning_rate}",
        ),
        ("| iter {} | 12 batches | loss 5.1 | ppl 3", "iter {step} | {word3} batches | loss {loss}"),
        ("INFO Update {}/1e5, Training Loss 0.5", "Update {step}/1e5, Training Loss {loss}"),
        ("step {} val loss 2.5", ""),
        ("Epoch {} loss 0.5", ""),
        ("step {} (12.5ms), x2 loss 0.5", "step {step} {word2}, {word3} loss {loss}"),
    ],
)
def test_the_form_of_lines_with_usual_words_is_advised(tmp_path, line, form):
    text = "".join(f"{line.format(step)}\n" for step in range(10, 16))
    assert known_form(open_storage(write_text(tmp_path / "train.log", text))) == form
    # A line that occurs once may be part of a description.
    assert known_form(open_storage(write_text(tmp_path / "once.log", text.splitlines()[0]))) == ""


def test_a_form_is_stated_in_a_run_file_and_on_the_command_line(tmp_path):
    run_without_scalars(tmp_path / "run", 4)
    write_text(tmp_path / "train.log", NANOGPT)
    (tmp_path / "run.toml").write_text(
        '[[source]]\npath = "run"\n[[source]]\npath = "train.log"\nmap = { line = "iter {step}: loss {loss}," }\n'
    )
    ingest(tmp_path / "run.toml", tmp_path / "out")
    assert [loss for _, loss, _ in stored(tmp_path / "out")] == [4.2649, 4.1, None, 3.9999]
    assert parse_map(["line=iter {step}: loss {loss}", "loss=loss step=step"]) == {
        "line": "iter {step}: loss {loss}",
        "loss": "loss",
        "step": "step",
    }


@given(st.lists(st.text(alphabet="iter step: loss{}'\"0123456789.,eE+-|/\t\r", max_size=80), max_size=20))
def test_any_text_is_either_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("text") / "train.log"
    path.write_text("\n".join(lines) + "\n", newline="")
    for form in (*LINE_FORMS, "iter {step}: loss {loss}", "{step} {word} {loss}"):
        decode = TEXT_KIND.of_line(form, "step")
        with contextlib.suppress(InputError, ValueError):
            for record in each_record(decode(open_storage(path), lambda key: True, [])):
                assert set(map(type, record.values())) <= {int, str, type(None)}


@given(
    st.lists(st.sampled_from(["Iter 1: LOSS 2.5", " iter\t2:  loss nan ", "", "x", "iter 3: loss 4", "iter 5 6"])),
    st.sampled_from(["iter {step}: loss {loss}", "{step}: loss {loss}", "Iter {word}", "iter {step}"]),
)
def test_lines_are_matched_together_as_one_by_one(tmp_path_factory, lines, form):
    path, decode = tmp_path_factory.mktemp("text") / "train.log", TEXT_KIND.of_line(form, "step")
    found = []
    for last in ("x", "é"):  # lines that are not ASCII are matched one by one
        path.write_text("\n".join([*lines, "iter 7: loss 8", last]) + "\n")
        records = each_record(decode(open_storage(path), lambda key: True, []))
        found.append([{key: str(value).lower() for key, value in record.items()} for record in records])
    assert found[0] == found[1]
