"""Output of common trainers in its original form: Hugging Face Trainer and Lightning."""

import json
import os
import shutil

import numpy as np
import pytest
from test_formats import ledger_of

from lazy import Lazy
from logs import write_log
from natgrad.schema.errors import InputError
from natgrad.sources.completion import complete
from natgrad.sources.configured import configuration_of
from natgrad.sources.formats import FORMATS
from natgrad.store import open_trajectory
from opened import ingest, open_source

accelerate = Lazy("accelerate")
lightning = Lazy("lightning")
callbacks = Lazy("lightning.pytorch.callbacks")
loggers = Lazy("lightning.pytorch.loggers")
safetensors_torch = Lazy("safetensors.torch")
torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
transformers = Lazy("transformers")

UPDATES = 4


def found(folder):
    return next(name for name, format in FORMATS.items() if format.find(folder))


def contents_of(folder, **options):
    log = open_source(folder, **options)
    contents = {}
    for step in log.steps():
        with log.open(step) as reader:
            contents[step.number] = complete(step, reader.content())
    return contents


# Hugging Face ------------------------------------------------------------------------------------------------


def callback_that_saves_gradients(batch, states_of=None):
    """Return a callback that saves the gradient of one batch with each checkpoint, and keeps the states."""

    class SavesGradients(transformers.TrainerCallback):
        def __init__(self):
            self.states = {}

        def on_save(self, args, state, control, model, optimizer=None, **more):
            names, tensors = zip(*model.named_parameters(), strict=True)
            model.eval()
            gradients = torch.autograd.grad(model(**batch).loss, tensors)
            model.train()
            gradients = dict(zip(names, gradients, strict=True))
            folder = f"{args.output_dir}/checkpoint-{state.global_step}"
            safetensors_torch.save_file(gradients, f"{folder}/gradient.safetensors")
            if states_of is None:
                parameters = {
                    f"parameter/{name}": p.detach().numpy().copy() for name, p in model.named_parameters()
                }
                kept = parameters | {f"gradient/{name}": gradient.numpy() for name, gradient in gradients.items()}
            else:
                kept = states_of(model, optimizer)
            self.states[state.global_step] = kept

    return SavesGradients()


def small_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )


def train(folder, states_of=None, **options):
    torch.manual_seed(0)
    model = small_gpt2()
    rows = torch.randint(0, 17, (16, 8))
    callback = callback_that_saves_gradients({"input_ids": rows[:4], "labels": rows[:4]}, states_of)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=UPDATES,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"logging_steps": 1, **options},
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return folder, callback.states


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trainer") / "out")


def states_with_scalars(folder, states):
    """Return states with the native keys, with the loss and rate of the next update as logged by the Trainer."""
    history = json.loads((folder / f"checkpoint-{UPDATES}" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in history if "loss" in entry}
    last = torch.load(folder / f"checkpoint-{UPDATES}" / "optimizer.pt", weights_only=True)["param_groups"]
    for step, state in states.items():
        if step + 1 in logged:
            scalars = {name: np.float64(logged[step + 1][name]) for name in ("loss", "learning_rate")}
        else:
            scalars = {"learning_rate": np.float64(last[0]["lr"])}
        yield state | scalars


def test_a_trainer_folder_reproduces_the_training_run(tmp_path, trained):
    folder, states = trained
    assert found(folder) == "huggingface"
    native = write_log(tmp_path / "log", list(states_with_scalars(folder, states)), numbers=list(states))
    assert ledger_of(tmp_path / "hf", [folder]) == ledger_of(tmp_path / "native", [native])


def test_the_arguments_of_the_trainer_and_the_configuration_of_the_model_are_read(trained):
    source, notes = open_source(trained[0]), []
    values = configuration_of(source, source.steps()[-1], notes)
    assert notes == []
    assert (values["max_steps"], values["per_device_train_batch_size"], values["learning_rate"]) == (
        UPDATES,
        2,
        5e-5,
    )
    assert (values["n_embd"], values["vocab_size"]) == (8, 17)


def test_the_rate_logged_at_a_step_is_that_of_the_update_to_it(trained):
    folder, _ = trained
    for step, content in contents_of(folder).items():
        optimizer = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert content.scalars["learning_rate"] == optimizer["param_groups"][0]["lr"]


def test_older_bin_folders_with_tied_weights_give_the_same_result(tmp_path, trained):
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "out")
    for checkpoint in (tmp_path / "out").iterdir():
        model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
        torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
        assert "lm_head.weight" in model.state_dict()
        (checkpoint / "model.safetensors").unlink()
    contents = contents_of(tmp_path / "out")
    assert any("'lm_head.weight' and " in note and "share memory" in note for note in contents[1].notes)
    assert ledger_of(tmp_path / "bin", [tmp_path / "out"]) == ledger_of(tmp_path / "hf", [folder])


