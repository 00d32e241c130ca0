"""Compare the report page with the results, and open it in a real browser."""

import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from browsers import browser
from layouts import faults_of
from logs import random_walk, write_log
from natgrad.app import run
from natgrad.reporting import page as report
from natgrad.reporting.run_results import number
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status

__all__ = ["browser"]  # a fixture

NAME = "<script>alert('run')</script> & $x_1$ \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-5B66}"
WINDOW = 4
METRICS = ("angle", "angle_uncertainty", "condition_number")


def with_faults(states):
    """Change a log so that it has updates of several statuses: a NaN, a zero gradient, and a zero update."""
    states[7]["gradient/scale"] = np.full_like(states[7]["gradient/scale"], np.nan)
    for key, value in states[11].items():
        if key.startswith("gradient/"):
            states[11][key] = np.zeros_like(value)
    for key, value in states[14].items():
        if key.startswith("parameter/"):
            states[15][key] = value
    return states


def processed(folder, states, windows=(1, WINDOW)):
    """Process a log and return the results."""
    run.ingest_run(write_log(folder / "log", states), folder / "out")
    run.analyze_run(folder / "out", run.Analysis(windows=windows, workers=1))
    with xr.open_datatree(folder / "out" / "results.zarr", engine="zarr") as tree:
        return tree.load()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return the results of a run with updates of several statuses."""
    return processed(tmp_path_factory.mktemp("faults"), with_faults(random_walk(60)))


@pytest.fixture(scope="module")
def wide_tree(tmp_path_factory):
    """Return the results of a run with forty tensors of increasing gradient norm."""
    states = random_walk(6, {f"encoder.blocks.{index}.attention.weight": (3,) for index in range(40)})
    for state in states:
        for key in state:
            if key.startswith("gradient/"):
                state[key] = state[key] / np.linalg.norm(state[key]) * (1 + int(key.split(".")[2]))
    return processed(tmp_path_factory.mktemp("wide"), states, windows=(1,))


@pytest.fixture(scope="module")
def page(tree, tmp_path_factory):
    """Write the page of one run."""
    return report.write_report({NAME: tree}, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def pages(tree, wide_tree, tmp_path_factory):
    """Write the page of three runs, one of them without a finite value."""
    runs = {NAME: tree, "wide " + 8 * "long_name_without_a_space_": wide_tree, "lost": without_values(tree)}
    return report.write_report(runs, tmp_path_factory.mktemp("pages") / "report.html")


def without_values(tree):
    """Return the results of a run that diverged at the first step."""

    def lost(dataset):
        values = {name: variable * np.nan for name, variable in dataset.items() if variable.dtype.kind == "f"}
        return dataset.assign(values | {"status": xr.full_like(dataset["status"], Status.NON_FINITE)})

    return tree.map_over_datasets(lambda dataset: lost(dataset) if "status" in dataset else dataset)


def with_steps(tree, rows):
    """Return results with a number of steps, which repeat those of the run."""

    def chosen(dataset):
        if "step" not in dataset.dims:
            return dataset
        steps = np.arange(rows) % max(dataset.sizes["step"], 1)
        return dataset.isel(step=steps).assign_coords(step=np.arange(rows))

    return tree.map_over_datasets(chosen)


class Page(html.parser.HTMLParser):
    """Elements of a page: texts and numbers of cells by the row's id, tags, addresses, data, and all other text."""

    def __init__(self, path):
        super().__init__()
        self.cells, self.numbers, self.tags, self.text, self.addresses = {}, {}, [], "", []
        self.data = None
        self._row, self._in_cell, self._script = None, False, None
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        self._script = attributes.get("id", tag) if tag in ("script", "style") else None
        if tag == "tr":
            self._row = attributes.get("id")
        if tag in ("td", "th"):
            self.cells.setdefault(self._row, []).append("")
            self._in_cell = True
        if tag == "data":
            self.numbers.setdefault(self._row, []).append(float(attributes["value"]))

    def handle_endtag(self, tag):
        self._script = None
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._script == "data":
            self.data = json.loads(data)
        if self._script is not None:
            return
        self.text += data
        if self._in_cell:
            self.cells[self._row][-1] += data


# Contents ----------------------------------------------------------------------------------------------------


