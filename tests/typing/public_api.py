"""Types of the public names, as a type checker of a user sees them. It is checked, never run."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
import xarray as xr

import natgrad
from natgrad.app.summaries import (
    AnalysisSummary,
    IngestSummary,
    Inspection,
    MovedStates,
    ProcessSummary,
    Report,
    ScanSummary,
    Verification,
)
from natgrad.recording.torch import Watch
from natgrad.store import Ledger
from natgrad_flows.runs import process_run

summary = natgrad.process("log", Path("out"), windows=[1, 5], gammas=(0.1, 1), memory_limit="1GiB", follow=True)
assert_type(summary, ProcessSummary)
assert_type(summary.new_steps, int)
assert_type(summary.report, str)
assert_type(natgrad.ingest(["log", Path("metrics.csv")], "out", mapping={"loss": "nll"}), IngestSummary)
assert_type(natgrad.analyze("out", learning_rate=0.1, attempt=0), AnalysisSummary)
assert_type(natgrad.report(["a", "b"], page="page.html"), Report)
assert_type(natgrad.report({"a": Path("a")}), Report)
assert_type(natgrad.inspect("log", sweep=True), Inspection)
assert_type(natgrad.verify("out", version="v1").ok, bool)
assert_type(natgrad.verify("out"), Verification)
assert_type(natgrad.scan("logs", "out", at_once=2), ScanSummary)
assert_type(natgrad.open_results("out"), xr.DataTree)
assert_type(natgrad.open_ledger("out"), Ledger)
assert_type(natgrad.open_trajectory("out"), xr.Dataset)
assert_type(natgrad.materialize("out"), MovedStates)
assert_type(natgrad.slim("out").states, int)
assert_type(natgrad.__version__, str)
natgrad.Recorder("log").record(0, parameter={"a": np.ones(2)}, gradient={"a": np.ones(2)}, loss=1.0)
module, optimizer = torch.nn.Linear(1, 1), torch.optim.SGD([torch.ones(1)])
with natgrad.watch([optimizer], "log", model=module, parameters="*", first_step=3) as watch:
    watch.log(loss=torch.ones(1), after=True)
assert_type(watch.active, bool)
callback = natgrad.WatchCallback("log", mode="ledger")
assert_type(callback.watch, Watch | None)
assert_type(natgrad.LightningWatch(Path("log"), every=10).watch, Watch | None)
error: type[ValueError] = natgrad.InputError
unavailable: type[natgrad.InputError] = natgrad.Unavailable
process_run("log", "out", windows=[1])

# Every mistake is an error, including an ignore that is not needed.
natgrad.process("log", "out", window=[1])  # type: ignore[call-arg]
natgrad.process("log", "out", windows="5")  # type: ignore[arg-type]
natgrad.analyze("out", overwrite=True)  # type: ignore[call-arg]
natgrad.scan("logs", "out", at_once="2")  # type: ignore[arg-type]
natgrad.nothing  # type: ignore[attr-defined]  # noqa: B018
summary.new_steps = 1  # type: ignore[misc]