def test_losses_that_an_older_trainer_rounded_are_marked(tmp_path, trained):
    folder, _ = trained
    assert not any("rounded" in note for content in contents_of(folder).values() for note in content.notes)
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / f"checkpoint-{UPDATES}" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        entry["loss"] = round(entry["loss"], 4)
    path.write_text(json.dumps(state))
    assert any("rounded to 4 decimals" in note for note in contents_of(tmp_path / "out")[1].notes)


def test_a_mean_loss_over_several_updates_is_not_the_loss_of_a_step(tmp_path):
    folder, _ = train(tmp_path / "out", logging_steps=2)
    contents = contents_of(folder)
    assert all("loss" not in content.scalars for content in contents.values())
    assert any("logging_steps is not 1" in note for note in contents[1].notes)
    assert all("learning_rate" in content.scalars for content in contents.values())


def test_a_run_continues_after_checkpoint_rotation(tmp_path, trained):
    folder, store = tmp_path / "out", tmp_path / "trajectory.zarr"
    shutil.copytree(trained[0], folder)
    (folder / "checkpoint-4").rename(tmp_path / "later")
    assert ingest(folder, store).new_steps == 3
    shutil.rmtree(folder / "checkpoint-1")
    (tmp_path / "later").rename(folder / "checkpoint-4")
    assert ingest(folder, store).new_steps == 1
    assert open_trajectory(store).scalar("step").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("gone", ["all", "model.safetensors", "checkpoint"])
def test_a_checkpoint_removed_during_reading_is_reported_as_removed(tmp_path, trained, gone):
    shutil.copytree(trained[0], tmp_path / "out")
    log = open_source(tmp_path / "out")
    step = log.steps()[0]
    if gone == "checkpoint":
        shutil.rmtree(step.path)
    else:
        for path in step.path.glob("*" if gone == "all" else gone):
            path.unlink()
    with pytest.raises(InputError) as caught, log.open(step) as reader:
        complete(step, reader.content())
    assert "checkpoint-1" in caught.value.where


LATE = [0.5, 0.4, 0.3, 0.2, 0.1]
"""Rate of each update of a run whose Trainer steps the scheduler before it logs the rate."""


def late_run(folder, *, optimizer=True, version=None, second=None):
    """Write checkpoints like transformers before 4.51, and a gradient for each."""
    values, history = torch.tensor([3.0, -2.0], dtype=torch.float64), []
    for step, rate in enumerate([*LATE, 0.0]):
        checkpoint = folder / "run" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        safetensors_torch.save_file({"a": values, "b": values[:1].clone()}, checkpoint / "model.safetensors")
        safetensors_torch.save_file({"a": values, "b": values[:1].clone()}, checkpoint / "gradient.safetensors")
        groups = [{"lr": rate, "params": [0] if second else [0, 1]}]
        groups += [{"lr": second * rate, "params": [1]}] if second else []
        if optimizer:
            torch.save({"state": {}, "param_groups": groups}, checkpoint / "optimizer.pt")
        if version is not None:
            (checkpoint / "config.json").write_text(json.dumps({"transformers_version": version}))
        state = {"global_step": step, "log_history": list(history)}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        following = [*LATE, 0.0, 0.0][step + 1]
        history.append({"step": step + 1, "loss": float(values @ values) / 2, "learning_rate": following})
        values = (1 - rate) * values
    (folder / "run" / "natgrad.toml").write_text('order = ["a", "b"]\n')
    return folder / "run"


