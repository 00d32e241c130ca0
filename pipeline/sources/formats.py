"""The formats that can be read, and which of them a path holds."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.places import files, is_url, names, network_errors, open_to_read, place
from pipeline.schema import SCALARS, InputError
from pipeline.sources.base import LoggedStep, NotYet, Source
from pipeline.sources.bergson_store import BergsonFolder, holds_bergson
from pipeline.sources.container import Container
from pipeline.sources.dcp_folder import DcpFolder, dcp_state
from pipeline.sources.deepspeed_folder import DeepSpeedFolder, deepspeed_number
from pipeline.sources.event_file import event_files, read_events
from pipeline.sources.hdf5_file import Hdf5File
from pipeline.sources.huggingface import TRAINER_KIND, TrainerFolder
from pipeline.sources.joined import JoinedSource
from pipeline.sources.megatron_folder import MegatronFolder, megatron_number
from pipeline.sources.model_folder import ModelFolder
from pipeline.sources.names import CHECKPOINT, MODEL, ROOT, checked_shift, step_number
from pipeline.sources.npz_file import NpzStack
from pipeline.sources.orbax_folder import OrbaxFolder, orbax_number, orbax_unfinished
from pipeline.sources.record_files import holds_metrics, read_csv, read_json_lines, read_parquet, read_sqlite
from pipeline.sources.scalar_log import Kind as ScalarKind
from pipeline.sources.scalar_log import ScalarLog
from pipeline.sources.stacked_file import StackedFile
from pipeline.sources.step_folder import NATIVE_KINDS, Kind, StepFolder, native_number, not_latest_yet
from pipeline.sources.sweep import Sweep
from pipeline.sources.torch_archive import TorchFile
from pipeline.sources.wandb_file import WANDB_START, read_wandb
from pipeline.sources.zarr_group import ZarrGroup, holds_zarr

__all__ = [
    "FORMATS",
    "RUN_FILE",
    "Format",
    "find_format",
    "format_of",
    "holds_run",
    "open_source",
    "open_sources",
    "run_file_readings",
]

_log = logging.getLogger(__name__)

RUN_FILE = "run.toml"
"""Run file that stands for the folder it is in."""

Opener = Callable[[Path, Mapping[str, str]], Source]


@dataclass(frozen=True)
class Format:
    """A log format: how it is found, and what it can and cannot give.

    Attributes
    ----------
    name : str
        As given with ``--format``.
    layout : str
        Files it is found by.
    gives, lacks : str
        What can and cannot be read from it.
    found : callable
        Whether a path is a log of this format.
    open : callable
        Path and mapping to `Source`.
    alignment : str
        Which state, before or after an update, what is logged at a step belongs to.
    scalars : ScalarKind, optional
        Of a format that holds scalars and no tensors; it is opened by this.
    """

    name: str
    layout: str
    gives: str
    lacks: str
    found: Callable[[Path], bool]
    open: Opener
    alignment: str = "all of step N is of the state after N updates, before the next; else give --shift"
    scalars: ScalarKind | None = None


def _holds(*kinds: Kind) -> Callable[[Path], bool]:
    def found(path: Path) -> bool:
        try:
            return any(kind.number(entry) is not None for entry in path.iterdir() for kind in kinds)
        except OSError:
            return False

    return found


def _folder(*kinds: Kind) -> tuple[Callable[[Path], bool], Opener]:
    return _holds(*kinds), lambda path, mapping: StepFolder(path, kinds, mapping)


def _folder_or_file(
    kind: Kind, suffix: str, open_file: Callable[[LoggedStep], Container]
) -> tuple[Callable[[Path], bool], Opener]:
    """Find and open a folder of steps, or one file of all."""
    in_folder = _holds(kind)

    def found(path: Path) -> bool:
        return (path.is_file() and path.suffix == suffix) or in_folder(path)

    def opener(path: Path, mapping: Mapping[str, str]) -> Source:
        if path.is_file():
            return StackedFile(path, open_file, mapping)
        return StepFolder(path, [kind], mapping)

    return found, opener


def _open_zarr(path: Path, mapping: Mapping[str, str]) -> Source:
    if holds_zarr(path):
        return StackedFile(path, lambda step: ZarrGroup(step, stacked=True), mapping)
    return StepFolder(path, [_ZARR], mapping)


def _file_number(*suffixes: str) -> Callable[[Path], int | None]:
    return lambda path: step_number(path.stem) if path.suffix in suffixes else None


def _model_number(path: Path) -> int | None:
    number = step_number(path.name)
    if number is None or not path.is_dir():
        return None
    files = list(path.glob("*.safetensors"))
    # A folder of steps is a run, though its own name has a number: run-1, seed-2.
    if any(NATIVE_KINDS["safetensors"].number(file) is not None for file in files):
        return None
    return number if files or (path / "model.safetensors.index.json").exists() else None


def _of_torch(step: LoggedStep, names: Any) -> TorchFile:
    return TorchFile(step, names.inert)


def _ckpt_file(path: Path) -> int | None:
    return step_number(path.stem) if path.suffix == ".ckpt" and path.is_file() else None


_TORCH = Kind("<name>-<N>.pt", _file_number(".pt", ".pth", ".bin", ".ckpt"), _of_torch, CHECKPOINT)
_MODELS = Kind(
    "step-<N>/model.safetensors", _model_number, lambda step, names: ModelFolder(step, names.inert), MODEL
)


def _dcp_number(path: Path) -> int | None:
    number = step_number(path.name)
    return number if number is not None and path.is_dir() and dcp_state(path) else None


_DCP = Kind(
    "step-<N>/.metadata",
    _dcp_number,
    lambda step, names: DcpFolder(step, names.inert),
    CHECKPOINT,
    lambda path: "" if dcp_state(path) == "finished" else "it has no .metadata: it is still being written",
)
_DEEPSPEED = Kind(
    "global_step<N>/",
    deepspeed_number,
    lambda step, names: DeepSpeedFolder(step, names.inert, masters=names.keys["parameter"][0] != "parameter"),
    replace(
        CHECKPOINT,
        keys={**CHECKPOINT.keys, "parameter": ("parameter", "module"), "step": ("global_steps",)},
    ),
    lambda path: not_latest_yet(path, "latest"),
)
_MEGATRON = Kind(
    "iter_<N>/mp_rank_<T>/model_optim_rng.pt",
    megatron_number,
    lambda step, names: MegatronFolder(step, names.inert),
    CHECKPOINT,
    lambda path: not_latest_yet(path, "latest_checkpointed_iteration.txt"),
)
_ORBAX = Kind(
    "<N>/_CHECKPOINT_METADATA",
    orbax_number,
    lambda step, names: OrbaxFolder(step),
    replace(
        CHECKPOINT,
        keys={
            **CHECKPOINT.keys,
            "parameter": ("parameter", "parameters", "params", "model", "state/params", ROOT),
            "gradient": (*CHECKPOINT.keys["gradient"], "state/grads"),
            "loss": ("loss", "*/loss"),
            "learning_rate": ("learning_rate", "lr", "*/learning_rate", "*/lr"),
            "step": ("step", "*/step"),
        },
    ),
    orbax_unfinished,
)
_LIGHTNING = Kind("<name>step=<N>.ckpt", _ckpt_file, _of_torch, CHECKPOINT)
_LIGHTNING_SHARDS = replace(
    _DCP, layout="<name>step=<N>.ckpt/", number=lambda path: _dcp_number(path) if path.suffix == ".ckpt" else None
)

_ZARR = Kind("step_<N>.zarr", native_number(".zarr"), lambda step, names: ZarrGroup(step))
_HDF5 = Kind("step_<N>.h5", native_number(".h5"), lambda step, names: Hdf5File(step))


def _named(folder: bool, start: bytes, *suffixes: str) -> Callable[[Path], list[Path]]:
    """Files of a log of scalars, told by suffix and first bytes: the path, or those of a folder by their names."""

    def is_one(path: Path) -> bool:
        if path.suffix not in suffixes:
            return False
        if not start:
            return True
        with open_to_read(path) as file:
            return file.read(len(start)) == start

    def found(path: Path) -> list[Path]:
        entries = files(path)
        return [entry for entry in entries if is_one(entry)] if folder or entries == [path] else []

    return found


_CSV = ScalarKind("a CSV file", _named(False, b"", ".csv", ".tsv"), read_csv)
_JSON_LINES = ScalarKind("a file of JSON lines", _named(False, b"{", ".jsonl", ".ndjson"), read_json_lines)
_PARQUET = ScalarKind("a Parquet file", _named(True, b"PAR1", ".parquet"), read_parquet)
_EVENTS = ScalarKind("a TensorBoard event file", event_files, read_events, step="step", single=True)
_WANDB = ScalarKind("a W&B run file", _named(False, WANDB_START, ".wandb"), read_wandb)
_TRACKIO = ScalarKind(
    "a trackio database",
    lambda path: [path] if path.is_file() and holds_metrics(path) else [],
    read_sqlite,
    step="step",
)


def _scalars(kind: ScalarKind) -> tuple[Callable[[Path], bool], Opener, str, ScalarKind]:
    """Find and open a log of scalars; what cannot be looked into is none."""

    def found(path: Path) -> bool:
        try:
            return bool(kind.files(path))
        except (OSError, ValueError):
            return False

    return found, lambda path, mapping: ScalarLog(path, kind, mapping), _ALIGNMENT_OF_SCALARS, kind


_ALIGNMENT_OF_SCALARS = (
    "as its logger counts: step N must be that of the state after N updates, where the loss was; else give --shift"
)
_GIVES_SCALARS = "loss, learning_rate, loss_time_derivative, hessian_min_eigenvalue, under usual keys or --map's"
_LACKS_TENSORS = "tensors: give their log as a further SOURCE"

_NATIVE = (
    "parameter/<tensor>, gradient/<tensor>, hvp/<tensor> (optional), loss, learning_rate, and of the draws of a "
    "stochastic rule replicate_parameter/<tensor>, replicate_hvp/<tensor>, replicate_loss; out of core"
)

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "steps",
            "folder of step_<N>.safetensors and step_<N>.npz",
            _NATIVE,
            "nothing",
            *_folder(*NATIVE_KINDS.values()),
        ),
        Format(
            "huggingface",
            "Trainer output folder: checkpoint-<N>/ with model.safetensors or pytorch_model.bin, single or sharded",
            "parameters, learning_rate; loss where logging_steps=1 (a mean over the update's batches, rounded to 4 "
            "decimals before transformers 5); gradients where a gradient.safetensors lies there; optimizer's state "
            "(--include optimizer, with the order of the model in natgrad.toml); out of core",
            "gradients as the Trainer writes it; the loss at step 0 without a checkpoint-0",
            _holds(TRAINER_KIND),
            TrainerFolder,
            "checkpoint-N is the state after N updates; its loss and the rate of the next update are those of the "
            "log at step N + 1",
        ),
        Format(
            "lightning",
            "folder of <name>step=<N>.ckpt, files or (sharded) folders with .metadata and meta.pt",
            "parameters, learning_rate, optimizer's state (--include optimizer), and what a callback adds under "
            "gradient, hvp or loss; out of core",
            "gradients as Lightning writes it; last.ckpt, which repeats another",
            *_folder(_LIGHTNING, _LIGHTNING_SHARDS),
            "step=N is the state after N updates, with the rate of the next one; gradient and loss that "
            "on_train_batch_end adds are of the state before: --shift gradient=-1 --shift loss=-1",
        ),
        Format(
            "dcp",
            "folder of checkpoints step-<N>/ of torch.distributed.checkpoint: .metadata and *.distcp, of any "
            "ranks; also torch_dist of Megatron-LM",
            "what --map says of the nested dicts that were saved, chunk by chunk in one process; optimizer's state "
            "(--include optimizer); out of core",
            "gradients where they were not saved; objects of classes: no pickle is executed",
            *_folder(_DCP),
        ),
        Format(
            "deepspeed",
            "folder of checkpoints global_step<N>/ of DeepSpeed, ZeRO stages 0 to 3, of any ranks",
            "parameters (the float32 master weights of all ranks, else the module), learning_rate, and what "
            "client_state adds under gradient, hvp or loss; optimizer's state (--include optimizer); out of core",
            "gradients as DeepSpeed writes it; pipeline, tensor and expert parallel models, "
            "whose files do not say how tensors are split",
            *_folder(_DEEPSPEED),
        ),
        Format(
            "megatron",
            "folder of checkpoints iter_<N>/mp_rank_<T>[_<P>]/model_optim_rng.pt of Megatron-LM",
            "parameters of all stages of a pipeline, learning_rate, and what is added under gradient; out of core",
            "gradients as Megatron-LM writes it; tensor and expert parallel models, whose files do not say how "
            "tensors are split (convert them to torch_dist, which is dcp)",
            *_folder(_MEGATRON),
        ),
        Format(
            "orbax",
            "folder of checkpoints <N>/ or <prefix>_<N>/ of Orbax, in OCDBT or not; needs the extra orbax",
            "what --map says of the trees that were saved: params, grads, loss, learning_rate; by chunks",
            "gradients and learning rates where they were not saved; chunks of more than 512 MiB (chunk_byte_size)",
            *_folder(_ORBAX),
        ),
        Format(
            "safetensors",
            "folder of step_<N>.safetensors, or of folders step-<N>/ with model.safetensors, single or sharded",
            _NATIVE + "; float64, float32, float16, bfloat16; of a folder, <array>.safetensors",
            "scalars of a folder that has them in no file",
            *_folder(NATIVE_KINDS["safetensors"], _MODELS),
        ),
        Format(
            "torch",
            "folder of <name>-<N>.pt, .pth, .bin or .ckpt (torch.save)",
            "what --map says of nested dicts: parameter, gradient, hvp, loss, learning_rate, step; the state of "
            "the optimizer (--include optimizer); out of core",
            "objects of classes: no pickle is executed; the format of torch before 1.6",
            *_folder(_TORCH),
        ),
        Format(
            "npz",
            "folder of step_<N>.npz (numpy.savez), or one .npz file of arrays (step, ...)",
            _NATIVE + "; float64, float32, float16; tensors in Fortran order are loaded whole",
            "bfloat16; one file must not be compressed",
            *_folder_or_file(NATIVE_KINDS["npz"], ".npz", NpzStack),
        ),
        Format(
            "hdf5",
            "folder of step_<N>.h5, or one .h5 file of datasets (step, ...); needs the extra hdf5",
            _NATIVE + "; bfloat16 as uint16 with the attribute ml_dtype",
            "data in other files (external, virtual)",
            *_folder_or_file(_HDF5, ".h5", Hdf5File),
        ),
        Format(
            "zarr",
            "one .zarr group of arrays (step, ...), or a folder of step_<N>.zarr, of version 2 or 3; needs the "
            "extra orbax",
            _NATIVE + " by chunks; bfloat16, also as uint16 with the attribute ml_dtype",
            "chunks that are not there, which may be lost (write_empty_chunks); chunks of more than 512 MiB",
            lambda path: holds_zarr(path) or _holds(_ZARR)(path),
            _open_zarr,
        ),
        Format(
            "bergson",
            "folder of gradient stores of Bergson checkpoint-<N>/ or step_<N>/ (gradients.bin, info.json), or one",
            "gradients of linear weights (with --include_bias, of their biases), of stores that are not projected: "
            "their one row (--aggregation mean), or the mean of one row an example; names and shapes are of the "
            "parameters in a further SOURCE, and natgrad.toml says [bergson] layout; out of core",
            "gradients of biases, norms, embeddings and heads, which are left out with a warning; stores that are "
            "projected, scaled, per token, or of the epochs of a run (train/epoch_<N>/), which are refused",
            holds_bergson,
            BergsonFolder,
            "checkpoint-N is the state after N updates; where config.yaml names another checkpoint it is refused",
        ),
        Format(
            "csv",
            "one file with a header, values parted by commas, semicolons or tabs: Lightning's metrics.csv, pandas'",
            _GIVES_SCALARS,
            _LACKS_TENSORS,
            *_scalars(_CSV),
        ),
        Format(
            "jsonl",
            "one file .jsonl or .ndjson with a JSON object in each line, nested or flat",
            _GIVES_SCALARS,
            _LACKS_TENSORS,
            *_scalars(_JSON_LINES),
        ),
        Format(
            "parquet",
            "one file .parquet, or a folder of them: W&B's history, trackio's, pandas'; needs the extra parquet",
            _GIVES_SCALARS,
            _LACKS_TENSORS,
            *_scalars(_PARQUET),
        ),
        Format(
            "tensorboard",
            "an event file (tfevents), or a folder of them; checksums are compared, every point is read",
            _GIVES_SCALARS + "; single precision as nearly all writers store it",
            _LACKS_TENSORS + "; event files in folders below",
            *_scalars(_EVENTS),
        ),
        Format(
            "wandb",
            "one file run-<id>.wandb of W&B, or the folder that it keeps for the run; wandb is not needed",
            _GIVES_SCALARS,
            _LACKS_TENSORS + "; runs that are on its server alone",
            *_scalars(_WANDB),
        ),
        Format(
            "trackio",
            "trackio's SQLite database, with a table metrics",
            _GIVES_SCALARS + "; of several runs the one of --map run=NAME",
            _LACKS_TENSORS,
            *_scalars(_TRACKIO),
        ),
    )
}


def find_format(path: Path) -> str | None:
    """Name of the format that a path holds a log of, by its content; None where it holds none."""
    return next((name for name, known in FORMATS.items() if known.found(path)), None)


def _holds_scalars_alone(path: Path) -> bool:
    """Whether a path holds a log of scalars, by its content."""
    known = FORMATS.get(format_of(path))
    return known is not None and known.scalars is not None


def holds_run(path: Path, *, in_one_file: bool = False) -> bool:
    """Whether a path holds a log with tensors, or a run file, by its content, or the one file in it is one."""
    if _run_file(path) is not None:
        return True
    path = _only_file(path) if in_one_file else path
    return any(known.found(path) for known in FORMATS.values() if known.scalars is None)


def open_source(
    path: Path,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
) -> Source:
    """Open a training log.

    Parameters
    ----------
    path : Path
        A log, or a run file (``.toml``) that lists several, or the folder of one that is called `RUN_FILE`.
    format : str, optional
        One of `FORMATS`; found by content where not given.
    mapping : mapping, optional
        Quantity to the key it stands under; see `pipeline.sources.names`.
    shift : mapping, optional
        Quantity to K: what is logged of it at step s belongs to the state s + K.

    Raises
    ------
    InputError
        Where nothing is there, the format is not known, or it is a log of scalars alone.
    """
    shift = checked_shift(shift or {})
    source = _open(path, format, mapping, shift)
    path = place(path)
    if isinstance(source, ScalarLog) and format is None and path.is_dir() and source.growing():
        raise NotYet(
            "no step files in this folder yet",
            where=str(path),
            why=f"there are only the scalars of {source.location}",
            remedy="run again later, or with --follow; or give the log that has the tensors as a further SOURCE",
        )
    return _joined([source], [shift])


def _open(
    path: Path,
    format: str | None,
    mapping: Mapping[str, str] | None,
    shift: Mapping[str, int],
    *,
    in_run_file: bool = False,
) -> Source:
    """Open one log, with tensors or of scalars; only the latter are shifted already."""
    path, mapping = place(path), dict(mapping or {})
    if format is not None and format not in FORMATS:
        raise InputError(
            f"format {format!r} is not known", remedy=f"choose one of {', '.join(FORMATS)} (natgrad formats)"
        )
    run_file = None if in_run_file else _run_file(path)
    if run_file is not None:
        if format or mapping or shift:
            raise InputError(
                "--format, --map and --shift do not say which source of a run file they mean",
                where=str(path),
                remedy="write them in the run file: format, map and shift of the [[source]] that is meant",
            )
        return _open_run_file(run_file)
    if is_url(path):
        return _open_objects(path, format, mapping, shift)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), remedy="give the folder of a training log")
    path = _only_file(path)
    known = FORMATS[format or find_format(path) or "steps"]
    if known.scalars is not None:
        # Whoever names the format means this file, whatever it is called.
        kind = replace(known.scalars, files=lambda path: [path]) if format and path.is_file() else known.scalars
        return ScalarLog(path, kind, mapping, shift)
    if not path.is_dir() and not known.found(path):
        raise InputError(
            "this is a file, a log is a folder",
            where=str(path),
            why="only .npz and .h5 files, and logs of scalars, can be a log of their own",
            remedy="give the folder that holds the step files",
        )
    return known.open(path, mapping)


def _joined(sources: Sequence[Source], shifts: Sequence[Mapping[str, int]]) -> Source:
    """Join the sources of a run, of which one must hold tensors; each with its shifts."""
    if all(isinstance(source, ScalarLog) for source in sources):
        raise InputError(
            "a log of scalars holds no tensors",
            where=", ".join(str(source.location) for source in sources),
            why="parameters and gradients are what is analyzed; loss and learning rate go with them",
            remedy="give the log that has the tensors as a further SOURCE",
        )
    return sources[0] if len(sources) == 1 and not shifts[0] else JoinedSource(sources, shifts)


def _run_file(path: Path) -> Path | None:
    """Run file that a path is, or that stands for the folder; of URLs it must be named."""
    if is_url(path):
        return path if path.suffix == ".toml" else None
    path = path / RUN_FILE if path.is_dir() else path
    return path if path.suffix == ".toml" and path.is_file() else None


_OF_OBJECTS = {"steps": tuple(NATIVE_KINDS.values()), **{name: (kind,) for name, kind in NATIVE_KINDS.items()}}
"""Formats with tensors that are read from an object store, without a file on this machine."""

_SCALARS_OF_OBJECTS = {
    "csv": _CSV,
    "jsonl": _JSON_LINES,
    "parquet": _PARQUET,
    "tensorboard": _EVENTS,
}
"""The same of scalars."""

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Of files of scalars."""


