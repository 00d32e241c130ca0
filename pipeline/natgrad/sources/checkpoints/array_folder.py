"""Read steps that are folders of files with arrays: ``step_0/params.npy`` and ``step_0/grads.npy``, for example."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.npy_file import NpyFile
from natgrad.sources.checkpoints.npz_file import NpzFile, NpzStack
from natgrad.sources.checkpoints.numpy_pickle import PickleFile
from natgrad.sources.checkpoints.several_files import SeveralFiles, holds_numbers, numbers_of
from natgrad.sources.checkpoints.stacked_file import StackedFile
from natgrad.sources.checkpoints.step_folder import Kind
from natgrad.sources.checkpoints.torch_archive import TorchFile
from natgrad.sources.container import Container, read_errors
from natgrad.sources.names import CHECKPOINT, Names
from natgrad.sources.step_names import is_content, is_step, parse_name, role_of
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage

__all__ = ["ARRAYS_KIND", "ArrayFolder", "stack_of"]

_FORM = "a folder of arrays"
_DEPTH = 3
_FILE_OPERATIONS = 500
_OPENERS: dict[str, Callable[[LoggedStep], Container]] = {
    ".npz": NpzFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
    ".pkl": PickleFile,
    ".pickle": PickleFile,
}


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, and the npy files in its folders, sorted. Links to folders are not followed."""
    for path, folders, names in os.walk(folder):
        folders.sort()
        below = Path(path)
        if len(below.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        for name in sorted(names):
            if not name.startswith(".") and (below == folder or name.endswith(".npy")):
                yield below / name


def _is_step(path: Path) -> bool:
    """Return True if a folder contains files of one step, whose names indicate their contents."""
    if not path.is_dir():
        return False
    files = [file for file in _files(path) if file.suffix in (".npy", *_OPENERS)]
    stems = [file.relative_to(path).with_suffix("").parts[0] for file in files]
    if any(is_step(stem) for stem in stems):
        return False
    named = [is_content(stem) and role_of(stem) not in ("optimizer", "other") for stem in stems]
    if is_step(path.name) and not path.name.isdecimal():
        return any(named)
    # The folder may be that of a run, whose files have the number of a step.
    return bool(stems) and all(named) and all(parse_name(stem).number is None for stem in stems)


def stack_of(path: Path, mapping: Mapping[str, str] | None = None) -> StackedFile | None:
    """Return a folder with a file for each quantity of a run as a log, or None if it is not one.

    ``params.npy``, ``grads.npy`` and ``losses.npy`` have a leading step dimension, for example.
    """
    try:
        files = [file for file in path.iterdir() if file.suffix in (".npy", ".npz")]
    except OSError:
        return None
    if len(files) < 2 or any(is_step(file.stem) or parse_name(file.stem).number is not None for file in files):
        return None
    log = StackedFile(
        path, lambda step: ArrayFolder(step, CHECKPOINT, stacked=True), mapping, usually_one_step=True
    )
    with suppress(InputError):
        return log if len(log.steps()) > 1 else None
    return None


class ArrayFolder(SeveralFiles):
    """The files of one step.

    Every file of one array, such as ``.npy``, is an array whose key is its path. Another ``.npz``, ``.pt`` or
    ``.pkl`` file contains the tensors of its kind (see `natgrad.sources.step_names.role_of`), or has usual keys.
    Numbers in JSON files are scalars. Other files are not read.

    Parameters
    ----------
    step : LoggedStep
    names : Names
    stacked : bool
        The arrays have a leading step dimension, so they are read from the middle.

    Raises
    ------
    InputError
        If a file cannot be read, or two files contain the same key.
    """

    def __init__(self, step: LoggedStep, names: Names, *, stacked: bool = False) -> None:
        super().__init__(step)
        self._openers = {**_OPENERS, ".npz": NpzStack} if stacked else _OPENERS
        try:
            with read_errors(step, _FORM):
                for path in _files(step.path):
                    self._add(path, names)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, names: Names) -> None:
        relative = path.relative_to(self.step.path)
        self.budget.spend(_FILE_OPERATIONS)
        if path.suffix == ".npy":
            self.include(NpyFile(self.step, relative.with_suffix("").as_posix(), LocalStorage(path)))
        elif holds_numbers(path):
            self.numbers = numbers_of(path) | self.numbers
        elif path.suffix in self._openers:
            role = role_of(path.stem)
            if role == "other":
                self.unread[relative.as_posix()] = "its name indicates neither the model nor gradients"
                return
            container = self._openers[path.suffix](LoggedStep(self.step.number, LocalStorage(path)))
            if [*container.tensors] == [""]:
                self.include(container, rename=lambda _: relative.with_suffix("").as_posix())
                return
            _, rename = names.of_part(role, container)
            self.include(container, role or path.stem, rename)


ARRAYS_KIND = Kind(
    "step-<N>/params.npy and grads.npy, or .npz, .pt, .pkl",
    _is_step,
    ArrayFolder,
    CHECKPOINT,
)
