"""Run the examples of the README and the documentation in an empty folder with the data."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import xarray as xr
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]


def run_shell(example):
    for line in example.parsed.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            # These commands set up everything, and this test is part of one of them.
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
        elif program == "pip":
            # tests/packaging installs the wheel of this name and then runs the demonstration.
            assert arguments == ["install", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]]
        else:
            assert program == "natgrad"
            subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, capture_output=True)


@pytest.mark.usefixtures("prefect_server")
def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    parsers = [PythonCodeBlockParser(), CodeBlockParser(language="sh", evaluator=run_shell)]
    examples = list(Sybil(parsers).parse(ROOT / "README.md"))
    assert len(examples) == 5
    for example in examples:
        example.evaluate()
    printed = capsys.readouterr().out
    assert "100% of the updates descend" in printed
    model = xr.open_datatree("runs/linear_system/results.zarr")["model"]
    assert model.sizes["step"] == 40
    assert len(list(Path("logs/quadratic").iterdir())) == 20


@pytest.mark.parametrize(("page", "examples"), [("errata.md", 20), ("paper.md", 9)])
def test_every_example_of_the_mathematics_holds(page, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    found = list(Sybil([PythonCodeBlockParser()]).parse(ROOT / "docs" / "explanation" / page))
    blocks = (ROOT / "docs" / "explanation" / page).read_text().count("```python")
    assert blocks == examples
    assert len(found) >= blocks
    for example in found:
        example.evaluate()


def test_every_erratum_has_a_counterexample():
    page = (ROOT / "docs" / "explanation" / "errata.md").read_text()
    sections = re.split(r"^### (\d+)\. ", page, flags=re.MULTILINE)[1:]
    assert sorted(map(int, sections[::2])) == list(range(1, 20))
    for number, text in zip(sections[::2], sections[1::2], strict=True):
        assert ">>>" in text, f"erratum {number} has none"


def test_links_in_the_documents_exist():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
    for page in (*pages, *(ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        for part in text.split("](")[1:]:
            target = part.partition(")")[0].partition("#")[0]
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
