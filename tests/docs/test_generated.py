"""Test that the check of the generated parts of the documentation, of `make lint`, detects if they are outdated."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from natgrad.results.replicate_variables import REPLICATE_VARIABLES
from natgrad.results.variables import VARIABLES

ROOT = Path(__file__).parents[2]


def generate(root, *arguments):
    return subprocess.run(
        [sys.executable, root / "docs" / "generate.py", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def copied(tmp_path):
    """Copy the code, the pages and the table of abilities."""
    for name in ("pipeline", "flows", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conformance.toml", tmp_path / "tests")
    return tmp_path


def test_changes_of_code_and_edits_fail_the_check_and_are_then_written(copied):
    table = copied / "tests" / "conformance.toml"
    table.write_text(table.read_text().replace('"dcp" = "yes"', '"dcp" = "a reason"'))
    with (copied / "pipeline" / "natgrad" / "kernel" / "gram.py").open("a") as file:
        file.write("\n\ndef later():\n    from natgrad.theory import geometry\n    return geometry\n")
    variables = copied / "docs" / "reference" / "variables.md"
    text = variables.read_text()
    variables.write_text(text.replace("| `angle` |", "| `angel` |"))
    checked = generate(copied, "--check")
    assert checked.returncode == 1
    outdated = {"docs/reference/formats.md", "docs/explanation/design.md", "docs/reference/variables.md"}
    assert set(re.findall(r"docs/\S+\.md(?= is not up to date)", checked.stderr)) == outdated
    assert generate(copied).returncode == 0
    assert "| `kernel` | `theory` |\n" in (copied / "docs" / "explanation" / "design.md").read_text()
    assert variables.read_text() == text
    assert generate(copied, "--check").returncode == 0


def test_every_variable_is_in_the_tables():
    rows = [line.split(" | ") for line in (ROOT / "docs" / "reference" / "variables.md").read_text().splitlines()]
    named = [row[0].strip("| `") for row in rows if len(row) == 5][1:]
    named = [name for name in named if name not in ("variable", "---")]
    assert named == [*VARIABLES, *REPLICATE_VARIABLES]
