"""Read gradient stores of Bergson: the mean gradient of a state, without tensor shapes and orientations.

A row of ``gradients.bin`` contains the flat gradients of the weights of the linear modules of a model, in the
order of ``info.json``, which lists names without the prefix of the model, and sizes. Each gradient is stored as
(out, in), regardless of the model (GPT-2's ``Conv1D`` is the transpose). If biases were requested, the gradient of
the bias is the last column (bergson 2.5.1: ``data.create_index``, ``collector.HookCollectorBase.shapes``). Names
and shapes therefore come from the parameters with which a store is joined, and the orientation comes from the user.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
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
from natgrad.sources.bounds import JSON_LIMIT, integer, parse_json, parse_toml, read_limited, shown
from natgrad.sources.checkpoints.step_folder import Kind, StepFolder
from natgrad.sources.checkpoints.zip_members import open_archive
from natgrad.sources.container import Region, boxes, read_errors
from natgrad.sources.names import MAP_FILE
from natgrad.sources.step_names import is_step, step_number
from natgrad.sources.steps import LoggedStep, LoggedTensor, where
from natgrad.storage import LocalStorage, open_regular

__all__ = ["BergsonFolder", "blocks", "holds_bergson"]

_DATA, _INFO, _PROCESSOR, _CONFIG = "gradients.bin", "info.json", "processor_config.yaml", "config.yaml"
_UNFINISHED_SUFFIX = ".part"
_FORM = "a gradient store of Bergson"
_TEXT_LIMIT = 1 << 22
BLOCK = 1 << 20
"""Default number of elements gathered at a time, if they are not stored in the order of the tensor."""

_LAYOUTS = ("linear", "conv1d")
_LAYOUT_REMEDY = (
    f'write a table [bergson] into {MAP_FILE} in the folder of SOURCE, with layout = "linear" if weights are (out, '
    'in), as in torch.nn.Linear, or layout = "conv1d" if they are (in, out), as in Conv1D of transformers (GPT-2); '
    'if modules differ, add a table [bergson.modules] with lines "MODULE" = "linear"'
)
_BUILD_REMEDY = (
    "build one store per checkpoint: bergson build STORES/checkpoint-N --model CHECKPOINTS/checkpoint-N "
    "--projection_dim 0 --aggregation mean, without optimizer_state, hessian_path, unit_normalize and "
    "attribute_tokens, over all examples of the loss; or log the gradients of each step together with the "
    "parameters (natgrad.recording.recorder)"
)

# Settings in processor_config.yaml and config.yaml that change the meaning of a row unless they have these values.
_NEUTRAL_SETTINGS = {
    "projection_dim": ("null", "0"),
    "optimizer_state": ("", "''", '""', "null"),
    "hessian_path": ("", "''", '""', "null"),
    "unit_normalize": ("false",),
    "normalize_aggregated_grad": ("false",),
    "aggregation": ("mean", "none"),
    "precision": ("fp64", "fp32", "bf16", "fp16", "auto"),
}
_MEANING = {
    "projection_dim": "its gradients are randomly projected",
    "optimizer_state": "its gradients are divided by roots of the second moments of an optimizer",
    "hessian_path": "its gradients are multiplied by the inverse of a Hessian",
    "unit_normalize": "each gradient is normalized to length 1",
    "normalize_aggregated_grad": "the mean gradient is normalized to length 1",
    "aggregation": "its row is not a mean over examples",
    "precision": "its gradients were computed at quantized weights, not at those of the state",
}
_STEP_NAME = re.compile(r"(?:(?:global_)?step|iter|checkpoint|ckpt)?[-_=]?\d{1,18}")

# Settings that describe the loss. They are reported in a note, because no file contains the training loss.
_LOSS = (
    *("loss_fn", "loss_reduction", "label_smoothing", "logit_scale", "advantage_column"),
    *("dataset", "split", "max_tokens", "precision"),
)
_DEFAULTS = {
    "label_smoothing": ("0.0",),
    "logit_scale": ("1.0",),
    "advantage_column": ("", "''"),
    "split": ("train",),
    "max_tokens": ("null",),
    "precision": ("fp64", "fp32", "auto"),
}


# Detection ---------------------------------------------------------------------------------------------------


def _is_store(path: Path) -> bool:
    return (path / _DATA).is_file() and (path / _INFO).is_file()


def _is_step_store(path: Path) -> bool:
    return path.is_dir() and _is_store(path)


def _unfinished(path: Path) -> str:
    return (
        f"its name {path.name} means that Bergson is still building it"
        if path.name.endswith(_UNFINISHED_SUFFIX)
        else ""
    )


def _epoch_stores(path: Path) -> list[Path]:
    """Return the stores that the Trainer callback wrote into a folder, or the folder if it is one of them."""
    found = (path, *sorted(path.glob("epoch_*")), *sorted(path.glob("train/epoch_*")))
    return [store for store in found if store.name.startswith("epoch_") and _is_store(store)]


def holds_bergson(path: Path) -> bool:
    """Return True if a folder is a gradient store, or contains stores of steps or of epochs of a training run."""
    if not path.is_dir():
        return False
    return _is_store(path) or bool(_epoch_stores(path)) or any(_KIND.holds(entry) for entry in path.iterdir())


class BergsonFolder(StepFolder):
    """A folder of gradient stores, one per state and named after it, or a single store.

    Parameters
    ----------
    location : Path
    mapping : mapping, optional
        Must be empty, because there is nothing to map.

    Raises
    ------
    InputError
        If the mapping file is not valid.
    """

    def __init__(self, location: Path, mapping: Mapping[str, str] | None = None) -> None:
        super().__init__(LocalStorage(location), [_KIND], own_map_file=True)
        self._folder = location
        if mapping:
            raise InputError(
                f"{', '.join(mapping)} cannot be mapped: a gradient store of Bergson contains only gradients",
                where=str(location),
                remedy="omit --map, or specify it for the other source in a run file",
            )
        self._orientation = _Orientation.of_folder(self._folder)

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        epochs = _epoch_stores(self._folder)
        if epochs:
            raise _no_gradient(
                epochs[0], ["its rows were computed while the parameters changed, each at a different state"]
            )
        if not _is_store(self._folder):
            return super().steps()
        number = step_number(self.location.name) if is_step(self.location.name) else None
        if number is None or _unfinished(self._folder):
            raise InputError(
                "the name of this gradient store does not contain the step of its state",
                where=str(self.location),
                why="its files do not record how many updates were made before"
                if number is None
                else "it is not complete",
                remedy="rename its folder to checkpoint-N or step-N for the state after N updates",
            )
        return [LoggedStep(number, self.location)]

    def open(self, step: LoggedStep) -> BergsonStep:
        """Open a step; see `natgrad.sources.base.Source`.

        Raises
        ------
        InputError
            If the store is corrupt, does not contain the gradient of the loss, or belongs to another step.
        """
        return BergsonStep(step, self._orientation)


def _opened(step: LoggedStep, names: object) -> NoReturn:
    raise NotImplementedError("BergsonFolder opens its steps itself")


_KIND = Kind(
    "checkpoint-<N>/gradients.bin",
    _is_step_store,
    _opened,
    unfinished=_unfinished,
    clean=lambda name: name.removesuffix(_UNFINISHED_SUFFIX),
)


# Orientation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Orientation:
    """Orientation of the modules, as specified in the mapping file of a folder.

    Attributes
    ----------
    path : Path
        The mapping file.
    layout : str, optional
        Layout of the modules that are not in ``modules``.
    modules : mapping
    """

    path: Path
    layout: str | None
    modules: Mapping[str, str]

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        path = folder / MAP_FILE
        try:
            table = parse_toml(path) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read the mapping file: {error}", where=str(path), remedy=_LAYOUT_REMEDY
            ) from error
        options = table.pop("bergson", {})
        options = dict(options) if isinstance(options, dict) else {"bergson": options}
        layout, modules = options.pop("layout", None), options.pop("modules", {})
        layouts = [
            *([] if layout is None else [layout]),
            *(modules.values() if isinstance(modules, dict) else [None]),
        ]
        if table or options or not all(layout in _LAYOUTS for layout in layouts):
            raise InputError(
                f"the mapping file has {', '.join((*table, *options)) or 'an unknown layout'}",
                where=str(path),
                remedy=_LAYOUT_REMEDY,
            )
        return cls(path, layout, modules)

    def transposed(self, step: LoggedStep, module: str) -> bool:
        """Return True if the tensor of the model is the transpose of the stored matrix."""
        layout = self.modules.get(module, self.layout)
        if layout is None:
            raise InputError(
                f"it is unknown whether module {module!r} is stored in the orientation of the model, or transposed",
                where=where(step, "gradient", module),
                why="Bergson stores every weight as (out, in), but GPT-2's Conv1D has (in, out); a store records "
                "neither the shape nor the type of a module, and the shape of a square matrix does not reveal it",
                remedy=_LAYOUT_REMEDY,
            )
        return layout == "conv1d"


# One store ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """Position of the elements of a tensor in a row of the store.

    Attributes
    ----------
    shape : tuple of int
        Shape (a, b) of the tensor.
    offset : int
        First element of the stored matrix.
    columns : int
        Number of columns of the stored matrix.
    first : int
        First column that belongs to the tensor.
    transposed : bool
        Element (i, j) of the tensor is element (j, i) of the stored matrix.
    """

    shape: tuple[int, int]
    offset: int
    columns: int
    first: int = 0
    transposed: bool = False


class BergsonStep:
    """An open gradient store.

    Until `shaped` is called with the parameters, gradients are flat and named after their modules.
    """

    def __init__(self, step: LoggedStep, orientation: _Orientation) -> None:
        self._step, self._orientation = step, orientation
        with read_errors(step, _FORM):
            if not _is_store(step.path):
                raise FileNotFoundError(f"{_DATA} or {_INFO} no longer exists")
            info = parse_json(read_limited(step.path / _INFO, JSON_LIMIT), _INFO)
            if not isinstance(info, dict):
                raise ValueError(f"{_INFO} is not a JSON object")
            self._settings = _settings(_text(step.path / _CONFIG)) | _settings(_text(step.path / _PROCESSOR))
            reasons = list(_reasons(step.path, info))
        if reasons:
            raise _no_gradient(step.path, reasons)
        self._require_step()
        with read_errors(step, _FORM):
            self._sizes, self._rows, self._logged = _described(info)
        self._mean = self._settings["aggregation"] == {"none"}
        self._elements = sum(self._sizes.values())
        starts = itertools.accumulate(self._sizes.values(), initial=0)
        self._offsets = dict(zip(self._sizes, starts, strict=False))
        # Bergson also computes means in float32.
        self._dtype = self._logged if not self._mean or self._logged == "float64" else "float32"
        self._matrices = {name: _Matrix((1, size), self._offsets[name], size) for name, size in self._sizes.items()}
        self._itemsize = 2 if self._logged == "bfloat16" else np.dtype(self._logged).itemsize
        with read_errors(step, _FORM):
            self._descriptor = open_regular(step.path / _DATA)
        try:
            with read_errors(step, _FORM):
                self._region = Region(self._descriptor)
                expected = self._rows * self._elements * self._itemsize
                if self._region.length != expected:
                    raise ValueError(f"{_DATA} has {self._region.length} bytes, but {_INFO} implies {expected}")
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def _require_step(self) -> None:
        """Refuse a store that was not built from the checkpoint that its name indicates."""
        sources = [value.strip("'\"") for key in ("revision", "model") for value in self._settings.get(key, ())]
        name = next((name for value in sources if _STEP_NAME.fullmatch(name := Path(value).name)), None)
        if name is not None and step_number(name) != self._step.number:
            raise InputError(
                f"the store was built from {name}, but its name indicates step {self._step.number}",
                where=where(self._step),
                why="the folder was renamed, or its number does not have the same meaning as those of the "
                "checkpoints",
                remedy="name the folder after the checkpoint to which the gradients belong",
            )

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        shapes = {name: LoggedTensor((size,), self._dtype) for name, size in self._sizes.items()}
        return StepContent({"gradient": shapes}, notes=(self._loss(),))

    def shaped(self, parameters: Mapping[str, LoggedTensor]) -> StepContent:
        """Describe the step by the names and shapes of the parameters with which it is joined.

        Parameters
        ----------
        parameters : mapping
            Logged tensors by name.

        Returns
        -------
        StepContent
            Description of the tensors. Later reads use these names.

        Raises
        ------
        InputError
            If a module does not match exactly one tensor, or if its orientation is unknown.
        """
        unknown = [module for module in self._orientation.modules if module not in self._sizes]
        if unknown:
            raise InputError(
                f"there is no module {unknown[0]!r} in this store",
                where=str(self._orientation.path),
                why=f"its modules are {_listed(self._sizes)}",
                remedy="use the module names in info.json",
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
            no_gradient="Bergson provides gradients only for linear modules: all results of the model concern "
            f"its other {len(found)} tensors, although the tensors listed here may also have been trained",
        )

    def _prefix(self, parameters: Mapping[str, LoggedTensor]) -> str:
        """Return the prefix that the names of all modules have in the model."""
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
                    f"module {module!r} with {self._sizes[module]} elements does not match any tensor of the model",
                    where=where(self._step, "gradient", module),
                    why=shapes
                    or f"no tensor name is {ending} or ends with it; the tensors are {_listed(parameters)}",
                    remedy="pass the parameters of the model from which the store was built; build it without "
                    "split_attention_modules and moe_experts: attention heads and experts are not tensors",
                )
            candidates = fitting if candidates is None else [prefix for prefix in candidates if prefix in fitting]
        if candidates is None or len(candidates) != 1:
            raise InputError(
                "the modules of the store do not belong to one part of the model",
                where=where(self._step, "gradient"),
                why=f"the modules {_listed(self._sizes)} match tensors with "
                + (f"each of the prefixes {_listed(candidates)}" if candidates else "no common prefix"),
                remedy="pass the parameters of the model from which the store was built, and no others",
            )
        return candidates[0]

    def _bias(self, module: str, weight: LoggedTensor) -> int | None:
        """Return the number of bias columns (0 or 1) of a module with this weight, or None if it does not fit."""
        if len(weight.shape) != 2:
            return None
        rows, columns = reversed(weight.shape) if self._orientation.transposed(self._step, module) else weight.shape
        with_bias = (0, 1) if self._settings.get("include_bias") == {"true"} else (0,)
        return next((bias for bias in with_bias if rows * (columns + bias) == self._sizes[module]), None)

    def _fitted(
        self, name: str, module: str, parameters: Mapping[str, LoggedTensor]
    ) -> Iterator[tuple[str, _Matrix]]:
        """Yield the tensors of a module, and their positions."""
        weight, offset = parameters[f"{name}.weight"], self._offsets[module]
        transposed, bias = self._orientation.transposed(self._step, module), self._bias(module, weight)
        assert bias is not None
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        yield f"{name}.weight", _Matrix((weight.shape[0], weight.shape[1]), offset, columns + bias, 0, transposed)
        if bias:
            logged = parameters.get(f"{name}.bias")
            if logged is None or logged.shape != (rows,):
                raise InputError(
                    f"the gradient of the bias of {module!r} with {rows} elements does not match any tensor of "
                    "the model",
                    where=where(self._step, "gradient", f"{name}.bias"),
                    why="there is no such parameter"
                    if logged is None
                    else f"the parameter has shape {logged.shape}",
                    remedy="pass the parameters of the model from which the store was built",
                )
            # The last column is read as a matrix with one row.
            yield f"{name}.bias", _Matrix((1, rows), offset, columns + 1, columns, True)

    def _loss(self) -> str:
        """Return a note about the loss to which the gradients belong."""
        settings = {name: ", ".join(sorted(self._settings.get(name, ()))) for name in _LOSS}
        reported = [
            f"{name}: {value[:80]}"
            for name, value in settings.items()
            if value and value not in _DEFAULTS.get(name, ())
        ]
        return (
            f"Bergson's gradients are those of the mean over documents ({', '.join(reported)}); a logged loss "
            "must be the same: with 'sum', it is the trainer's mean over all tokens times the tokens per document"
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self._step, _FORM, f"{array}/{tensor}"):
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
        """Read contiguous elements, or their mean over the rows of examples."""
        if not self._mean:
            self._region.fill(start * self._itemsize, out)
            return
        words = np.empty(out.size, np.uint16 if self._logged == "bfloat16" else self._logged)
        total = np.zeros(out.size)
        # Gradients of a diverged run may overflow or be NaN.
        with np.errstate(all="ignore"):
            for row in range(self._rows):
                self._region.fill((row * self._elements + start) * self._itemsize, words)
                total += widened(words, self._logged)
            out[:] = total / self._rows


def blocks(rows: slice, columns: slice, *, limit: int = BLOCK) -> Iterator[tuple[range, range]]:
    """Split a box into boxes with at most ``most`` elements, in the order of the elements.

    Parameters
    ----------
    rows, columns : slice
    limit : int

    Yields
    ------
    rows, columns : range
    """
    step = max(1, limit // (columns.stop - columns.start))
    for first in range(rows.start, rows.stop, step):
        block = range(first, min(first + step, rows.stop))
        if len(block) > 1 or columns.stop - columns.start <= limit:
            yield block, range(columns.start, columns.stop)
            continue
        for start in range(columns.start, columns.stop, limit):
            yield block, range(start, min(start + limit, columns.stop))


# Metadata ----------------------------------------------------------------------------------------------------


def _no_gradient(store: Path, reasons: list[str]) -> InputError:
    return InputError(
        "this gradient store of Bergson does not contain the gradient of the loss at a state",
        where=str(store),
        why="; ".join(reasons),
        remedy=_BUILD_REMEDY,
    )


def _reasons(store: Path, info: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons in the files of a store why it does not contain the gradient of the loss."""
    if info.get("attribute_tokens"):
        yield "it has one row per token"
    processor, config = (_settings(_text(store / name)) for name in (_PROCESSOR, _CONFIG))
    if "projection_dim" not in processor:
        yield f"it does not record whether it is projected ({_PROCESSOR})"
    if not {"aggregation", "unit_normalize"} <= config.keys():
        yield f"it does not record how its rows were computed ({_CONFIG})"
    elif len(config["aggregation"]) > 1 or len(config.get("model", ())) > 1:
        yield f"its {_CONFIG} describes several builds"
    for setting, neutral in _NEUTRAL_SETTINGS.items():
        values = processor.get(setting, set()) | config.get(setting, set())
        changed = next((value for value in sorted(values) if value not in neutral), None)
        if changed is not None:
            yield f"{_MEANING[setting]} ({setting}: {changed[:80]})"
    if config.get("aggregation") == {"mean"} and info.get("num_grads") != 1:
        yield f"it has {shown(info.get('num_grads'))} rows, but a mean is one row"
    if (store / "contrast").exists():
        yield "the gradient of other examples was subtracted (contrast/)"
    if _has_normalizers(store / "normalizers.pth"):
        yield "its gradients are scaled by the second moments of an optimizer (normalizers.pth)"


