"""Read folders ``checkpoint-<N>/`` of the Hugging Face Trainer and of accelerate.

The Trainer saves model, optimizer and log history. ``Accelerator.save_state`` saves model and optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.sources.base import Difference, StepContent
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints.dcp_folder import DcpFolder, holds_dcp
from natgrad.sources.checkpoints.deepspeed_folder import DEEPSPEED_KIND, DeepSpeedFolder
from natgrad.sources.checkpoints.model_folder import ModelFolder, holds_model
from natgrad.sources.checkpoints.step_folder import Kind, StepFolder
from natgrad.sources.container import Container
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import MODEL, ROOT, Names
from natgrad.sources.optimizers.saved_state import optimizer_roots
from natgrad.sources.scalars.update_records import (
    ROUNDED,
    TRAINER_STATE,
    UNKNOWN_VERSION,
    are_rounded,
    logged_number,
    rates_are_late,
    read_history,
)
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage

__all__ = ["TRAINER_KIND", "TrainerFolder"]

_ACCELERATE_LAST = "random_states_*.pkl"
_ACCELERATE = ("optimizer*.bin", "scheduler*.bin")
_LOG = "the log of the Trainer (one update late before transformers 4.51)"


def _is_checkpoint(path: Path) -> bool:
    # A gradient store of Bergson is named after the checkpoint from which it was built.
    bergson = (path / "gradients.bin").is_file() and not (path / TRAINER_STATE).is_file()
    if path.name.startswith("checkpoint-"):
        return path.is_dir() and not bergson
    # The output folder of a run, which contains the checkpoints, has the file as well.
    return (path / TRAINER_STATE).is_file() and not any(path.glob("checkpoint-*"))


def _unfinished(path: Path) -> str:
    # The Trainer writes trainer_state.json last, and accelerate the states of the random generators.
    if _has(path, TRAINER_STATE, _ACCELERATE_LAST):
        return ""
    last = _ACCELERATE_LAST if _has(path, *_ACCELERATE) else TRAINER_STATE
    return f"it has no {last}: it is still being written, or being removed"


def _never(path: Path) -> str:
    return ""


def _has(path: Path, *names: str) -> bool:
    """Return True if a folder has a file with one of these names, which may contain wildcards."""
    return any(any(path.glob(name)) for name in names)


def _open(step: LoggedStep, names: Names) -> Container:
    # In stage 3 of ZeRO, the weights may exist only in the checkpoint of DeepSpeed.
    inner = [path for path in sorted(step.path.glob("global_step*")) if DEEPSPEED_KIND.number(path) is not None]
    if len(inner) != 1:
        # With sharded states, FSDP saves model and optimizer as folders of torch.distributed.checkpoint.
        return (
            DcpFolder(step, names.inert)
            if not holds_model(step.path) and holds_dcp(step.path)
            else ModelFolder(step, names.inert)
        )
    inner_step = LoggedStep(step.number, LocalStorage(inner[0]))
    return (
        _WithState(step, inner_step, names) if holds_model(step.path) else DeepSpeedFolder(inner_step, names.inert)
    )


class _WithState(Container):
    """A model with the optimizer state from the DeepSpeed checkpoint in the same folder."""

    def __init__(self, step: LoggedStep, inner_step: LoggedStep, names: Names) -> None:
        super().__init__(step)
        self._stack = ExitStack()
        with ExitStack() as stack:
            model = stack.enter_context(ModelFolder(step, names.inert))
            self.tensors, self.numbers, self.texts = dict(model.tensors), dict(model.numbers), dict(model.texts)
            self.ties, self.ordered, self._model = model.ties, model.ordered, model
            self._state: dict[str, Container] = {}
            if not optimizer_roots(model):
                try:
                    # If the optimizer state cannot be merged, the model can still be read.
                    state = stack.enter_context(DeepSpeedFolder(inner_step, names.inert, masters=True))
                except InputError as error:
                    self.unread[f"{inner_step.path.name}/optimizer"] = error.what
                else:
                    self._take(state)
            self._stack = stack.pop_all()

    def _take(self, state: Container) -> None:
        found = [key for key in state.tensors if key.startswith("optimizer/")]
        self.tensors |= {key: state.tensors[key] for key in found}
        self._state = dict.fromkeys(found, state)
        self.numbers |= {key: number for key, number in state.numbers.items() if key.startswith("optimizer/")}
        self.texts |= {key: text for key, text in state.texts.items() if key.startswith("optimizer/")}
        self.unread |= state.unread
        self.objects |= state.objects

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self._state.get(key, self._model).read(key, start, out)

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return self._state.get(key, self._model).ranges(key)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


TRAINER_KIND = Kind(
    "checkpoint-<N>/",
    _is_checkpoint,
    _open,
    replace(MODEL, keys={**MODEL.keys, "parameter": ("parameter", "model", ROOT)}),
    _unfinished,
)


class TrainerFolder(StepFolder):
    """An output folder of the Trainer.

    ``checkpoint-N`` is the state after N updates. Its optimizer has the learning rate of the next update. The loss
    of this state is that at step N + 1 in the log history of the newest checkpoint. The Trainer logs the mean loss
    since its last entry. It is used if it covers one update (``logging_steps=1``), with a note if it is rounded,
    and ignored otherwise. The learning rates of the log are used only if there is no optimizer: before transformers
    4.51 they are those of the update after the one that was logged.
    Checkpoints of accelerate have no log history, and neither have models that ``save_pretrained`` wrote.
    """

    def __init__(self, location: Path, mapping: Mapping[str, str] | None = None) -> None:
        super().__init__(LocalStorage(location), [TRAINER_KIND], mapping)
        self._folder = location
        self._history: dict[int, dict[str, Any]] = {}

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`. This also reads the newest ``trainer_state.json``."""
        folders = [entry for entry in self._folder.glob("checkpoint-*") if entry.is_dir()]
        # `save_pretrained` writes only models. The Trainer completes a checkpoint before it begins the next one.
        not_models = (TRAINER_STATE, _ACCELERATE_LAST, *_ACCELERATE)
        only_models = len(folders) > 1 and not any(_has(folder, *not_models) for folder in folders)
        unfinished = _never if only_models else _unfinished
        self._kinds = tuple(replace(kind, unfinished=unfinished) for kind in self._kinds)
        steps = super().steps()
        self._history = {} if only_models else _history(steps[-1])
        return steps

    def open(self, step: LoggedStep) -> _TrainerStep:
        """Open a step; see `natgrad.sources.base.Source`."""
        reader = super().open(step)
        assert isinstance(reader, NamedStep)
        return _TrainerStep(reader, step, self._history)


