"""Hooks of MkDocs: show files from outside this folder as pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

PAGES = {
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "howto/contribute.md",
    "data/README.md": "reference/data.md",
}
"""Page of the site for each file of the repository."""

_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of files from outside the folder. Their links stay valid."""
    for source, page in PAGES.items():
        text = _moved((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:  # noqa: ANN001
    """Redirect links to these files from the pages of this folder to their pages."""
    return _redirected(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _moved(markdown: str, source: str, page: str) -> str:
    return _redirected(markdown, source, page)


def _redirected(markdown: str, source: str, page: str) -> str:
    """Make the links of a file of the repository relative to a page of the site."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}"

    return _LINK.sub(link, markdown)
