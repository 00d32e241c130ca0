"""Describe any folder or file before it is processed: its contents, the command that works, and its cost."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from natgrad.app import declarations, options
from natgrad.app.diagnosis.candidates import Deadline
from natgrad.app.diagnosis.contents import contents_of
from natgrad.app.diagnosis.diagnose import Diagnosis, diagnose, no_log
from natgrad.app.diagnosis.loss_consistency import objective_of
from natgrad.app.diagnosis.proposals import LOG_READERS
from natgrad.app.summaries import Inspection
from natgrad.compute.plan import PlanLimits, peak_bytes, plan_shape
from natgrad.compute.processors import usable_processors
from natgrad.results.grouping import groups_of
from natgrad.results.sizes import require_memory
from natgrad.schema.errors import InputError
from natgrad.schema.layout import (
    MEBIBYTE,
    STORAGE_DTYPES,
    Layout,
    TrajectoryShape,
    chunk_shape,
    promote,
    storage_dtype,
)
from natgrad.schema.logs import collected_warnings
from natgrad.schema.names import (
    HVP,
    PRODUCTS,
    REPLICATE_HVP,
    REPLICATE_LOSS,
    REPLICATE_PARAMETER,
    REPLICATE_STATES,
    SCALARS,
    STATES,
)
from natgrad.sources.alignment import misalignment
from natgrad.sources.base import Ranged, Source, StepContent
from natgrad.sources.changes import files_of
from natgrad.sources.opening import format_of, open_log
from natgrad.sources.optimizers.state import FactoredMetric, OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor, Unreadable
from natgrad.storage import Location, Storage, open_all, open_storage

__all__ = ["NEEDED_FOR", "inspect_source"]

NEEDED_FOR: dict[str, tuple[str, str]] = {
    "parameter": ("all results", "set their key with --map parameter=KEY, or add the log that contains them"),
    "gradient": (
        "all results except norms of parameters and updates, and losses",
        "log them (natgrad.Recorder, or a hook of the trainer), and add that log as another SOURCE",
    ),
    "learning_rate": (
        "eigenvalues, bounds, norms of g = displacement / learning rate, and windows of several updates; angles "
        "and condition numbers of single updates do not depend on it",
        "set it with --learning-rate",
    ),
    "loss": (
        "the descents 'corrected' and 'trapezoid', loss_average, loss_decrease, discrete_identity_residual",
        "log it, or add a log of scalars as another SOURCE",
    ),
    HVP: ("the descent 'taylor', eq. (16)", "log H (theta_{t+1} - theta_t) as hvp"),
    "hessian_min_eigenvalue": (
        "learning_rate_bound, eq. (18)",
        "log it, for example by Lanczos, or use natgrad replay --hessian-eigenvalues",
    ),
    "hessian_max_eigenvalue": (
        "the result of the same name, the largest curvature",
        "log it, for example by Lanczos, or use natgrad replay --hessian-eigenvalues",
    ),
    "taylor_point": ("the result of the same name, lambda of eq. (11)", "use natgrad replay --taylor-point"),
    "loss_time_derivative": (
        "losses that change with time, section 2.1",
        "log dL/dt if the loss changes with time",
    ),
    "decoupled_weight_decay": (
        "updates without weight decay, if the optimizer decouples it (AdamW)",
        "log it, or set it with --weight-decay",
    ),
    REPLICATE_PARAMETER: ("stochastic rules, eqs. (19), (20)", "log the states after several draws of the update"),
    REPLICATE_HVP: ("the metric of eq. (19)", "log H (theta_{t+1} - theta_t) of each of these draws"),
    REPLICATE_LOSS: ("the mean loss_decrease of a stochastic rule", "log the loss of each of these states"),
}
"""For each quantity of a log: the results that require it, and how to provide it."""

_REFUSED_SHOWN = 12
_OBJECTIVE_SECONDS = 1.5
_SAMPLE_BYTES = 64 * MEBIBYTE
_PASS_RATE = 2e9
"""Assumed bytes per second of the pass. On two cores, 5e9 to 7e9 were measured."""

_START_SECONDS = 4.0
"""Assumed seconds of a process that do not depend on the size of the log: imports, compiled code, the page."""


def inspect_source(
    sources: Sequence[Location],
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    pattern: str | None = None,
    exact_names: bool = False,
    sweep: bool = False,
    evaluation: str = "unknown",
    memory_limit: int | None = None,
) -> Inspection:
    """Describe files or folders, find the command that processes them, and estimate its cost. Nothing is written.

    If the sources cannot be processed as they are, or lack usual quantities, the folders are searched for logs. A
    command is returned only after it was tried on the first states of the run.

    Parameters
    ----------
    sources, format, mapping, shift, pattern, exact_names, sweep
        As for `natgrad.ingestion.ingest`.
    evaluation : str
        Data on which the loss and the gradient of a step are evaluated, as the user declares.
    memory_limit : int, optional
        Bytes that a worker process may use.

    Raises
    ------
    InputError
        If there is no such file or folder, or if a log cannot be read with the given options.
    """
    paths = open_all(sources)
    options = {"format": format, "map": mapping or {}, "shift": shift or {}, "pattern": pattern or ""}
    with collected_warnings(*LOG_READERS):  # those of the command are among the notes
        return _inspected(paths, {**options, "exact_names": exact_names, "sweep": sweep}, evaluation, memory_limit)


def _inspected(
    paths: Sequence[Storage], options: Mapping[str, Any], evaluation: str, memory_limit: int | None
) -> Inspection:
    found = diagnose(paths, options)
    contents = [contents_of(path) for path in paths]
    error = None if found.error is None or found.command else no_log(paths[0], contents[0], found.error)
    values: dict[str, Any] = {
        "source": ", ".join(map(str, paths)),
        "format": _format(found, paths, options["format"]),
        "contents": contents[0] if len(paths) == 1 else _by_path(paths, contents),
        "command": found.command,
        "run_file": found.run_file and dict(zip(("path", "content"), found.run_file, strict=True)),
        "other_commands": found.others,
        "refused": _refused(found),
        "error": error and {"what": error.what, "where": error.where, "why": error.why, "do": error.remedy},
        "nearest_format": found.nearest,
        "provides": {part.part.location: part.text() for part in reversed(found.parts)},
    }
    notes = ["the search ended after its time limit; pass a smaller folder"] if found.ended else []
    notes += [
        f"{part.location}: {' '.join(part.flags())} was inferred from names: check that it is correct"
        for part in (found.chosen.proposal.parts if found.chosen is not None and not _given(options) else ())
        if part.pattern or part.map
    ]
    notes += [
        f"{part.location}: --shift gradient={part.shift['gradient']} was inferred from the first updates, which "
        "are parallel to these gradients"
        for part in (found.chosen.proposal.parts if found.chosen is not None and not options["shift"] else ())
        if "gradient" in part.shift
    ]
    used = found.chosen.proposal.parts if found.chosen is not None else ()
    notes += [
        f"{part.location} is not in {paths[0]}: check that it belongs to the same run" for part in found.nearby
    ]
    notes += [
        f"{part.part.location}: {note}" for part in found.parts if part.part not in used for note in part.notes[:4]
    ]
    if found.chosen is not None:
        steps = found.chosen.rehearsal.steps
        with found.chosen.rehearsal.log as log:
            values |= _description(log, steps, sweep=options["sweep"])
            completed = found.chosen.rehearsal.content
            notes += [*values["notes"], *completed.notes, *found.chosen.rehearsal.warnings]
            with suppress(Unreadable):
                notes += [note] if (note := misalignment(log, steps, completed)) else []
            values |= _plan(log, steps, completed, memory_limit)
            values["gradient_from"] = _gradient_from(found, values)
            objective = objective_of(log, steps, completed, Deadline(_OBJECTIVE_SECONDS))
            values["objective"] = (evaluation != "unknown") * f"declared {evaluation}; " + objective
    elif found.parts:
        part = found.parts[0].part
        source = open_log(open_storage(part.location), part.format, part.map, part.shift, pattern=part.pattern)
        values |= _description(source, source.steps(), sweep=False)
        notes += values["notes"]
    return Inspection(**{**values, "notes": list(dict.fromkeys(notes))})


def _gradient_from(found: Diagnosis, values: Mapping[str, Any]) -> dict[str, str] | None:
    """Return how a log without gradients can be processed with gradients, the cheapest approach first.

    The cost of an approach consists of forward and backward passes, and of the seconds for everything else. The
    time of a pass is not known, because it depends on the objective of the user. Approaches that are not possible
    are last.
    """
    assert found.chosen is not None
    proposal, holds = found.chosen.proposal, values["holds"]
    if PRODUCTS in holds or ("gradient" in holds and not proposal.recover):
        return None
    recovering = replace(proposal, recover=True).command
    cost = (math.inf, math.inf)
    if proposal.recover:
        cost = 0, values["process_seconds"]
        recover = f"{recovering}: about {cost[1]:g} s; the gradient is that of each mini-batch"
    elif recovering in found.refused:
        recover = f"not possible: {found.refused[recovering].what}"
    else:
        recover = "not possible: the states of the optimizer were not saved"
    approaches = {"recover": (cost, recover)}
    states, read = values["steps"], values.get("ingest_seconds", 0.0)
    if not proposal.sweep:
        gigabytes = states * values["elements"] * 4 / 1e9
        approaches["replay"] = (
            (states, read),
            f"{proposal.replay_command}: evaluates your objective at each state, which takes {states} "
            f"forward and backward passes over its data and about {read:g} s to read the states; with "
            f"--keep-gradients, OUT also has {gigabytes:.3g} GB of gradients",
        )
    passes = values.get("runs", 1) * (values["last_step"] - values["first_step"] + 1)
    approaches["record"] = (
        (passes, math.inf),
        "natgrad.watch(optimizer, FOLDER) in the training program, for the next run: the training itself, which "
        f"takes {passes} forward and backward passes for these steps, and a pass over the parameters for each "
        "update",
    )
    return {name: text for name, (_, text) in sorted(approaches.items(), key=lambda one: one[1][0])}


def _given(options: Mapping[str, Any]) -> bool:
    return bool(options["map"] or options["pattern"])


def _format(found: Diagnosis, paths: Sequence[Storage], format: str | None) -> str:
    """Return the formats of the logs that the command reads."""
    if found.chosen is not None and found.chosen.parts:
        return ", ".join(dict.fromkeys(part.format for part in found.chosen.parts))
    if found.chosen is None:
        return ", ".join(dict.fromkeys(part.format for part in found.parts)) or "none"
    steps = found.chosen.rehearsal.steps
    logs = _logs(steps) if found.chosen.proposal.sweep else paths
    return format or ", ".join(dict.fromkeys(map(format_of, logs)))


def _by_path(paths: Sequence[Storage], contents: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {
        str(path): "; ".join(f"{kind}: {names}" for kind, names in found.items())
        for path, found in zip(paths, contents, strict=True)
    }


def _refused(found: Diagnosis) -> dict[str, str]:
    """Return the attempts that failed, each with the reason, and with the remedy if no command was found."""
    texts = {
        what: "; ".join(filter(None, (error.what, error.why, error.remedy * (found.command is None))))
        for what, error in found.refused.items()
    }
    return dict(itertools.islice(texts.items(), _REFUSED_SHOWN))


def _description(log: Source, listed: Sequence[LoggedStep], *, sweep: bool) -> dict[str, Any]:
    """Describe the first and the last state of a log, and the distances between states."""
    first, last = (_content(log, step) for step in (listed[0], listed[-1]))
    if first.absent:
        raise next(iter(first.absent.values()))
    runs = len({step.run for step in listed})
    spans = [b.number - a.number for a, b in itertools.pairwise(listed) if a.run == b.run]
    usual = max(set(spans), key=spans.count) if spans else 0
    found: dict[str, Any] = {
        **({"runs": runs} if sweep else {}),
        "steps": len(listed),
        "first_step": min(step.number for step in listed),
        "last_step": max(step.number for step in listed),
        "step_numbers": {str(step.number): step.origin for step in (listed[0], listed[-1]) if step.origin},
        "step_span": usual,
        "gaps": sum(span != usual for span in spans),
        "log_bytes": _log_bytes(listed),
    }
    logged = {name: f"{len(tensors)} tensors" for name, tensors in first.arrays.items() if tensors}
    logged |= {
        name: f"{first.replicates} replicates of {logged[name]}" for name in logged if name in REPLICATE_STATES
    }
    logged |= {REPLICATE_LOSS: f"{len(first.replicate_loss)} replicates"} if first.replicate_loss else {}
    logged |= {name: f"{value:g} at step {listed[0].number}" for name, value in first.scalars.items()}
    missing = {name: needed for name, needed in NEEDED_FOR.items() if name not in logged}
    if not first.replicates:
        missing = {name: needed for name, needed in missing.items() if name not in (REPLICATE_HVP, REPLICATE_LOSS)}
    if first.recorded:
        # Arrays cannot be added, because inner products with them require states.
        logged = {PRODUCTS: f"{len(first.arrays[STATES[0]])} tensors"} | {
            name: text for name, text in logged.items() if name not in first.arrays
        }
        # The Hessian can only be evaluated at a state.
        missing = {name: needed for name, needed in missing.items() if name in SCALARS and name != "taylor_point"}
    found["holds"] = logged
    found["missing"] = {name: f"needed for {use}; {remedy}" for name, (use, remedy) in missing.items()}
    if last.optimizer is not None:
        found["optimizer"] = last.optimizer.problem or (
            f"{', '.join((*last.optimizer.arrays, *_rules(last.optimizer))) or 'options'} of "
            f"{_tensors_of(last.optimizer)} tensors at step "
            f"{listed[-1].number}; store it with --include optimizer"
        )
    found["changes"] = _changes(first, last)
    found["notes"] = list(dict.fromkeys([*first.notes, *last.notes]))
    found["notes"] += [
        f"{entry.quantity} of {entry.used} is {entry.value!r}, and that of {entry.other} is {entry.other_value!r} "
        f"at step {step.number}"
        for step, content in ((listed[0], first), (listed[-1], last))
        for entry in content.differences
    ]
    found["unused_keys"] = list(first.unused)
    return found


def _log_bytes(listed: Sequence[LoggedStep]) -> int:
    """Return the total size of the files of a log."""
    files = {str(file): file for step in listed for file in files_of(step)}
    total = 0
    for file in files.values():
        with suppress(OSError):
            total += file.stat(fresh=False).size
    return total


def _logs(listed: Sequence[LoggedStep]) -> list[Storage]:
    """Return the logs of a sweep: the folder of each run's first step, or the file of all its steps."""
    firsts = {step.run: step.storage for step in reversed(listed)}
    count = Counter(step.storage for step in listed)
    return [path if count[path] > 1 else path.parent for path in firsts.values()]