def _has_normalizers(path: Path) -> bool:
    """Return True if a file of normalizers is not empty: each normalizer has a tensor."""
    try:
        with LocalStorage(path).open() as file, open_archive(file, file.size) as archive:
            return any(re.search(r"(^|/)data/", name) for name in archive.namelist())
    except FileNotFoundError:
        return False
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, struct.error):
        return True


def _settings(text: str) -> dict[str, set[str]]:
    """Return the values of each setting in a file written by PyYAML, one per line, at any depth."""
    found: dict[str, set[str]] = {}
    for name, value in re.findall(r"^[ \t-]*(\w+):(.*)$", text, re.MULTILINE):
        found.setdefault(name, set()).add(value.strip(" \t"))
    return found


def _described(info: Mapping[str, Any]) -> tuple[dict[str, int], int, str]:
    """Return the sizes of the modules, the number of rows and the dtype."""
    sizes, rows, dtype = (info.get(key) for key in ("grad_sizes", "num_grads", "base_dtype"))
    if not isinstance(sizes, dict) or not sizes:
        raise ValueError(f"grad_sizes in {_INFO} is not a mapping of modules to sizes")
    for module, size in sizes.items():
        integer(size, f"the size of {shown(module)} in {_INFO}", least=1)
    rows = integer(rows, f"num_grads in {_INFO}", least=1)
    if not isinstance(dtype, str) or dtype not in STORAGE_DTYPES:
        raise ValueError(f"base_dtype in {_INFO} is {shown(dtype)}, not one of {', '.join(STORAGE_DTYPES)}")
    return sizes, rows, dtype


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")


def _text(path: Path) -> str:
    try:
        return read_limited(path, _TEXT_LIMIT).decode(errors="replace")
    except FileNotFoundError:
        return ""
