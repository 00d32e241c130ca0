"""Nine learning rules.

Nine rules train one network on the same MNIST digits, from the same weights.
Every update of backpropagation is steepest descent, momentum turns away from it after its first update, and no
update of partial ascent, a control, is effective.
Feedback alignment and its direct form start with updates that raise the loss, and then learn to descend.
Weight perturbation always descends, but at angles so close to 90° that more than half of its updates need a
metric with a condition number above 1,000.
"""

from pathlib import Path

import numpy as np

import natgrad
from natgrad.experiments.learning_rules import RULES, log_learning_rules

log_learning_rules(Path("logs"), steps=40, images=400)
for rule in RULES:
    natgrad.process(f"logs/{rule}", f"runs/{rule}", evaluation="fixed")
natgrad.report([f"runs/{rule}" for rule in RULES], "report.html")

# The statements about these runs.
runs = {
    rule: natgrad.open_results(f"runs/{rule}")["model"].to_dataset().sel(descent="gradient", window=1)
    for rule in RULES
}
assert len(runs) == 9
assert all((run["loss"][0] == runs["adam"]["loss"][0]).item() for run in runs.values())
assert (runs["backpropagation"]["angle"] < 1e-3).all()
assert runs["momentum"]["angle"][0] < 1e-3 < runs["momentum"]["angle"][1:].min()
for rule in ("feedback-alignment", "direct-feedback-alignment"):
    assert (runs[rule]["angle"][:2] > np.pi / 2).all()
    assert runs[rule]["loss"][0] < runs[rule]["loss"][1] < runs[rule]["loss"][2]
    assert (runs[rule]["effective"][-20:] == 1).all()
assert (runs["weight-perturbation"]["effective"] == 1).all()
assert runs["weight-perturbation"]["condition_number"].median() > 1000
assert (runs["partial-ascent"]["effective"] == 0).all()
