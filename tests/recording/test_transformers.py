"""Record a real training run of the Trainer, and compare the log with its gradients."""

import subprocess
import sys

import natgrad
from lazy import Lazy
from watched import all_states, read, updates_of

torch = Lazy("torch")
transformers = Lazy("transformers")


def make_trainer(folder, callbacks, steps, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    rows = torch.randint(0, 17, (16, 8))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=0.5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=callbacks,
    )


def test_a_trainer_is_recorded_in_both_modes_and_continued_from_a_checkpoint(tmp_path):
    class Keeps(transformers.TrainerCallback):
        def __init__(self):
            self.states = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            # The gradients are accumulated and clipped here.
            named = dict(model.named_parameters())
            self.states.append({name: (one.detach().clone(), one.grad.clone()) for name, one in named.items()})

    kept = Keeps()
    for steps, resume in ((4, None), (6, str(tmp_path / "out" / "checkpoint-4"))):
        watches = [natgrad.WatchCallback(tmp_path / mode, mode=mode) for mode in ("full", "ledger")]
        assert watches[0].watch is None
        make_trainer(tmp_path / "out", [kept, *watches], steps).train(resume_from_checkpoint=resume)
        assert [one.watch.recorded for one in watches] == [steps if resume is None else 2] * 2
    assert list(all_states(tmp_path / "full")) == [*range(7)]
    found = read(tmp_path / "full")
    for number, (state, expected) in enumerate(zip(found.values(), kept.states, strict=True)):
        assert set(state["parameter"]) == set(expected), number
        for name, (parameter, gradient) in expected.items():
            assert torch.equal(state["parameter"][name], parameter)
            assert torch.equal(state["gradient"][name], gradient)
    ledgers = list(updates_of(tmp_path / "ledger"))
    assert [update["step"] for update in ledgers] == [*range(6)]
    natgrad.process(tmp_path / "full", tmp_path / "run")
    table = natgrad.open_results(tmp_path / "run")["model"]
    assert table["step"].values.tolist() == [*range(6)]


def test_a_missing_library_is_an_error_with_the_remedy():
    code = """
import sys
sys.modules["transformers"] = sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import natgrad
for name in ("WatchCallback", "LightningWatch"):
    try:
        getattr(natgrad, name)
    except natgrad.InputError as error:
        print(error.what, error.remedy.partition(";")[0], sep=": ")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "natgrad.WatchCallback needs transformers, which is not installed: pip install transformers",
        "natgrad.LightningWatch needs Lightning, which is not installed: pip install lightning",
    ]
