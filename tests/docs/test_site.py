"""Build the site, with warnings as errors, check that it requests nothing, and open the gallery in a browser."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

import natgrad
from browsers import browser
from pages import ROOT

__all__ = ["browser"]  # a fixture

GALLERY = sorted(path.stem for path in (ROOT / "docs" / "gallery").glob("*.py"))

RESOURCES = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=\"?([^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--quiet", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *message):
        """Print nothing."""


@pytest.fixture(scope="module")
def served(site):
    """Serve the site, because a browser does not let a page from the disk read the search index."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_page_requests_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        resources = RESOURCES.findall(page.read_text())
        assert resources
        for resource in resources:
            if resource.startswith("data:"):
                continue
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


def test_the_search_works_without_a_server(site, browser):
    page, complaints = browser.new_page(), []
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((site / "howto" / "replay.html").as_uri())
    page.locator(".md-search__input").click()
    page.keyboard.type("fingerprint")
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    assert found.get_attribute("href").startswith(site.as_uri())
    assert complaints == []
    page.close()


@pytest.mark.parametrize("name", ["variables", "formats"])
def test_names_in_tables_wrap_after_their_parts_on_a_phone(site, browser, name):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto((site / "reference" / f"{name}.html").as_uri())
    divided = page.locator("td code").evaluate_all(
        """codes => codes.flatMap(code => [...code.childNodes]).filter(part => {
             const range = document.createRange()
             range.selectNode(part)
             return /^[\\w.]+$/.test(part.textContent) && range.getClientRects().length > 1
           }).map(part => part.textContent)"""
    )
    assert divided == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_the_gallery_has_the_runs_of_every_program(site):
    assert len(GALLERY) == 5
    index = (site / "gallery" / "index.html").read_text()
    for name in GALLERY:
        assert f'href="{name}.html"' in index
        page = re.sub(r"<[^>]+>", "", (site / "gallery" / f"{name}.html").read_text())
        # The program is shown, with the statements that it checks.
        assert "import natgrad" in page
        assert "assert" in page


@pytest.mark.parametrize("name", GALLERY)
def test_a_page_of_the_gallery_shows_a_live_report(site, served, browser, name):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{served}/gallery/{name}.html")
    page.locator("iframe.report").scroll_into_view_if_needed()
    report = page.frame_locator("iframe.report")
    report.locator("html[data-ready]").wait_for()
    assert report.locator(".plot").count() >= 4
    # The text about the sweep mentions its parallel coordinates.
    assert report.locator("#parallel").is_visible() == (name == "sweep")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    # Every link of the text leads to a file of the site.
    links = page.locator("article a[href]").evaluate_all("all => all.map(each => each.href)")
    assert f"{served}/gallery/{name}/report.html" in links
    for link in links:
        assert link.startswith(f"{served}/")
        assert (site / urllib.parse.unquote(urllib.parse.urlsplit(link).path)[1:]).is_file(), link
    # The report is also a page by itself.
    page.get_by_role("link", name="in the full window").click()
    page.wait_for_selector("html[data-ready]")
    assert page.url == f"{served}/gallery/{name}/report.html"
    assert complaints == []
    assert all(request.startswith((f"{served}/", "data:", "blob:")) for request in requests)
    context.close()
