"""Build pages of the gallery from programs that succeed and that fail."""

import subprocess
import sys

import pytest

from pages import ROOT

PROGRAM = '''"""A run of three steps.

The file has three lines.
"""

from pathlib import Path

Path("report.html").write_text("a\\nb\\nc\\n")
'''


def build(folder, program):
    """Build the gallery of one program with the script of a copy of the documentation."""
    (folder / "docs" / "gallery").mkdir(parents=True)
    script = folder / "docs" / "build_gallery.py"
    script.write_text((ROOT / "docs" / "build_gallery.py").read_text())
    (folder / "docs" / "gallery" / "short.py").write_text(program)
    command = [sys.executable, "-W", "error", script, folder / "site"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_page_has_the_text_the_report_and_the_code_of_its_program(tmp_path):
    done = build(tmp_path, PROGRAM)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "short.md").read_text()
    assert page.startswith("# A run of three steps\n\nThe file has three lines.\n\n")
    assert 'src="short/report.html"' in page
    code = PROGRAM.rpartition('"""')[2].strip()
    assert f"```python\n{code}\n```\n" in page
    assert (tmp_path / "site" / "short" / "report.html").read_text() == "a\nb\nc\n"
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["short", "short.md"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("assert len(Path('report.html').read_text().splitlines()) == 4", "AssertionError"),
        ("import warnings; warnings.warn('rounded')", "UserWarning: rounded"),
        ("Path('report.html').unlink()", "FileNotFoundError"),
    ],
)
def test_a_program_that_fails_or_warns_or_writes_no_report_has_no_page(tmp_path, line, error):
    done = build(tmp_path, f"{PROGRAM}{line}\n")
    assert done.returncode != 0
    assert error in done.stderr
    assert not (tmp_path / "site").exists()