def _history(step: LoggedStep) -> dict[int, dict[str, Any]]:
    """Return the entries of the log history by step; those of accelerate have none."""
    file = step.storage / TRAINER_STATE
    return {} if any(step.path.glob(_ACCELERATE_LAST)) and not file.exists() else read_history(file)


class _TrainerStep:
    """Reader of one checkpoint that adds the logged scalars of the next update."""

    def __init__(self, reader: NamedStep, step: LoggedStep, history: Mapping[int, Mapping[str, Any]]) -> None:
        self._reader, self._step, self._history = reader, step, history
        self.read, self.ranges, self.placement = reader.read, reader.ranges, reader.placement

    def __enter__(self) -> _TrainerStep:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.__exit__(*exception)

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        content = self._reader.content()
        number = self._step.number
        scalars, notes = dict(content.scalars), list(content.notes)
        entry = self._history.get(number + 1, {})
        covers = number + 1 - max((step for step in self._history if step <= number), default=0)
        late = rates_are_late(self._step.storage)
        logged = (self._history.get(number, {}) if late else entry).get("learning_rate")
        rates = () if content.optimizer is None else content.optimizer.group_rates
        difference = None
        if logged is not None and (rates or "learning_rate" in scalars):
            # The Trainer logs the rate of the first group.
            saved = rates[0] if rates else scalars["learning_rate"]
            difference = Difference("learning_rate", "the checkpoint", saved, _LOG, logged_number(logged))
        elif logged is not None:
            scalars["learning_rate"] = logged_number(logged)
            notes += [UNKNOWN_VERSION] if late is None else []
        if "loss" in entry and covers == 1:
            scalars["loss"] = logged_number(entry["loss"])
            notes += [ROUNDED] if are_rounded(self._history) else []
        elif self._history:
            notes.append("the Trainer did not log the loss of every single step (logging_steps is not 1)")
        differences = (difference,) if difference is not None and difference.matters else ()
        return replace(
            content, scalars=scalars, notes=tuple(notes), differences=(*content.differences, *differences)
        )
