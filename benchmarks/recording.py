"""Measure how much of the processor time of a training step the recording takes, and what people do without it.

    python -m benchmarks.recording

trains a transformer of 10 million parameters with one thread of torch. Steps with and without a method alternate.
The share is the processor time that the step of the optimizer takes with hooks, minus that without, plus that of
other threads, which write and flush; the forward and backward passes, which vary by more than that, are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

import natgrad

TOKENS = (256, 768, 1024)
LIMITS = {"ledger": {256: 0.04, 768: 0.015, 1024: 0.01}, "full": {768: 0.25, 1024: 0.25}}
"""Largest shares of a step that are promised."""

WORDS, WIDTH, LAYERS = 2048, 320, 8


class Transformer(torch.nn.Module):
    """A causal transformer of 10 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, words: Any) -> Any:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        hidden = self.layers(self.embed(words), mask=mask, is_causal=True)
        return hidden @ self.embed.weight.T


Method = Callable[[Any, Any, Path], Any]


@contextmanager
def nothing(model: Any, optimizer: Any, folder: Path) -> Iterator[None]:
    yield


def recorded(mode: str) -> Method:
    @contextmanager
    def method(model: Any, optimizer: Any, folder: Path) -> Iterator[None]:
        with natgrad.watch(optimizer, folder / mode, model=model, mode=mode, on_error="raise"):
            yield

    return method


def hooked(before_step: Callable[[dict[str, Any], int, Path], None]) -> Method:
    """Return a method that calls a function of the named parameters before each step."""

    @contextmanager
    def method(model: Any, optimizer: Any, folder: Path) -> Iterator[None]:
        named, count = dict(model.named_parameters()), 0

        def call(*_: Any) -> None:
            nonlocal count
            before_step(named, count, folder)
            count += 1

        handle = optimizer.register_step_pre_hook(call)
        yield
        handle.remove()

    return method


def clone_and_save(named: dict[str, Any], step: int, folder: Path) -> None:
    state = {name: (one.detach().clone(), one.grad.clone()) for name, one in named.items()}
    torch.save(state, folder / f"step_{step}.pt")


def histograms(named: dict[str, Any], step: int, folder: Path) -> None:
    """Compute what wandb.watch(log="all") does: a histogram of 64 bins of each parameter and gradient."""
    for one in named.values():
        for tensor in (one.detach(), one.grad):
            flat = tensor.reshape(-1)
            torch.histc(flat, 64, flat.min().item(), flat.max().item()).tolist()


def norms(named: dict[str, Any], step: int, folder: Path) -> None:
    for one in named.values():
        one.detach().norm().item()
        one.grad.norm().item()


METHODS: dict[str, Method] = {
    "none": nothing,
    "ledger": recorded("ledger"),
    "full": recorded("full"),
    "clone and save": hooked(clone_and_save),
    "histograms": hooked(histograms),
    "norms with item()": hooked(norms),
}


@dataclass(frozen=True)
class Seconds:
    """Processor time of a training step, that of the call of the optimizer in it, and that of other threads."""

    step: float
    call: float
    others: float


def seconds_of_steps(method: Method, model: Any, optimizer: Any, tokens: int, steps: int, folder: Path) -> Seconds:
    """Train for some steps, after one that is not counted. Other threads count until they have written all."""
    words = torch.randint(0, WORDS, (1, tokens + 1))
    calls, everything, here = 0.0, 0.0, 0.0
    with method(model, optimizer, folder):
        for step in range(steps + 1):
            if step == 1:
                calls, everything, here = 0.0, time.process_time(), time.thread_time()
            optimizer.zero_grad()
            scores = model(words[:, :-1])
            torch.nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten()).backward()
            before = time.thread_time()
            optimizer.step()
            calls += time.thread_time() - before
        own = time.thread_time() - here
    others = time.process_time() - everything - (time.thread_time() - here)
    return Seconds(own / steps, calls / steps, others / steps)


def memory(model: Any, optimizer: Any, folder: Path) -> float:
    """Return the memory that the recording of ledgers takes, as a multiple of the parameters."""
    # The first recording also loads the compiler.
    small = torch.nn.Linear(1, 1)
    with natgrad.watch(one := torch.optim.SGD(small.parameters()), folder / "small", model=small, mode="ledger"):
        small(torch.ones(1)).backward()
        one.step()
    seconds_of_steps(nothing, model, optimizer, 16, 2, folder)
    before = psutil.Process().memory_info().rss
    with natgrad.watch(optimizer, folder / "memory", model=model, mode="ledger", on_error="raise"):
        seconds_of_steps(nothing, model, optimizer, 16, 2, folder)
        taken = psutil.Process().memory_info().rss - before
    return taken / sum(one.numel() * one.element_size() for one in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    report: dict[str, Any] = {"parameters": sum(one.numel() for one in model.parameters()), "steps": {}}
    folder = Path(tempfile.mkdtemp())
    try:
        report["memory of ledgers"] = memory(model, optimizer, folder)
        for tokens in TOKENS:
            names = ["none", *(name for name in METHODS if name in arguments.only.split(",") and name != "none")]
            found: dict[str, list[Seconds]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name in names:
                    method, steps = METHODS[name], arguments.steps
                    found[name].append(seconds_of_steps(method, model, optimizer, tokens, steps, folder))
                    shutil.rmtree(folder)
                    folder.mkdir()
            step, call = (median(getattr(one, kind) for one in found["none"]) for kind in ("step", "call"))
            shares = {
                name: (median(one.call + one.others for one in found[name]) - call) / step for name in names[1:]
            }
            report["steps"][tokens] = {"seconds": step, "shares": shares}
            print(f"{tokens} tokens: {step * 1e3:.0f} ms")
            for name, share in shares.items():
                limit = LIMITS.get(name, {}).get(tokens)
                print(f"  {name:18s} {share:7.2%}" + (f"  (at most {limit:.1%})" if limit else ""))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"memory of ledgers: {report['memory of ledgers']:.2f} times the parameters")
    output = Path(__file__).parents[1] / "bench" / "recording.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
