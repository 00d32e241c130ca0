"""Run the examples of the documentation, and check its links, its language and its figure."""

import importlib.util
import re
import tomllib

import numpy as np
import pytest
import xarray

import distributions
import natgrad
from logs import random_walk, write_log
from pages import ROOT, blocks, run_page
from processing import process

DOCS = ROOT / "docs"
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")


def load(name, path):
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# Examples ----------------------------------------------------------------------------------------------------


def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorial.md"
    assert run_page(page) >= blocks(page) == 9


def test_the_guide_to_the_recorder_logs_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "log.md"
    assert run_page(page) == blocks(page) == 3
    assert len(list((tmp_path / "logs" / "quadratic").iterdir())) == 20
    assert natgrad.process("logs/ledger", "run").updates == 20


def test_the_guide_to_pytorch_records_and_processes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "pytorch.md"
    assert run_page(page) == blocks(page) == 9
    assert natgrad.open_results("runs/ledger").attrs["gradient_source"] == "recorded"
    steps = {path.name: len(list(path.glob("step_*"))) for path in (tmp_path / "logs").iterdir()}
    # Each complete log also has the state after its last update.
    assert steps == {"adamw": 31, "shown": 21, "ledger": 0, "weights": 6, "muon": 6}
    model = natgrad.open_results("runs/adamw")["model"].sel(descent="gradient", window=1)
    assert (model["effective"] == 1).all()
    assert natgrad.open_results("runs/weights")["model"]["step"].values.tolist() == [0, 10, 20]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(
    ("name", "examples", "updates", "elements"),
    [("trainer", 2, 4, 1088), ("lightning", 2, 8, 4), ("fsdp", 1, 10, 41)],
)
def test_the_guides_to_trainers_and_shards_record_and_process_a_run(
    tmp_path, monkeypatch, name, examples, updates, elements
):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / f"{name}.md"
    assert run_page(page) == blocks(page) == examples
    results = natgrad.open_results(f"runs/{name}")
    assert (results.attrs["gradient_source"], results.attrs["elements"]) == ("recorded", elements)
    model = results["model"].sel(descent="gradient", window=1)
    assert model["step"].values.tolist() == [*range(updates)]
    for variable in ("angle", "loss", "learning_rate"):
        assert np.isfinite(model[variable]).all(), variable


def test_the_guide_to_jax_records_and_processes_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "jax.md"
    assert run_page(page) == blocks(page) == 2
    results = natgrad.open_results("runs/jax")
    assert (results.attrs["gradient_source"], results.attrs["evaluation"]) == ("recorded", "fixed")
    assert results["model"]["step"].values.tolist() == [*range(20)]
    assert np.isfinite(results["model"]["learning_rate"]).all()


def test_the_guide_to_xarray_opens_draws_and_exports_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process(write_log(tmp_path / "log", random_walk(22)), tmp_path / "runs" / "momentum", windows=(1, 20))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points = {"xarray.backends": declared["xarray.backends"]}
    monkeypatch.syspath_prepend(distributions.install(tmp_path / "site", "natgrad-engine", {}, points))
    xarray.backends.refresh_engines()
    page = DOCS / "howto" / "xarray.md"
    assert run_page(page) == blocks(page) == 7
    assert len((tmp_path / "angles.csv").read_text().splitlines()) == 1 + 3 * 21


def test_the_guide_to_recovery_processes_states_of_the_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "recover.md"
    assert run_page(page) == blocks(page) == 3
    assert natgrad.open_results("runs/recovered").attrs["gradient_source"] == "recovered"


def test_the_guide_to_replay_agrees_with_the_training_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "replay.md"
    assert run_page(page) == blocks(page) == 4
    assert natgrad.open_results("runs/suite").attrs["gradient_source"] == "replayed"


def test_the_guide_to_inspect_finds_and_processes_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "inspect.md"
    assert run_page(page) == blocks(page) == 4
    assert natgrad.open_trajectory("runs/experiment").sizes["step"] == 5


