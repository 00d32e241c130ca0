"""Compare the report page with the results, and open it in a real browser."""

import base64
import html.parser
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from lazy import Lazy
from logs import random_walk, write_log
from natgrad.app import run
from natgrad.reporting import figures
from natgrad.reporting import page as report
from natgrad.reporting.figures import canvas, paper
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status

sync_api = Lazy("playwright.sync_api")

NAME = "<script>alert('run')</script> & $x_1$ \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-5B66}"
WINDOW = 4
# Eq. (9) where |y| = |g|, the smallest in the form that does not cancel.
EIGENVALUES = (
    lambda psi: (1 + np.sin(psi)) / np.cos(psi),
    lambda psi: 1 / np.cos(psi),
    lambda psi: np.cos(psi) / (1 + np.sin(psi)),
)
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
    """Elements of a page: images, texts of cells by the row's id, numbers by the row's id, tags, and all text."""

    def __init__(self, path):
        super().__init__()
        self.images, self.cells, self.numbers, self.tags, self.text = [], {}, {}, [], ""
        self._row, self._in_cell = None, False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self._row = attributes.get("id")
        if tag in ("td", "th"):
            self.cells.setdefault(self._row, []).append("")
            self._in_cell = True
        if tag == "data":
            self.numbers.setdefault(self._row, []).append(float(attributes["value"]))

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.cells[self._row][-1] += data


def graphics(path):
    """Return the vector graphics of a page as text."""
    start = "data:image/svg+xml;base64,"
    images = Page(path).images
    assert all(image["src"].startswith(start) for image in images)
    return [base64.b64decode(image["src"].removeprefix(start)).decode() for image in images]


# What it says ------------------------------------------------------------------------------------------------


def test_one_run_has_figure_3_and_its_own_figures_each_with_an_alternative_text(page):
    alts = [image["alt"] for image in Page(page).images]
    begins = ["Largest", "Eigenvalues", "Loss", "Angle", "Condition number", "Angle", "Condition number"]
    assert len(alts) == len(begins)
    assert all(alt.startswith(begin) and NAME in alt for alt, begin in zip(alts, begins, strict=True))
    assert "3 tensors: " in alts[-1]


def test_several_runs_share_panel_a_and_have_a_pair_of_panels_each(pages):
    alts = [image["alt"] for image in Page(pages).images]
    assert [re.match(r"\w+", alt)[0] for alt in alts[:7]] == ["Largest", *3 * ["Eigenvalues", "Loss"]]
    assert all(name in alts[0] for name in (NAME, "long_name_without_a_space_", "lost"))


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
    assert "script" not in Page(page).tags
    assert NAME in Page(page).text


def test_only_tensors_with_the_largest_gradient_are_shown_and_the_others_are_counted(wide_tree, tmp_path):
    seen = Page(report.write_report({"wide": wide_tree}, tmp_path / "page.html"))
    largest = [f"encoder.blocks.{index}.attention.weight" for index in range(39, 39 - figures.SHOWN_TENSORS, -1)]
    assert [name for name in re.findall(r"encoder\S+weight", seen.text)] == largest
    assert seen.images[-1]["alt"].endswith(": " + ", ".join(largest) + ".")
    assert f"{40 - figures.SHOWN_TENSORS} more are not shown" in " ".join(seen.text.split())


