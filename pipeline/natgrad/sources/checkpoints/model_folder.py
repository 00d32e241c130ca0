"""Read steps that are folders of safetensors files or torch archives, single or in shards listed by an index."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from natgrad.schema.names import STATES
from natgrad.sources.bounds import JSON_LIMIT, parse_json, read_limited, shown
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.checkpoints.several_files import SeveralFiles, holds_numbers, numbers_of
from natgrad.sources.checkpoints.step_folder import Kind
from natgrad.sources.checkpoints.torch_archive import TorchFile
from natgrad.sources.container import Container, read_errors
from natgrad.sources.names import MODEL
from natgrad.sources.step_names import is_step, role_of
from natgrad.sources.steps import LoggedStep, Unreadable
from natgrad.storage import LocalStorage

__all__ = ["MODELS", "MODEL_KIND", "OPTIMIZERS", "ModelFolder", "holds_model"]

MODELS = ("model", "pytorch_model", "pytorch_model_fsdp", "adapter_model", "diffusion_pytorch_model")
"""Stems of files whose keys are at the root; the keys of ``gradient.safetensors`` are below ``gradient``."""

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
"""Files of the state of an optimizer, as saved by the Trainer and by accelerate."""

_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".bin")
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_FORM = "a checkpoint folder"


def holds_model(path: Path) -> bool:
    """Return True if a folder contains the weights of a model, in one file or in shards."""
    endings = [suffix + end for suffix in _SUFFIXES for end in ("", _INDEX)]
    return any((path / (stem + ending)).is_file() for stem in MODELS for ending in endings)


def _is_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        return False
    files = list(path.glob("*.safetensors"))
    # A folder of step files is a run, even if its own name contains a number.
    return not any(is_step(file.stem) for file in files) and (bool(files) or holds_model(path))


MODEL_KIND = Kind(
    "step-<N>/model.safetensors or pytorch_model.bin",
    _is_checkpoint,
    lambda step, names: ModelFolder(step, names.inert),
    MODEL,
)


class ModelFolder(SeveralFiles):
    """The files of one step.

    The reader opens every ``<name>.safetensors``, every ``<name>.safetensors.index.json`` with its shards, and
    ``optimizer.pt`` or ``optimizer.bin``. If a model has no such file, it opens ``<model>.bin`` or its index. If
    none of these files is named after gradients, it opens one file of torch that is. Other files are ignored. A
    state of an optimizer that cannot be read is omitted, with the reason in ``unread``.

    Raises
    ------
    InputError
        If a file is missing, corrupt or outside of the folder.
    """

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._inert = tuple(inert)
        try:
            with read_errors(step, _FORM):
                names = sorted(path.name for path in step.path.iterdir() if path.is_file())
                files = self._files(names)
                self.ordered = all(name.endswith(".bin") for name, (prefix, _) in files.items() if not prefix)
                for path in filter(holds_numbers, map(step.path.joinpath, names)):
                    self.numbers = numbers_of(path) | self.numbers
                for name, (prefix, wanted) in files.items():
                    try:
                        container = self._open(step.path / name)
                    except Unreadable as error:
                        if name not in OPTIMIZERS:
                            raise
                        self.unread["optimizer"] = f"{name}: {error.what}"
                        continue
                    self._add(container, name, prefix, wanted)
        except BaseException:
            self.close()
            raise

    def _files(self, names: list[str]) -> dict[str, tuple[str, set[str] | None]]:
        """Return the files to read, each with the prefix of its keys and, if an index lists them, its keys."""
        files: dict[str, tuple[str, set[str] | None]] = {}
        shards: set[str] = set()
        stems: set[str] = set()
        for suffix in _SUFFIXES:
            for name in names:
                stem = name.removesuffix(suffix + _INDEX)
                if stem != name and stem not in stems and (suffix != ".bin" or stem in MODELS):
                    stems.add(stem)
                    for shard, wanted in self._index(name).items():
                        files[shard] = (_prefix(stem), wanted)
                        shards.add(shard)
            for name in names:
                stem = name.removesuffix(suffix)
                if stem != name and name not in shards and stem not in stems:
                    if suffix == ".bin" and (stem not in MODELS or stems & set(MODELS)):
                        continue
                    stems.add(stem)
                    files[name] = (_prefix(stem), None)
        if not files:
            raise ValueError("it contains no model.safetensors, no shards with an index, and no pytorch_model.bin")
        files |= {name: ("optimizer/", None) for name in OPTIMIZERS if name in names}
        for name in names:
            stem, suffix = Path(name).stem, Path(name).suffix
            if suffix in _TORCH_SUFFIXES and role_of(stem) == STATES[1] and not any(map(role_of, stems)):
                files[name] = STATES[1], None
                break
        return files

    def _index(self, name: str) -> dict[str, set[str]]:
        index = parse_json(read_limited(self.step.path / name, JSON_LIMIT), name)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{name} is not an index of shards")
        shards: dict[str, set[str]] = {}
        for key, shard in weight_map.items():
            if not shard or Path(shard).name != shard or shard == "..":
                raise ValueError(f"{name} maps {shown(key)} to {shown(shard)}, which is outside of the folder")
            shards.setdefault(shard, set()).add(key)
        return shards

    def _open(self, path: Path) -> Container:
        opener: Callable[..., Container] = SafetensorsFile if path.suffix == ".safetensors" else TorchFile
        if opener is SafetensorsFile:
            return SafetensorsFile(self.step, LocalStorage(path))
        return TorchFile(LoggedStep(self.step.number, LocalStorage(path)), self._inert)

    def _add(self, container: Container, name: str, prefix: str, wanted: set[str] | None) -> None:
        if prefix == STATES[1]:  # a file of torch may contain its own key of the gradients
            _, rename = MODEL.of_part(prefix, container)
            self.include(container, prefix, rename)
            return
        self.include(container, rename=lambda key: prefix + key)
        if wanted is not None and wanted != container.tensors.keys():
            key = sorted(wanted ^ container.tensors.keys())[0]
            verb = "does not contain" if key in wanted else "contains"
            raise ValueError(f"{name} {verb} {shown(key)}, unlike its index")


def _prefix(stem: str) -> str:
    return "" if stem in MODELS else f"{stem}/"
