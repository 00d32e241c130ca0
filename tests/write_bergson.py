"""Train two tiny models, and let Bergson build gradient stores of their states, in a separate process.

Usage: write_bergson.py FOLDER

Below FOLDER: ``gpt2`` (Conv1D) and ``neox`` (Linear), each with ``models/step-<N>``, ``stores/checkpoint-<N>`` and
``gradients/<N>.npz``, the gradients of torch in float64; and one store of each other kind in ``other``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from bergson.build import build_query
from bergson.cli.commands import Build
from bergson.config.config import DataConfig, IndexConfig, PreprocessConfig, QuerySetConfig
from bergson.gradients import AdamNormalizer, GradientProcessor
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

STEPS, RATE, WORDS = 3, 2.0**-6, 11
DOCUMENTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3], [5, 8, 9, 7, 9, 3]]

folder = Path(sys.argv[1])
torch.manual_seed(0)
data = {"input_ids": DOCUMENTS}
Dataset.from_dict(data).save_to_disk(str(folder / "data"))
words = Tokenizer(models.WordLevel({str(n): n for n in range(WORDS)}, "0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")


def options(model, store, **more):
    sizes = {"token_batch_size": 64, **more}
    dataset = DataConfig(dataset=str(folder / "data"))
    return IndexConfig(run_path=str(store), model=str(model), data=dataset, **{"precision": "fp64", **sizes})


def build(model, store, rows, **more):
    Build(options(model, store, **more), PreprocessConfig(**rows)).execute()


def loss_of(model):
    """The mean over documents of the sum over their tokens: Bergson's default."""
    losses = [
        torch.nn.functional.cross_entropy(
            model(torch.tensor([document])).logits[0, :-1], torch.tensor(document[1:]), reduction="sum"
        )
        for document in DOCUMENTS
    ]
    return sum(losses) / len(losses)


sizes = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
runs = {
    "gpt2": GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=8, n_layer=1, n_head=2, n_inner=12, **no_dropout)
    ),
    "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=12, max_position_embeddings=64)),
}
for name, model in runs.items():
    model.double()
    (folder / name / "gradients").mkdir(parents=True)
    for step in range(STEPS):
        saved = folder / name / "models" / f"step-{step}"
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        build(saved, folder / name / "stores" / f"checkpoint-{step}", {"aggregation": "mean"})
        model.zero_grad()
        loss_of(model).backward()
        gradients = {tensor: parameter.grad.numpy() for tensor, parameter in model.named_parameters()}
        np.savez(folder / name / "gradients" / f"{step}.npz", **gradients)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad

first, mean = folder / "gpt2" / "models" / "step-0", {"aggregation": "mean"}
other = folder / "other"
build(first, other / "rows" / "step-0", {})
build(first, other / "bfloat16" / "step-0", {}, precision="bf16")
build(first, other / "biased" / "step-0", mean, include_bias=True)
build(first, other / "biased rows" / "step-0", {}, include_bias=True)
build(first, other / "tokens" / "step-0", {}, attribute_tokens=True)
build(first, other / "projected" / "step-0", mean, projection_dim=4)
build(first, other / "projected to one" / "step-0", mean, projection_dim=4, projection_target="global")
build(first, other / "sum" / "step-0", {"aggregation": "sum"})
build(first, other / "unit" / "step-0", {**mean, "unit_normalize": True})
build(first, other / "unit mean" / "step-0", {**mean, "normalize_aggregated_grad": True})
build(first, other / "normalized" / "step-0", mean)
moments = {"h.0.mlp.c_proj": AdamNormalizer(torch.ones(8, 12))}
GradientProcessor(moments).save(other / "normalized" / "step-0")
examples = {"dataset": str(folder / "data"), "split": "train[:1]"}
query = QuerySetConfig(aggregation="mean", **examples, contrast=DataConfig(dataset=str(folder / "data")))
build_query(options(first, other / "contrast" / "step-0"), query, PreprocessConfig())