def _open_objects(path: Path, format: str | None, mapping: Mapping[str, str], shift: Mapping[str, int]) -> Source:
    """Open a log in an object store."""
    found = names(path)
    if not found:
        raise InputError("no such object or folder", where=str(path), remedy="give the folder of a training log")
    name, place = (format, path) if format else _format_of_objects(path)
    if name in _SCALARS_OF_OBJECTS:
        kind = _SCALARS_OF_OBJECTS[name]
        kind = replace(kind, files=lambda path: [path]) if format and files(path) == [path] else kind
        return ScalarLog(place, kind, mapping, shift)
    kinds = _OF_OBJECTS.get(name, ())
    if not any(kind.number(path / name) is not None for name in found for kind in kinds):
        raise InputError(
            f"no {' or '.join(kind.layout for kind in kinds)} here" if kinds else f"format {name!r} needs files",
            where=f"{path}, {found[0]!r} for one",
            why=f"only step_<N>.safetensors and step_<N>.npz, and logs of scalars, are read from an object store "
            f"(--format {', '.join((*_OF_OBJECTS, *_SCALARS_OF_OBJECTS))}); the other formats need files of this "
            "machine",
            remedy="copy the log to a folder first (aws s3 sync URL FOLDER), and give that",
        )
    return StepFolder(path, kinds, mapping)


