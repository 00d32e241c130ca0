"""Run the examples of the README in an empty folder."""

from pathlib import Path

import natgrad
from pages import ROOT, blocks, run_page


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "README.md") == blocks(ROOT / "README.md") == 4
    printed = capsys.readouterr().out
    assert "100% of the updates descend" in printed
    assert "the hardest step to explain is 17" in printed
    assert natgrad.open_results("runs/quadratic")["model"].sizes["step"] == 20
    assert (Path("runs/quadratic") / "report.html").is_file()


def test_it_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert (ROOT / "docs" / "images" / "feedback_alignment.svg").stat().st_size < 100_000
