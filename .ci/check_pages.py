"""Check the lines of the documentation: one sentence per line, at most 100 columns.

``python .ci/check_pages.py [FILE ...]`` checks the files, or all pages of the repository. It prints one line per
finding and exits with 1 if there are any. Tables, the output of commands and words that cannot be divided, such as
links, may be wider. Example code may be as wide as the code of the packages.
"""

import re
import subprocess
import sys
from pathlib import Path

COLUMNS = 100
CODE_COLUMNS = 116
"""Limit for lines of example code, the same as for Python files."""

ABBREVIATIONS = ("e.g", "i.e", "eq", "eqs", "Prop", "Props", "Fig", "al", "vs")
_BEFORE = "".join(rf"(?<!\b{re.escape(word)})" for word in ABBREVIATIONS)
_SENTENCES = re.compile(rf"{_BEFORE}(?<!\d)[.?!] +[A-Z]")
OUTPUT = ("console", "text")

_CODE = re.compile(r"`[^`]*`")


def check(path: Path) -> list[tuple[int, str, str]]:
    """Return line number, rule and text of each finding in a page."""
    found, inside, language = [], False, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        inside ^= fence
        language = line.strip().strip("`") if fence and inside else language
        if line.startswith("|"):
            continue
        limit = CODE_COLUMNS if inside else COLUMNS
        # A line with two words is a list marker and a word that cannot be divided.
        if len(line) > limit and len(line.split()) > 2 and not (inside and language in OUTPUT):
            found.append((number, f"longer than {limit} columns", line))
        # Titles may have two sentences.
        if not (inside or fence or line.startswith("#")) and _SENTENCES.search(_CODE.sub("x", line)):
            found.append((number, "two sentences", line))
    return found


def main() -> int:
    """Check the files on the command line, or all pages."""
    listed = (
        sys.argv[1:]
        or subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout.split()
    )
    findings = [(name, *finding) for name in listed for finding in check(Path(name))]
    for name, number, what, text in findings:
        sys.stdout.write(f"{name}:{number}: {what}: {text.strip()[:80]}\n")
    return int(bool(findings))


if __name__ == "__main__":
    raise SystemExit(main())
