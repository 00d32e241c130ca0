"""Build the site, with warnings as errors, and check that its pages request nothing from other servers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import natgrad
from pages import ROOT

RESOURCES = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=\"?([^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--quiet", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return folder


def test_no_page_requests_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        resources = RESOURCES.findall(page.read_text())
        assert resources
        for resource in resources:
            assert not re.match(r"(https?:)?//", resource), f"{page.name} requests {resource}"
            assert (page.parent / resource.partition("#")[0].partition("?")[0]).exists() or page.name == "404.html"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text())


def test_the_reference_has_every_public_name_with_its_options(site):
    page = (site / "reference" / "api.html").read_text()
    for name in set(natgrad.__all__) - {"__version__"}:
        assert f'id="natgrad.{name}"' in page
    text = re.sub(r"<[^>]+>", "", page)
    assert "idle_timeout" in text
    assert "Seconds without a new step after which follow ends." in text


def test_the_changelog_has_the_fragments(site):
    page = re.sub(r"<[^>]+>", "", (site / "reference" / "changelog.html").read_text())
    assert "Unreleased" in page or not list((ROOT / "changes").glob("*.md"))
