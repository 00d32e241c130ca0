"""Gradient stores of Bergson: recognised, and refused with what the store itself says.

A row has the gradients of linear and convolutional weights, flat, one after the other; ``info.json`` has their
names and sizes. Shapes are not there: a square matrix that Bergson stores as (out, in) and the model as (in, out)
(GPT-2's ``Conv1D``) could not be told from its transpose. So no gradient is taken from it, whatever else it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from pipeline.schema import InputError

__all__ = ["holds_bergson", "refuse_bergson"]

_DATA, _INFO = "gradients.bin", "info.json"
_TEXT_LIMIT = 1 << 20

# Of processor_config.yaml and config.yaml: settings that change what a row is, where they are not these.
_SETTINGS = {
    "projection_dim": ("null", "0"),
    "optimizer_state": ("", "''", '""', "null"),
    "hessian_path": ("", "''", '""', "null"),
    "unit_normalize": ("false",),
    "normalize_aggregated_grad": ("false",),
}
_MEANING = {
    "projection_dim": "its gradients are projected at random",
    "optimizer_state": "they are divided by roots of an optimizer's second moments",
    "hessian_path": "they are multiplied by the inverse of a Hessian",
    "unit_normalize": "each is scaled to length 1",
    "normalize_aggregated_grad": "their mean is scaled to length 1",
}


def _stores(path: Path) -> list[Path]:
    """Return the stores that a folder is, or that the callback of the Trainer wrote below it."""
    folders = (path, *path.glob("epoch_*"), *path.glob("train/epoch_*")) if path.is_dir() else ()
    return [folder for folder in folders if (folder / _DATA).is_file() and (folder / _INFO).is_file()]


def holds_bergson(path: Path) -> bool:
    """Whether a folder is a gradient store, or holds those of the epochs of a training run."""
    return bool(_stores(path))


def refuse_bergson(path: Path, mapping: Mapping[str, str]) -> NoReturn:
    """Refuse a store, with what it lacks and how to have it.

    Raises
    ------
    InputError
        Always.
    """
    stores = _stores(path)
    if not stores:
        raise InputError(
            "no step files, and no gradients.bin with its info.json, in this folder",
            where=str(path),
            remedy="give the folder that holds the step files; natgrad formats lists what can be read",
        )
    raise InputError(
        "a gradient store of Bergson is not read as a gradient of the loss",
        where=str(stores[0]),
        why="; ".join(_reasons(stores[0])),
        remedy="build one of each checkpoint (bergson build STORE --model step-N --projection_dim 0 --aggregation "
        "mean, without optimizer_state, hessian_path and unit_normalize, over all examples of the loss) and save "
        "it with the shapes and names of the model: {PREFIX + name + '.weight': row.reshape(out, in)} of "
        "bergson.data.load_module_gradients(STORE), transposed for Conv1D, as step-N/gradient.safetensors; or log "
        "the gradient of each step beside the parameters (pipeline.recorder)",
    )


def _reasons(store: Path) -> Iterator[str]:
    """Say what of a store is no gradient of the loss, by its own files."""
    if store.name.startswith("epoch_"):
        yield "its rows were taken while the parameters changed, each at another state of the epoch"
    try:
        info = json.loads(_text(store / _INFO))
    except (ValueError, RecursionError):
        info = None
    if isinstance(info, dict) and info.get("attribute_tokens"):
        yield "it has a row for each token"
    elif isinstance(info, dict) and info.get("num_grads") != 1:
        yield f"it has a row for each of {str(info.get('num_grads'))[:20]} examples"
    texts = [_text(store / name) for name in ("processor_config.yaml", "config.yaml")]
    if not texts[0]:
        yield "it does not say whether it is projected (processor_config.yaml)"
    for setting, plain in _SETTINGS.items():
        found = [value for text in texts for value in re.findall(rf"^[ \t-]*{setting}:(.*)$", text, re.MULTILINE)]
        told = next((value.strip() for value in found if value.strip() not in plain), None)
        if told is not None:
            yield f"{_MEANING[setting]} ({setting}: {told[:80]})"
    yield (
        "it has the weights of linear and convolutional modules alone, under names without the model's prefix, and "
        "neither their shapes nor whether they are transposed"
    )


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_TEXT_LIMIT)
    except OSError:
        return ""