def rates_of(summary):
    states = open_trajectory(summary.trajectory)
    return states.scalar("learning_rate").tolist(), states.scalar("tensor_learning_rate").tolist()


def test_the_optimizer_takes_precedence_over_a_log_that_is_late(tmp_path):
    summary = ingest([late_run(tmp_path)], tmp_path / "trajectory.zarr")
    assert rates_of(summary)[0] == [*LATE, 0.0]
    (warning,) = (text for text in summary.warnings if "differs" in text)
    assert "differs at 5 of 6 steps" in warning
    assert "0.3 and 0.2 at step 2" in warning


def test_a_log_without_optimizer_is_corrected_if_its_version_is_known(tmp_path):
    known = ingest([late_run(tmp_path / "a", optimizer=False, version="4.50.3")], tmp_path / "a.zarr")
    assert rates_of(known)[0][1:] == [*LATE[1:], 0.0]
    assert np.isnan(rates_of(known)[0][0])
    unknown = late_run(tmp_path / "b", optimizer=False)
    summary = ingest([unknown], tmp_path / "b.zarr")
    assert rates_of(summary)[0][:5] == [*LATE[1:], 0.0]
    (warning,) = (text for text in summary.warnings if "no file states the version" in text)
    assert "--shift learning_rate=1" in warning
    shifted = ingest([unknown], tmp_path / "c.zarr", shift={"learning_rate": 1})
    assert rates_of(shifted)[0][1:] == [*LATE[1:], 0.0]


def test_each_tensor_has_the_rate_of_its_group(tmp_path):
    summary = ingest([late_run(tmp_path, second=0.5)], tmp_path / "trajectory.zarr")
    rates, of_tensors = rates_of(summary)
    assert np.isnan(rates[:5]).all()
    assert of_tensors[:5] == [[rate, rate / 2] for rate in LATE]
    assert any("each tensor has that of its group" in text for text in summary.warnings)
    assert not any("learning_rate is missing" in text for text in summary.warnings)


def test_no_rate_is_used_if_the_groups_cannot_be_assigned(tmp_path):
    run = late_run(tmp_path, second=0.5)
    (run / "natgrad.toml").unlink()
    summary = ingest([run], tmp_path / "trajectory.zarr")
    rates, of_tensors = rates_of(summary)
    assert np.isnan(rates[:5]).all()
    assert np.isnan(of_tensors[:5]).all()
    assert any("none is used, because the groups cannot be assigned" in text for text in summary.warnings)


@pytest.mark.parametrize("second", [None, 0.5])
def test_the_optimizer_takes_precedence_over_other_sources(tmp_path, second):
    run = late_run(tmp_path, second=second)
    (tmp_path / "log.csv").write_text("step,lr\n" + "".join(f"{step},0.75\n" for step in range(6)))
    summary = ingest([tmp_path / "log.csv", run], tmp_path / "trajectory.zarr")
    rates, of_tensors = rates_of(summary)
    if second is None:
        assert rates == [*LATE, 0.0]
    else:
        assert np.isnan(rates[:5]).all()
        assert of_tensors[:5] == [[rate, rate / 2] for rate in LATE]
    assert any("log.csv differs at" in text and "0.5 and 0.75 at step 0" in text for text in summary.warnings)


