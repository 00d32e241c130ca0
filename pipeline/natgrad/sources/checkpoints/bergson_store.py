"""Gradient stores of Bergson: the mean gradient of a state, without the shapes and orientation of its tensors.

A row of ``gradients.bin`` has the gradients of the weights of a model's linear modules, flat, one after the other
in the order of ``info.json``: names without the model's prefix, and sizes. Each is stored (out, in), whatever the
model has (GPT-2's ``Conv1D`` is the transpose), with the gradient of the bias as a last column where it was asked
for (bergson 2.5.1: ``data.create_index``, ``collector.HookCollectorBase.shapes``). So names and shapes come from
the parameters that a store is joined with, and the orientation from the user.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES, widened
from natgrad.sources.base import StepContent
from natgrad.sources.checkpoints.step_folder import Kind, StepFolder
from natgrad.sources.container import Region, boxes, refused
from natgrad.sources.names import MAP_FILE, is_step, step_number
from natgrad.sources.steps import LoggedStep, LoggedTensor, where
from natgrad.storage import LocalStorage

__all__ = ["BergsonFolder", "blocks", "holds_bergson"]

_DATA, _INFO, _PROCESSOR, _CONFIG = "gradients.bin", "info.json", "processor_config.yaml", "config.yaml"
_PART = ".part"
_FORM = "a gradient store of Bergson"
_TEXT_LIMIT = 1 << 24
BLOCK = 1 << 20
"""Default number of elements that are gathered at a time, if they do not lie in the order of the tensor."""

_LAYOUTS = ("linear", "conv1d")
_HOW_TO_SAY = (
    f'write into {MAP_FILE} in the folder of SOURCE the table [bergson] with layout = "linear" (weights are (out, '
    'in): torch.nn.Linear) or layout = "conv1d" (they are (in, out): Conv1D of transformers, as in GPT-2), and '
    'where modules differ a table [bergson.modules] with lines "MODULE" = "linear"'
)
_HOW_TO_BUILD = (
    "build one of each checkpoint: bergson build STORES/checkpoint-N --model CHECKPOINTS/checkpoint-N "
    "--projection_dim 0 --aggregation mean, without optimizer_state, hessian_path, unit_normalize and "
    "attribute_tokens, over all examples of the loss; or log the gradient of each step beside the parameters "
    "(natgrad.recording.recorder)"
)

# Of processor_config.yaml and config.yaml: settings that change what a row is, where they are not these.
_PLAIN = {
    "projection_dim": ("null", "0"),
    "optimizer_state": ("", "''", '""', "null"),
    "hessian_path": ("", "''", '""', "null"),
    "unit_normalize": ("false",),
    "normalize_aggregated_grad": ("false",),
    "aggregation": ("mean", "none"),
    "precision": ("fp64", "fp32", "bf16", "fp16", "auto"),
}
_MEANING = {
    "projection_dim": "its gradients are projected at random",
    "optimizer_state": "they are divided by roots of an optimizer's second moments",
    "hessian_path": "they are multiplied by the inverse of a Hessian",
    "unit_normalize": "each is scaled to length 1",
    "normalize_aggregated_grad": "their mean is scaled to length 1",
    "aggregation": "its row is no mean over examples",
    "precision": "they were taken at quantized weights, not at those of the state",
}
_OF_STEP = re.compile(r"(?:(?:global_)?step|iter|checkpoint|ckpt)?[-_=]?\d{1,18}")

# What the loss is: said in a note, as no file says what was trained.
_LOSS = (
    *("loss_fn", "loss_reduction", "label_smoothing", "logit_scale", "advantage_column"),
    *("dataset", "split", "max_tokens", "precision"),
)
_USUAL = {
    "label_smoothing": ("0.0",),
    "logit_scale": ("1.0",),
    "advantage_column": ("", "''"),
    "split": ("train",),
    "max_tokens": ("null",),
    "precision": ("fp64", "fp32", "auto"),
}


# Finding stores ----------------------------------------------------------------------------------------------


def _is_store(path: Path) -> bool:
    return (path / _DATA).is_file() and (path / _INFO).is_file()


def _number(path: Path) -> int | None:
    return step_number(path.name.removesuffix(_PART)) if path.is_dir() and _is_store(path) else None


def _unfinished(path: Path) -> str:
    return f"it is called {path.name}: Bergson is building it" if path.name.endswith(_PART) else ""


def _of_epochs(path: Path) -> list[Path]:
    """Return the stores that the callback of the Trainer wrote into a folder, or that it is one of."""
    found = (path, *sorted(path.glob("epoch_*")), *sorted(path.glob("train/epoch_*")))
    return [store for store in found if store.name.startswith("epoch_") and _is_store(store)]


def holds_bergson(path: Path) -> bool:
    """Whether a folder is a gradient store, or holds those of steps, or of the epochs of a training run."""
    if not path.is_dir():
        return False
    return _is_store(path) or bool(_of_epochs(path)) or any(_number(entry) is not None for entry in path.iterdir())


class BergsonFolder(StepFolder):
    """A folder of gradient stores, one for each state and called after it, or one such store.

    Parameters
    ----------
    location : Path
    mapping : mapping, optional
        There is nothing to map: refused where it is not empty.

    Raises
    ------
    InputError
        Where the mapping file cannot be understood.
    """

    def __init__(self, location: Path, mapping: Mapping[str, str] | None = None) -> None:
        super().__init__(LocalStorage(location), [_KIND], own_map_file=True)
        self._folder = location
        if mapping:
            raise InputError(
                f"{', '.join(mapping)} cannot be mapped: a gradient store of Bergson has gradients alone",
                where=str(location),
                remedy="leave --map out, or give it with the other source in a run file",
            )
        self._orientation = _Orientation.of_folder(self._folder)

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        epochs = _of_epochs(self._folder)
        if epochs:
            raise _no_gradient(
                epochs[0], ["its rows were taken while the parameters changed, each at another state"]
            )
        if not _is_store(self._folder):
            return super().steps()
        number = step_number(self.location.name) if is_step(self.location.name) else None
        if number is None or _unfinished(self._folder):
            raise InputError(
                "the name of this gradient store does not say of which state it is",
                where=str(self.location),
                why="its files do not say how many updates were done before"
                if number is None
                else "it is not whole",
                remedy="call its folder checkpoint-N or step-N, of the state after N updates",
            )
        return [LoggedStep(number, self.location)]

    def open(self, step: LoggedStep) -> BergsonStep:
        """Open a step; see `natgrad.sources.base.Source`.

        Raises
        ------
        InputError
            Where the store is damaged, has no gradient of the loss, or says that it is of another step.
        """
        return BergsonStep(step, self._orientation)


def _opened(step: LoggedStep, names: object) -> NoReturn:
    raise NotImplementedError("BergsonFolder opens its steps itself")


_KIND = Kind("checkpoint-<N>/gradients.bin", _number, _opened, unfinished=_unfinished)


# What the user says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Orientation:
    """Which modules are transposed, as the mapping file of a folder says.

    Attributes
    ----------
    path : Path
        The file.
    layout : str, optional
        Of the modules that are not in ``modules``.
    modules : mapping
    """

    path: Path
    layout: str | None
    modules: Mapping[str, str]

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        path = folder / MAP_FILE
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read the mapping file: {error}", where=str(path), remedy=_HOW_TO_SAY
            ) from error
        said = table.pop("bergson", {})
        said = dict(said) if isinstance(said, dict) else {"bergson": said}
        layout, modules = said.pop("layout", None), said.pop("modules", {})
        layouts = [
            *([] if layout is None else [layout]),
            *(modules.values() if isinstance(modules, dict) else [None]),
        ]
        if table or said or not all(layout in _LAYOUTS for layout in layouts):
            raise InputError(
                f"the mapping file holds {', '.join((*table, *said)) or 'another layout than there is'}",
                where=str(path),
                remedy=_HOW_TO_SAY,
            )
        return cls(path, layout, modules)

    def transposed(self, step: LoggedStep, module: str) -> bool:
        """Whether the model has the transpose of what is stored."""
        layout = self.modules.get(module, self.layout)
        if layout is None:
            raise InputError(
                f"nothing says whether module {module!r} is stored as the model has it, or transposed",
                where=where(step, "gradient", module),
                why="Bergson stores every weight as (out, in), GPT-2's Conv1D has (in, out), and a store says "
                "neither the shape nor the kind of a module; of a square matrix nothing else tells",
                remedy=_HOW_TO_SAY,
            )
        return layout == "conv1d"


# One store ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """Where the elements of a tensor lie in a row of the store.

    Attributes
    ----------
    shape : tuple of int
        (a, b) of the tensor.
    offset : int
        First element of the stored matrix.
    columns : int
        Elements of its rows.
    first : int
        First of its columns that belongs to the tensor.
    transposed : bool
        Element (i, j) of the tensor is (j, i) of the stored matrix.
    """

    shape: tuple[int, int]
    offset: int
    columns: int
    first: int = 0
    transposed: bool = False


class BergsonStep:
    """An open gradient store.

    Without the parameters that it belongs to, its gradients are flat and named after their modules; see `shaped`.
    """

    def __init__(self, step: LoggedStep, orientation: _Orientation) -> None:
        self._step, self._orientation = step, orientation
        with refused(step, _FORM):
            if not _is_store(step.path):
                raise FileNotFoundError(f"{_DATA} or {_INFO} is gone")
            info = json.loads(_text(step.path / _INFO))
            if not isinstance(info, dict):
                raise ValueError(f"{_INFO} is no table")
        self._settings = _settings(_text(step.path / _CONFIG)) | _settings(_text(step.path / _PROCESSOR))
        reasons = list(_reasons(step.path, info))
        if reasons:
            raise _no_gradient(step.path, reasons)
        self._require_step()
        with refused(step, _FORM):
            self._sizes, self._rows, self._logged = _described(info)
        self._mean = self._settings["aggregation"] == {"none"}
        self._elements = sum(self._sizes.values())
        starts = itertools.accumulate(self._sizes.values(), initial=0)
        self._offsets = dict(zip(self._sizes, starts, strict=False))
        # A mean is as exact as one that Bergson takes itself, in float32.
        self._dtype = self._logged if not self._mean or self._logged == "float64" else "float32"
        self._matrices = {name: _Matrix((1, size), self._offsets[name], size) for name, size in self._sizes.items()}
        self._itemsize = 2 if self._logged == "bfloat16" else np.dtype(self._logged).itemsize
        with refused(step, _FORM):
            self._descriptor = os.open(step.path / _DATA, os.O_RDONLY)
        try:
            with refused(step, _FORM):
                self._region = Region(self._descriptor)
                expected = self._rows * self._elements * self._itemsize
                if self._region.length != expected:
                    raise ValueError(f"{_DATA} has {self._region.length} bytes, {_INFO} says {expected}")
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def _require_step(self) -> None:
        """Refuse a store that was built of another checkpoint than its name says."""
        told = [value.strip("'\"") for key in ("revision", "model") for value in self._settings.get(key, ())]
        name = next((name for value in told if _OF_STEP.fullmatch(name := Path(value).name)), None)
        if name is not None and step_number(name) != self._step.number:
            raise InputError(
                f"the store was built of {name}, its name says step {self._step.number}",
                where=where(self._step),
                why="the folder was renamed, or counts something else than the checkpoints do",
                remedy="call the folder after the checkpoint that the gradients are of",
            )

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        shapes = {name: LoggedTensor((size,), self._dtype) for name, size in self._sizes.items()}
        return StepContent({"gradient": shapes}, notes=(self._loss(),))

    def shaped(self, parameters: Mapping[str, LoggedTensor]) -> StepContent:
        """Describe the step by the names and shapes of the parameters that it is joined with.

        Parameters
        ----------
        parameters : mapping
            Tensor to what was logged of it.

        Returns
        -------
        StepContent
            Its tensors are read by these names from now on.

        Raises
        ------
        InputError
            Where a module does not fit exactly one tensor, or nothing says how it is oriented.
        """
        unknown = [module for module in self._orientation.modules if module not in self._sizes]
        if unknown:
            raise InputError(
                f"there is no module {unknown[0]!r} in this store",
                where=str(self._orientation.path),
                why=f"its modules are {_listed(self._sizes)}",
                remedy="write the names as info.json has them",
            )
        prefix = self._prefix(parameters)
        found: dict[str, _Matrix] = {}
        for module in self._sizes:
            found |= self._fitted(prefix + module, module, parameters)
        self._matrices = found
        tensors = {name: LoggedTensor(parameters[name].shape, self._dtype) for name in found}
        return StepContent(
            {"gradient": tensors},
            notes=(self._loss(),),
            untrained=True,
            no_gradient="Bergson takes that of linear modules alone: every result of the model is of its other "
            f"{len(found)} tensors, though these may have been trained too",
        )

    def _prefix(self, parameters: Mapping[str, LoggedTensor]) -> str:
        """Return what stands before the names of all modules in those of the model."""
        candidates: list[str] | None = None
        for module in self._sizes:
            ending = f"{module}.weight"
            named = [name for name in parameters if name == ending or name.endswith(f".{ending}")]
            fitting = [
                name.removesuffix(ending) for name in named if self._bias(module, parameters[name]) is not None
            ]
            if not fitting:
                shapes = ", ".join(f"{name!r} has {parameters[name].shape}" for name in named[:4])
                raise InputError(
                    f"module {module!r} fits no tensor of the model: it has {self._sizes[module]} elements",
                    where=where(self._step, "gradient", module),
                    why=shapes or f"no tensor is called {ending}, or ends so; there are {_listed(parameters)}",
                    remedy="give the parameters of the model that the store was built of; a head of attention or "
                    "an expert (split_attention_modules, moe_experts) is no tensor: build without",
                )
            candidates = fitting if candidates is None else [prefix for prefix in candidates if prefix in fitting]
        if candidates is None or len(candidates) != 1:
            raise InputError(
                "the modules of the store are not those of one part of the model",
                where=where(self._step, "gradient"),
                why=f"the names of {_listed(self._sizes)} fit those of the tensors with "
                + (f"each of the prefixes {_listed(candidates)}" if candidates else "no prefix that they share"),
                remedy="give the parameters of the model that the store was built of, and no other",
            )
        return candidates[0]

    def _bias(self, module: str, weight: LoggedTensor) -> int | None:
        """Columns of the bias, 0 or 1, that a module has if the weight is its; None where it cannot be."""
        if len(weight.shape) != 2:
            return None
        rows, columns = reversed(weight.shape) if self._orientation.transposed(self._step, module) else weight.shape
        with_bias = (0, 1) if self._settings.get("include_bias") == {"true"} else (0,)
        return next((bias for bias in with_bias if rows * (columns + bias) == self._sizes[module]), None)

    def _fitted(
        self, name: str, module: str, parameters: Mapping[str, LoggedTensor]
    ) -> Iterator[tuple[str, _Matrix]]:
        """Give the tensors of a module, and where they lie."""
        weight, offset = parameters[f"{name}.weight"], self._offsets[module]
        transposed, bias = self._orientation.transposed(self._step, module), self._bias(module, weight)
        assert bias is not None
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        yield f"{name}.weight", _Matrix((weight.shape[0], weight.shape[1]), offset, columns + bias, 0, transposed)
        if bias:
            logged = parameters.get(f"{name}.bias")
            if logged is None or logged.shape != (rows,):
                raise InputError(
                    f"the gradient of the bias of {module!r} fits no tensor of the model: it has {rows} elements",
                    where=where(self._step, "gradient", f"{name}.bias"),
                    why="there is none" if logged is None else f"the parameter has shape {logged.shape}",
                    remedy="give the parameters of the model that the store was built of",
                )
            # The last column, read as a matrix of one row.
            yield f"{name}.bias", _Matrix((1, rows), offset, columns + 1, columns, True)

    def _loss(self) -> str:
        """Say of which loss the gradients are."""
        said = {name: ", ".join(sorted(self._settings.get(name, ()))) for name in _LOSS}
        told = [
            f"{name}: {value[:80]}" for name, value in said.items() if value and value not in _USUAL.get(name, ())
        ]
        return (
            f"gradients of Bergson are of the mean over documents ({', '.join(told)}), and a loss that is given "
            "too must be the same: with 'sum' it is a trainer's mean over all tokens times the tokens per document"
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with refused(self._step, _FORM, f"{array}/{tensor}"):
            matrix, done = self._matrices[tensor], 0
            for box in boxes(matrix.shape, start, start + out.size):
                for rows, columns in blocks(*box):
                    part = out[done : done + len(rows) * len(columns)]
                    self._gather(matrix, rows, columns, part)
                    done += part.size

    def _gather(self, matrix: _Matrix, rows: range, columns: range, out: NDArray[Any]) -> None:
        """Read a box of a tensor."""
        if matrix.transposed:
            first = matrix.offset + matrix.first + rows.start
            stored = np.empty((len(columns), len(rows)), out.dtype)
            for row, column in zip(stored, columns, strict=True):
                self._fill(first + column * matrix.columns, row)
            out.reshape(len(rows), len(columns))[:] = stored.T
        elif len(columns) == matrix.columns:
            self._fill(matrix.offset + rows.start * matrix.columns, out)
        else:
            first = matrix.offset + matrix.first + columns.start
            for part, row in zip(out.reshape(len(rows), len(columns)), rows, strict=True):
                self._fill(first + row * matrix.columns, part)

    def _fill(self, start: int, out: NDArray[Any]) -> None:
        """Read elements that lie together; of rows of examples, their mean."""
        if not self._mean:
            self._region.fill(start * self._itemsize, out)
            return
        words = np.empty(out.size, np.uint16 if self._logged == "bfloat16" else self._logged)
        total = np.zeros(out.size)
        # Gradients of a diverged run overflow, or are none.
        with np.errstate(all="ignore"):
            for row in range(self._rows):
                self._region.fill((row * self._elements + start) * self._itemsize, words)
                total += widened(words, self._logged)
            out[:] = total / self._rows


def blocks(rows: slice, columns: slice, *, most: int = BLOCK) -> Iterator[tuple[range, range]]:
    """Split a box into boxes of at most this many elements, in the order of the elements.

    Parameters
    ----------
    rows, columns : slice
    most : int

    Yields
    ------
    rows, columns : range
    """
    step = max(1, most // (columns.stop - columns.start))
    for first in range(rows.start, rows.stop, step):
        block = range(first, min(first + step, rows.stop))
        if len(block) > 1 or columns.stop - columns.start <= most:
            yield block, range(columns.start, columns.stop)
            continue
        for start in range(columns.start, columns.stop, most):
            yield block, range(start, min(start + most, columns.stop))


# What its own files say --------------------------------------------------------------------------------------


def _no_gradient(store: Path, reasons: list[str]) -> InputError:
    return InputError(
        "this gradient store of Bergson has no gradient of the loss at a state",
        where=str(store),
        why="; ".join(reasons),
        remedy=_HOW_TO_BUILD,
    )


def _reasons(store: Path, info: Mapping[str, Any]) -> Iterator[str]:
    """Say what of a store is no gradient of the loss, by its own files."""
    if info.get("attribute_tokens"):
        yield "it has a row for each token"
    processor, config = (_settings(_text(store / name)) for name in (_PROCESSOR, _CONFIG))
    if "projection_dim" not in processor:
        yield f"it does not say whether it is projected ({_PROCESSOR})"
    if not {"aggregation", "unit_normalize"} <= config.keys():
        yield f"it does not say how its rows were made ({_CONFIG})"
    elif len(config["aggregation"]) > 1 or len(config.get("model", ())) > 1:
        yield f"its {_CONFIG} is of several builds"
    for setting, plain in _PLAIN.items():
        values = processor.get(setting, set()) | config.get(setting, set())
        told = next((value for value in sorted(values) if value not in plain), None)
        if told is not None:
            yield f"{_MEANING[setting]} ({setting}: {told[:80]})"
    if config.get("aggregation") == {"mean"} and info.get("num_grads") != 1:
        yield f"it has {str(info.get('num_grads'))[:20]} rows, where a mean is one"
    if (store / "contrast").exists():
        yield "the gradient of other examples was subtracted (contrast/)"
    if _has_normalizers(store / "normalizers.pth"):
        yield "they are scaled by an optimizer's second moments (normalizers.pth)"


def _has_normalizers(path: Path) -> bool:
    """Whether a file of normalizers holds any: each has a tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.search(r"(^|/)data/", name) for name in archive.namelist())
    except FileNotFoundError:
        return False
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):
        return True


def _settings(text: str) -> dict[str, set[str]]:
    """Values of each setting in a file as PyYAML dumps it, a line each, at whatever depth."""
    found: dict[str, set[str]] = {}
    for name, value in re.findall(r"^[ \t-]*(\w+):[ \t]*(.*?)[ \t]*$", text, re.MULTILINE):
        found.setdefault(name, set()).add(value)
    return found


def _described(info: Mapping[str, Any]) -> tuple[dict[str, int], int, str]:
    """Sizes of modules, number of rows and dtype."""
    sizes, rows, dtype = (info.get(key) for key in ("grad_sizes", "num_grads", "base_dtype"))
    if not isinstance(sizes, dict) or not sizes or any(type(n) is not int or n < 1 for n in sizes.values()):
        raise ValueError(f"grad_sizes of {_INFO} are no sizes of modules")
    if type(rows) is not int or rows < 1:
        raise ValueError(f"num_grads of {_INFO} is {str(rows)[:20]}")
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"base_dtype of {_INFO} is {str(dtype)[:20]}, not one of {', '.join(STORAGE_DTYPES)}")
    return sizes, rows, dtype


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_TEXT_LIMIT)
    except OSError:
        return ""
