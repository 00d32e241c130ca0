"""A run of the Hugging Face Trainer.

A small GPT-2 learns to count, and a callback records its Trainer.
AdamW never takes a step of steepest descent, but every update of the model descends, and so does every sum of ten
consecutive updates.
Sort the table of tensors by angle: the weights and biases of the attention's queries, keys and values are farthest
from steepest descent, and the gain of the last normalization is nearest to it.
The learning rate falls to zero at the end of the run, and the size of the updates with it.
"""

import torch
import transformers

import natgrad

torch.manual_seed(0)
config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
sequences = (torch.arange(16) + torch.randint(0, 32, (64, 1))) % 32
trainer = transformers.Trainer(
    transformers.GPT2LMHeadModel(config),
    transformers.TrainingArguments(
        "checkpoints", max_steps=60, learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in sequences],
    callbacks=[natgrad.WatchCallback("logs/trainer", evaluation="batch")],
)
trainer.train()
losses = "checkpoints/checkpoint-60/trainer_state.json"
natgrad.process(["logs/trainer", losses], "runs/trainer", windows=[1, 10])
natgrad.report("runs/trainer", "report.html")

# The statements about this run.
results = natgrad.open_results("runs/trainer").sel(descent="gradient")
model, tensor = results["model"], results["tensor"].sel(window=1)
assert model["angle"].sel(window=1).min() > 0.5
assert (model["effective"].sel(window=1) == 1).all()
assert (model["effective"].sel(window=10)[: 60 - 10 + 1] == 1).all()
angles = tensor["angle"].median("step").to_series().sort_values()
assert all(".attn.c_attn." in name for name in angles.index[-4:])
assert angles.index[0] == "transformer.ln_f.weight"
assert model["update_to_weight"][-1] < 0.05 * model["update_to_weight"].max()
assert model["loss"][-1] < 0.8 * model["loss"][0]
