"""Test the parameters of the flows, as the forms of Prefect show them, without a server."""

import pytest

from lazy import Lazy
from natgrad.app import declarations, options

demo = Lazy("natgrad_flows.demo")
runs = Lazy("natgrad_flows.runs")
scans = Lazy("natgrad_flows.scan")


@pytest.fixture(autouse=True, scope="module")
def flows_imported():
    """Import Prefect here, so that its time does not count for the first test."""
    assert demo.demo
    assert scans.scan_runs


# Flows by name, each with the models of its options.
FLOWS = {
    "process-run": lambda: (
        runs.process_run,
        options.RunOptions,
        options.OverwriteOptions,
        options.LinkOptions,
        options.ProcessLimits,
    ),
    "ingest-run": lambda: (runs.ingest_run, options.ReadOptions, options.OverwriteOptions, options.ProcessLimits),
    "analyze-run": lambda: (runs.analyze_run, options.AnalyzeOptions, options.LinkOptions, options.ProcessLimits),
    "replay-run": lambda: (runs.replay_run, options.ReplayOptions, options.LinkOptions, options.ProcessLimits),
    "scan-runs": lambda: (scans.scan_runs, options.ScanFlowOptions),
    "demo": lambda: (demo.demo, options.DemoOptions),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_parameter_form_has_every_option_with_its_description(name):
    flow, *models = FLOWS[name]()
    assert flow.name == name
    declared = {option: one for model in models for option, one in declarations.declared(model).items()}
    assert flow.description
    assert "----" not in flow.description  # plain words, not the sections of a docstring
    form = flow.parameters.properties
    assert set(form) - {"source", "root", "out"} == set(declared)
    for option, one in declared.items():
        assert form[option]["description"].startswith(one.description())
        assert one.option.required or form[option]["default"] == one.option.default
        assert f"\n{option} : " in flow.fn.__doc__
    assert all(form[argument]["description"] for argument in set(form) - set(declared))
    assert form["out"]["description"].startswith("Folder for the logs") == (name == "demo")
    if "windows" in form:
        assert form["windows"]["anyOf"][0] == {"type": "array", "items": {"type": "integer", "minimum": 1}}
