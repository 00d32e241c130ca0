"""Record a training run of PyTorch from the hooks of its optimizers.

The gradient of an update is available in the step hooks of the optimizer, but where depends on the trainer. The
rule is the same for all: Copy the parameters and the learning rates before the step. Without a closure, also copy
``.grad`` before the step, which may change it. With a closure, copy it after the first evaluation, because it is
missing, stale or incomplete before. Divide by ``grad_scale``, which a fused optimizer applies inside the step.

Torch is imported when `watch` is called.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from natgrad.recording.arrays import is_tensor
from natgrad.recording.declared import store_configuration
from natgrad.recording.ledgers import LedgerRecording
from natgrad.recording.live import LastUpdate
from natgrad.recording.parameters import Model, Names, Selection, parameters_of, shapes_of
from natgrad.recording.shards import Shards, is_sharded
from natgrad.recording.states import StateRecording
from natgrad.recording.updates import Recording, Update
from natgrad.schema.arguments import number, real_array, shown
from natgrad.schema.configuration import declared_configuration
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE
from natgrad.schema.logs import logger
from natgrad.schema.names import EVALUATIONS

__all__ = ["Optimizer", "Watch", "watch"]

_log = logger("natgrad.recording")

_STEPS_OF_ANOTHER = 10
"""Number of steps of an optimizer like the watched one, without a step of the latter, that suggest a copy."""


_LONG_WAIT = 0.1
"""Seconds of waiting for the disk in one step that are reported."""


class Optimizer(Protocol):
    """An optimizer of PyTorch, or a wrapper with the attribute ``optimizer``, such as that of Accelerate."""

    @property
    def param_groups(self) -> Any:
        """Groups of parameters."""
        ...


def watch(
    optimizer: Optimizer | Sequence[Optimizer],
    folder: str | Path,
    *,
    model: Model | None = None,
    mode: str = "full",
    parameters: str | Sequence[str] | None = None,
    every: int = 1,
    first_step: int | None = None,
    evaluation: str = "unknown",
    configuration: Mapping[str, Any] | None = None,
    on_error: str = "warn",
    buffer_bytes: int = 1024 * MEBIBYTE,
) -> Watch:
    """Record every step of a PyTorch optimizer into a log that `natgrad.process` reads.

    The training loop does not change. Parameters, gradients and learning rates are copied when the optimizer steps,
    and written in a thread. The gradient is the one that the optimizer uses: after clipping, accumulation and
    unscaling. With a closure, it is that of the first evaluation.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or sequence of them
        The optimizer, or several that together make one update, each with one step. Wrappers with the attribute
        ``optimizer`` are unwrapped. Register other step hooks that change gradients before this call.
    folder : str or Path
        Folder of the log. It is created if it does not exist.
    model : torch.nn.Module, optional
        Model with the names of the parameters. Without it, they are those that the optimizer was created with
        (``named_parameters``), or numbers.
    mode : {"full", "ledger"}
        Record complete states, or only the inner products of the parameters, the displacement and the gradient of
        each tensor, which take 88 bytes per tensor and update.
    parameters : str or sequence of str, optional
        Patterns of the names of the parameters to record, with the wildcards ``*``, ``?`` and ``[...]``. Default:
        all parameters that require a gradient at the first step.
    every : int
        Record every n-th update, that is, the states before and after it, so that each result belongs to a single
        update. Windows of several updates have no results then. Default: all updates.
    first_step : int, optional
        Number of updates before the first recorded state, to continue the log of a training run that was resumed.
        Steps that are recorded again are replaced. Default: 0, in a folder without steps.
    evaluation : {"batch", "fixed", "unknown"}
        Declare that the losses and gradients of steps belong to changing mini-batches, or to one objective. The
        option of `natgrad.process` takes precedence.
    configuration : mapping, optional
        Options of the run, for example ``vars(args)``, which pages show and compare; see `natgrad.Recorder`.
    on_error : {"warn", "raise"}
        With "warn", an error ends the recording with a warning, and the training continues. With "raise", it
        is raised in the training loop.
    buffer_bytes : int
        Maximum size of the states that wait to be written. If they are larger, the training waits for the disk,
        with a warning. One state always fits.

    Returns
    -------
    Watch
        Call its method ``close`` after the last step, or use it as a context manager.

    Raises
    ------
    InputError
        If torch is not installed, an argument is not valid, the folder already contains steps, the model lacks
        parameters of the optimizer, or no name matches the patterns.

    Examples
    --------
    >>> import torch, tempfile  # doctest: +SKIP
    >>> model = torch.nn.Linear(3, 1)  # doctest: +SKIP
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # doctest: +SKIP
    >>> with watch(optimizer, "logs/a", model=model) as log:  # doctest: +SKIP
    ...     for _ in range(10):
    ...         optimizer.zero_grad()
    ...         loss = model(torch.ones(3)).square().sum()
    ...         loss.backward()
    ...         log.log(loss=loss)
    ...         optimizer.step()
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "natgrad.watch needs PyTorch, which is not installed",
            remedy="pip install torch; natgrad.Recorder records NumPy arrays without it",
        ) from error
    optimizers = [_unwrapped(one, torch) for one in _listed(optimizer)]
    _require_choice("on_error", on_error, ("warn", "raise"))
    _require_choice("mode", mode, ("full", "ledger"))
    _require_choice("evaluation", evaluation, EVALUATIONS)
    try:
        start = number(0 if first_step is None else first_step, int, minimum=0)
        limit, interval = number(buffer_bytes, int, minimum=0), number(every, int, minimum=1)
    except ValueError as error:
        raise InputError(
            f"first_step, buffer_bytes or every {error}",
            where="arguments first_step, buffer_bytes and every",
            remedy="pass whole numbers",
        ) from error
    patterns = ["*"] if parameters is None else [parameters] if isinstance(parameters, str) else list(parameters)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            f"parameters must be patterns of names, got {shown(parameters)}",
            where="argument parameters",
            remedy="pass, for example, parameters='encoder.*'",
        )
    names = Names(model, patterns)
    names.select(optimizers)
    resume = first_step is not None
    distributed = _is_distributed(torch)
    _require_known_parallelism(model)
    declared = None if configuration is None else declared_configuration(configuration)
    is_first = not distributed or torch.distributed.get_rank() == 0
    recording: Recording | None = None
    if mode == "ledger":
        every_parameter = [parameter for one in optimizers for parameter in parameters_of(one)]
        sharded = distributed and any(map(is_sharded, every_parameter))
        shards = Shards(every_parameter) if sharded else None
        if shards is not None or is_first:
            recording = LedgerRecording(folder, interval, resume=resume, evaluation=evaluation, shards=shards)
    elif is_first:
        recording = StateRecording(folder, interval, resume=resume, limit=limit, evaluation=evaluation)
    if is_first:
        store_configuration(Path(folder), declared)
    return Watch(optimizers, names, recording, start, raises=on_error == "raise")


