"""A sweep of learning rates.

Adam trains one network with five learning rates, and one page compares the runs.
All runs start with the same weights, and therefore with the same angle.
In the parallel coordinates, larger learning rates have a smaller last loss.
The largest rate also has the largest median angle, and its median condition number is more than five times that of
the smallest rate.
"""

import torch

import natgrad

torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = inputs.sin().sum(1, keepdim=True)
for rate in (0.001, 0.003, 0.01, 0.03, 0.1):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with natgrad.watch(optimizer, f"logs/lr={rate}", model=model, evaluation="fixed") as watch:
        for _ in range(60):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
natgrad.process("logs", "runs/sweep", sweep=True)
natgrad.compare("runs/sweep", page="report.html")

# The statements about these runs.
runs = natgrad.open_results("runs/sweep")["model"].to_dataset().sel(descent="gradient", window=1)
assert runs["run"].values.tolist() == ["lr=0.001", "lr=0.003", "lr=0.01", "lr=0.03", "lr=0.1"]
assert (runs["loss"].isel(step=-1).diff("run") < 0).all()
angles, conditions = (runs[name].median("step") for name in ("angle", "condition_number"))
assert (angles[:-1] < angles[-1]).all()
assert conditions[-1] > 5 * conditions[0]
assert float(runs["angle"].isel(step=0).max() - runs["angle"].isel(step=0).min()) < 1e-3
