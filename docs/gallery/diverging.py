"""A run that diverges.

A linear regression is trained with a learning rate that grows at every update.
While the rate is below 2/λ, where λ is the largest eigenvalue of the Hessian, every update decreases the loss.
Above twice this limit, updates increase the loss until it overflows, and the last updates are `non finite`.
The angle does not show this: every finite update is steepest descent to within 0.01 rad, so the cause is the size
of the updates and not their direction.
"""

import torch

import natgrad
from natgrad.schema.variables import Status

torch.manual_seed(0)
inputs = torch.randn(128, 8)
targets = inputs.sin().sum(1, keepdim=True)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)
with natgrad.watch(optimizer, "logs/diverging", model=model, evaluation="fixed") as watch:
    for _ in range(80):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()
        warmup.step()
natgrad.process("logs/diverging", "runs/diverging")
natgrad.report("runs/diverging", "report.html")

# The statements about this run.
results = natgrad.open_results("runs/diverging")["model"].to_dataset().sel(window=1)
update, discrete = results.sel(descent="gradient"), results.sel(descent="corrected")
features = torch.cat([inputs, torch.ones(128, 1)], 1)
limit = 2 / float(torch.linalg.eigvalsh(2 * features.T @ features / 128)[-1])
rate = results["learning_rate"]
assert 0 < (rate < limit).sum() < len(rate)
assert (discrete["status"][rate < limit] == Status.EFFECTIVE).all()
growing = (rate > 2 * limit) & (results["loss"] < 1e30)
assert growing.sum() > 10
assert (discrete["status"][growing] == Status.OBTUSE).all()
assert (results["loss"] == float("inf")).any()
finite = update["status"] != Status.NON_FINITE
assert (update["effective"][finite] == 1).all()
assert (update["angle"][finite] < 0.01).all()
assert (update["status"][-5:] == Status.NON_FINITE).all()
assert update["angle"][-5:].isnull().all()