class Watch:
    """Recording of a training run, which `natgrad.watch` returns.

    Attributes
    ----------
    active : bool
        True until the recording ends, by `close` or by an error. In distributed data parallel training, only
        rank 0 records.
    recorded, skipped : int
        Number of recorded updates, and of steps that the optimizer skipped because a gradient overflowed.
    seconds_waited : float
        Time for which the training waited for the disk.
    """

    def __init__(
        self, optimizers: Sequence[Any], names: Names, recording: Recording | None, start: int, *, raises: bool
    ) -> None:
        self._optimizers, self._names, self._recording = optimizers, names, recording
        self._next, self._raises, self._process = start, raises, os.getpid()
        self._selections: list[Selection] = []
        self._update: Update | None = None
        self._next_loss: Any = None
        self._versions: dict[int, list[int]] = {}
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()
        self._steps_of_others = 0
        self._reported: set[str] = set()
        self.active, self.recorded, self.skipped = recording is not None, 0, 0
        self._handles: list[Any] = []
        if recording is None:
            return
        self._register()
        atexit.register(self.close)

    def __repr__(self) -> str:
        folder = "" if self._recording is None else str(self._recording.folder)
        return f"Watch({folder!r}, active={self.active}, recorded={self.recorded})"

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def seconds_waited(self) -> float:
        """Time for which the training waited for the disk."""
        return 0.0 if self._recording is None else self._recording.seconds_waited

    @property
    def last(self) -> LastUpdate | None:
        """Angle, condition number and relative length of the last update, for the model and each tensor.

        The values are computed when they are read, between two steps, from the recorded state and the current
        parameters. None before the first complete step, after the end of the recording, and if the parameters were
        changed after the step.
        """
        update, recording = self._update, self._recording
        if recording is None or not self._works() or update is None or not self._is_complete(update):
            return None
        try:
            if not self._is_unchanged():
                return None
            return recording.last(update, self._selections)
        except Exception as error:
            self._fail(error)
            return None

    def log(self, *, loss: Any, after: bool = False) -> None:
        """Record the loss of an update, at the parameters before it.

        Without a call, the loss is the value that the closure of the step returns, if there is one.

        Parameters
        ----------
        loss : float or tensor
            One number. A tensor may have a graph and be on any device.
        after : bool
            The loss belongs to the step just taken. By default, it belongs to the next step.
        """
        if not self._works():
            return
        try:
            value = _loss(loss)
            update = self._update
            if after and update is None:
                raise InputError("no step has been taken yet", where="after=True", remedy="omit after=True")
            if update is not None and (after or len(update.stepped) < len(self._optimizers)):
                if update.loss is not None and _stepping():
                    return  # a later evaluation of the closure, at other parameters
                previous, update.loss = update.loss, value
            else:
                previous, self._next_loss = self._next_loss, value
            if previous is not None:
                self._report("losses", "the loss of a step was logged twice; the last value is used")
        except Exception as error:  # a wrong loss must not end the training
            if self._raises:
                raise
            self._report("loss", "a loss was not recorded: %s", error)

    def close(self) -> None:
        """Write what waits, and end the recording. The optimizer is not changed."""
        if self._recording is None or self._process != os.getpid():
            return
        atexit.unregister(self.close)
        try:
            if self.active:
                self._finish_log()
            self._end()
            self._recording.close()
        except Exception as error:
            if "failure" not in self._reported:
                self._fail(error)

    # Hooks ----------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        # A compiled step calls hooks without compiling them.
        before, after, another = map(torch.compiler.disable, (self._before, self._after, self._another))
        for index, optimizer in enumerate(self._optimizers):
            self._handles += [
                optimizer.register_step_pre_hook(functools.partial(before, index)),
                optimizer.register_step_post_hook(functools.partial(after, index)),
                optimizer.register_load_state_dict_post_hook(self._reloaded),
            ]
        self._handles.append(register_optimizer_step_pre_hook(another))

    def _before(self, index: int, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Copy the state before a step. Return the arguments of the step with a closure that copies gradients."""
        if not self._works() or _is_nested(optimizer):
            return None
        self._steps_of_others = 0
        try:
            return self._copy(index, optimizer, args, kwargs)
        except Exception as error:
            self._fail(error)
            return None

    def _after(self, index: int, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Complete the step of an optimizer."""
        update, recording = self._update, self._recording
        if recording is None or not self._works() or update is None or _is_nested(optimizer):
            return
        try:
            found = getattr(optimizer, "found_inf", None)
            if found is not None and float(found) > 0:
                self.skipped += not update.skipped
                update.skipped = True
            selection = self._selections[index]
            self._versions[index] = selection.versions()
            if recording.includes(update.number) and index in update.evaluated:
                recording.after(update, selection)
            if len(update.stepped | {index}) == len(self._optimizers):
                recording.complete(update)
            update.stepped.add(index)
        except Exception as error:
            self._fail(error)

    def _reloaded(self, optimizer: Any) -> None:
        """End the recording if the optimizer is set to another state of the run."""
        if self._works() and self._update is not None:
            self._fail(
                InputError(
                    "the state of the optimizer was replaced (load_state_dict)",
                    why="the training continues from another state, which is not the result of an update",
                    remedy="to continue the log, call natgrad.watch again after loading, with first_step=N, where "
                    "N is the number of updates before the loaded state",
                )
            )

    def _another(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Report steps of optimizers that are not watched but update the same run."""
        inside = {id(one) for one in (optimizer, *_stepping())}
        if not self._works() or any(id(one) in inside for one in self._optimizers):
            return  # of a watched optimizer, or a part of its step
        try:
            if optimizer not in self._others:
                self._others.add(optimizer)
                self._require_other_parameters(optimizer)
            self._steps_of_others += 1
            if self._steps_of_others == _STEPS_OF_ANOTHER and any(
                shapes_of(optimizer) == shapes_of(one) for one in self._optimizers
            ):
                self._report(
                    "copy",
                    "the watched optimizer has not taken a step since another one with parameters of the same "
                    "shapes took %d; if the latter is a copy (copy.deepcopy), its steps are not recorded: call "
                    "natgrad.watch for it",
                    _STEPS_OF_ANOTHER,
                )
        except Exception as error:
            self._fail(error)

    # Updates --------------------------------------------------------------------------------------------------

    def _copy(self, index: int, optimizer: Any, args: Any, kwargs: Any) -> Any:
        assert self._recording is not None
        _require_no_graph_capture()
        if not self._selections:
            self._selections = self._names.select(self._optimizers)
        selection = self._selections[index]
        if (text := selection.changes(optimizer)) is not None:
            self._report(
                "tensors", "%s: it is not recorded, because all steps of a log have the same tensors", text
            )
        changed = self._versions.get(index, selection.versions()) != selection.versions()
        if changed:
            self._report(
                "versions",
                "parameters were changed between two steps (load_state_dict, or a projection of weights): %s",
                self._recording.meaning_of_changes,
            )
        update = self._update
        if update is None or index in update.started:
            self._finish_update()
            update = self._update = Update(self._next, self._next_loss)
            self._next, self._next_loss = self._next + 1, None
        update.started.add(index)
        if not self._recording.includes(update.number):
            return None
        first = sum(len(one.param_groups) for one in self._optimizers[:index])
        for name, (group, rate) in selection.rates(optimizer).items():
            update.groups[name], update.rates[name] = first + group, rate
        self._recording.before(update, selection, changed=changed)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._take_gradients(update, index, optimizer)
            return None
        wrapped = self._with_gradients(closure, update, index, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _with_gradients(
        self, closure: Callable[..., Any], update: Update, index: int, optimizer: Any
    ) -> Callable[..., Any]:
        """Return a closure that takes the gradients after its first evaluation."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            first = index not in update.evaluated
            if not first and self._works():
                try:
                    assert self._recording is not None
                    self._recording.evaluated_again(update, self._selections[index])
                except Exception as error:
                    self._fail(error)
            value = closure(*args, **kwargs)
            if first and self._works():
                try:
                    self._take_gradients(update, index, optimizer)
                    update.closure_loss = None if value is None else _loss(value)
                except Exception as error:
                    self._fail(error)
            return value

        return evaluate

    def _take_gradients(self, update: Update, index: int, optimizer: Any) -> None:
        assert self._recording is not None
        trained = self._selections[index].trained
        if trained and all(parameter.grad is None for parameter in trained.values()):
            raise InputError(
                "no parameter of the optimizer has a gradient when it steps",
                why="zero_grad was called before the step, or the trainer keeps gradients elsewhere (DeepSpeed, "
                "Megatron)",
                remedy="call zero_grad after the step or before the backward pass; for these trainers, process "
                "their checkpoints instead (natgrad formats)",
            )
        self._recording.evaluated(update, optimizer, self._selections[index])
        update.evaluated.add(index)

    def _finish_update(self) -> None:
        """Write the last update."""
        update, self._update = self._update, None
        recording = self._recording
        if recording is None or update is None or not recording.includes(update.number):
            return
        if not self._is_complete(update):
            self._report(
                "incomplete",
                "step %d and other incomplete steps are not recorded: an optimizer took no step (if this is "
                "intended, watch each optimizer with its own folder), its step failed, or it did not evaluate its "
                "closure",
                update.number,
            )
            return
        waited = recording.seconds_waited
        recording.write(update)
        self.recorded += 1
        waited = recording.seconds_waited - waited
        if waited > _LONG_WAIT:
            self._report(
                "wait",
                "the training waited %.1f s for the disk at step %d, and will again: the states are written more "
                "slowly than the optimizer steps (record fewer parameters, or use a faster disk)",
                waited,
                update.number,
            )

    def _finish_log(self) -> None:
        """Write the last update and what follows it, unless parameters were changed after it."""
        update, recording = self._update, self._recording
        self._finish_update()
        if recording is not None and update is not None and self._is_complete(update) and self._is_unchanged():
            recording.finish(update, self._selections)

    def _is_unchanged(self) -> bool:
        """Return True if the parameters are those after the last step."""
        return all(self._versions[index] == one.versions() for index, one in enumerate(self._selections))

    def _is_complete(self, update: Update) -> bool:
        assert self._recording is not None
        every = set(range(len(self._optimizers)))
        return self._recording.includes(update.number) and every == update.stepped == update.evaluated

    def _require_other_parameters(self, optimizer: Any) -> None:
        watched = {id(parameter) for one in self._optimizers for parameter in parameters_of(one)}
        if any(id(parameter) in watched for parameter in parameters_of(optimizer)):
            raise InputError(
                f"another optimizer ({type(optimizer).__name__}) updates parameters that are recorded",
                why="the displacement between two recorded states would contain its updates",
                remedy="pass all optimizers to natgrad.watch, or call it again for a new optimizer",
            )

    # Errors ---------------------------------------------------------------------------------------------------

    def _works(self) -> bool:
        """Return True if this process records. A forked process does not."""
        return self.active and self._process == os.getpid()

    def _report(self, kind: str, text: str, *args: Any) -> None:
        """Warn, once for each kind."""
        if kind not in self._reported:
            self._reported.add(kind)
            _log.warning(text, *args)

    def _fail(self, error: Exception) -> None:
        """End the recording because of an error, and report it. A complete update before the error is valid."""
        assert self._recording is not None
        if self._update is not None and self._is_complete(self._update):
            with suppress(Exception):  # the error of the writer, which is this one or follows from it
                self._finish_log()
        self._end()
        if "failure" not in self._reported:
            self._reported.add("failure")
            self._recording.abort()
        if self._raises:
            raise error
        unexpected = None if isinstance(error, InputError | OSError) else error
        _log.warning(
            "the recording into %s has ended at step %d, but the training continues: %s",
            self._recording.folder,
            max(self._next - 1, 0),
            error,
            exc_info=unexpected,
        )

    def _end(self) -> None:
        self.active, self._update = False, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# Arguments --------------------------------------------------------------------------------------------------------


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(
            f"{name} must be {' or '.join(map(repr, choices))}, got {shown(value)}", where=f"argument {name}"
        )


def _require_known_parallelism(model: Any) -> None:
    """Refuse models whose parameters are parts of flat tensors, which have neither names nor shapes."""
    modules = model.modules() if callable(getattr(model, "modules", None)) else ()
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        raise InputError(
            "the model is sharded by FullyShardedDataParallel (FSDP1)",
            where="argument model",
            why="its processes have parts of flattened parameters, whose boundaries are not those of tensors",
            remedy="use torch.distributed.fsdp.fully_shard (FSDP2), or record the checkpoints of the run instead",
        )


def _listed(optimizer: Any) -> list[Any]:
    several = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    if not several:
        raise InputError("there is no optimizer", where="argument optimizer", remedy="pass at least one")
    return several


def _unwrapped(optimizer: Any, torch: Any) -> Any:
    """Return the optimizer inside wrappers."""
    base, inner = torch.optim.Optimizer, optimizer
    _require_own_parameters(inner)
    while isinstance(wrapped := getattr(inner, "optimizer", None), base) or _library(wrapped) in _PARTITIONING:
        inner = wrapped
        _require_own_parameters(inner)
    if not isinstance(inner, base):
        raise InputError(
            f"the optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}",
            where="argument optimizer",
            why="other classes have no step hooks (for example those of DeepSpeed and Megatron)",
            remedy="pass the optimizer of PyTorch; record other training loops with natgrad.Recorder",
        )
    return inner


_PARTITIONING = {
    "deepspeed": "between the backward pass and the step, record deepspeed.utils.safe_get_full_fp32_param and "
    "safe_get_full_grad of each parameter with natgrad.Recorder, or process the checkpoints of the run "
    "(natgrad formats)",
    "megatron": "process the checkpoints of the run (natgrad formats)",
}
"""Libraries whose optimizers update parts of flattened parameters, and what to do instead."""


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _require_own_parameters(optimizer: Any) -> None:
    """Refuse optimizers whose parameters are not those of the model."""
    if (library := _library(optimizer)) in _PARTITIONING:
        raise InputError(
            f"the optimizer is one of {library} ({type(optimizer).__name__})",
            where="argument optimizer",
            why="it updates parts of flattened parameters, and the gradients of the model are None when it steps",
            remedy=_PARTITIONING[library],
        )


def _stepping() -> list[Any]:
    """Return the optimizers whose step is in progress, one for each call of `step` with hooks."""
    import torch

    hooked = torch.optim.Optimizer.profile_hook_step(torch.optim.Optimizer.step).__code__
    found: list[Any] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is hooked:
            found.append(frame.f_locals.get("self"))
        frame = frame.f_back
    return found


def _is_nested(optimizer: Any) -> bool:
    """Return True in the hooks of ``super().step()``, if the step of a subclass calls it: both calls have hooks."""
    return sum(one is optimizer for one in _stepping()) > 1


def _is_distributed(torch: Any) -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _require_no_graph_capture() -> None:
    """Refuse a step that a CUDA graph captures: hooks run during the capture, and never when it is replayed."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "the step of the optimizer is captured by a CUDA graph",
            why="hooks do not run when the graph is replayed",
            remedy="exclude the step of the optimizer from the graph",
        )


def _loss(value: Any) -> Any:
    """Return a loss, as a float or as a copy of the tensor, which is read later.

    Raises
    ------
    InputError
        If it is not one number.
    """
    try:
        if is_tensor(value):
            if value.numel() == 1 and value.is_floating_point():
                return value.detach().clone().reshape(())
        elif (array := real_array(value)).size == 1:
            return array.item()
    except ValueError as error:
        raise InputError(f"the loss {error}", remedy="log a float or a tensor with one number") from error
    raise InputError(f"the loss must be one number, got {shown(value)}", remedy="log loss.mean(), for example")
