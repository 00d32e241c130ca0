"""Read checkpoint folders of Megatron-LM in its format ``torch``: ``mp_rank_<T>[_<P>]/model_optim_rng.pt``.

Its format ``torch_dist`` is read by `natgrad.sources.checkpoints.dcp_folder`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints.pickle_data import Record
from natgrad.sources.checkpoints.step_folder import Kind, not_latest_yet
from natgrad.sources.checkpoints.torch_archive import TorchFile
from natgrad.sources.container import Container, read_errors
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.steps import LoggedStep, where

__all__ = ["MEGATRON_KIND", "MegatronFolder"]

_CLASSES = ("megatron.*", "transformer_engine.*", "_io.BytesIO")
"""Classes that Megatron-LM pickles in addition to tensors."""

_FORM = "a Megatron-LM checkpoint"
_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,9})(?:_(\d{3,9}))?(?:_(\d{3,9}))?")
_SIZES = {
    "its tensors are split over {} tensor parallel ranks": ("tensor_model_parallel_size", "model_parallel_size"),
    "its experts are split over {} ranks": ("expert_model_parallel_size",),
}
_OFFICIAL = (
    "convert it with Megatron-LM: run the training command with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save DIR, or tools/checkpoint/convert.py with --target-tensor-parallel-size 1; or train with "
    "--ckpt-format torch_dist"
)
_HEAD = ("word_embeddings_for_head/weight", "output_layer.weight")
_EMBEDDING = re.compile(r"(?:.*[/.])?word_embeddings[/.]weight")


def _is_checkpoint(path: Path) -> bool:
    try:
        return path.is_dir() and any(_RANK.fullmatch(entry.name) for entry in path.iterdir())
    except OSError:
        return False


MEGATRON_KIND = Kind(
    "iter_<N>/mp_rank_<T>/model_optim_rng.pt",
    _is_checkpoint,
    lambda step, names: MegatronFolder(step, names.inert),
    CHECKPOINT,
    lambda path: not_latest_yet(path, "latest_checkpointed_iteration.txt"),
)


class MegatronFolder(Container):
    """One checkpoint: one file, or one file per pipeline stage.

    Each stage numbers its layers from 0. If there are several stages, tensor names therefore start with
    ``stage<P>.``. Tensor names in chunks of a virtual pipeline start with ``model<V>.``.

    Raises
    ------
    InputError
        If a file is missing or corrupt, or if tensors are split over ranks.
    """

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._origins: dict[str, tuple[TorchFile, str]] = {}
        inert = (*_CLASSES, *inert)
        with ExitStack() as stack:
            with read_errors(step, _FORM):
                names = sorted(entry.name for entry in step.path.iterdir() if _RANK.fullmatch(entry.name))
                if any(int(_ranks(name)[0]) for name in names):
                    raise self._split_error(f"its tensors are split over {len(names)} ranks")
                files = [
                    stack.enter_context(TorchFile(LoggedStep(step.number, step.storage / name / _FILE), inert))
                    for name in names
                ]
                trees = [file.tree for file in files]
                if not all(isinstance(tree, dict) for tree in trees):
                    raise ValueError("its files do not contain dictionaries")
                stages = self._stages(trees[0].get("args"))
                if len(files) != stages or [_stage(name) for name in names] != list(range(stages)):
                    raise ValueError(f"it was written by {stages} stages, but the folders are {', '.join(names)}")
                self.budget = Budget(sum(file.budget.size for file in files))
                for stage, file in enumerate(files):
                    self._add(file, f"stage{stage}." if stages > 1 else "")
                if stages > 1:
                    self._tie_head(trees[0]["args"], stages)
                self.numbers = dict(files[0].numbers)
                self.objects = {key: item for file in files for key, item in file.objects.items()}
            self._stack = stack.pop_all()

    def _stages(self, arguments: Any) -> int:
        """Return the number of stages from the arguments of the run, which also show if tensors are split."""
        if not isinstance(arguments, Record):
            return 1
        for why, names in _SIZES.items():
            for name in names:
                size = arguments.get(name)
                if isinstance(size, int) and size > 1:
                    raise self._split_error(why.format(size))
        stages = arguments.get("pipeline_model_parallel_size")
        return stages if isinstance(stages, int) and stages > 0 else 1

    def _split_error(self, why: str) -> InputError:
        return InputError(
            f"this checkpoint cannot be merged: {why}, and no file records the axis",
            where=where(self.step),
            remedy=_OFFICIAL,
        )

    def _add(self, file: TorchFile, stage: str) -> None:
        keys = {}
        for key, logged in file.tensors.items():
            array, slash, name = key.partition("/")
            chunk = re.fullmatch(r"model(\d+)", array)
            array, name = ("model", f"{array}.{name}") if chunk else (array, name)
            keys[key] = f"{array}{slash}{stage}{name}" if slash else f"{stage}{array}"
            self.add(keys[key], logged.shape, logged.dtype)
            self._origins[keys[key]] = file, key
        self.ties |= {keys[key]: keys[target] for key, target in file.ties.items()}

    def _tie_head(self, arguments: Record, stages: int) -> None:
        """Tie the copy of the embedding in the last stage to that in the first stage, if the run ties them."""
        if arguments.get("untie_embeddings_and_output_weights"):
            return
        first = [key for key in self.tensors if key.startswith("model/stage0.") and _EMBEDDING.fullmatch(key)]
        last = [key for key in self.tensors if key.startswith(f"model/stage{stages - 1}.") and key.endswith(_HEAD)]
        if len(first) == len(last) == 1 and self.tensors[first[0]] == self.tensors[last[0]]:
            self.ties[last[0]] = first[0]

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        file, inner = self._origins[key]
        file.read(inner, start, out)

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        file, inner = self._origins[key]
        return file.ranges(inner)

    def configuration(self) -> dict[str, Scalar]:
        """Return the configuration of the run; see `natgrad.sources.container.Container`."""
        return next(iter(self._origins.values()))[0].configuration() if self._origins else {}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def _ranks(name: str) -> tuple[str, str | None, str | None]:
    match = _RANK.fullmatch(name)
    assert match is not None
    return match[1], match[2], match[3]


def _stage(name: str) -> int:
    return int(_ranks(name)[1] or 0)
