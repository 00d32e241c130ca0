"""Show the page of a comparison in a real browser."""

import json
import re

import pytest

from browsers import browser
from compared import tree
from natgrad.reporting.comparison_page import write_comparison
from natgrad.results.comparison import compare
from natgrad.storage import LocalStorage

__all__ = ["browser"]  # a fixture

HOSTILE = "</script><img src=x onerror=alert(1)>"


def write(folder, align="step"):
    trees = {
        "small": tree([4, 3, 2, 1], options={"learning_rate": 0.1}, tensors=("w", HOSTILE)),
        HOSTILE: tree([4, 2, 1], options={"learning_rate": 0.4}, tensors=("w",), angle=1.0),
        "$$x$$": tree([5, 2, 1, 0.5], options={"learning_rate": 0.2}),
    }
    write_comparison(compare(trees, align), LocalStorage(folder / "comparison.html"))
    return folder / "comparison.html"


@pytest.mark.parametrize("align", ["step", "loss", "length"])
def test_the_page_shows_all_runs_their_options_and_their_tensors(tmp_path, browser, align):
    path = write(tmp_path, align)
    page = browser.new_page(viewport={"width": 400, "height": 800})
    problems = []
    page.on(
        "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append("a dialog") or dialog.dismiss())
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#overview tbody tr").count() == 3
    assert HOSTILE in page.locator("#overview").inner_text()
    assert HOSTILE in page.locator("#tensors").inner_text()
    assert "0.4" in page.locator("#options").inner_text()
    assert page.locator("#charts .plot").count() == 4
    assert page.locator("#parallel").is_visible()
    # The page is not wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    chart = page.locator("#charts .plot").first
    before = chart.screenshot()
    page.locator("#overview input").nth(1).uncheck()
    page.wait_for_timeout(300)
    assert chart.screenshot() != before
    page.locator("#overview input").nth(1).check()
    assert problems == []
    page.close()


def test_the_data_of_the_page_are_the_curves(tmp_path):
    text = write(tmp_path).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    loss = next(curve for curve in data["curves"] if curve["title"] == "Loss")
    assert data["positions"] == [0, 1, 2, 3]
    assert loss["values"] == [[4, 3, 2, 1], [4, 2, 1, None], [5, 2, 1, 0.5]]
    assert "http" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S).replace("http-equiv", "")
    assert {axis["name"] for axis in data["parallel"]} >= {"learning rate", "last loss"}


def test_the_page_states_that_gradients_have_different_sources(tmp_path):
    found = []
    for source in ("recorded", "logged"):
        trees = {"one": tree([2, 1], gradient_source=source), "other": tree([2, 1], gradient_source="logged")}
        path = write_comparison(compare(trees), LocalStorage(tmp_path / f"{source}.html")).local_path
        found.append(re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S))
    different, equal = found
    (warnings,) = re.findall(r'<ul class="warnings">(.*?)</ul>', different)
    assert "different sources (logged, recorded)" in warnings
    assert "<tr><th>gradient source</th><td>recorded</td><td>logged</td></tr>" in different
    assert "sources" not in equal
    assert "gradient source" not in equal