def _content(log: Source, step: LoggedStep) -> StepContent:
    with log.open(step) as reader:
        return reader.content()


def _changes(first: StepContent, last: StepContent) -> list[str]:
    """List the differences between the first and the last step. Ingest rejects those between tensors."""
    changes = []
    for name in (*STATES, *REPLICATE_STATES):
        before, after = first.arrays.get(name, {}), last.arrays.get(name, {})
        if before and not after and name != STATES[0]:
            changes.append(f"{name}: missing at the last step")
            continue
        for tensor in {**before, **after}:
            if before.get(tensor) != after.get(tensor):
                changes.append(f"{name} {tensor!r}: {_shape(before.get(tensor))}, then {_shape(after.get(tensor))}")
    for name in (*SCALARS, REPLICATE_LOSS):
        if (name in first.numbers) != (name in last.numbers):
            changes.append(f"{name}: missing at the {'first' if name in last.numbers else 'last'} step")
    return changes


def _tensors_of(optimizer: OptimizerState) -> int:
    tables = (*optimizer.arrays.values(), *optimizer.numbers.values(), optimizer.metrics)
    return len({tensor for table in tables for tensor in table})


def _rules(optimizer: OptimizerState) -> list[str]:
    """Return the rules whose metrics the log contains, as factors or in another basis."""
    metrics = optimizer.metrics.values()
    rules = dict.fromkeys(m.rule if isinstance(m, FactoredMetric) else "SOAP" for m in metrics)
    return [f"the metric of {rule}" for rule in rules]


