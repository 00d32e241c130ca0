"""Test that flows process logs of ledgers while the run is trained, and that the results are those of states."""

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.kernel.ledger_sums import roundoff_bound
from watched import loss_of, make_model

torch = Lazy("torch")
transformers = Lazy("transformers")
lightning = Lazy("lightning")
runs = Lazy("natgrad_flows.runs")

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

STEPS, FLOW_AFTER = 8, (3,)


class Flows:
    """Processes of the log while it is written, and their results."""

    def __init__(self, folder):
        self.folder, self.summaries = folder, []

    def after(self, steps):
        """Process the log after a number of steps."""
        if steps in FLOW_AFTER:
            self.process()

    def process(self):
        self.summaries.append(runs.process_run(self.folder / "ledger", self.folder / "recorded", workers=1))


def both(optimizer, folder, model):
    return [natgrad.watch(optimizer, folder / mode, model=model, mode=mode) for mode in ("full", "ledger")]


def plain(folder, flows):
    model = make_model().float()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    watches = both(optimizer, folder, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(torch.ones(1, 3)) - step) ** 2).mean()
        loss.backward()
        for watch in watches:
            watch.log(loss=loss)
        optimizer.step()
        flows.after(step + 1)
    for watch in watches:
        watch.close()


def mixed(folder, flows):
    """Train with automatic mixed precision; a gradient overflows at step 3."""
    model = make_model().float()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu")
    watches = both(optimizer, folder, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ((model(torch.ones(1, 3)) - step) ** 2).mean()
        scaler.scale(loss * torch.inf if step == 3 else loss).backward()
        for watch in watches:
            watch.log(loss=loss)
        scaler.step(optimizer)
        scaler.update()
        flows.after(step + 1)
    for watch in watches:
        watch.close()


def trainer(folder, flows):
    class Processes(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            flows.after(state.global_step)

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    rows = torch.randint(0, 17, (16, 8))
    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=STEPS, report_to=[], use_cpu=True, disable_tqdm=True
    )
    watches = [natgrad.WatchCallback(folder / mode, mode=mode) for mode in ("full", "ledger")]
    transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[*watches, Processes()],
    ).train()


def lightning_run(folder, flows):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = make_model()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1, momentum=0.9)

        def training_step(self, rows, index):
            return loss_of(self.layer, index)

    class Processes(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            flows.after(trainer.global_step)

    watches = [natgrad.LightningWatch(folder / mode, mode=mode) for mode in ("full", "ledger")]
    lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*watches, Processes()],
        default_root_dir=folder,
    ).fit(Module(), torch.utils.data.DataLoader([torch.zeros(1)] * STEPS))


def require_same_results(one, other, elements):
    """Require that the results of a log of ledgers are those of states, except where they need both gradients."""
    exact = {"step", "loss", "learning_rate", "step_span", "attempt"}
    for group in ("model", "tensor"):
        found, expected = (tree[group].to_dataset().sel(descent=["gradient", "corrected"]) for tree in (one, other))
        assert {*found} == {*expected}
        skipped = found["status"] == found["status"].attrs["flag_values"][-1]
        assert (expected["status"].where(skipped, 5) == 5).all()  # non_finite
        assert (found["status"] == expected["status"]).where(~skipped, True).all()
        for name in [name for name in found.variables if found[name].dtype.kind in "fi" and name in exact]:
            np.testing.assert_array_equal(found[name], expected[name], name)
        # Both ledgers agree to four roundoff bounds of their norms, and angles add a few roundings.
        bound = 16 * roundoff_bound(elements)
        for name in ("angle", "update_to_weight", "gradient_norm"):
            np.testing.assert_allclose(found[name], expected[name], bound, bound, err_msg=f"{group} {name}")


@pytest.mark.parametrize("train", [plain, mixed, trainer, lightning_run])
def test_a_run_is_processed_while_it_is_trained(tmp_path, train):
    flows = Flows(tmp_path)
    train(tmp_path, flows)
    # The last update of a log is passed to the system with the next one, or when it is closed.
    updates = [summary["updates"] for summary in flows.summaries]
    assert all(0 < count <= after for count, after in zip(updates, FLOW_AFTER, strict=True))
    flows.process()
    assert flows.summaries[-1]["gradient_source"] == "recorded"
    assert sum(summary["new_steps"] for summary in flows.summaries) == STEPS + 1
    natgrad.process(tmp_path / "full", tmp_path / "states")
    results = [natgrad.open_results(tmp_path / name) for name in ("recorded", "states")]
    assert results[0]["model"]["step"].values.tolist() == [*range(STEPS)]
    assert flows.summaries[-1]["status"].get("skipped", 0) == (train is mixed)
    elements = natgrad.open_trajectory(tmp_path / "states").sizes["element"]
    require_same_results(*results, elements)
    assert not natgrad.verify(tmp_path / "recorded").damages
