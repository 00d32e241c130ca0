"""Show the page of a comparison in a real browser."""

import json
import re

import pytest

from browsers import browser
from compared import tree
from layouts import faults_of
from natgrad.reporting.comparison_page import write_comparison
from natgrad.results.comparison import compare
from natgrad.storage import LocalStorage

__all__ = ["browser"]  # a fixture

HOSTILE = "</script><img src=x onerror=alert(1)>"


def write(folder, align="step"):
    trees = {
        "small": tree([4, 3, 2, 1], configuration={"lr": 0.1, HOSTILE: "a"}, tensors=("w", HOSTILE)),
        HOSTILE: tree([4, 2, 1], configuration={"lr": 0.4, HOSTILE: HOSTILE}, tensors=("w",), angle=1.0),
        "$$x$$": tree([5, 2, 1, 0.005], configuration={"lr": 0.2, HOSTILE: "a"}, options={"window": [1, 8]}),
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
    assert page.locator("#configuration tbody tr").nth(1).inner_text().split("\t") == [HOSTILE, "0.4", HOSTILE]
    assert "[1, 8]" in page.locator("#options").inner_text()
    assert page.locator("#charts .plot").count() == 4
    assert page.locator("#parallel").is_visible()
    # The page is not wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert faults_of(page) == []
    chart = page.locator("#charts .plot").first
    before = chart.screenshot()
    page.locator("#overview input").nth(1).uncheck()
    page.wait_for_timeout(300)
    assert chart.screenshot() != before
    page.locator("#overview input").nth(1).check()
    # Runs are coloured by name at first, then by a number, and by text.
    keys = page.locator("#overview i.key")

    def colours():
        return [keys.nth(run).evaluate("key => key.style.background") for run in range(3)]

    by_name = colours()
    assert len(set(by_name)) == 3
    page.locator("#colour").select_option(label=HOSTILE)
    assert [colour == colours()[0] for colour in colours()] == [True, False, True]
    page.locator("#colour").select_option(label="lr")
    assert colours() != by_name
    page.locator("#overview thead button").nth(-1).click()
    assert page.locator("#overview tbody tr").first.inner_text().startswith("small")
    page.locator("details summary").click()
    drawn = page.locator("#parallel-chart").screenshot()
    page.locator("#axes label", has_text="lr").locator("input").uncheck()
    page.wait_for_timeout(300)
    assert page.locator("#parallel-chart").screenshot() != drawn
    page.locator("#none").click()
    assert page.locator("#overview input:checked").count() == 0
    page.locator("#theme").select_option("dark")
    page.wait_for_timeout(300)
    assert problems == []
    page.close()


def test_the_data_of_the_page_are_the_curves(tmp_path):
    text = write(tmp_path).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    loss = next(curve for curve in data["curves"] if curve["title"] == "loss")
    assert data["positions"] == [0, 1, 2, 3]
    assert loss["values"] == [[4, 3, 2, 1], [4, 2, 1, None], [5, 2, 1, 0.005]]
    assert "http" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S).replace("http-equiv", "")
    axes = {axis["name"]: axis for axis in data["axes"]}
    assert [axes["lr"]["values"], axes["lr"]["log"]] == [[0.1, 0.4, 0.2], False]
    assert axes[HOSTILE]["values"] == ["a", HOSTILE, "a"]
    # The last losses, 1, 1 and 0.005, span more than two decades.
    assert [axes["Last loss"]["values"], axes["Last loss"]["log"]] == [[1, 1, 0.005], True]
    assert data["heat"] == {"names": ["w", HOSTILE], "values": [[0.5, 1, 0.5], [0.5, None, None]]}


def test_the_configuration_that_explains_the_results_comes_first(tmp_path):
    trees = {
        str(run): tree([4, loss], configuration={"seed": seed, "optimizer": name, "lr": 10.0**-run})
        for run, (loss, seed, name) in enumerate(zip([4, 3, 2, 1], [2, 1, 3, 0], ["a", "b", "b", "a"], strict=True))
    }
    write_comparison(compare(trees), LocalStorage(tmp_path / "comparison.html"))
    text = (tmp_path / "comparison.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert [axis["name"] for axis in data["axes"]] == ["lr", "seed", "optimizer", "Last loss"]


def test_the_page_states_that_gradients_have_different_sources(tmp_path):
    found = []
    for source in ("recorded", "logged"):
        trees = {"one": tree([2, 1], gradient_source=source), "other": tree([2, 1], gradient_source="logged")}
        path = write_comparison(compare(trees), LocalStorage(tmp_path / f"{source}.html")).local_path
        found.append(re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S))
    different, equal = found
    (warnings,) = re.findall(r'<ul class="warnings">(.*?)</ul>', different)
    assert "different sources (logged, recorded)" in warnings
    (options,) = re.findall(r'<table id="options".*?</table>', different, re.S)
    assert re.findall("<t[hd]>(.*?)</t[hd]>", options) == [
        "Run",
        "gradient source",
        "one",
        "recorded",
        "other",
        "logged",
    ]
    assert "sources" not in equal
    assert "gradient source" not in equal