def test_the_guide_to_hugging_face_trains_and_processes_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "huggingface.md"
    assert run_page(page) == blocks(page) == 6
    model = natgrad.open_results("runs/adam")["model"].sel(descent="gradient", window=1)
    assert model["step"].values.tolist() == [1, 2, 3]
    assert np.isfinite(model["angle"]).all()
    assert np.isfinite(model["preconditioner_condition_number"]).all()


@pytest.mark.parametrize(("name", "examples"), [("errata", 20), ("paper", 9)])
def test_every_example_of_the_mathematics_holds(name, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    page = DOCS / "explanation" / f"{name}.md"
    assert run_page(page, ["python"]) >= blocks(page, ["python"]) == examples


def test_every_erratum_has_a_counterexample():
    page = (DOCS / "explanation" / "errata.md").read_text()
    sections = re.split(r"^### (\d+)\. ", page, flags=re.MULTILINE)[1:]
    assert sorted(map(int, sections[::2])) == list(range(1, 20))
    for number, text in zip(sections[::2], sections[1::2], strict=True):
        assert ">>>" in text, f"erratum {number} has none"


def test_the_example_storage_is_the_one_that_is_tested():
    example = (ROOT / "tests" / "storage" / "memory_storage.py").read_text()
    assert f"```python\n{example}```\n" in (DOCS / "howto" / "new_storage.md").read_text()


def test_the_condition_numbers_of_the_idea_follow_from_its_formula():
    rows = re.findall(r"^\| (\d+)° \| ([\d.,]+) \|", (DOCS / "explanation" / "idea.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for degrees, kappa in rows:
        psi = np.radians(int(degrees))
        digits = len(kappa.partition(".")[2])
        # 13,130 is rounded to four digits.
        scale = 10 if kappa.endswith("0") else 1
        expected = ((1 + np.sin(psi)) / np.cos(psi)) ** 2
        assert round(expected / scale, digits) * scale == float(kappa.replace(",", ""))


# Text --------------------------------------------------------------------------------------------------------


def pages():
    return [*(ROOT / name for name in TOP), *DOCS.rglob("*.md")]


def test_links_in_the_documents_exist():
    fragments = [(ROOT, path) for path in (ROOT / "changes").glob("*.md")]
    for folder, page in [*fragments, *((page.parent, page) for page in pages())]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (folder / target).exists(), f"{page.name} links to {target}"


def test_no_page_has_long_lines_or_two_sentences_on_a_line():
    check = load("check_pages", ROOT / ".ci" / "check_pages.py")
    assert [finding for page in pages() for finding in check.check(page)] == []


def test_long_lines_and_lines_with_two_sentences_are_found(tmp_path):
    check = load("check_pages", ROOT / ".ci" / "check_pages.py")
    page = tmp_path / "page.md"
    page.write_text(
        "# A title. With two.\n\nFine, e.g. this (see eq. (3)).\nOne. Two.\n\n"
        f"```python\nx = 1  # One. Two.\ny = {'1 ' * 60}\n```\n\n"
        f"| One. Two. | {'a ' * 51} |\n\n{'a ' * 51}\n{'a' * 120}\n"
    )
    assert [(line, what) for line, what, _ in check.check(page)] == [
        (4, "two sentences"),
        (8, "longer than 116 columns"),
        (13, "longer than 100 columns"),
    ]


# Figure ------------------------------------------------------------------------------------------------------


def test_the_figure_is_drawn_from_a_run(tmp_path):
    recorder = natgrad.Recorder(tmp_path / "log")
    for step in range(5):
        theta = np.array([3.0, -2.0]) / (step + 1)
        tensors = {"a": theta, "b": theta[:1]}
        gradient = {"a": theta, "b": 2 * theta[:1]}
        recorder.record(step, parameter=tensors, gradient=gradient, learning_rate=0.1)
    natgrad.process(tmp_path / "log", tmp_path / "run")
    script = load("draw", DOCS / "draw.py")
    script.draw(tmp_path / "run", tmp_path / "a.svg")
    script.draw(tmp_path / "run", tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
