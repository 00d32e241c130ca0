"""Define the supported log formats: how each is detected and opened, and what it contains.

Another package adds formats through the entry-point group ``natgrad.formats``; each entry point names a `Format`.
docs/howto/reader.md describes how to write one.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.extensions import Extension, registered
from natgrad.schema.logs import logger
from natgrad.schema.names import SCALARS, STATES
from natgrad.sources.base import Source
from natgrad.sources.checkpoints.array_folder import ARRAYS_KIND, stack_of
from natgrad.sources.checkpoints.bergson_store import BergsonFolder, holds_bergson
from natgrad.sources.checkpoints.dcp_folder import DCP_KIND
from natgrad.sources.checkpoints.deepspeed_folder import DEEPSPEED_KIND
from natgrad.sources.checkpoints.hdf5_file import Hdf5File
from natgrad.sources.checkpoints.huggingface import TRAINER_KIND, TrainerFolder
from natgrad.sources.checkpoints.megatron_folder import MEGATRON_KIND
from natgrad.sources.checkpoints.model_folder import MODEL_KIND
from natgrad.sources.checkpoints.npy_file import NpyFile
from natgrad.sources.checkpoints.npz_file import NpzStack
from natgrad.sources.checkpoints.numpy_pickle import PickleFile, is_pickle
from natgrad.sources.checkpoints.orbax_folder import ORBAX_KIND
from natgrad.sources.checkpoints.rank_files import RANKS_KIND
from natgrad.sources.checkpoints.stacked_file import StackedFile
from natgrad.sources.checkpoints.step_folder import NATIVE_KINDS, Kind, StepFolder, is_entry, step_entries
from natgrad.sources.checkpoints.torch_archive import TorchFile
from natgrad.sources.checkpoints.zarr_group import ZarrGroup, holds_zarr
from natgrad.sources.checkpoints.zip_members import first_member
from natgrad.sources.container import Container, first_bytes
from natgrad.sources.ledger_log import LedgerLog, holds_ledgers
from natgrad.sources.names import CHECKPOINT, NATIVE, Names
from natgrad.sources.scalars.event_file import event_files, read_run_events
from natgrad.sources.scalars.mlflow_store import (
    DATABASE_COLUMNS,
    metric_files,
    read_database,
    read_database_parameters,
    read_metric_file,
    read_parameters,
)
from natgrad.sources.scalars.record_files import (
    COMPRESSED,
    TRACKIO_COLUMNS,
    holds_json_lines,
    holds_metrics,
    open_text,
    read_csv,
    read_json_lines,
    read_parquet,
    read_sqlite,
)
from natgrad.sources.scalars.scalar_log import Kind as ScalarKind
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.scalars.text_file import LINE_FORMS, TEXT_KIND
from natgrad.sources.scalars.update_records import TRAINER_STATE, read_trainer_state
from natgrad.sources.scalars.wandb_file import read_wandb_configuration, read_wandb_run, wandb_files
from natgrad.sources.step_names import AUTOMATIC, Naming, role_of
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage, NotRegularError, Storage

__all__ = ["FORMATS", "FORMATS_GROUP", "Format", "find_format", "one_file_format", "unnumbered_format"]

_log = logger(__name__)

FORMATS_GROUP = "natgrad.formats"
"""Entry-point group for formats of other packages."""

Opener = Callable[[Path, Mapping[str, str]], Source]


@dataclass(frozen=True)
class Format:
    """A log format: how it is detected and opened, and what it contains.

    Attributes
    ----------
    name : str
        Value of ``--format``.
    layout : str
        Files by which it is detected.
    gives, lacks : str
        Quantities that can and cannot be read from it.
    find : callable
        Takes a path and returns True if it contains a log of this format.
    open : callable
        Takes a path and a mapping (``--map``) and returns a `natgrad.sources.base.Source`.
    alignment : str
        State (before or after an update) to which the quantities logged at a step belong.
    scalars : ScalarKind, optional
        Reader of a format that contains scalars but no tensors. It is used instead of ``open``.
    kinds : tuple of Kind
        Kinds of steps in a folder of this format.
    files : tuple of str
        Endings of files that may contain all steps.
    has_states : bool
        False for logs of the inner products of updates, which have no states.
    """

    name: str
    layout: str
    gives: str
    lacks: str
    find: Callable[[Path], bool]
    open: Opener
    alignment: str = (
        "values of step N belong to the state after N updates, before the next one; otherwise use --shift"
    )
    scalars: ScalarKind | None = None
    kinds: tuple[Kind, ...] = ()
    files: tuple[str, ...] = ()
    has_states: bool = True


def _contains(*kinds: Kind) -> Callable[[Path], bool]:
    def found(path: Path) -> bool:
        try:
            return any(kind.holds(entry) for entry in path.iterdir() for kind in kinds)
        except OSError:
            return False

    return found


def _folder(*kinds: Kind, parts: tuple[Kind, ...] = ()) -> dict[str, Any]:
    """Return the functions that detect and open a folder of steps, and the kinds of steps.

    ``parts`` are kinds of files that can be parts of a step, but by which the format is not detected.
    """
    return {
        "find": _contains(*kinds),
        "open": lambda path, mapping: StepFolder(LocalStorage(path), (*kinds, *parts), mapping),
        "kinds": kinds,
    }


def _folder_or_file(
    kind: Kind, open_file: Callable[[LoggedStep], Container], names: Names = NATIVE, *, by_content: bool = False
) -> dict[str, Any]:
    """Return the same for a folder of steps, or for one file that contains all steps.

    Such a file is detected by its suffix or, if most files with this suffix contain one step, by its content.
    """
    in_folder = _contains(kind)

    def found(path: Path) -> bool:
        if not path.is_file():
            return in_folder(path)
        return kind.stem(path.name) is not None and (not by_content or holds_steps(path))

    def holds_steps(path: Path) -> bool:
        with suppress(InputError):
            return len(StackedFile(path, open_file, names=names, usually_one_step=True).steps()) > 1
        return False

    def opener(path: Path, mapping: Mapping[str, str]) -> Source:
        if path.is_file():
            return StackedFile(path, open_file, mapping, names, usually_one_step=by_content)
        return StepFolder(LocalStorage(path), [kind], mapping)

    return {"find": found, "open": opener, "kinds": (kind,), "files": kind.suffixes}


def _open_zarr(path: Path, mapping: Mapping[str, str]) -> Source:
    if holds_zarr(path):
        return StackedFile(path, lambda step: ZarrGroup(step, stacked=True), mapping)
    return StepFolder(LocalStorage(path), [_ZARR], mapping)


def _open_npy(path: Path, mapping: Mapping[str, str]) -> Source:
    kinds = (_NPY, ARRAYS_KIND)
    stack = None if _contains(*kinds)(path) else stack_of(path, mapping)
    return stack or StepFolder(LocalStorage(path), kinds, mapping)


def _open_torch(step: LoggedStep, names: Names) -> TorchFile:
    return TorchFile(step, names.inert)


_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar", ".ckpt.tar")

_TORCH = Kind(
    "<name>-<N>.pt",
    is_entry,
    _open_torch,
    CHECKPOINT,
    suffixes=_TORCH_SUFFIXES,
    content=lambda path: bool(name := first_member(path)) and not name.endswith(".npy"),
)
_OPTIMIZER = replace(
    _TORCH,
    layout="optimizer_<N>.pt",
    contains=lambda path: role_of(path.name) == "optimizer",
    names=NATIVE,
    content=lambda path: False,
)
_ZARR = Kind("step_<N>.zarr", is_entry, lambda step, names: ZarrGroup(step), suffixes=(".zarr",))
_HDF5 = Kind(
    "step_<N>.h5",
    is_entry,
    lambda step, names: Hdf5File(step),
    suffixes=(".h5", ".hdf5"),
    content=lambda path: first_bytes(path, 8) == b"\x89HDF\r\n\x1a\n",
)


_PICKLE = Kind(
    "step_<N>.pkl",
    lambda path: role_of(path.name) != "other",  # random states of accelerate, for example
    lambda step, names: PickleFile(step, names.inert),
    CHECKPOINT,
    suffixes=(".pkl", ".pickle", ".p", ".pkl.gz", ".pickle.gz", ".joblib"),
    content=lambda path: is_pickle(first_bytes(path, 2)),
)
_NPY = Kind(
    "<name>_<N>.npy",
    is_entry,
    lambda step, names: NpyFile(step, role_of(step.storage.name) or STATES[0]),
    CHECKPOINT,
    suffixes=(".npy",),
    content=lambda path: first_bytes(path, 6) == b"\x93NUMPY",
    one_array=True,
)


_LATE = (
    "a callback of Lightning that saves .grad in on_train_batch_end or on_save_checkpoint saves the gradient of "
    "the update that was just made, which belongs to the state before it"
)
_LIGHTNING_NAMES = replace(CHECKPOINT, late=_LATE)
_LIGHTNING = Kind("<name>step=<N>.ckpt", Path.is_file, _open_torch, _LIGHTNING_NAMES, suffixes=(".ckpt",))
_LIGHTNING_SHARDS = replace(
    DCP_KIND, layout="<name>step=<N>.ckpt/", suffixes=(".ckpt",), names=replace(DCP_KIND.names, late=_LATE)
)


def _find_files(
    folder: bool, start: bytes, *suffixes: str, check: Callable[[Storage], bool] | None = None
) -> Callable[[Storage], list[Storage]]:
    """Return a function that finds scalar log files by suffix and content, at a location or in a folder.

    The content is compared with the first bytes of this kind of file, or checked by a function.
    """

    def matches(file: Storage) -> bool:
        if not file.name.endswith(suffixes):
            return False
        try:
            if check is not None:
                return check(file)
            if start:
                with file.open() as content:
                    return content.read(len(start)) == start
        except (NotRegularError, EOFError, zlib.error, gzip.BadGzipFile):
            pass  # reading it as such a log is refused, with the reason
        return True

    def found(location: Storage) -> list[Storage]:
        entries = location.files()
        return [entry for entry in entries if matches(entry)] if folder or entries == [location] else []

    return found


def _find_database(columns: Set[str]) -> Callable[[Storage], list[Storage]]:
    """Return a function that finds a SQLite database with some columns in its table ``metrics``."""
    return lambda location: [file for file in location.files() if file == location and holds_metrics(file, columns)]


def _starts_as_json(file: Storage) -> bool:
    """Return True if a file contains JSON lines. Other JSON files have the suffix ``.json``, too."""
    if file.name.removesuffix(COMPRESSED).endswith(".json"):
        return holds_json_lines(file)
    with open_text(file) as content:
        return content.read(1) == b"{"


_CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


_SCALAR_ALIGNMENT = (
    "step N of the logger must be the state after N updates, at which the loss was computed; otherwise use --shift"
)
_GIVES_SCALARS = f"{', '.join(SCALARS)}, under common keys or those of --map"
_LACKS_TENSORS = "tensors: pass the log that contains them as an additional SOURCE"


def _scalar_format(
    name: str, layout: str, kind: ScalarKind, gives: str = "", lacks: str = "", alignment: str = ""
) -> Format:
    """Return the format of a log of scalars. A file that cannot be read is not detected as such a log."""

    def found(path: Path) -> bool:
        try:
            return bool(kind.files(LocalStorage(path)))
        except (OSError, ValueError):
            return False

    return Format(
        name,
        layout,
        _GIVES_SCALARS + gives,
        _LACKS_TENSORS + lacks,
        found,
        lambda path, mapping: ScalarLog(LocalStorage(path), kind, mapping),
        alignment or _SCALAR_ALIGNMENT,
        kind,
    )


_NATIVE = (
    "parameter/<tensor>, gradient/<tensor>, hvp/<tensor> (optional), loss, learning_rate; for the samples of a "
    "stochastic rule replicate_parameter/<tensor>, replicate_hvp/<tensor>, replicate_loss; out of core"
)

_BUILT_IN: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "steps",
            "folder of step_<N>.safetensors and step_<N>.npz",
            _NATIVE,
            "nothing",
            **_folder(*NATIVE_KINDS.values(), parts=(_OPTIMIZER,)),
        ),
        Format(
            "ledgers",
            'folder of ledger_<k>.log of natgrad.watch(mode="ledger")',
            "the inner products of each update, loss, learning_rate, and whether the optimizer skipped the update; "
            "the run then has a ledger, and no trajectory",
            "states: tensors of parameters and gradients; the gradient after the update",
            holds_ledgers,
            LedgerLog,
            "step N has the update from the state after N updates, with its loss and learning rate",
            has_states=False,
        ),
        Format(
            "huggingface",
            "Trainer output folder: checkpoint-<N>/ with model.safetensors or pytorch_model.bin, single or sharded,"
            " or shards of FSDP; also folders checkpoint-<N>/ of accelerate's save_state",
            "parameters, learning_rate; loss if logging_steps=1 (a mean over the batches of the update, rounded "
            "to 4 decimals before transformers 5); gradients if there is a gradient.safetensors; optimizer "
            "state (--include optimizer, with the parameter order in natgrad.toml); out of core",
            "gradients, which the Trainer does not save; the loss at step 0 without a checkpoint-0",
            _contains(TRAINER_KIND),
            TrainerFolder,
            "checkpoint-N is the state after N updates; the learning rate of the next update is that of its "
            "optimizer, and its loss is that in the log at step N + 1",
            kinds=(TRAINER_KIND,),
        ),
        Format(
            "lightning",
            "folder of <name>step=<N>.ckpt, files or (sharded) folders with .metadata and meta.pt",
            "parameters, learning_rate, optimizer state (--include optimizer), and what a callback adds under "
            "gradient, hvp or loss; out of core",
            "gradients, which Lightning does not save; last.ckpt, which duplicates another checkpoint",
            alignment="step=N is the state after N updates, with the learning rate of the next one; a gradient or "
            "loss added in on_train_batch_end belongs to the previous state: --shift gradient=-1 --shift loss=-1",
            **_folder(_LIGHTNING, _LIGHTNING_SHARDS),
        ),
        Format(
            "dcp",
            "folder of checkpoints step-<N>/ of torch.distributed.checkpoint: .metadata and *.distcp, from any "
            "number of ranks; also torch_dist of Megatron-LM",
            "entries of the saved nested dicts selected with --map, read by chunks in one process; optimizer state "
            "(--include optimizer); out of core",
            "gradients, if they were not saved; class instances: pickles are not executed",
            **_folder(DCP_KIND),
        ),
        Format(
            "deepspeed",
            "folder of checkpoints global_step<N>/ of DeepSpeed, ZeRO stages 0 to 3, from any number of ranks",
            "parameters (the float32 master weights of all ranks, otherwise the module), learning_rate, and what "
            "client_state adds under gradient, hvp or loss; optimizer state (--include optimizer); out of core",
            "gradients, which DeepSpeed does not save; pipeline, tensor and expert parallel models, "
            "because their files do not record how tensors are split",
            **_folder(DEEPSPEED_KIND),
        ),
        Format(
            "megatron",
            "folder of checkpoints iter_<N>/mp_rank_<T>[_<P>]/model_optim_rng.pt of Megatron-LM",
            "parameters of all pipeline stages, learning_rate, and entries added under gradient; out of core",
            "gradients, which Megatron-LM does not save; tensor and expert parallel models, because their files do "
            "not record how tensors are split (convert them to torch_dist and use dcp)",
            **_folder(MEGATRON_KIND),
        ),
        Format(
            "verl",
            "folder of checkpoints global_step_<N>/ of verl: [actor/]model_world_size_<W>_rank_<R>.pt, one file "
            "for each of W ranks",
            "parameters of the actor or critic, assembled from the parts of all ranks; optimizer state "
            "(--include optimizer); out of core",
            "gradients, which verl does not save; tensors that are split along several dimensions (merge them with "
            "python -m verl.model_merger merge); more than 64 ranks",
            **_folder(RANKS_KIND),
        ),
        Format(
            "orbax",
            "folder of checkpoints <N>/ or <prefix>_<N>/ of Orbax, with or without OCDBT; needs the extra orbax",
            "entries of the saved trees selected with --map: params, grads, loss, learning_rate; read by chunks",
            "gradients and learning rates, if they were not saved; chunks of more than 512 MiB (chunk_byte_size)",
            **_folder(ORBAX_KIND),
        ),
        Format(
            "safetensors",
            "folder of step_<N>.safetensors, or of folders step-<N>/ with model.safetensors, single or sharded",
            _NATIVE + "; float64, float32, float16, bfloat16; in a folder, <array>.safetensors",
            "scalars of a folder that has no file for them",
            **_folder(NATIVE_KINDS["safetensors"], MODEL_KIND, parts=(_OPTIMIZER,)),
        ),
        Format(
            "torch",
            "folder of <name>-<N>.pt, .pth, .bin or .ckpt (torch.save)",
            "entries of nested dicts selected with --map: parameter, gradient, hvp, loss, learning_rate, step; "
            "optimizer state (--include optimizer); out of core",
            "class instances: pickles are not executed; the format of torch before 1.6",
            **_folder_or_file(_TORCH, TorchFile, CHECKPOINT, by_content=True),
        ),
        Format(
            "npz",
            "folder of step_<N>.npz (numpy.savez), or one .npz file of arrays (step, ...)",
            _NATIVE + "; float64, float32, float16; tensors in Fortran order are loaded completely",
            "bfloat16; compressed data in one file of all steps",
            **_folder_or_file(NATIVE_KINDS["npz"], NpzStack),
        ),
        Format(
            "npy",
            "folder of <name>_<N>.npy (numpy.save), or of folders step_<N>/ with .npy, .npz, .pt or .pkl files "
            "named after their contents, such as params.npy and grads.npy; or one folder of arrays (step, ...)",
            "parameters and gradients, in one file, or a file for each tensor; scalars in JSON files; out of core",
            "scalars, if the steps are single files: pass their log as an additional SOURCE",
            lambda path: _contains(_NPY, ARRAYS_KIND)(path) or stack_of(path) is not None,
            _open_npy,
            kinds=(_NPY, ARRAYS_KIND),
        ),
        Format(
            "pickle",
            "folder of step_<N>.pkl (pickle.dump) with dicts of NumPy or JAX arrays, or one such file of all steps",
            "the same as torch; arrays are loaded completely",
            "class instances: pickles are not executed; joblib and compressed pickles; more than 128 MiB in a file",
            **_folder_or_file(_PICKLE, PickleFile, CHECKPOINT, by_content=True),
        ),
        Format(
            "hdf5",
            "folder of step_<N>.h5, or one .h5 file of datasets (step, ...); needs the extra hdf5",
            _NATIVE + "; bfloat16 as uint16 with the attribute ml_dtype",
            "data in other files (external, virtual)",
            **_folder_or_file(_HDF5, Hdf5File),
        ),
        Format(
            "zarr",
            "one .zarr group of arrays (step, ...), or a folder of step_<N>.zarr, of version 2 or 3; needs the "
            "extra orbax",
            _NATIVE + " by chunks; bfloat16, also as uint16 with the attribute ml_dtype",
            "missing chunks, which may have been lost (write_empty_chunks); chunks of more than 512 MiB",
            lambda path: holds_zarr(path) or _contains(_ZARR)(path),
            _open_zarr,
            kinds=(_ZARR,),
        ),
        Format(
            "bergson",
            "folder of Bergson gradient stores checkpoint-<N>/ or step_<N>/ (gradients.bin, info.json), or one "
            "store",
            "gradients of linear weights (with --include_bias, also of their biases) in stores without "
            "projection: their single row (--aggregation mean), or the mean over one row per example; names and "
            "shapes come from the parameters in an additional SOURCE, and the [bergson] layout from "
            "natgrad.toml; out of core",
            "gradients of biases, norms, embeddings and heads, which are omitted with a warning; projected, "
            "scaled or per-token stores and stores of epochs of a run (train/epoch_<N>/), which are refused",
            holds_bergson,
            BergsonFolder,
            "checkpoint-N is the state after N updates; a store whose config.yaml names another checkpoint is "
            "refused",
        ),
        _scalar_format(
            "csv",
            "one file with a header, separated by commas, semicolons or tabs, e.g. metrics.csv of Lightning, "
            "pandas; also .csv.gz",
            ScalarKind("a CSV file", _find_files(False, b"", *_CSV_SUFFIXES), read_csv),
        ),
        _scalar_format(
            "jsonl",
            "one .jsonl, .ndjson or .json file with a JSON object on each line, nested or flat; also .jsonl.gz",
            ScalarKind(
                "a file of JSON lines",
                _find_files(False, b"", *_JSON_SUFFIXES, check=_starts_as_json),
                read_json_lines,
            ),
        ),
        _scalar_format(
            "trainer-state",
            "one trainer_state.json of the Hugging Face Trainer",
            ScalarKind(
                "a log history of the Trainer",
                _find_files(False, b"{", TRAINER_STATE),
                read_trainer_state,
                step="step",
            ),
            alignment="the loss at step N + 1 of the log is that of state N, if every update was logged "
            "(logging_steps=1)",
        ),
        _scalar_format(
            "text",
            "one text file (.log, .txt, .out) with --map line=FORM: a line with fields, such as "
            f"'iter {{step}}: loss {{loss}}', or one of {', '.join(LINE_FORMS)}",
            TEXT_KIND,
            gives="; rounded to the digits that were printed",
            alignment="as stated by the lines; the loss that megatron and trainer print at step N + 1 is that of "
            "state N",
        ),
        _scalar_format(
            "parquet",
            "one .parquet file or a folder of them: W&B history, trackio, pandas; needs the extra parquet",
            ScalarKind("a Parquet file", _find_files(True, b"PAR1", ".parquet"), read_parquet),
        ),
        _scalar_format(
            "tensorboard",
            "an event file (tfevents), a folder of them, or a folder of such folders; checksums are verified, all "
            "points are read",
            ScalarKind("a TensorBoard event file", event_files, read_run_events, step="step", single=True),
            gives="; single precision, as written by nearly all writers; for several sub-folders, the one selected "
            "with --map run=NAME",
            lacks="; event files in sub-folders of a folder that has its own",
        ),
        _scalar_format(
            "wandb",
            "one W&B file run-<id>.wandb, the folder of the run that contains it, or the folder wandb of all runs; "
            "does not need wandb",
            ScalarKind("a W&B run file", wandb_files, read_wandb_run, configuration=read_wandb_configuration),
            gives="; for several runs, the one selected with --map run=ID",
            lacks="; runs that exist only on the W&B server",
        ),
        _scalar_format(
            "trackio",
            "the SQLite database of trackio, with a table metrics",
            ScalarKind(
                "a trackio database",
                _find_database(TRACKIO_COLUMNS),
                read_sqlite,
                step="step",
            ),
            gives="; for several runs, the one selected with --map run=NAME",
        ),
        _scalar_format(
            "mlflow",
            "the file store of MLflow: the folder mlruns, or that of an experiment, of a run or of its metrics",
            ScalarKind(
                "a file store of MLflow",
                metric_files,
                read_metric_file,
                step="step",
                configuration=read_parameters,
            ),
            gives="; for several runs, the one selected with --map run=ID",
        ),
        _scalar_format(
            "mlflow-sqlite",
            "the SQLite database of MLflow (mlflow.db)",
            ScalarKind(
                "a database of MLflow",
                _find_database(DATABASE_COLUMNS),
                read_database,
                step="step",
                configuration=read_database_parameters,
            ),
            gives="; for several runs, the one selected with --map run=ID",
        ),
    )
}


class _Formats(Mapping[str, Format]):
    """The formats of this package and of others, by name. Formats of other packages are loaded on first use."""

    @cached_property
    def _others(self) -> dict[str, Format]:
        extensions = registered(FORMATS_GROUP, Format, _BUILT_IN)
        return {name: _guarded(extension) for name, extension in extensions.items()}

    def __getitem__(self, name: str) -> Format:
        return _BUILT_IN[name] if name in _BUILT_IN else self._others[name]

    def __iter__(self) -> Iterator[str]:
        yield from _BUILT_IN
        yield from self._others

    def __len__(self) -> int:
        return len(_BUILT_IN) + len(self._others)


def _guarded(extension: Extension[Format]) -> Format:
    """Return a format of another package with a ``find`` that returns False instead of raising.

    Every format examines every path, including logs of other formats.
    """
    format, warned = extension.value, False

    def find(path: Path) -> bool:
        nonlocal warned
        try:
            return bool(format.find(path))
        except Exception as error:  # code of other packages may raise anything
            if not warned:
                _log.warning(
                    "format %s of %s is skipped: it failed to examine %s (%s: %s). Update or uninstall %s.",
                    format.name,
                    extension.distribution,
                    path,
                    type(error).__name__,
                    error,
                    extension.distribution,
                )
            warned = True
            return False

    return replace(format, find=find)


FORMATS: Mapping[str, Format] = _Formats()
"""All formats by name; those of this package come first."""


def find_format(path: Path, naming: Naming = AUTOMATIC) -> str | None:
    """Return the name of the format of the log at a path, detected from its content; None if there is no log.

    Parameters
    ----------
    path : Path
    naming : Naming
        How steps are recognized in a folder.
    """
    if naming == AUTOMATIC or not path.is_dir():
        return next((name for name, known in FORMATS.items() if known.find(path)), None)
    found = _format_of_entries(path, lambda kind, entry: kind.holds(entry, naming), naming)
    return found or find_format(path)


def one_file_format(path: Path) -> str | None:
    """Return the name of the format of files with the ending of this one that may contain all steps, or None."""
    return next((name for name, known in FORMATS.items() if known.files and path.name.endswith(known.files)), None)


def unnumbered_format(path: Path) -> str | None:
    """Return the name of the format of a folder of steps whose names have numbers that are not steps, or None."""
    return _format_of_entries(path, lambda kind, entry: kind.step_name(entry) is not None, AUTOMATIC)


def _format_of_entries(path: Path, accept: Callable[[Kind, Path], bool], naming: Naming) -> str | None:
    try:
        entries = [entry.local_path for entry in step_entries(LocalStorage(path), naming)]
    except InputError:
        return None
    for name, known in FORMATS.items():
        if any(accept(kind, entry) for entry in entries if entry is not None for kind in known.kinds):
            return name
    return None