def _shape(tensor: LoggedTensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _plan(
    log: Source, listed: Sequence[LoggedStep], content: StepContent, memory_limit: int | None
) -> dict[str, Any]:
    """Estimate sizes and times of processing."""
    arrays = content.arrays
    dtypes = {name: promote([tensor.dtype for tensor in arrays[name].values()]) for name in arrays}
    layout = Layout.from_shapes({name: (t.shape, t.dtype) for name, t in arrays["parameter"].items()})
    chunk = chunk_shape(len(listed), layout.elements, content.replicates)
    shape = TrajectoryShape(
        states=len(listed),
        layout=layout,
        chunk=chunk,
        dtypes={} if content.recorded else dtypes,
        replicates=content.replicates,
        partial_reads=True,
        keeps_versions=False,
        recorded=content.recorded,
    )
    tensors, elements, itemsizes = len(layout.tensors), layout.elements, shape.itemsizes
    entries = len(shape.vectors) ** 2 + len(shape.replicate_vectors) ** 2 + 1
    padded = -(-elements // chunk[1]) * chunk[1] * -(-len(listed) // chunk[0]) * chunk[0] if elements else 0
    found: dict[str, Any] = {
        "tensors": tensors,
        "elements": elements,
        "dtypes": dtypes,
        "trajectory_bytes": padded * sum(itemsizes),
        "ledger_bytes": (len(listed) - 1) * tensors * entries * 8,
    }
    rate = _reading_rate(log, listed[0], content)
    state_bytes = len(listed) * elements * sum(itemsizes)
    if rate:
        found["ingest_seconds"] = round(state_bytes / rate, 1)
    found["pass_seconds"] = round(state_bytes / _PASS_RATE, 1)
    if _is_in_place(log, listed[0], content):
        found["in_place"] = (
            f"process --in-place does not copy the {state_bytes / 1e9:.3g} GB of states, if the files of the log "
            "stay as they are"
        )
    found["process_seconds"] = round(_START_SECONDS + found.get("ingest_seconds", 0) + found["pass_seconds"], 1)
    if len(listed) > 1 and elements:
        try:
            plan = plan_shape(shape, memory_limit=memory_limit)
            defaults = declarations.validated(options.AnalyzeOptions, {})
            groups = len(groups_of(shape.layout.names, defaults["groups"]))
            idle = PlanLimits().reserved_bytes
            of_results = require_memory(shape, defaults["windows"], idle, memory_limit, groups)
        except InputError as error:
            found["worker_memory"] = f"exceeds --memory-limit: {error.what}"
        else:
            worker = max(plan.projected_bytes, of_results)
            found["worker_memory"] = peak_bytes(usable_processors(), memory_limit, idle, worker)
    return found


def _is_in_place(log: Source, step: LoggedStep, content: StepContent) -> bool:
    """Return True if the arrays of a step are plain bytes of its files."""
    with log.open(step) as reader:
        return (
            bool(content.readable)
            and isinstance(reader, Ranged)
            and all(
                reader.ranges(array, tensor) is not None
                for array, tensors in content.readable.items()
                for tensor, logged in tensors.items()
                if math.prod(logged.shape)
            )
        )


def _reading_rate(log: Source, step: LoggedStep, content: StepContent) -> float | None:
    """Measure the bytes per second of reading the first tensors of a step; None if there are too few."""
    done, begin = 0, time.perf_counter()
    with log.open(step) as reader:
        for array, tensors in content.readable.items():
            for name, tensor in tensors.items():
                if tensor.dtype not in STORAGE_DTYPES or done >= _SAMPLE_BYTES:
                    continue
                dtype = storage_dtype(tensor.dtype)
                size = min(math.prod(tensor.shape), _SAMPLE_BYTES // dtype.itemsize)
                reader.read(array, name, 0, np.empty(size, dtype))
                done += size * dtype.itemsize
    return done / (time.perf_counter() - begin) if done else None
