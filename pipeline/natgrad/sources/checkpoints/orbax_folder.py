"""Read checkpoints of Orbax (an extra of the package: ``pip install natgrad-pipeline[orbax]``).

``_METADATA`` of an item lists the leaves of a tree of arrays. Each leaf is a Zarr array, either in its own folder
or in the key-value store OCDBT, whose files may have been written by any number of processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from natgrad.sources.bounds import Budget, shown, surveyed
from natgrad.sources.checkpoints.step_folder import Kind
from natgrad.sources.checkpoints.torch_archive import to_float
from natgrad.sources.checkpoints.zarr_group import ZarrArrays, read_object
from natgrad.sources.container import read_errors
from natgrad.sources.names import CHECKPOINT, ROOT
from natgrad.sources.step_names import is_step
from natgrad.sources.steps import LoggedStep

__all__ = ["ORBAX_KIND", "OrbaxFolder"]

_FORM = "an Orbax checkpoint"
_METADATA, _CHECKPOINT, _COMMIT = "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"
_DEPTH_LIMIT = 16
# Leaves that are not arrays.
_NON_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string")


def _is_checkpoint(path: Path) -> bool:
    """Return True for a checkpoint folder, even if it is still being written."""
    if not path.is_dir():
        return False
    return _TEMPORARY in path.name or (path / _CHECKPOINT).is_file() or bool(_items(path))


def _unfinished(path: Path) -> str:
    """Return why a checkpoint is not complete: Orbax renames it, or adds a file to it, at the end."""
    if _TEMPORARY in path.name:
        return "its name means that it is being written"
    if (path / _COMMIT).is_file() or not (path / _CHECKPOINT).is_file():
        return ""
    try:
        written = read_object(path / _CHECKPOINT).get("commit_timestamp_nsecs", 0)
    except (OSError, ValueError):
        written = None
    return "" if written is not None else f"{_CHECKPOINT} has no commit time: it is being written"


def _items(path: Path) -> list[Path]:
    """Return the folders of the trees of a checkpoint: those in it, or the checkpoint itself."""
    try:
        if (path / _METADATA).is_file():
            return [path]
        items = sorted(item for item in path.iterdir() if (item / _METADATA).is_file())
        # A folder of steps is a run, even if its own name contains a number: run-1, seed-2.
        complete = (path / _CHECKPOINT).is_file()
        return [item for item in items if complete or not is_step(item.name)]
    except OSError:
        return []


ORBAX_KIND = Kind(
    "<N>/_CHECKPOINT_METADATA",
    _is_checkpoint,
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
    _unfinished,
    clean=lambda name: name.partition(_TEMPORARY)[0],
)


class OrbaxFolder(ZarrArrays):
    """One checkpoint: its trees of arrays, and the numbers of its JSON items.

    Levels of a tree are joined by slashes. If there are several trees, keys start with the name of the item.

    Raises
    ------
    InputError
        If metadata are corrupt or refer to files outside of the folder, an array is missing or in chunks that are
        too large to decompress, or TensorStore is not installed.
    """

    def __init__(self, step: LoggedStep) -> None:
        super().__init__(step, _FORM)
        with read_errors(step, _FORM):
            size, links = surveyed(step.path)
            if links:
                raise ValueError(f"{links[0]} is a link to a folder: copy the folder itself")
            self.budget = Budget(size)
            self._describe()

    def _describe(self) -> None:
        items = _items(self.step.path)
        if not items:
            raise ValueError(f"it contains no item with {_METADATA}")
        specs: dict[str, dict[str, Any]] = {}
        for item in items:
            self._add_tree(item, f"{item.name}/" if len(items) > 1 else "", specs)
        for path in sorted(self.step.path.glob("*/metadata")) + sorted(self.step.path.glob("*/metrics")):
            if path.is_file() and path.parent not in items:
                self._add_numbers(path)
        self.open_arrays(specs)

    def _add_tree(self, item: Path, prefix: str, specs: dict[str, dict[str, Any]]) -> None:
        tree = read_object(item / _METADATA)
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        packed = (item / "manifest.ocdbt").is_file()
        for entry in tree["tree_metadata"].values():
            value = entry["value_metadata"]
            if value.get("skip_deserialize") or value.get("value_type") in _NON_ARRAYS:
                continue
            levels = [str(level["key"]) for level in entry["key_metadata"]]
            self.budget.spend(len(levels), sum(map(len, levels)))
            if not levels or len(levels) > _DEPTH_LIMIT:
                raise ValueError(f"{_METADATA} has a leaf with {len(levels)} levels")
            key, name = prefix + "/".join(levels), ".".join(levels)
            if key in specs:
                raise ValueError(f"it contains {shown(key)} twice")
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise ValueError(f"{_METADATA} refers to {name[:80]!r}, which is outside of the folder")
            if packed:
                base = {"driver": "file", "path": f"{item.absolute()}/"}
                store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                store = {"driver": "file", "path": f"{item.absolute()}/{name}/"}
            # If chunks of zeros are also stored, a missing chunk was lost.
            lost = bool(tree.get("store_array_data_equal_to_fill_value"))
            specs[key] = {"driver": driver, "kvstore": store, "fill_missing_data_reads": not lost}

    def _add_numbers(self, path: Path) -> None:
        try:
            found = read_object(path)
        except ValueError as error:
            self.unread[path.parent.name] = str(error)
            return
        self.numbers |= {
            f"{path.parent.name}/{key}": to_float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
