"""Run the examples of the README in an empty folder."""

import re
from pathlib import Path

import natgrad
from pages import ROOT, blocks, run_page


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "README.md") == blocks(ROOT / "README.md") == 4
    printed = capsys.readouterr().out
    assert re.search(r"\d+% of the updates descend", printed)
    assert natgrad.open_results("runs/adamw").attrs["gradient_source"] == "recorded"
    assert natgrad.open_results("runs/adamw")["model"].sizes["step"] == 50
    assert (Path("runs/adamw") / "report.html").is_file()


def test_it_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    program = lines[lines.index("```python") + 1 :]
    assert len(list(filter(None, program[: program.index("```")]))) <= 15
    assert (ROOT / "docs" / "images" / "feedback_alignment.svg").stat().st_size < 100_000