def test_the_same_results_give_the_same_bytes(tree, page, tmp_path):
    assert report.write_report({NAME: tree}, tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_an_older_page_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "new folder" / "report.html"
    target.parent.mkdir()
    target.write_text("an older page")
    assert report.write_report({}, target) == target
    assert "There are no runs to report." in target.read_text("utf-8")
    assert list(target.parent.iterdir()) == [target]


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        report.write_report({}, target)
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_points_outside_the_page(pages):
    text = pages.read_text("utf-8")
    # Names of markup languages are addresses that nobody visits.
    drawn = "".join(re.sub(r' xmlns(:\w+)?="[^"]*"', "", graphic) for graphic in graphics(pages))
    outside = re.sub(r'src="data:image/svg\+xml;base64,[^"]*"', "", text) + drawn
    assert "http" not in outside.lower()
    assert not re.search(r"""(url\(|href=["']?|src=["']?)(?!["']?(#|data:))""", outside)


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


# What is drawn -----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tree):
    """Return a function from the name of a panel to its contents."""
    one = figures.RunResults.of("run", tree)

    def contents(panel):
        picture = figures.eigenvalue_curves([one]) if panel == "A" else getattr(figures, panel)(one, "B")
        return picture.figure.panels[0]

    return contents


def test_measured_points_lie_on_the_curves_of_equation_9(drawn, tree):
    lines = drawn("A").lines
    points = [line for line in lines if line.marker]
    curves = [line for line in lines if not line.marker]
    assert (len(points), len(curves)) == (3, 3)
    for group in (points, curves):
        for line, formula in zip(group, EIGENVALUES, strict=True):
            angle, value = line.x, line.y
            # Beyond, cosines from angles lose digits to pi/2 itself and prove nothing.
            near = np.cos(angle) >= 1e-3
            assert near.sum() > 5
            # Promised are 1e-10 of an eigenvalue there and 1e-13 of an angle, which moves none by more than 1/cos.
            np.testing.assert_allclose(value[near], formula(angle[near]), rtol=1e-10 + 1e-13 / 1e-3, atol=0)
    measured = tree["model"]["angle"].sel(descent="gradient", window=1)
    measured = measured.values[tree["model"]["status"].sel(descent="gradient", window=1).values == Status.EFFECTIVE]
    assert set(points[0].x) <= set(measured)


def test_the_spectrum_and_the_loss_are_drawn_from_the_results(drawn, tree):
    model = tree["model"].to_dataset()
    at = {"descent": "gradient", "window": 1}
    spectrum = [line for line in drawn("spectrum").lines if not line.marker]
    loss = drawn("loss_curve").lines
    expected = [model[f"eigenvalue_{name}"].sel(at) for name in ("max", "mid", "min")]
    expected += [model["loss"], model["loss_average"].sel(window=WINDOW)]
    for line, variable in zip([*spectrum, *loss], expected, strict=True):
        assert np.array_equal(line.x, variable["step"])
        assert np.array_equal(line.y, variable, equal_nan=True)


def test_axes_have_labels_and_the_log_scales_of_the_paper(drawn):
    for panel in ("A", "spectrum", "loss_curve"):
        assert drawn(panel).y.log
        assert drawn(panel).x.label
        assert drawn(panel).y.label


# Where there is little to show -------------------------------------------------------------------------------


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
    assert seen.images == []


@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_of_one_or_two_updates_is_drawn(tree, tmp_path, rows):
    seen = Page(report.write_report({"short": with_steps(tree, rows)}, tmp_path / "page.html"))
    assert int(seen.cells["run-1-effective"][1]) == rows
    assert len(seen.images) == 7


def test_a_tree_without_results_is_an_error_with_the_name_of_the_run(tree, tmp_path):
    broken = tree.copy()
    broken["model"] = xr.DataTree(tree["model"].to_dataset().drop_vars("angle"))
    with pytest.raises(InputError, match=r"(?s)angle.*where: run first.*natgrad analyze"):
        report.write_report({"first": broken}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# Long runs ---------------------------------------------------------------------------------------------------


def test_a_page_of_a_hundred_thousand_steps_is_hardly_larger_than_one_of_a_thousand(tree, tmp_path):
    sizes = [
        report.write_report({"long": with_steps(tree, rows)}, tmp_path / f"{rows}.html").stat().st_size
        for rows in (1000, 100_000)
    ]
    # Both are beyond two points a column, so both draw as many; numbers of the steps are longer in one.
    assert sizes[1] < 1.5 * sizes[0]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(np.nan), min_size=1, max_size=300).map(np.array), st.integers(1, 40))
def test_thinning_keeps_order_and_the_extremes_of_every_column(values, columns):
    x, y = canvas.thinned(np.arange(len(values), dtype=float), values, columns)
    rows = x.astype(int)
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(values[rows], y, equal_nan=True)
    assert len(x) <= 2 * columns
    starts = canvas.column_starts(len(values), columns)
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        part, kept = values[start:stop], y[(rows >= start) & (rows < stop)]
        assert len(kept) >= 1
        if np.isfinite(part).any():
            assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(part), np.nanmax(part))


@given(
    st.lists(st.floats(0, np.pi / 2), min_size=1, max_size=200).map(np.array), st.floats(0, 1), st.integers(1, 48)
)
def test_points_of_panel_a_are_few_and_include_the_smallest_and_the_largest_angle(angle, shift, columns):
    chosen = angle[paper.spread_points(angle, shift, columns)]
    assert chosen.min() == angle.min()
    assert chosen.max() == angle.max()
    # A shifted grid touches at most two more columns, and the two ends may come on top.
    assert len(chosen) <= columns + 4


@given(st.floats(1e-300, 1e300))
def test_numbers_read_back_to_four_digits(value):
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    text = figures.number(value).translate(digits).replace("×10", "e")
    # Four significant digits are off by half a unit of the fourth at most, and reading is one rounding more.
    assert abs(float(text) - value) <= value * (0.5e-3 + 4 * np.finfo(float).eps)


# In a browser ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_figure_without_requests_or_overflow(browser, pages, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    view = context.new_page()
    complaints, requests = [], []
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(pages.as_uri())
    images = view.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight,"
        " i.getBoundingClientRect().width, i.getBoundingClientRect().right])))"
    )
    overflow = view.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    titles = view.evaluate("document.title")
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [pages.as_uri()]
    assert len(images) == len(Page(pages).images)
    assert all(min(image[:3]) > 0 and image[3] <= width for image in images)
    assert overflow == 0
    assert titles == "3 runs: natural gradient report"


def test_figures_adapt_to_light_and_dark_screens(browser, page):
    shots = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        view = context.new_page()
        view.goto(page.as_uri())
        # Mean brightness of the drawn pixels of the first figure: dark lines on light, light lines on dark.
        shots[scheme] = view.evaluate(
            """async () => {
                const image = document.images[0]
                await image.decode()
                const canvas = document.createElement('canvas')
                canvas.width = image.naturalWidth; canvas.height = image.naturalHeight
                const pen = canvas.getContext('2d')
                pen.drawImage(image, 0, 0)
                const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data
                let sum = 0, weight = 0
                for (let i = 0; i < pixels.length; i += 4) {
                    sum += pixels[i + 3] * (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3
                    weight += pixels[i + 3]
                }
                return [sum / weight, weight]
            }"""
        )
        context.close()
    assert min(weight for _, weight in shots.values()) > 0
    assert shots["light"][0] < shots["dark"][0]
