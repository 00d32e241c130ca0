"""Hooks of MkDocs: show files from outside this folder as pages of the site, and build the gallery."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "howto/contribute.md",
    "data/README.md": "reference/data.md",
}
"""Page of the site for each file of the repository."""

PROGRAMS = {f"docs/gallery/{path.name}": f"gallery/{path.stem}.md" for path in (ROOT / "docs/gallery").glob("*.py")}
"""Page of the site for each program of the gallery."""

_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")

_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+")
_SEPARATOR = re.compile(r"(?<=\w)([._/]|&gt;)(?=\w)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside the folder, and those of the gallery."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "CHANGELOG.md":
            text += unreleased()
        files.append(File.generated(config, page, content=_relinked(text, source, page)))
    for path, content in gallery().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of the pages in this folder lead to the pages from outside."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Let names in the narrow cells of tables wrap after their parts, and not within a word."""
    return _CELL.sub(lambda cell: _CODE.sub(lambda code: _SEPARATOR.sub(r"\1<wbr>", code[0]), cell[0]), output)


def gallery() -> dict[str, bytes]:
    """Build the gallery, with warnings as errors, and return its files by their path in the site.

    Raises
    ------
    PluginError
        If a program fails, or a statement about its runs does not hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The programs run in their own process, because they and their libraries print and log.
        command = [sys.executable, "-W", "error", str(ROOT / "docs" / "build_gallery.py"), folder]
        # More threads would not make such small runs faster, and on a busy machine they wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PluginError(f"a program of the gallery failed:\n{done.stdout}{done.stderr}")
        files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return {f"gallery/{path.as_posix()}": content for path, content in files.items()}


def unreleased() -> str:
    """Return the section of the changelog that the fragments give."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "Unreleased", "--date", "-"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace(" (-)", "")


def _relinked(markdown: str, source: str, page: str) -> str:
    """Make the links in a file of the repository relative to its page."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        target = {**PAGES, **PROGRAMS}.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}"

    return _LINK.sub(link, markdown)
