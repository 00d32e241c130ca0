"""The formats that can be read, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.schema import InputError
from pipeline.sources.base import Source
from pipeline.sources.step_folder import StepFolder

__all__ = ["FORMATS", "Format", "open_source"]


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
    open : callable
        Path to `Source`.
    """

    name: str
    layout: str
    gives: str
    lacks: str
    open: Callable[[Path], Source]


_GIVES = "parameter/<tensor>, gradient/<tensor>, hvp/<tensor> (optional), loss, learning_rate; out of core"

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "steps",
            "folder of step_<N>.safetensors and step_<N>.npz",
            _GIVES,
            "nothing",
            StepFolder,
        ),
        Format(
            "safetensors",
            "folder of step_<N>.safetensors",
            _GIVES + "; float64, float32, float16, bfloat16",
            "nothing",
            lambda path: StepFolder(path, ["safetensors"]),
        ),
        Format(
            "npz",
            "folder of step_<N>.npz (numpy.savez)",
            _GIVES + "; float64, float32, float16; tensors in Fortran order are loaded whole",
            "bfloat16",
            lambda path: StepFolder(path, ["npz"]),
        ),
    )
}


def open_source(path: Path, format: str | None = None) -> Source:
    """Open a training log.

    Parameters
    ----------
    path : Path
    format : str, optional
        One of `FORMATS`; found by content where not given.

    Raises
    ------
    InputError
        Where nothing is there, or the format is not known.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), remedy="give the folder of a training log")
    if format is not None and format not in FORMATS:
        raise InputError(
            f"format {format!r} is not known", remedy=f"choose one of {', '.join(FORMATS)} (natgrad formats)"
        )
    if not path.is_dir():
        raise InputError(
            "this is a file, a log is a folder",
            where=str(path),
            remedy="give the folder that holds the step files",
        )
    return FORMATS[format or "steps"].open(path)