def test_the_page_starts_with_a_sentence_about_the_run(page, tree):
    text = " ".join(Page(page).text.split())
    angle = tree["model"]["angle"].sel(descent="gradient", window=1)
    status = tree["model"]["status"].sel(descent="gradient", window=1)
    effective = f"{100 * float((status == Status.EFFECTIVE).mean()):.1f}".removesuffix(".0")
    share = f"{effective} % of the 59 updates of 3 tensors in {NAME} descend the loss"
    median = f"at a median angle of {float(angle.median()):.4g} rad"
    assert share in text, text[:400]
    assert median in text, text[:400]
    lead = text.index(share)
    objective = text.index("; objective: ")
    assert lead < text.index(median) < text.index("the worst tensors are") < objective < text.index("Overview")
    warnings = page.read_text("utf-8").partition('<ul class="warnings">')[0].count("<li>")
    assert f"gradients: logged; {warnings} warnings." in text[objective : text.index("Overview")]
    effective = (tree["tensor"]["status"].sel(descent="gradient", window=1) == Status.EFFECTIVE).mean("step")
    worst = str(effective["tensor"].values[int(effective.values.argmin())])
    assert f"the worst tensors are {worst} (" in text or f" and {worst} (" in text


def test_a_page_of_several_runs_compares_them_and_links_to_each(pages):
    seen = Page(pages)
    assert "3 runs: 0 % of the updates of lost are effective" in seen.text
    assert [address for address in seen.addresses if address.startswith("#")] == ["#run-1", "#run-2", "#run-3"]
    assert seen.data["compared"]["rows"] == [run["name"] for run in seen.data["runs"]]


def test_counts_of_statuses_agree_with_the_results_and_each_is_explained(page, tree):
    status = tree["model"]["status"].sel(descent="gradient", window=1).values
    cells = Page(page).cells
    for member in Status:
        name, count, meaning = cells[f"run-1-{member.name.lower()}"]
        assert name == member.name.lower().replace("_", " ")
        assert int(count) == (status == member).sum()
        assert meaning == report.STATUS_MEANING[member]
    faults = (Status.NON_FINITE, Status.ZERO_GRADIENT, Status.ZERO_UPDATE)
    assert all((status == fault).any() for fault in faults)


def test_every_gap_is_explained_with_its_number_its_steps_and_its_reason(page, tree):
    status = tree["model"]["status"].sel(descent="gradient", window=1)
    text = " ".join(Page(page).text.split())
    for member in (Status.NON_FINITE, Status.ZERO_GRADIENT, Status.ZERO_UPDATE):
        (step,) = status["step"].values[status.values == member]
        named = member.name.lower().replace("_", " ")
        assert re.search(rf"\b1 of 59 updates \(1.7 %\) are {named}, at step {step}\. ", text)


def test_numbers_agree_with_the_results(page, tree):
    numbers = Page(page).numbers
    model = tree["model"].to_dataset()
    for name in METRICS:
        values = model[name].sel(descent="gradient", window=1).values
        finite = values[np.isfinite(values)]
        assert numbers[f"run-1-{name}"] == [finite.min(), np.median(finite), finite.max()]
    for descent in ("gradient", "corrected", "trapezoid"):
        effective = (model["status"].sel(descent=descent) == Status.EFFECTIVE).sum("step")
        # A window of m updates is complete at 59 - m + 1 steps.
        shares = [int(effective.sel(window=m)) / (59 - m + 1) for m in (1, WINDOW)]
        assert numbers[f"run-1-share-{descent}"] == shares
    assert Page(page).cells["run-1-share-taylor"][1:] == ["not known"] * 2


def changing_batches(states):
    """Replace the losses by those of changing batches, which the gradients do not explain."""
    rng = np.random.default_rng(0)
    return [state | {"loss": state["loss"] + 100.0 * rng.random()} for state in states]


