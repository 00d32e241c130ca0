"""The log history of the Trainer, without other files, as a log of scalars."""

import json

import pytest
from test_scalar_log import run_without_scalars, settled, stored

from natgrad.sources.scalars.update_records import at_states
from opened import ingest


@pytest.mark.parametrize(
    ("version", "late"), [("4.40.1", True), ("4.51.0", False), ("5.0.0.dev0", False), (None, None)]
)
def test_a_rate_belongs_to_the_update_that_the_version_determines(tmp_path, version, late):
    rates = [0.5, 0.4, 0.3, 0.2]
    entries = [
        {"step": s, "loss": 1.0 / (s + 2), "learning_rate": rates[s if late else s - 1], "epoch": s / 10}
        for s in range(1, 4)
    ]
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    history = [*entries, {"step": 3, "eval_loss": 7.0}, {"step": 3, "train_loss": 0.3}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}, indent=2))
    if version:
        (checkpoint / "config.json").write_text(json.dumps({"transformers_version": version}))
    settled(checkpoint)
    run = run_without_scalars(tmp_path / "run", 4)
    summary = ingest([run, checkpoint / "trainer_state.json"], tmp_path / "out")
    first, last = (None, rates[3]) if late else (rates[0], None)
    assert stored(tmp_path / "out") == [
        (0, 1 / 3, first),
        (1, 1 / 4, rates[1]),
        (2, 1 / 5, rates[2]),
        (3, None, last),
    ]
    assert any("no file states the version" in warning for warning in summary.warnings) == (late is None)


def test_means_over_several_updates_are_omitted_with_a_note():
    records = [{"step": step, "loss": float(step), "learning_rate": 0.1} for step in (1, 2, 5, 6)]
    notes = []
    found = list(at_states(records, notes))
    assert [(record["step"], record.get("loss")) for record in found] == [(0, 1.0), (1, 2.0), (4, None), (5, 6.0)]
    assert all(record["learning_rate"] == 0.1 for record in found)
    assert notes == ["1 losses are omitted: each is a mean over several updates, as not every update was logged"]
