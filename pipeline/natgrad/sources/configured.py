"""Read the configuration of a run where training programs store it: in files next to the log, or in the log itself.

YAML is parsed without the tags of Python objects, and pickles are read as data, so nothing in a file is executed. A
file that cannot be read costs only its values: the reason is a note, and the log is read nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

from natgrad.schema.configuration import CONFIGURATION_FILE, Scalar, flat_configuration
from natgrad.sources.base import Source
from natgrad.sources.bounds import JSON_LIMIT, parse_json, parse_toml, read_limited
from natgrad.sources.checkpoints.torch_archive import saved_object
from natgrad.sources.container import READ_ERRORS, reason_of
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage, Storage, network_errors

__all__ = ["Configured", "configuration_of", "nearby", "read_or_note"]

Configuration = dict[str, Scalar]

_JSON_BYTES, _YAML_BYTES, _YAML_BRACKETS = 1 << 20, 1 << 17, 10_000
"""Maximum sizes of files, and number of brackets in YAML. PyYAML takes a second for 130 kB, or for 15,000 brackets
within each other."""

_LEVELS = 3
"""Maximum number of levels between the folders of a step, its log and its run."""

_SUBFOLDERS = ("checkpoint", "ckpt", "weights", "models", "states", "steps", "log", "tensorboard")
"""Beginnings of the names of folders that contain only a part of a run, whose configuration is one level up."""

_TRAINER_OPTIONS = (
    "max_steps",
    "num_train_epochs",
    "train_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
"""Values in ``trainer_state.json`` that are options of the run; others are its progress."""


@runtime_checkable
class Configured(Protocol):
    """A log that knows where the configuration of a run is."""

    def configuration(self, step: LoggedStep, notes: list[str]) -> Configuration:
        """Return the plain values of the configuration of the run of a step, by key; see `configuration_of`."""
        ...


def configuration_of(source: Source, step: LoggedStep, notes: list[str]) -> Configuration:
    """Return the plain values of the configuration of a run by key, such as ``optimizer.lr``; empty if not logged.

    Parameters
    ----------
    source : Source
        Any log. One that is not `Configured` has its configuration in files next to it.
    step : LoggedStep
        A step of the run, which may itself contain the configuration.
    notes : list of str
        Reasons why files are not read are appended.
    """
    if isinstance(source, Configured):
        return source.configuration(step, notes)
    location = source.location
    return nearby(location if isinstance(location, Storage) else LocalStorage(location), step, notes)


def nearby(location: Storage, step: LoggedStep, notes: list[str]) -> Configuration:
    """Return the values in the known files of a step, its log and its run. The nearest file with a key decides.

    Parameters
    ----------
    location : Storage
        File or folder of the log.
    step : LoggedStep
    notes : list of str
        Reasons why files are not read are appended.
    """
    found: Configuration = {}
    for folder in _folders(location, step):
        for name, parse in _FILES.items():
            file = folder
            for part in name.split("/"):
                file = file / part
            found = flat_configuration(read_or_note(partial(parse, file), file, notes)) | found
    return found


def read_or_note(read: Callable[[], Mapping[str, Any]], file: Storage, notes: list[str]) -> Mapping[str, Any]:
    """Return what a function reads from a file. If it cannot be read, append a note; if it is missing, do not."""
    try:
        with network_errors(file), suppress(FileNotFoundError, NotADirectoryError):
            return read()
    except (*READ_ERRORS, RecursionError) as error:
        notes.append(f"the configuration in {file} is not read: {reason_of(error)}")
    return {}


def _folders(location: Storage, step: LoggedStep) -> Iterator[Storage]:
    """Yield the folders of a step, its log and its run, the nearest first."""
    log = location if location.is_folder() else location.parent
    entry, inner = step.storage, list[Storage]()
    while entry != log and len(inner) < _LEVELS:
        inner.append(entry)
        entry = entry.parent
    # The folder of a step that is not below the log is its own.
    yield from (each for each in (inner if entry == log else inner[:1]) if each.is_folder())
    yield log
    for _ in range(_LEVELS):
        if not log.name.lower().startswith(_SUBFOLDERS):
            return
        log = log.parent
        yield log


# Files -------------------------------------------------------------------------------------------------------


def _json(file: Storage) -> Any:
    return parse_json(read_limited(file, _JSON_BYTES), file.name)


def _yaml(file: Storage) -> Any:
    import yaml

    text = read_limited(file, _YAML_BYTES).decode()
    if text.count("[") + text.count("{") > _YAML_BRACKETS:
        raise ValueError(f"it has more than {_YAML_BRACKETS} brackets")
    try:
        tree = yaml.load(text, _plain_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return _without_descriptions(tree)


@cache
def _plain_loader() -> Any:
    """Return a loader that reads objects of Python classes as the plain data that they consist of."""
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def flatten_mapping(self, node: Any) -> None:
            """Leave merge keys: mappings that are merged into each other repeatedly grow exponentially."""

    def data(loader: Any, tag: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    PlainLoader.add_multi_constructor("", data)
    return PlainLoader


def _without_descriptions(tree: Any) -> Any:
    """Return the values of a ``config.yaml`` of W&B, which stores each with a description."""
    if not isinstance(tree, dict):
        return tree
    return {
        key: entry["value"] if isinstance(entry, dict) and {"value"} <= entry.keys() <= {"value", "desc"} else entry
        for key, entry in tree.items()
    }


def _trainer_options(file: Storage) -> Any:
    state = parse_json(read_limited(file, JSON_LIMIT), file.name)
    return {name: state[name] for name in _TRAINER_OPTIONS if name in state}


_FILES: dict[str, Callable[[Storage], Any]] = {
    CONFIGURATION_FILE: _json,
    ".hydra/config.yaml": _yaml,
    "hparams.yaml": _yaml,
    "config.yaml": _yaml,
    "config.yml": _yaml,
    "config.json": _json,
    "config.toml": parse_toml,
    "args.json": _json,
    "training_args.bin": saved_object,
    "trainer_state.json": _trainer_options,
}
"""Files with a configuration, the most specific ones first."""
