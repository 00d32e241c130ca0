"""Record a real training run of Lightning, and compare the log with its gradients."""

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from watched import ROUNDING, all_states, by_hand, loss_of, make_model, read, snapshot, updates_of

torch = Lazy("torch")
lightning = Lazy("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def test_a_run_with_accumulation_is_recorded_in_both_modes_and_continued(tmp_path):
    states = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = make_model()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.layer.parameters(), lr=0.1)

        def training_step(self, rows, index):
            if index % 2 == 0:
                states.append(snapshot(self.layer))
            return loss_of(self.layer, index)

    def fit(steps, checkpoint=None):
        watches = [natgrad.LightningWatch(tmp_path / mode, mode=mode) for mode in ("full", "ledger")]
        trainer = lightning.Trainer(
            max_steps=steps,
            accumulate_grad_batches=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=watches,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader([torch.zeros(1)] * 20), ckpt_path=checkpoint)
        return trainer, watches

    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, watches = fit(5, tmp_path / "last.ckpt")
    assert [one.watch.recorded for one in watches] == [2, 2]
    assert list(all_states(tmp_path / "full")) == [*range(6)]
    found = read(tmp_path / "full")
    for step, (state, parameters) in enumerate(zip(found.values(), states, strict=True)):
        _, gradients = by_hand(parameters, 2 * step, 2 * step + 1)
        for name, parameter in parameters.items():
            assert torch.equal(state["parameter"][f"layer.{name}"], parameter)
            np.testing.assert_allclose(state["gradient"][f"layer.{name}"].numpy(), gradients[name], 0, ROUNDING)
    ledgers = list(updates_of(tmp_path / "ledger"))
    assert [update["step"] for update in ledgers] == [*range(5)]
    # The loss is that of the last batch of the accumulation, as in the log of states.
    assert [update["loss"] for update in ledgers] == [state["loss"] for state in found.values()]


def test_an_error_in_the_training_ends_the_recording(tmp_path):
    class Fails(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = make_model()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

        def training_step(self, rows, index):
            if index == 3:
                raise RuntimeError("the data ended")
            return loss_of(self.layer, index)

    watch = natgrad.LightningWatch(tmp_path / "log", mode="ledger")
    trainer = lightning.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        default_root_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="the data ended"):
        trainer.fit(Fails(), torch.utils.data.DataLoader([torch.zeros(1)] * 20))
    assert not watch.watch.active
    assert [update["step"] for update in updates_of(tmp_path / "log")] == [0, 1, 2]