def _format_of_objects(path: Path) -> tuple[str, Path]:
    """Name of the format of a log in an object store, by its content, and where in it the log is."""
    with network_errors(path):
        found = files(path)
        if not any(kind.number(file) is not None for file in found for kind in _OF_OBJECTS["steps"]):
            for name, kind in _SCALARS_OF_OBJECTS.items():
                if kind.files(path):
                    return name, path
            alone = [file for file in found if file.suffix in _SUFFIXES]
            for name, kind in _SCALARS_OF_OBJECTS.items() if len(alone) == 1 else ():
                if kind.files(alone[0]):
                    return name, alone[0]
    return "steps", path


def _only_file(path: Path) -> Path:
    """Return the one file in a folder that is a log of its own, where the folder is no log itself."""
    if not path.is_dir() or any(known.found(path) for known in FORMATS.values()):
        return path
    files = [entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    # Tensors count before scalars that lie beside them.
    logs = [file for file in files if holds_run(file)] or [file for file in files if find_format(file)]
    return logs[0] if len(logs) == 1 else path


def format_of(path: Path) -> str:
    """Name of the format that a log is found to be of, by its content; that of a run file is ``run file``."""
    if _run_file(path) is not None:
        return "run file"
    if is_url(path):
        return _format_of_objects(path)[0]
    return find_format(_only_file(path)) or "steps"


def open_sources(
    paths: Sequence[Path],
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    *,
    sweep: bool = False,
) -> Source:
    """Open the logs of one run: one, or several that are joined by step. Or open a folder of many runs.

    Parameters
    ----------
    paths, format, mapping, shift
        See `open_source`. Of several logs, ``mapping`` of arrays is that of the one with tensors, and of scalars
        and ``step`` that of the one log of scalars; ``shift`` is that of all.
    sweep : bool
        The path is a folder that holds a log for each of several runs.

    Raises
    ------
    InputError
        See `open_source`; of a sweep, where it has no runs.
    """
    if sweep:
        return _open_sweep(paths, format, mapping, shift)
    if len(paths) == 1:
        return open_source(paths[0], format, mapping, shift)
    shift = checked_shift(shift or {})
    mappings = _shares(paths, mapping or {})
    if mappings is None or format:
        raise InputError(
            "--format and --map do not say which SOURCE they mean",
            where=", ".join(map(str, paths)),
            remedy="list the sources in a run file, each with its format and map",
        )
    sources = [_open(path, None, share, shift) for path, share in zip(paths, mappings, strict=True)]
    return _joined(sources, [shift] * len(sources))


def _shares(paths: Sequence[Path], mapping: Mapping[str, str]) -> list[dict[str, str]] | None:
    """Return the part of a mapping that is meant for each of several logs, None where that is not clear."""
    of_scalars = [_holds_scalars_alone(path) for path in paths]
    shares: list[dict[str, str]] = [{} for _ in paths]
    for quantity, key in mapping.items():
        # Parameters and gradients cannot be in a log of scalars, and such a log is given for its scalars.
        meant = [
            share
            for share, alone in zip(shares, of_scalars, strict=True)
            if alone == (quantity in (*SCALARS, "step", "run"))
        ]
        if len(meant) != 1:
            return None
        meant[0][quantity] = key
    return shares


def _open_sweep(
    paths: Sequence[Path], format: str | None, mapping: Mapping[str, str] | None, shift: Mapping[str, int] | None
) -> Source:
    """Open every folder in a folder as the log of a run, and every file that is a log of its own."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise InputError(
            "a sweep is one folder, with a folder or file for each run",
            where=", ".join(map(str, paths)),
            remedy="give the folder that holds the runs, or leave --sweep out",
        )
    (folder,) = paths
    runs: dict[str, Source] = {}
    for entry in sorted(folder.iterdir()):
        stacked = not is_url(entry) and entry.is_file() and holds_run(entry)
        if not entry.name.startswith(".") and (entry.is_dir() or stacked):
            runs[entry.name] = open_source(entry, format, mapping, shift)
        else:
            _log.info("%s is no run of the sweep", entry)
    if not runs:
        raise InputError(
            "no run is in this folder", where=str(folder), remedy="give the folder that holds a folder for each run"
        )
    return Sweep(folder, runs)


def _run_file_entries(path: Path) -> list[dict[str, Any]]:
    """Return the sources that a run file lists, their ``map`` and ``shift`` checked to be tables."""

    def refuse(what: str) -> InputError:
        return InputError(
            what,
            where=str(path),
            remedy='write a table [[source]] for each, with path = "FOLDER", and format = "NAME", '
            'map = { QUANTITY = "KEY" } and shift = { QUANTITY = -1 } where needed',
        )

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"cannot read the run file: {error}") from error
    entries = table.pop("source", None)
    if table or not isinstance(entries, list) or not entries:
        raise refuse(f"the run file has {', '.join(table) or 'no [[source]]'}")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise refuse("a source has no path")
        unknown = set(entry) - {"path", "format", "map", "shift"}
        tables = [entry.get(name, {}) for name in ("map", "shift")]
        if unknown or not all(isinstance(table, dict) for table in tables):
            raise refuse(
                f"source {entry['path']!r} has {', '.join(sorted(unknown)) or 'a map or shift that is no table'}"
            )
        if Path(entry["path"]).suffix == ".toml":
            raise refuse(f"source {entry['path']!r} is a run file itself")
    return entries


def _open_run_file(path: Path) -> Source:
    """Open the sources that a run file lists, relative to its folder."""
    sources, shifts = [], []
    for entry in _run_file_entries(path):
        shifts.append(checked_shift(entry.get("shift", {}), f"{path}, shift of {entry['path']!r}"))
        listed = place(entry["path"])
        listed = listed if is_url(listed) else path.parent / listed
        sources.append(_open(listed, entry.get("format"), entry.get("map"), shifts[-1], in_run_file=True))
    return _joined(sources, shifts)


def run_file_readings(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Return maps and shifts of the sources of a run file, by their paths; None where a path is no run file.

    Raises
    ------
    InputError
        Where it cannot be read.
    """
    run_file = _run_file(place(path))
    if run_file is None:
        return None
    readings: dict[str, list[dict[str, Any]]] = {}
    for entry in _run_file_entries(run_file):
        reading = {"map": entry.get("map", {}), "shift": checked_shift(entry.get("shift", {}))}
        readings.setdefault(entry["path"], []).append(reading)
    return readings