def test_the_rates_of_groups_are_shifted_with_the_rate(tmp_path):
    run = late_run(tmp_path, second=0.5)
    summary = ingest([run], tmp_path / "trajectory.zarr", shift={"learning_rate": 1})
    assert rates_of(summary)[1][1:6] == [[rate, rate / 2] for rate in LATE]


def test_an_unfinished_checkpoint_is_omitted_with_a_warning(tmp_path, trained, caplog):
    shutil.copytree(trained[0], tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    assert [step.number for step in open_source(tmp_path / "out").steps()] == [1, 2, 3]
    assert "checkpoint-4 is left for the next pass" in caplog.text


def test_models_without_a_trainer_are_read_if_there_are_several(tmp_path, caplog):
    model = small_gpt2()
    model.save_pretrained(tmp_path / "checkpoint-0")
    with pytest.raises(InputError, match="no step files"):
        open_source(tmp_path).steps()
    assert "checkpoint-0 is left for the next pass" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path / "checkpoint-1000")
    log = open_source(tmp_path)
    steps = log.steps()
    assert [step.number for step in steps] == [0, 1000]
    with log.open(steps[-1]) as reader:
        assert reader.content().scalars == {}
    assert not caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"log_history": 1}', '{"log_history": [{"loss": 1}]}', "[" * 99999]
)
def test_an_invalid_trainer_state_is_refused(tmp_path, trained, text):
    shutil.copytree(trained[0], tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "out").steps()
    assert caught.value.where == str(path)


# Lightning ---------------------------------------------------------------------------------------------------


def module_that_saves_gradients():
    """Return a module that adds the gradient at the saved state to each checkpoint."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.states, self.momenta = {}, {}
            self.save_hyperparameters({"width": 2, "nested": {"a": [1, 2]}})

        def loss(self, batch):
            return self.layer(batch).square().mean()

        def training_step(self, batch, index):
            return self.loss(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.125, momentum=0.5)

        def on_save_checkpoint(self, checkpoint):
            with torch.enable_grad():
                loss = self.loss(torch.ones(4, 3))
                gradients = torch.autograd.grad(loss, list(self.parameters()))
            names = [name for name, _ in self.named_parameters()]
            checkpoint["gradient"] = dict(zip(names, gradients, strict=True))
            checkpoint["loss"] = loss.item()
            kept = self.trainer.optimizers[0].state
            self.momenta[checkpoint["global_step"]] = {
                name: kept[p]["momentum_buffer"].numpy().copy() for name, p in self.named_parameters()
            }
            state = {f"parameter/{name}": p.detach().numpy().copy() for name, p in self.named_parameters()}
            state |= {f"gradient/{name}": g.numpy() for name, g in checkpoint["gradient"].items()}
            self.states[checkpoint["global_step"]] = state | {
                "loss": np.float64(loss.item()),
                "learning_rate": np.float64(0.125),
            }

    return Module()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    module = module_that_saves_gradients()
    data = torch.utils.data.TensorDataset(torch.randn(16, 3))
    lightning.Trainer(
        max_steps=UPDATES,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            callbacks.ModelCheckpoint(dirpath=folder / "out", every_n_train_steps=1, save_top_k=-1, save_last=True)
        ],
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    return folder / "out", module.states, module.momenta


def test_lightning_checkpoints_reproduce_the_fitted_run(tmp_path, fitted):
    folder, states, momenta = fitted
    assert found(folder) == "lightning"
    assert (folder / "last.ckpt").exists()
    numbers = sorted(states)
    native = write_log(tmp_path / "log", [states[number] for number in numbers], numbers=numbers)
    assert ledger_of(tmp_path / "lightning", [folder]) == ledger_of(tmp_path / "native", [native])
    ingest(folder, tmp_path / "store", include=["optimizer"])
    store = open_trajectory(tmp_path / "store")
    rows = np.zeros((store.n_states, store.chunk[1]), np.float32)
    store.read("momentum_buffer", 0, store.n_states, 0, rows)
    for row, number in zip(rows, store.scalar("step"), strict=True):
        for tensor in store.layout.tensors:
            np.testing.assert_array_equal(row[tensor.offset : tensor.stop], momenta[number][tensor.name].ravel())


def test_sharded_lightning_folders_give_the_same_run(tmp_path, fitted):
    """Write like Lightning's sharding strategies, which need a GPU: ``meta.pt`` contains all except the tensors."""
    folder, *_ = fitted
    for path in folder.glob("epoch*.ckpt"):
        checkpoint = torch.load(path, weights_only=False)
        state = {
            "model": checkpoint.pop("state_dict"),
            "gradient": checkpoint.pop("gradient"),
            "optimizer_0": checkpoint["optimizer_states"][0]["state"],
        }
        dcp.save(state, checkpoint_id=tmp_path / "out" / path.name, no_dist=True)
        torch.save(checkpoint, tmp_path / "out" / path.name / "meta.pt")
    assert found(tmp_path / "out") == "lightning"
    assert ledger_of(tmp_path / "sharded", [tmp_path / "out"]) == ledger_of(tmp_path / "single", [folder])


