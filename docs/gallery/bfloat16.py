"""A run in bfloat16.

Gradient descent trains one network in bfloat16 and in float32.
In float32, every update is steepest descent to within 0.001 rad, but in bfloat16, rounding turns the first update
by more than 0.05 rad.
As the gradient shrinks, more than half of the updates in bfloat16 become too small for the stored parameters: they
have the status `unverifiable` instead of an angle.
The loss of the run in bfloat16 stays higher.
"""

import torch

import natgrad
from natgrad.schema.variables import Status

torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = inputs.sin().sum(1, keepdim=True)
for dtype in (torch.bfloat16, torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    name = str(dtype).removeprefix("torch.")
    with natgrad.watch(optimizer, f"logs/{name}", model=model, evaluation="fixed") as watch:
        for _ in range(100):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs.to(dtype)).float(), targets)
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
    natgrad.process(f"logs/{name}", f"runs/{name}")
natgrad.report(["runs/bfloat16", "runs/float32"], "report.html")

# The statements about these runs.
half, single = (
    natgrad.open_results(f"runs/{name}")["model"].to_dataset().sel(descent="gradient", window=1)
    for name in ("bfloat16", "float32")
)
assert (single["angle"] < 1e-3).all()
assert half["angle"][0] > 0.05
unverifiable = half["status"] == Status.UNVERIFIABLE
assert half["gradient_norm"][-1] < half["gradient_norm"][0]
assert unverifiable[-1]
assert not unverifiable[0]
assert unverifiable.mean() > 0.5
assert half["angle"][unverifiable].isnull().all()
assert half["loss"][-1] > single["loss"][-1]