@pytest.mark.parametrize(
    ("evaluation", "share", "expected"),
    [
        ("batch", False, "not comparable: the losses belong to changing batches"),
        ("unknown", False, "unverifiable: the losses probably belong to changing batches"),
        ("fixed", True, None),
    ],
)
def test_no_share_is_stated_from_losses_of_changing_batches(tmp_path, evaluation, share, expected):
    run.ingest_run(write_log(tmp_path / "log", changing_batches(random_walk(12))), tmp_path / "out")
    run.analyze_run(tmp_path / "out", run.Analysis(workers=1, evaluation=evaluation))
    written = Path(run.report_run([tmp_path / "out"]).report).read_text(encoding="utf-8")
    rows = re.findall(r'<tr id="run-1-share-(corrected|trapezoid)">(.*?)</tr>', written, re.DOTALL)
    assert len(rows) == 2
    for _, row in rows:
        assert ("<data" in row) == share
        assert ("not known" in row) != share
        assert expected is None or expected in row
    facts = dict(re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", written))
    assert ("declared" if evaluation != "unknown" else "not declared") in facts["Objective"]
    assert "do not agree" in facts["Objective"]
    if expected is not None:
        assert facts["Smallest window over which the loss always decreases"] == expected
    warned = {"batch": 0, "unknown": 1, "fixed": 1}[evaluation]
    assert written.count("do not explain how the loss changes") == warned


def test_a_run_of_one_objective_states_its_shares_without_a_caution(page):
    written = page.read_text(encoding="utf-8")
    (row,) = re.findall(r'<tr id="run-1-share-corrected">(.*?)</tr>', written, re.DOTALL)
    assert "the loss decreased</th>" in row
    assert "changing batches" not in written


def test_provenance_is_at_the_bottom(page, tree):
    text = Page(page).text
    bottom = text[text.rindex("Provenance") :]
    assert tree.attrs["source"] in bottom
    assert tree.attrs["fingerprint"] in bottom
    assert all(f'"{name}": "{version}"' in bottom for name, version in tree.attrs["versions"].items())


def test_names_are_text_and_never_markup(page):
    text = page.read_text("utf-8")
    assert NAME in Page(page).text
    assert "<script>alert" not in text
    assert Page(page).data["runs"][0]["name"] == NAME


def test_a_name_cannot_end_the_data(tree, tmp_path):
    name = "</script><script>alert(1)</script>"
    seen = Page(report.write_report({name: tree}, tmp_path / "page.html"))
    assert seen.data["runs"][0]["name"] == name
    assert seen.tags.count("script") == Page(report.write_report({"x": tree}, tmp_path / "x.html")).tags.count(
        "script"
    )


def test_the_table_has_all_tensors(wide_tree, tmp_path):
    seen = Page(report.write_report({"wide": wide_tree}, tmp_path / "page.html"))
    (kind,) = seen.data["runs"][0]["kinds"]
    assert kind["rows"] == [f"encoder.blocks.{index}.attention.weight" for index in range(40)]
    medians = wide_tree["tensor"]["update_to_weight"].median("step").values
    # The summary has six digits, and the median of five values is one of them.
    assert kind["summary"]["update_to_weight"] == pytest.approx(medians, rel=1e-5)


def test_the_same_results_give_the_same_bytes(tree, page, tmp_path):
    assert report.write_report({NAME: tree}, tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_an_older_page_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "new folder" / "report.html"
    target.parent.mkdir()
    target.write_text("an older page")
    assert report.write_report({}, target) == target
    assert "There are no runs to report." in target.read_text("utf-8")
    assert list(target.parent.iterdir()) == [target]


def test_a_page_that_cannot_be_written_leaves_no_files(tmp_path):
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        report.write_report({}, target)
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_points_outside_the_page(pages):
    assert all(address.startswith(("#", "data:")) for address in Page(pages).addresses)


def test_the_page_shows_the_smallest_windows_and_the_condition_number_of_the_optimizer(tree, tmp_path):
    kappa = xr.zeros_like(tree["model"]["parameter_norm"]) + np.arange(2.0, 2.0 + tree["model"].sizes["step"])
    model = tree["model"].to_dataset().assign(preconditioner_condition_number=kappa)
    groups = {"/model": model, "/tensor": tree["tensor"].to_dataset()}
    path = report.write_report({NAME: xr.DataTree.from_dict(groups)}, tmp_path / "report.html")
    page = Page(path)
    (numbers,) = [numbers for row, numbers in page.numbers.items() if row and "preconditioner" in row]
    assert numbers == [float(kappa.min()), float(kappa.median()), float(kappa.max())]
    cells = page.cells[None]
    for name, text in report.WINDOW_FACTS.items():
        found = model[name].sel(descent="gradient") if "descent" in model[name].dims else model[name]
        smallest = cells[cells.index(text) + 1]
        assert smallest == "none" if np.isnan(found) else smallest.startswith(f"{int(found)} update")


# Little data -------------------------------------------------------------------------------------------------


def test_results_without_a_finite_value_give_a_page_that_states_this(tree, tmp_path):
    seen = Page(report.write_report({"lost": without_values(tree)}, tmp_path / "page.html"))
    assert "No update is effective, so there is no metric to draw." in seen.text
    assert "No finite loss was logged" in seen.text
    assert "59 of 59 updates (100 %) are non finite, at steps 0–58. " in seen.text
    assert all(seen.cells[f"run-1-{name}"][1:] == ["none"] for name in METRICS)


def test_results_without_a_step_give_a_page_that_states_this(tree, tmp_path):
    seen = Page(report.write_report({"empty": with_steps(tree, 0)}, tmp_path / "page.html"))
    assert "The run has no update: an update requires two logged states." in seen.text
    assert all(int(seen.cells[f"run-1-{member.name.lower()}"][1]) == 0 for member in Status)


def test_no_run_gives_a_page_that_states_this(tmp_path):
    seen = Page(report.write_report({}, tmp_path / "page.html"))
    assert "There are no runs to report." in seen.text
    assert "script" not in seen.tags


@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_of_one_or_two_updates_is_drawn(tree, tmp_path, rows):
    seen = Page(report.write_report({"short": with_steps(tree, rows)}, tmp_path / "page.html"))
    assert int(seen.cells["run-1-effective"][1]) == rows
    assert seen.data["runs"][0]["steps"]["shape"] == [rows]


def test_a_tree_without_results_is_an_error_with_the_name_of_the_run(tree, tmp_path):
    broken = tree.copy()
    broken["model"] = xr.DataTree(tree["model"].to_dataset().drop_vars("angle"))
    with pytest.raises(InputError, match=r"(?s)angle.*where: run first.*natgrad analyze"):
        report.write_report({"first": broken}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# In a browser ------------------------------------------------------------------------------------------------


class View:
    """A page in a browser, with what it complained about and what it requested."""

    def __init__(self, browser, address, width=1280, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def __call__(self, expression):
        """Evaluate an expression after the figures have been drawn."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.page.evaluate(expression)

    def curve(self, figure, key='"model"'):
        """Return the steps and the values of a curve."""
        return self(
            f"(({{x, y}}) => [[...x], [...y].map(value => Number.isNaN(value) ? null : value)])"
            f"(report.figures.{figure}.curves.get({key}).source.data)"
        )

    def text(self, selector):
        return self.page.locator(selector).inner_text()


@pytest.fixture
def view(browser, page):
    with View(browser, page.as_uri()) as view:
        yield view
        assert view.complaints == []


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1280, "light"), (1280, "dark")])
def test_a_browser_shows_every_figure_without_requests_or_overflow(browser, pages, width, scheme):
    with View(browser, pages.as_uri(), width, scheme) as view:
        drawn = view(
            "report.placed.map(({target}) => target.getBoundingClientRect()).map(box => [box.width, box.right])"
        )
        assert len(drawn) == 8
        assert all(0 < wide <= right <= width for wide, right in drawn)
        assert view("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert view("document.title") == "3 runs: natural gradient report"
        assert scheme == "dark" or faults_of(view.page) == []
        assert view.complaints == []
        assert [url for url in view.requests if not url.startswith("data:")] == [pages.as_uri()]


def test_faults_of_the_layout_are_detected(view):
    view.page.set_viewport_size({"width": 400, "height": 844})
    for style, fault in (
        ("#legend { margin-bottom: -1.2rem }", "covers"),
        ("h2 { position: absolute }", "covers"),
        (".lead { width: 140vw }", "px wide"),
        (".controls { transform: translateX(-5rem) }", "is cut off"),
        (".plot { opacity: 0 }", "shows no data"),
    ):
        tag = view.page.add_style_tag(content=style)
        assert any(fault in found for found in faults_of(view.page)), style
        tag.evaluate("element => element.remove()")


def test_progress_counts_the_parts_of_the_page(tree, tmp_path):
    calls = []
    report.write_report({"a": tree, "b": tree}, tmp_path / "page.html", lambda *done: calls.append(done))
    total = calls[-1][1]
    assert total >= 6
    assert calls == [(done, total) for done in range(1, total + 1)]


def brightness(view):
    """Return the mean brightness of the first figure on the screen, from 0 to 255."""
    view("0")
    shot = view.page.locator(".plot").first.screenshot()
    return float(np.asarray(Image.open(io.BytesIO(shot)).convert("L")).mean())


def test_figures_adapt_to_the_system_and_to_the_chosen_theme(browser, page):
    with View(browser, page.as_uri(), scheme="dark") as view:
        dark = brightness(view)
        view.page.select_option("#theme", "light")
        light = brightness(view)
        view.page.select_option("#theme", "dark")
        assert brightness(view) < 100
        assert view.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    # Most of a figure is its background.
    assert dark < 100 < 155 < light


PRINTED = """() => {
  dispatchEvent(new Event("beforeprint"))
  const canvases = (root) => [
    ...root.querySelectorAll("canvas"),
    ...[...root.querySelectorAll("*")].flatMap(({shadowRoot}) => (shadowRoot ? canvases(shadowRoot) : [])),
  ]
  const pixels = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
  const [canvas] = canvases(document.querySelector(".plot"))
  const counts = {light: 0, dark: 0}
  const data = pixels(canvas)
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] === 255) counts[data[at] + data[at + 1] + data[at + 2] > 384 ? "light" : "dark"] += 1
  }
  return counts
}"""


def test_figures_are_printed_on_white_in_every_theme(browser, page):
    # The browser prints before the next frame, so the figures must be drawn before the handler returns.
    with View(browser, page.as_uri(), scheme="dark") as view:
        found = view.page.evaluate(PRINTED)
    assert found["light"] > 10 * found["dark"] > 0


def test_curves_are_the_values_of_the_results(view, tree):
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    for figure, tolerance in (("angle", 2e-7), ("condition_number", 2e-6), ("update_to_weight", 2e-6), ("loss", 0)):
        # Angles have 24 bits. A logarithm with 24 bits has an error of at most 2^-24 log(value), and no value is
        # beyond e^20. Losses are exact.
        steps, values = view.curve(figure)
        assert steps == model["step"].values.tolist()
        expected = model[figure].values
        if figure == "update_to_weight":  # a logarithmic axis has no 0
            expected = np.where(expected > 0, expected, np.nan)
        found = np.array([np.nan if value is None else value for value in values])
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


def test_the_slider_and_the_keyboard_choose_a_step(view, tree):
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    view.page.locator("#step").focus()
    view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("ArrowRight")
    assert view.page.input_value("#step-number") == "2"
    view.page.locator("#plots").focus()
    view.page.keyboard.press("ArrowRight")
    assert view("report.position") == 3
    readout = " ".join(view.text("#readout").split())
    assert f"{float(model['angle'][3]):.4g}" in readout
    assert "status effective" in readout
    view.page.fill("#step-number", "7")
    view.page.keyboard.press("Enter")
    assert "status non finite" in " ".join(view.text("#readout").split())
    assert view("Object.values(report.figures).map(({span}) => span.location)") == [7] * 7
    view.page.locator("#plots").focus()
    view.page.keyboard.press("End")
    assert view("report.position") == 58
    view.page.keyboard.press("Home")
    assert view("report.position") == 0


def visible(view):
    return view("[report.range.start, report.range.end]")


def test_zooming_and_moving_change_the_range_of_all_figures_and_fit_the_axes(view):
    view.page.click("#reset")
    whole = visible(view)
    limits = view("[report.figures.loss.figure.y_range.start, report.figures.loss.figure.y_range.end]")
    view.page.click("#zoom-in")
    assert np.diff(visible(view)) == pytest.approx(np.diff(whole) / 2)
    assert view("[report.figures.loss.figure.y_range.start, report.figures.loss.figure.y_range.end]") != limits
    assert view("Object.values(report.figures).every(({figure}) => figure.x_range === report.range)")
    before = visible(view)
    view.page.click("#later")
    assert visible(view)[0] > before[0]
    view.page.click("#earlier")
    view.page.click("#zoom-out")
    assert np.diff(visible(view)) == pytest.approx(np.diff(whole))
    view.page.locator("#plots").focus()
    for key, changed in (("+", True), ("0", False), ("]", False), ("+", True), ("-", False)):
        view.page.keyboard.press(key)
        assert (visible(view) != pytest.approx(whole)) == changed
    # Dragging zooms.
    box = view.page.locator(".plot").first.bounding_box()
    view.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 90, steps=4)
    view.page.mouse.up()
    zoomed = visible(view)
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    view.page.select_option("#drag", "pan")
    view.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 60, steps=4)
    view.page.mouse.up()
    assert visible(view)[0] < zoomed[0]
    view.page.select_option("#drag", "zoom")
    view.page.click("#reset")
    assert visible(view) == pytest.approx(whole)


def test_a_pointer_shows_values_as_text(view):
    box = view.page.locator(".plot").first.bounding_box()
    view.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    view.page.wait_for_function(
        "[...document.querySelectorAll('*')].some(each => each.shadowRoot?.textContent.includes('step '))"
        " || document.body.innerText.includes('step ')"
    )
    heat = view.page.locator("#heat .plot").bounding_box()
    shown = view("report.heatTooltip(3, 0.5).textContent")
    assert shown.startswith("step 3")
    assert heat["height"] > 100


def test_windows_and_estimates_are_chosen_on_the_page(view, tree):
    view.page.select_option("#window", str(WINDOW))
    view.page.select_option("#descent", "trapezoid")
    _, values = view.curve("angle")
    expected = tree["model"]["angle"].sel(descent="trapezoid", window=WINDOW).values
    found = np.array([np.nan if value is None else value for value in values])
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    view.page.select_option("#window", "1")
    view.page.select_option("#descent", "gradient")


def names(view):
    return view.page.locator("#rows-body tr th").all_inner_texts()


def test_the_table_sorts_searches_and_controls_the_plots(view, tree):
    median = tree["tensor"]["angle"].sel(descent="gradient", window=1).median("step").to_series()
    button = view.page.locator('#rows-head button[data-column="angle"]')
    button.click()
    assert names(view) == median.sort_values(ascending=False).index.tolist()
    assert view.page.locator('#rows-head th[aria-sort="descending"]').inner_text() == "Median ψ ▼"
    view.page.keyboard.press("Enter")
    assert names(view) == median.sort_values().index.tolist()
    # The heat map has the rows in this order.
    assert view("report.order.map(row => report.kind.rows[row])") == names(view)
    view.page.fill("#search", "LAYER bias")
    assert names(view) == ["layer.bias"]
    assert view.text("#rows-count") == "1 of 3"
    assert view("report.figures.heat.source.data.dh[0]") == 1
    view.page.fill("#search", "")
    view.page.click("#clear")
    assert view("report.selected.size") == 0
    view.page.locator('#rows-body input[aria-label="Draw scale"]').focus()
    view.page.keyboard.press("Space")
    row = view("[...report.selected]")[0]
    _steps, values = view.curve("angle", row)
    expected = tree["tensor"]["angle"].sel(descent="gradient", window=1, tensor="scale").values
    found = np.array([np.nan if value is None else value for value in values])
    # Values of tensors have 16 bits of their range, which is at most pi: half a step is an error of 2.4e-5.
    np.testing.assert_allclose(found, expected, atol=np.pi / 65533 / 2 * 1.01)
    assert "scale" in view.text("#legend")
    # A click on a row of the heat map removes the curve.
    order = names(view)
    heat = view(
        "(() => {const {top, height} = report.figures.heat.target.getBoundingClientRect(); return [top, height]})()"
    )
    assert heat[1] > 0
    view(f"report.tapped(report.figures.heat, 5, {len(order) - 0.5 - order.index('scale')})")
    assert view("report.selected.size") == 0
    assert view("report.position") == 5
    view.page.locator("#rows-body .row-name").first.click()
    assert view("report.selected.size") == 1


@pytest.mark.parametrize("variable", ["angle", "condition_number", "update_to_weight", "status"])
def test_the_heat_map_has_the_values_of_all_tensors(view, tree, variable):
    view.page.select_option("#colour", variable)
    expected = tree["tensor"][variable]
    if "descent" in expected.dims:
        expected = expected.sel(descent="gradient", window=1)
    rows = view("report.order.map(row => report.kind.rows[row])")
    image = view("[...report.figures.heat.source.data.image[0]].map(value => Number.isNaN(value) ? null : value)")
    image = np.array([np.nan if value is None else value for value in image]).reshape(3, -1)[::-1]
    expected = expected.sel(tensor=rows).values.T.astype(float)
    if variable in ("condition_number", "update_to_weight"):
        expected = np.log10(np.where(expected > 0, expected, np.nan))
    reach = np.nanmax(expected) - np.nanmin(expected)
    # 16 bits of the range; a status is exact.
    np.testing.assert_allclose(image, expected, atol=0 if variable == "status" else reach / 65533 / 2 * 1.01)
    ends = (
        [np.nanmin(expected), np.nanmax(expected)]
        if variable == "angle"
        else 10.0 ** np.array([np.nanmin(expected), np.nanmax(expected)])
    )
    legend = view.text("#heat-legend")
    if variable == "status":
        assert all(Status(int(code)).name.lower().replace("_", " ") in legend for code in np.unique(expected))
    else:
        assert all(number(end)[:4] in legend for end in ends)


def test_runs_are_compared_and_chosen(browser, pages):
    with View(browser, pages.as_uri()) as view:
        seen = Page(pages)
        assert view.page.input_value("#rows") == "run"
        assert names(view)[0] == "lost"
        view.page.select_option("#run", "1")
        view.page.wait_for_function("report.runIndex === 1 && report.position === 0")
        view.page.select_option("#rows", "tensor")
        assert len(names(view)) == 40
        assert view.page.locator("#run option").all_inner_texts() == [run["name"] for run in seen.data["runs"]]
        view.page.select_option("#run", "2")
        view.page.wait_for_function("report.runIndex === 2")
        assert view("report.curve(report.figures.angle, 'model').source.data.y.every(Number.isNaN)")
        assert view.complaints == []


def test_a_page_is_printed_in_black_on_white_with_all_rows(browser, page, tmp_path):
    with View(browser, page.as_uri(), scheme="dark") as view:
        view.page.emulate_media(media="print", color_scheme="dark")
        view("dispatchEvent(new Event('beforeprint'))")
        assert brightness(view) > 155
        assert view.page.locator("#step").is_hidden()
        assert view.page.evaluate("getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"
        assert view.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        view("dispatchEvent(new Event('afterprint'))")
        assert brightness(view) < 100
        assert view.complaints == []


def test_hostile_names_of_tensors_stay_text(browser, tmp_path):
    hostile = {"<img src=x onerror=alert(1)>": (2,), "$$\\frac{x}{y}$$": (2,), "</script><b>": (2,), "&lt;": (2,)}
    run.ingest_run(write_log(tmp_path / "log", random_walk(8, hostile), container="npz"), tmp_path / "out")
    run.analyze_run(tmp_path / "out", run.Analysis(workers=1))
    page = Path(run.report_run([tmp_path / "out"]).report)
    with View(browser, page.as_uri()) as view:
        assert set(names(view)) == set(hostile)
        for box in view.page.locator("#rows-body input").all():
            box.check()
        assert all(name in view.text("#legend") for name in hostile)
        view("report.heatTooltip(1, 0.5)")
        assert view.page.locator("img, b:has-text('x')").count() == 0
        assert view.complaints == []
        assert [url for url in view.requests if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("missing", ["gradient", "learning_rate"])
def test_a_run_that_lacks_gradients_or_learning_rates_is_drawn(browser, tmp_path, missing):
    states = [
        {key: value for key, value in state.items() if not key.startswith(missing)} for state in random_walk(8)
    ]
    run.ingest_run(write_log(tmp_path / "log", states), tmp_path / "out")
    run.analyze_run(tmp_path / "out", run.Analysis(workers=1))
    page = Path(run.report_run([tmp_path / "out"]).report)
    with View(browser, page.as_uri()) as view:
        figures = {"update_to_weight", "loss", "heat"}
        if missing == "learning_rate":
            figures |= {"angle", "condition_number", "spectrum", "average"}
        assert set(view("Object.keys(report.figures)")) == figures
        assert len(names(view)) == 3
        steps, sizes = view.curve("update_to_weight")
        assert steps == list(range(7))
        assert None not in sizes
        assert view.complaints == []