def module_with_late_gradients():
    """Return a module that adds the gradient of the last update to each checkpoint, and logs loss and rate."""

    class LateGradients(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.states = []

        def training_step(self, batch, index):
            loss = self.layer(batch[0]).square().mean()
            self.log("train_loss", loss)
            self.states.append({"loss": np.float64(loss.item())})
            return loss

        def on_before_optimizer_step(self, optimizer):
            for name, value in self.named_parameters():
                self.states[-1][f"parameter/{name}"] = value.detach().numpy().copy()
                self.states[-1][f"gradient/{name}"] = value.grad.numpy().copy()
            self.states[-1]["learning_rate"] = np.float64(optimizer.param_groups[0]["lr"])

        def on_save_checkpoint(self, checkpoint):
            checkpoint["gradient"] = {name: p.grad.clone() for name, p in self.named_parameters()}

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.125)
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    return LateGradients()


def test_gradients_of_the_state_before_and_the_scalars_of_a_logger_are_shifted_to_the_run(tmp_path):
    torch.manual_seed(0)
    module = module_with_late_gradients()
    data = torch.utils.data.TensorDataset(torch.randn(16, 3))
    lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=loggers.CSVLogger(tmp_path, name="logger"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            callbacks.ModelCheckpoint(dirpath=tmp_path / "out", every_n_train_steps=1, save_top_k=-1),
            callbacks.LearningRateMonitor("step"),
        ],
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    metrics = tmp_path / "logger" / "version_0" / "metrics.csv"
    os.utime(metrics, (1, 1))
    summary = ingest([tmp_path / "out", metrics], tmp_path / "unshifted.zarr")
    assert any("use --shift gradient=-1" in warning for warning in summary.warnings)
    # There is no checkpoint of state 0; the gradient of state 6 was never computed.
    last = {f"parameter/{name}": value.detach().numpy() for name, value in module.named_parameters()}
    last["learning_rate"] = np.float64(0.125 * 0.5**6)
    native = write_log(tmp_path / "native", [*module.states[1:], last], numbers=range(1, 7))
    expected = ledger_of(tmp_path / "expected", [native])
    assert ledger_of(tmp_path / "found", [tmp_path / "out", metrics], shift={"gradient": -1}) == expected


# accelerate and FSDP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """Write a run with ``Accelerator.save_state``, and its gradients into another folder."""
    folder = tmp_path_factory.mktemp("accelerate")
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model, optimizer = accelerator.prepare(model, optimizer)
    states, moments = [], []
    for step in range(UPDATES):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(4, 3)).square().mean())
        states.append({"learning_rate": np.float64(0.125)})
        for name, parameter in model.named_parameters():
            states[-1][f"parameter/{name}"] = parameter.detach().numpy().copy()
            states[-1][f"gradient/{name}"] = parameter.grad.numpy().copy()
        moments.append([optimizer.state[p]["exp_avg"].numpy().copy() for p in model.parameters()] if step else None)
        accelerator.save_state(str(folder / "run" / f"checkpoint-{step}"))
        optimizer.step()
    gradients = [{k: v for k, v in state.items() if k.startswith("gradient/")} for state in states]
    write_log(folder / "gradients", gradients)
    return folder, states, moments


