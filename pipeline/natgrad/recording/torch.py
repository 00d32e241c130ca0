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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from natgrad.recording.arrays import is_tensor, tensor_array
from natgrad.recording.background import BackgroundWriter
from natgrad.recording.live import LastUpdate, last_update
from natgrad.recording.parameters import Model, Names, Selection, parameters_of, shapes_of
from natgrad.recording.recorder import Recorder
from natgrad.schema.arguments import number, real_array, shown
from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE
from natgrad.schema.logs import logger

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


@dataclass
class _State:
    """The state before an update, copied before the step of each optimizer that makes the update.

    Attributes
    ----------
    number : int
        Number of updates before it.
    loss, closure_loss : object
        The loss from `Watch.log`, and that from the closure.
    parameter, gradient : dict
        Arrays by name.
    rates : dict
        Learning rate of each parameter, NaN if the optimizer has none.
    started, stepped : set of int
        Optimizers that started and completed their step.
    """

    number: int
    loss: Any = None
    closure_loss: Any = None
    parameter: dict[str, NDArray[Any]] = field(default_factory=dict)
    gradient: dict[str, NDArray[Any]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for arrays in (self.parameter, self.gradient) for array in arrays.values())


def watch(
    optimizer: Optimizer | Sequence[Optimizer],
    folder: str | Path,
    *,
    model: Model | None = None,
    parameters: str | Sequence[str] | None = None,
    every: int = 1,
    first_step: int | None = None,
    on_error: str = "warn",
    buffer_bytes: int = 1024 * MEBIBYTE,
) -> Watch:
    """Record every step of a PyTorch optimizer into a log that `natgrad.process` reads.

    The training loop stays as it is. Parameters, gradients and learning rates are copied when the optimizer steps,
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
    parameters : str or sequence of str, optional
        Patterns of the names of the parameters to record, with the wildcards ``*``, ``?`` and ``[...]``. Default:
        all parameters that require a gradient at the first step.
    every : int
        Record every n-th update, that is, the states before and after it, so that each result belongs to a single
        update. Windows of several updates have no results then. Default: all updates.
    first_step : int, optional
        Number of updates before the first recorded state, to continue the log of a training run that was resumed.
        Steps that are recorded again are replaced. Default: 0, in a folder without steps.
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
    if on_error not in ("warn", "raise"):
        raise InputError(f"on_error must be 'warn' or 'raise', got {shown(on_error)}", where="argument on_error")
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
    rank = torch.distributed.get_rank() if _is_distributed(torch) else 0
    recorder = Recorder(folder, resume=first_step is not None) if rank == 0 else None
    if recorder is not None:
        _declare_span(recorder.folder, interval, resume=first_step is not None)
    return Watch(optimizers, names, recorder, start, interval, raises=on_error == "raise", limit=limit)


class Watch:
    """Recording of a training run, which `natgrad.watch` returns.

    Attributes
    ----------
    active : bool
        True until the recording ends, by `close` or by an error. In distributed data parallel training, only
        rank 0 records.
    recorded, skipped : int
        Number of recorded states, and of steps that the optimizer skipped because a gradient overflowed.
    seconds_waited : float
        Time for which the training waited for the disk.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        names: Names,
        recorder: Recorder | None,
        start: int,
        every: int,
        *,
        raises: bool,
        limit: int,
    ) -> None:
        self._optimizers, self._names, self._recorder = optimizers, names, recorder
        self._next, self._every, self._raises, self._process = start, every, raises, os.getpid()
        self._selections: list[Selection] = []
        self._grouped = False
        self._state: _State | None = None
        self._next_loss: Any = None
        self._versions: dict[int, list[int]] = {}
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()
        self._steps_of_others = 0
        self._reported: set[str] = set()
        self.active, self.recorded, self.skipped = recorder is not None, 0, 0
        self._handles: list[Any] = []
        if recorder is None:
            return
        self._writer = BackgroundWriter(self._write, limit)
        self._register()
        atexit.register(self.close)

    def __repr__(self) -> str:
        folder = "" if self._recorder is None else str(self._recorder.folder)
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
        return 0.0 if self._recorder is None else self._writer.seconds_waited

    @property
    def last(self) -> LastUpdate | None:
        """Angle, condition number and relative length of the last update, for the model and each tensor.

        The values are computed when they are read, between two steps, from the recorded state and the current
        parameters. None before the first complete step, after the end of the recording, and if the parameters were
        changed after the step.
        """
        state = self._state
        if not self._works() or state is None or not self._is_complete(state):
            return None
        try:
            if any(self._versions[index] != one.versions() for index, one in enumerate(self._selections)):
                return None
            parameters = {name: one for selection in self._selections for name, one in selection.trained.items()}
            tensors = (
                (name, before, tensor_array(parameters[name], f"parameter {name!r}"), state.gradient[name])
                for name, before in state.parameter.items()
            )
            return last_update(state.number, tensors, state.rates)
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
            state = self._state
            if after and state is None:
                raise InputError("no step has been taken yet", where="after=True", remedy="omit after=True")
            if state is not None and (after or len(state.stepped) < len(self._optimizers)):
                if state.loss is not None and _stepping():
                    return  # a later evaluation of the closure, at other parameters
                previous, state.loss = state.loss, value
            else:
                previous, self._next_loss = self._next_loss, value
            if previous is not None:
                self._report("losses", "the loss of a step was logged twice; the last value is used")
        except Exception as error:  # a wrong loss must not end the training
            if self._raises:
                raise
            self._report("loss", "a loss was not recorded: %s", error)

    def close(self) -> None:
        """Write the states that wait, and end the recording. The optimizer is not changed."""
        if self._recorder is None or self._process != os.getpid():
            return
        atexit.unregister(self.close)
        try:
            if self.active:
                self._finish_state()
            self._end()
            self._writer.close()
            if self._writer.error is not None and "failure" not in self._reported:
                raise self._writer.error
        except Exception as error:
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
        if not self._works() or self._state is None or _is_nested(optimizer):
            return
        try:
            found = getattr(optimizer, "found_inf", None)
            if found is not None and float(found) > 0:
                self.skipped += 1
            self._state.stepped.add(index)
            self._versions[index] = self._selections[index].versions()
        except Exception as error:
            self._fail(error)

    def _reloaded(self, optimizer: Any) -> None:
        """End the recording if the optimizer is set to another state of the run."""
        if self._works() and self._state is not None:
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

    # States ---------------------------------------------------------------------------------------------------

    def _copy(self, index: int, optimizer: Any, args: Any, kwargs: Any) -> Any:
        _require_no_graph_capture()
        if not self._selections:
            self._selections = self._names.select(self._optimizers)
            self._grouped = sum(len(one.param_groups) for one in self._optimizers) > 1
        selection = self._selections[index]
        if (text := selection.changes(optimizer)) is not None:
            self._report(
                "tensors", "%s: it is not recorded, because all steps of a log have the same tensors", text
            )
        if self._versions.get(index, selection.versions()) != selection.versions():
            self._report(
                "versions",
                "parameters were changed between two steps (load_state_dict, or a projection of weights): the "
                "change counts as a part of the update before it",
            )
        state = self._state
        if state is None or index in state.started:
            self._finish_state()
            state = self._state = _State(self._next, self._next_loss)
            self._next, self._next_loss = self._next + 1, None
        state.started.add(index)
        if not self._is_recorded(state):
            return None
        for name, parameter in selection.trained.items():
            state.parameter[name] = tensor_array(parameter, f"parameter {name!r}", copy=True)
        state.rates |= selection.rates(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._copy_gradients(state, index, optimizer)
            return None
        wrapped = self._with_copy(closure, state, index, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _with_copy(
        self, closure: Callable[..., Any], state: _State, index: int, optimizer: Any
    ) -> Callable[..., Any]:
        """Return a closure that copies the gradients after its first evaluation."""
        evaluated = False

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluated
            value = closure(*args, **kwargs)
            if not evaluated and self._works():
                evaluated = True
                try:
                    self._copy_gradients(state, index, optimizer)
                    state.closure_loss = None if value is None else _loss(value)
                except Exception as error:
                    self._fail(error)
            return value

        return evaluate

    def _copy_gradients(self, state: _State, index: int, optimizer: Any) -> None:
        trained = self._selections[index].trained
        scale = getattr(optimizer, "grad_scale", None)
        if all(parameter.grad is None for parameter in trained.values()):
            raise InputError(
                "no parameter of the optimizer has a gradient when it steps",
                why="zero_grad was called before the step, or the trainer keeps gradients elsewhere (DeepSpeed, "
                "Megatron)",
                remedy="call zero_grad after the step or before the backward pass; for these trainers, process "
                "their checkpoints instead (natgrad formats)",
            )
        for name, parameter in trained.items():
            if parameter.grad is None:
                # The loss does not depend on this parameter, and the optimizer does not change it.
                state.gradient[name] = np.zeros_like(state.parameter[name])
                continue
            array = tensor_array(parameter.grad, f"gradient {name!r}", copy=True)
            if scale is not None:
                # The scale is a power of two: the quotient is exact unless it is subnormal.
                array = array.astype(np.promote_types(array.dtype, np.float32)) / np.float32(scale)
            state.gradient[name] = array

    def _finish_state(self) -> None:
        """Pass the state before the last update to the writer."""
        state, self._state = self._state, None
        if state is None or not self._is_recorded(state):
            return
        if not self._is_complete(state):
            self._report(
                "incomplete",
                "step %d and other incomplete steps are not recorded: an optimizer took no step (if this is "
                "intended, watch each optimizer with its own folder), its step failed, or it did not evaluate its "
                "closure",
                state.number,
            )
            return
        waited = self._writer.seconds_waited
        self._writer.put(state, state.size)
        self.recorded += 1
        waited = self._writer.seconds_waited - waited
        if waited > _LONG_WAIT:
            self._report(
                "wait",
                "the training waited %.1f s for the disk at step %d, and will again: the states are written more "
                "slowly than the optimizer steps (record fewer parameters, or use a faster disk)",
                waited,
                state.number,
            )

    def _is_recorded(self, state: _State) -> bool:
        """Return True for the states before and after every n-th update."""
        return state.number % self._every < 2

    def _is_complete(self, state: _State) -> bool:
        return (
            self._is_recorded(state)
            and len(state.stepped) == len(self._optimizers)
            and len(state.gradient) == len(state.parameter)
        )

    def _write(self, state: _State) -> None:
        """Write a state, in the thread of the writer."""
        assert self._recorder is not None
        rates: dict[str, float] | float | None = state.rates
        if not self._grouped:
            (rate,) = set(state.rates.values())
            rates = None if np.isnan(rate) else rate
        loss = state.closure_loss if state.loss is None else state.loss
        self._recorder.record(
            state.number, parameter=state.parameter, gradient=state.gradient, loss=loss, learning_rate=rates
        )

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
        """End the recording because of an error, and report it. A complete state before the error is valid."""
        if self._state is not None and self._is_complete(self._state):
            with suppress(Exception):  # the error of the writer, which is this one or follows from it
                self._finish_state()
        self._end()
        self._reported.add("failure")
        if self._raises:
            raise error
        assert self._recorder is not None
        unexpected = None if isinstance(error, InputError | OSError) else error
        _log.warning(
            "the recording into %s has ended at step %d, but the training continues: %s",
            self._recorder.folder,
            max(self._next - 1, 0),
            error,
            exc_info=unexpected,
        )

    def _end(self) -> None:
        self.active, self._state = False, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# Arguments --------------------------------------------------------------------------------------------------------


def _listed(optimizer: Any) -> list[Any]:
    several = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    if not several:
        raise InputError("there is no optimizer", where="argument optimizer", remedy="pass at least one")
    return several


def _unwrapped(optimizer: Any, torch: Any) -> Any:
    """Return the optimizer inside wrappers."""
    base, inner = torch.optim.Optimizer, optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), base):
        inner = wrapped
    if not isinstance(inner, base):
        raise InputError(
            f"the optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}",
            where="argument optimizer",
            why="other classes have no step hooks (for example those of DeepSpeed and Megatron)",
            remedy="pass the optimizer of PyTorch; record other training loops with natgrad.Recorder",
        )
    return inner


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


def _declare_span(folder: Path, every: int, *, resume: bool) -> None:
    """State in the mapping file of the log that updates lead only from one step to the next."""
    path, text = folder / "natgrad.toml", "step_span = 1\n"
    present = path.read_text() if path.exists() else ""
    if every > 1 and not present and not (resume and any(folder.glob("step_*"))):
        path.write_text("# Pairs of states, before and after single updates.\n" + text)
    elif (every > 1) != (text.strip() in present):
        raise InputError(
            f"every={every} does not fit the log in the folder",
            where=str(path),
            why="step_span = 1 in this file states that the log contains pairs of states, and its absence that it "
            "contains all states",
            remedy="use another folder, or the value of every of the existing log",
        )


def _is_distributed(torch: Any) -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _require_no_graph_capture() -> None:
    """Refuse a step that a CUDA graph captures: hooks run during the capture, and never when it is replayed."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "the step of the optimizer is captured by a CUDA graph",
            why="hooks do not run when the graph is replayed",
            remedy="leave the step of the optimizer out of the graph",
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
