"""A real browser, in which tests show pages."""

import shutil

import pytest

from lazy import Lazy

sync_api = Lazy("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    """Start a real browser. The tests fail without one, because only a browser shows the page."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next((path for path in found if path), None)
    if path is None:
        pytest.fail("no browser to show the page in; install one, for example: apt-get install chromium")
    quiet = ("background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += [f"--disable-{name}" for name in quiet]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()