def test_states_of_accelerate_reproduce_the_run(tmp_path, accelerated):
    folder, states, moments = accelerated
    assert found(folder / "run") == "huggingface"
    sources = [folder / "run", folder / "gradients"]
    native = write_log(tmp_path / "log", states)
    assert ledger_of(tmp_path / "out", sources) == ledger_of(tmp_path / "native", [native])
    ingest(sources, tmp_path / "store", include=["optimizer"])
    store = open_trajectory(tmp_path / "store")
    rows = np.zeros((store.n_states, store.chunk[1]), np.float32)
    store.read("exp_avg", 0, store.n_states, 0, rows)
    assert np.isnan(rows[0, :8]).all()  # there is no state before the first update
    for row, (weight, bias) in zip(rows[1:], moments[1:], strict=True):
        assert row[:8].tobytes() == np.concatenate([bias.ravel(), weight.ravel()]).tobytes()


def test_an_unfinished_state_of_accelerate_is_omitted_with_a_warning(tmp_path, accelerated, caplog):
    shutil.copytree(accelerated[0] / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3" / "random_states_0.pkl").unlink()
    assert [step.number for step in open_source(tmp_path / "run").steps()] == [0, 1, 2]
    assert "checkpoint-3 is left for the next pass: it has no random_states_*.pkl" in caplog.text


@pytest.mark.parametrize("body", [b"", b"no archive"])
def test_a_damaged_optimizer_file_matters_only_if_the_optimizer_is_requested(tmp_path, accelerated, body):
    shutil.copytree(accelerated[0] / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "optimizer.bin").write_bytes(body)
    sources = [tmp_path / "run", accelerated[0] / "gradients"]
    warnings = ingest(sources, tmp_path / "store").warnings
    assert any("optimizer was not read: optimizer.bin: cannot read a torch archive" in each for each in warnings)
    with pytest.raises(InputError, match=r"state of the optimizer: optimizer\.bin") as caught:
        ingest(sources, tmp_path / "other", include=["optimizer"])
    assert "checkpoint-2" in caught.value.where


def test_sharded_fsdp_checkpoints_of_the_trainer_are_read(tmp_path, trained):
    """Write like the Trainer with FSDP and SHARDED_STATE_DICT, which needs a GPU (``fsdp_utils`` of accelerate)."""
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "out")
    for checkpoint in (tmp_path / "out").iterdir():
        model = safetensors_torch.load_file(checkpoint / "model.safetensors")
        dcp.save({"model": model}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": {"state": {}}}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
        gradients = safetensors_torch.load_file(checkpoint / "gradient.safetensors")
        number = checkpoint.name.removeprefix("checkpoint-")
        (tmp_path / "gradients").mkdir(exist_ok=True)
        safetensors_torch.save_file(
            {f"gradient/{name}": gradient for name, gradient in gradients.items()},
            tmp_path / "gradients" / f"step_{number}.safetensors",
        )
        for name in ("model.safetensors", "gradient.safetensors", "optimizer.pt"):
            (checkpoint / name).unlink()
    assert found(tmp_path / "out") == "huggingface"
    sources = [tmp_path / "out", tmp_path / "gradients"]
    # Without optimizer.pt, the rate of the update after the last checkpoint is not saved.
    sharded, single = ledger_of(tmp_path / "sharded", sources), ledger_of(tmp_path / "single", [folder])
    assert sharded[:3] == single[:3]
    assert sharded[3][:2] == single[3][:2]
