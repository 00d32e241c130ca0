"""Gradients recovered from the checkpoints of trainers, compared with those that the training loop had."""

import json

import numpy as np
import pytest
from test_huggingface import small_gpt2

from lazy import Lazy
from natgrad.sources.optimizers.recovery import GRADES, RULE_NAMES
from natgrad.sources.recovered import Recovered
from opened import open_sources
from optimizer_states import errors, recovered, train

accelerate = Lazy("accelerate")
callbacks = Lazy("lightning.pytorch.callbacks")
dcp = Lazy("torch.distributed.checkpoint")
lightning = Lazy("lightning")
state_dict = Lazy("torch.distributed.checkpoint.state_dict")
torch = Lazy("torch")
transformers = Lazy("transformers")

UPDATES = 4


def gradients_of(model):
    return {name: p.grad.double().numpy().ravel().copy() for name, p in model.named_parameters()}


def with_torch(folder):
    folder.mkdir()
    trees, truth = train(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), UPDATES)
    for step, tree in enumerate(trees):
        torch.save(tree, folder / f"step-{step}.pt")
    return truth


def with_two_optimizers(folder):
    """Write a run with Muon for matrices and AdamW for others, as Muon requires."""
    folder.mkdir()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    named = list(model.named_parameters())
    optimizers = [
        torch.optim.Muon([(name, p) for name, p in named if p.ndim == 2], lr=1e-2),
        torch.optim.AdamW([(name, p) for name, p in named if p.ndim != 2], lr=1e-3),
    ]
    truth = []
    for step in range(UPDATES + 1):
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": states}, folder / f"step-{step}.pt")
        model.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        truth.append(gradients_of(model))
        for optimizer in optimizers:
            optimizer.step()
    return truth[:UPDATES]


def with_dcp(folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    truth = []
    for step in range(UPDATES + 1):
        tree = {
            "model": state_dict.get_model_state_dict(model),
            "optimizer": state_dict.get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(tree, checkpoint_id=folder / f"step-{step}", no_dist=True)
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        truth.append(gradients_of(model))
        optimizer.step()
    return truth[:UPDATES]


def with_accelerate(folder):
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(6, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.NAdam(model.parameters(), lr=1e-2))
    truth = []
    for step in range(UPDATES + 1):
        accelerator.save_state(str(folder / f"checkpoint-{step}"))
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 6)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        truth.append(gradients_of(model))
        optimizer.step()
    return truth[:UPDATES]


def with_lightning(folder):
    truth = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def training_step(self, batch, index):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.RMSprop(self.parameters(), lr=1e-2, momentum=0.5)

        def optimizer_step(self, epoch, batch, optimizer, closure=None):
            super().optimizer_step(epoch, batch, optimizer, closure)
            truth.append(gradients_of(self))

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16, 3))
    lightning.Trainer(
        max_steps=UPDATES + 1,
        accelerator="cpu",
        logger=False,
        gradient_clip_val=0.1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.parent,
        callbacks=[callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1)],
    ).fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))
    return truth[1:]


def with_trainer(folder):
    truth = {}

    class Keeps(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **more):
            truth[state.global_step] = gradients_of(model)

    torch.manual_seed(0)
    rows = torch.randint(0, 17, (16, 8))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=UPDATES + 1,
        save_steps=1,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = small_gpt2()
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Keeps()]).train()
    # The optimizer does not have the names of tensors, and safetensors does not have their order.
    names = [name for name, _ in model.named_parameters()]
    (folder / "natgrad.toml").write_text(f"order = {json.dumps(names)}\n")
    return [truth[step] for step in range(1, UPDATES + 1)]


WRITERS = {
    "torch": (with_torch, {"AdamW"}, "verified"),
    "two optimizers": (with_two_optimizers, {"Muon", "AdamW"}, "verified"),
    "DCP": (with_dcp, {"SGD with momentum"}, "rate only"),
    "accelerate": (with_accelerate, {"NAdam"}, "verified"),
    "Lightning": (with_lightning, {"RMSprop with momentum"}, "rate only"),
    "Trainer": (with_trainer, {"AdamW", "Adam"}, "verified"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_checkpoints_of_trainers_give_the_gradients_after_clipping(tmp_path, writer):
    write, rules, grade = WRITERS[writer]
    truth = write(tmp_path / "log")
    gradients, figures = recovered(open_sources(tmp_path / "log"))
    assert len(gradients) == UPDATES
    error = errors(gradients, [{name: one[name] for name in gradients[0]} for one in truth])
    bounds = np.array([[each["gradient_error_bound"][name] for name in gradients[0]] for each in figures])
    assert (error <= bounds).all()
    assert bounds.max() < 1e-2
    assert {RULE_NAMES[int(rule)] for each in figures for rule in each["gradient_rule"].values()} == rules
    assert {GRADES[int(found)] for each in figures for found in each["gradient_check"].values()} == {grade}


def test_the_last_state_has_no_gradient_and_reads_as_before(tmp_path):
    with_torch(tmp_path / "log")
    log = open_sources(tmp_path / "log")
    source = Recovered(log)
    *_, last = source.steps()
    assert source.location == log.location
    with source.open(last) as reader, log.open(last) as plain:
        assert reader.content() == plain.content()
        assert reader.recovery() == {}
        assert reader.ranges("parameter", "0.weight") == plain.ranges("parameter", "0.weight")
