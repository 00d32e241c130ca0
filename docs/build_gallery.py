"""Build the gallery of the site: run the programs in ``docs/gallery``, and write a page for each of them.

``python -W error docs/build_gallery.py FOLDER`` writes ``<name>.md`` and ``<name>/report.html`` for each program
below FOLDER. ``make docs`` calls it, see ``docs/hooks.py``. It needs no network.

A program trains small runs, processes them, writes ``report.html``, and asserts what its docstring states about the
runs. The docstring is the title and the text of the page, and the rest of the program is shown on the page.
"""

from __future__ import annotations

import ast
import contextlib
import runpy
import sys
import tempfile
from pathlib import Path

PROGRAMS = tuple(sorted((Path(__file__).parent / "gallery").glob("*.py")))
"""Programs of the gallery."""

REPORT = "report.html"
"""Page that each program writes into its working folder."""


def build(program: Path, folder: Path) -> None:
    """Run a program in an empty folder, and write its page and its report below another folder.

    Parameters
    ----------
    program : Path
        The program. An error of a program, such as a statement that does not hold, is not caught.
    folder : Path
        Folder of the pages.

    Raises
    ------
    FileNotFoundError
        If the program did not write a report.
    """
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        runpy.run_path(str(program), run_name="__main__")
        report = Path(REPORT).read_bytes()
    (folder / program.stem).mkdir(parents=True)
    (folder / program.stem / REPORT).write_bytes(report)
    (folder / f"{program.stem}.md").write_text(page(program), encoding="utf-8")


def page(program: Path) -> str:
    """Return the page of a program: title, text, report and code."""
    source = program.read_text(encoding="utf-8")
    docstring, *statements = ast.parse(source).body
    title, _, text = str(ast.literal_eval(docstring.value)).strip().partition(".\n")
    code = "\n".join(source.splitlines()[statements[0].lineno - 1 :])
    report = f"{program.stem}/{REPORT}"
    return f"""# {title}

{text.strip()}

[Show this page in the full window]({report})

<iframe class="report" src="{report}" title="{title}" loading="lazy"></iframe>

## Program

This program trained and processed the runs when this site was built.
Its last part checks the statements above.

```python
{code}
```
"""


if __name__ == "__main__":
    for path in PROGRAMS:
        build(path, Path(sys.argv[1]).absolute())
