"""Assign the entries of a saved optimizer to tensors.

Torch numbers the parameters of an optimizer across its groups, and saves no names unless it was given some.
The numbers are therefore matched by order, if it is known, or by shape, if this is unique. Shapes are always
checked.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import TENSOR_WEIGHT_DECAY
from natgrad.sources.container import Container
from natgrad.sources.optimizers import factors
from natgrad.sources.optimizers.state import FactoredMetric, OptimizerState, RotatedMetric, RuleState, factor_array
from natgrad.sources.steps import LoggedTensor, is_running_statistic

__all__ = ["OPTIMIZER_KEYS", "SavedOptimizer", "optimizer_roots", "saved_optimizer"]

OPTIMIZER_KEYS = (
    *("optimizer", "optimizer_state_dict", "optim", "optimizer_state", "optim_state_dict", "optim_state"),
    *("opt", "opt_state_dict", "opt_state"),
)
"""Usual keys of the state of an optimizer."""

_ROOTS = (
    *OPTIMIZER_KEYS,
    # Several optimizers, in a list or by name.
    *("optimizers/[^/]+", r"optimizer/[0-9]+", "optimizer_states/[^/]+", "state/optimizers/[^/]+"),
)
"""Regular expressions for the keys under which optimizers are saved. Those that the first one matches are used."""

_PLACEMENTS_LIMIT = 1 << 10
"""Number of partial assignments of tensors to groups that are compared."""
_ARRAYS = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "momentum_buffer": "momentum_buffer",
    "master_param": "master_parameter",
}
_RULE_ARRAYS = {
    **{name: True for name in ("max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum", "acc_delta")},
    **dict.fromkeys(("row_var", "col_var", "variance"), False),
}
"""Other arrays that rules need to be inverted, and whether they have the shape of their parameter."""

_SHAPED = (*_ARRAYS, *(name for name, shaped in _RULE_ARRAYS.items() if shaped))
"""Arrays with the shape of their parameter."""

_COUNTS = ("step", "mu_product")
"""Numbers of an entry, which may be tensors with one element."""

_DECAY = "decoupled_weight_decay"
_NUMBERS = {
    "lr": "tensor_learning_rate",
    "betas/0": "beta1",
    "betas/1": "beta2",
    "eps": "epsilon",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
}
# Levels are joined by slashes, or by dots if torch flattened the dict of the optimizer.
_QUANTIZED = ("state1", "qmap1", "absmax1")
"""Keys of bitsandbytes: the first moment in blocks of 8 bits, its code book, and the scale of each block."""
_ENTRY = re.compile(
    rf"state[/.](.+)[/.]({'|'.join((*_ARRAYS, *_RULE_ARRAYS, *_QUANTIZED))}|step|mu_product|{factors.ENTRY})"
)
_OTHER = re.compile(r"state/([^/]+)/([^/]+)(?:/.*)?")
_DECAY_OPTIONS = ("decoupled_weight_decay", "dampening", "ns_steps")
"""Options that show how an optimizer applies weight decay, see `_decoupled_decay`."""
_RULE_OPTIONS = (
    *("nesterov", "maximize", "amsgrad", "bias_correction", "weight_decouple", "fixed_decay", "alpha", "centered"),
    *("rho", "lr_decay", "initial_accumulator_value", "momentum_decay", "beta2_decay", "d", "eps/0", "eps/1"),
    *("ns_coefficients/0", "ns_coefficients/1", "ns_coefficients/2", "adjust_lr_fn"),
    *("lambd", "etas/0", "history_size"),
)
"""Options that identify a rule, or that its inverse needs."""
_TEXT_OPTIONS = {"True": 1.0, "False": 0.0, "original": 0.0, "match_rms_adamw": 1.0}
"""Values of options that are strings; the last two are those of ``adjust_lr_fn``."""
_FLAGS = (*factors.OPTIONS, *_DECAY_OPTIONS, *_RULE_OPTIONS)
_OPTION = re.compile(rf"param_groups[/.](.+?)[/.]({'|'.join((*_NUMBERS, *_FLAGS))})")
_MEMBER = re.compile(r"param_groups/([^/]+)/(params|param_names)/(\d+)")

# Tensors without weight decay: selected by name (Hugging Face), or those with one dimension (nanoGPT).
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


@dataclass(frozen=True)
class SavedOptimizer:
    """The state of an optimizer, by tensor.

    Attributes
    ----------
    roots : tuple of str
        Keys under which it is saved.
    state : OptimizerState
    keys : mapping
        Array to a mapping of tensor to its key in the container.
    """

    roots: tuple[str, ...]
    state: OptimizerState
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def optimizer_roots(container: Container) -> tuple[str, ...]:
    """Return the keys under which the states of optimizers are saved, in the order of the file."""
    for root in _ROOTS:
        start = re.compile(rf"({root})/(?:state|param_groups)[/.]")
        matches = (start.match(key) for keys in (container.numbers, container.tensors) for key in keys)
        found = dict.fromkeys(match[1] for match in matches if match)
        if found:
            return tuple(found)
    return ()


def saved_optimizer(
    container: Container,
    parameters: Mapping[str, LoggedTensor],
    trained: Collection[str] = (),
    order: Sequence[str] = (),
    user_options: Mapping[str, str | int] | None = None,
) -> SavedOptimizer | None:
    """Return the state of the optimizer of a step, and of a K-FAC preconditioner in front of it, by tensor.

    Parameters
    ----------
    container : Container
    parameters : mapping
        Tensors of the model, in file order.
    trained : collection of str
        Tensors that have a gradient, if known.
    order : sequence of str
        Tensor names in the order in which they were passed to the optimizer, if the user specified it.
    user_options : mapping, optional
        Options in `natgrad.sources.optimizers.factors.USER_OPTIONS` that the user specified.

    Returns
    -------
    SavedOptimizer or None
        None if there is no state. If the state cannot be matched, ``state.problem`` gives the reason.
    """
    roots = optimizer_roots(container)
    unread = next((why for key, why in container.unread.items() if re.fullmatch("|".join(_ROOTS), key)), "")
    if not roots and unread:
        return SavedOptimizer((), OptimizerState(unread=unread))
    kfac_root, metrics = factors.kfac_metrics(container, parameters, user_options or {})
    saved = _matched(container, roots, parameters, trained, order, user_options or {}) if roots else None
    if kfac_root is None or (saved is not None and saved.state.problem):
        return saved
    saved = saved or SavedOptimizer((), OptimizerState())
    state = saved.state
    own = {*state.metrics, *state.arrays.get("exp_avg_sq", ())}
    rates = state.numbers.get("tensor_learning_rate", {})
    for tensor in parameters:
        problem = ""
        if tensor not in metrics:
            problem = "" if tensor in own else "the preconditioner has no factors for it"
        elif tensor in own:
            # The update is a product of two matrices, which is not symmetric.
            problem = "the optimizer after the preconditioner has its own metric"
        elif len({rates.get(other) for other in metrics[tensor].tensors}) > 1:
            problem = "weight and bias have different learning rates"
        if problem:
            metrics[tensor] = FactoredMetric("K-FAC", problem=problem)
    state = replace(state, metrics={**state.metrics, **metrics})
    return SavedOptimizer((*saved.roots, kfac_root), state, {**saved.keys, **_factor_keys(metrics)})


def _factor_keys(metrics: Mapping[str, FactoredMetric | RotatedMetric]) -> dict[str, dict[str, str]]:
    """Return the keys of the factors, by the arrays under which they are read."""
    keys: dict[str, dict[str, str]] = {}
    for tensor, metric in metrics.items():
        if isinstance(metric, FactoredMetric):
            for index, factor in enumerate(factor for block in metric.blocks for factor in block):
                keys.setdefault(factor_array(index), {})[tensor] = factor.key
    return keys


class _Optimizer:
    """One saved optimizer: the keys of its entries, by entry and by name, and its parameter groups."""

    def __init__(self, container: Container, root: str) -> None:
        self.start = f"{root}/"
        self.entries: dict[str, dict[str, str]] = {}
        self.others: dict[str, dict[str, None]] = {}
        for key in (*container.tensors, *container.numbers):
            inner = key.removeprefix(self.start) if key.startswith(self.start) else ""
            if match := _ENTRY.fullmatch(inner):
                self.entries.setdefault(match[1], {})[match[2]] = key
            elif match := _OTHER.fullmatch(inner):
                self.others.setdefault(match[1], {})[match[2]] = None
        self.groups = _groups(container, self.start)

    @property
    def members(self) -> list[list[str]]:
        """The entries of each group, in order."""
        return [group.ordered() for group in self.groups.values()]


def _matched(
    container: Container,
    roots: tuple[str, ...],
    parameters: Mapping[str, LoggedTensor],
    trained: Collection[str],
    order: Sequence[str],
    user_options: Mapping[str, str | int],
) -> SavedOptimizer:
    optimizers = [_Optimizer(container, root) for root in roots]
    for group in (group for optimizer in optimizers for group in optimizer.groups.values()):
        # Before torch 2.7, no option distinguishes Adam from AdamW.
        if _DECAY in user_options and "beta1" in group.options:
            group.options.setdefault(_DECAY, float(user_options[_DECAY]))
    group_rates = tuple(
        group.options["tensor_learning_rate"]
        for optimizer in optimizers
        for group in optimizer.groups.values()
        if "tensor_learning_rate" in group.options
    )
    owners = _owners(container, optimizers, parameters, trained, order)
    groups = [group for optimizer in optimizers for group in optimizer.groups.values()]
    note = _decay_note(groups)
    if isinstance(owners, str):
        # A coefficient that all groups have in common needs no assignment.
        common, *others = {_decoupled_decay(group.options) for group in groups} or {math.nan}
        known = not others and not math.isnan(common)
        shared = {TENSOR_WEIGHT_DECAY: dict.fromkeys(parameters, common)} if known else {}
        state = OptimizerState(numbers=shared, problem=owners, group_rates=group_rates, decay_note=note)
        return SavedOptimizer(roots, state)
    keys: dict[str, dict[str, str]] = {}
    numbers: dict[str, dict[str, float]] = {}
    metrics: dict[str, FactoredMetric | RotatedMetric] = {}
    rules = [factors.rule_of(optimizer.entries.values()) for optimizer in optimizers]
    quantized: dict[str, list[str]] = {}
    saved_rules: dict[str, RuleState] = {}
    for (number, entry), tensor in owners.items():
        optimizer, rule = optimizers[number], rules[number]
        entry_keys, options = optimizer.entries.get(entry, {}), _options_of(entry, tensor, optimizer.groups)
        if encoding := _encoding(container, optimizer.start, entry, entry_keys):
            quantized.setdefault(encoding, []).append(tensor)
            metrics[tensor] = FactoredMetric("quantized", problem=f"its moments are {encoding}")
        counts: dict[str, float] = {}
        of_rule: dict[str, LoggedTensor] = {}
        for name, key in entry_keys.items():
            if name in _ARRAYS:
                logged = container.tensors.get(key)
                if logged is None or logged.shape != parameters[tensor].shape or logged.dtype not in STORAGE_DTYPES:
                    actual = "a number" if logged is None else f"{logged.dtype} of shape {logged.shape}"
                    problem = (
                        f"{key} is {actual}, but its parameter {tensor!r} has shape {parameters[tensor].shape}"
                    )
                    state = OptimizerState(problem=problem, group_rates=group_rates, decay_note=note)
                    return SavedOptimizer(roots, state)
                keys.setdefault(_ARRAYS[name], {})[tensor] = key
            elif name in _RULE_ARRAYS and key in container.tensors:
                of_rule[name] = container.tensors[key]
                keys.setdefault(name, {})[tensor] = key
            elif (name in _COUNTS or key in container.numbers) and (count := container.number(key)) is not None:
                counts[name] = count
        if "step" in counts:
            numbers.setdefault("updates", {})[tensor] = counts["step"]
        for name, value in options.items():
            if name not in _FLAGS:
                numbers.setdefault(name, {})[tensor] = value
        if not math.isnan(decay := _decoupled_decay(options)):
            numbers.setdefault(TENSOR_WEIGHT_DECAY, {})[tensor] = decay
        if rule is not None and entry_keys:
            saved = factors.Entry(entry_keys, container.tensors, counts, options, user_options)
            metrics[tensor] = saved.metric(rule, parameters[tensor].shape)
        of_rule |= {_ARRAYS[name]: container.tensors[key] for name, key in entry_keys.items() if name in _ARRAYS}
        saved_rules[tensor] = RuleState(
            options,
            counts,
            of_rule,
            (*(name for name in entry_keys if name not in (*of_rule, *counts)), *optimizer.others.get(entry, ())),
            f"its moments are {encoding}" if encoding else _rule_problem(of_rule, parameters[tensor].shape),
        )
    arrays = {
        array: {tensor: container.tensors[key] for tensor, key in array_keys.items()}
        for array, array_keys in keys.items()
        if array not in _RULE_ARRAYS
    }
    notes = tuple(
        f"the moments of {len(names)} tensors are {encoding}, which are not read: NaN is stored, the first is "
        f"{names[0]!r}"
        for encoding, names in quantized.items()
    )
    state = OptimizerState(
        *(arrays, numbers, metrics), notes=notes, group_rates=group_rates, decay_note=note, rules=saved_rules
    )
    return SavedOptimizer(roots, state, keys | _factor_keys(metrics))


def _rule_problem(arrays: Mapping[str, LoggedTensor], shape: tuple[int, ...]) -> str:
    """Return why the arrays of an entry cannot be used; empty if they can."""
    for name, logged in arrays.items():
        if logged.dtype not in STORAGE_DTYPES or (_RULE_ARRAYS.get(name, True) and logged.shape != shape):
            return f"{name} is {logged.dtype} of shape {logged.shape}, but its parameter has shape {shape}"
    return ""


def _decoupled_decay(options: Mapping[str, float]) -> float:
    """Return the coefficient of decoupled weight decay in the options of a group; NaN if not known.

    The optimizers of torch state whether their decay is decoupled. The decay of Muon is decoupled. For SGD without
    momentum, decoupled decay and decay that is added to the gradient are the same; with momentum it is not
    decoupled. Before 2.7, torch did not distinguish AdamW from Adam.
    """
    decay = options.get("weight_decay", math.nan)
    if decay == 0 or "ns_steps" in options:
        return decay
    if "decoupled_weight_decay" in options:
        return decay if options["decoupled_weight_decay"] else 0.0
    if "dampening" in options and "momentum" in options:
        return 0.0 if options["momentum"] else decay
    return math.nan


def _decay_note(groups: Sequence[_Group]) -> str:
    """Return a note on weight decay that may or may not be decoupled; empty if there is none."""
    unknown = [
        group.options["weight_decay"]
        for group in groups
        if group.options.get("weight_decay", 0.0) > 0 and math.isnan(_decoupled_decay(group.options))
    ]
    if not unknown:
        return ""
    return (
        f"the optimizer has weight decay {unknown[0]:g}, but does not state whether it is decoupled; if it is, as "
        f"in AdamW, --weight-decay {unknown[0]:g} gives results without it as well"
    )


def _encoding(container: Container, start: str, entry: str, entry_keys: Mapping[str, str]) -> str:
    """Return how the moments of an entry are encoded if they are not tensors of floats; otherwise empty."""
    if any(name in entry_keys for name in _QUANTIZED):
        return "in 8-bit blocks of bitsandbytes (state1, state2)"
    objects = container.objects
    kind = next((objects[key].kind for name in _ARRAYS if (key := f"{start}state/{entry}/{name}") in objects), "")
    return f"objects of {kind}" if kind else ""


@dataclass
class _Group:
    """A parameter group: its members by number or name, in order, and its options."""

    members: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    options: dict[str, float] = field(default_factory=dict)

    @cached_property
    def entries(self) -> frozenset[str]:
        """The members, for membership tests; to be used when the group is complete."""
        return frozenset(self.members.values())

    def ordered(self) -> list[str]:
        return [self.members[index] for index in sorted(self.members)]


def _groups(container: Container, start: str) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    for key in (*container.numbers, *container.tensors):
        inner = key.removeprefix(start)
        if not key.startswith(start) or not inner.startswith("param_groups"):
            continue
        if (member := _MEMBER.fullmatch(inner)) and key in container.numbers:
            groups.setdefault(member[1], _Group()).members[int(member[3])] = f"{container.numbers[key]:.15g}"
        elif option := _OPTION.fullmatch(inner):
            value = container.number(key)
            if value is not None:
                groups.setdefault(option[1], _Group()).options[_NUMBERS.get(option[2], option[2])] = value
    for key, text in container.texts.items():
        inner = key.removeprefix(start)
        if not key.startswith(start):
            continue
        if member := _MEMBER.fullmatch(inner):
            group = groups.setdefault(member[1], _Group())
            (group.members if member[2] == "params" else group.names)[int(member[3])] = text
        elif text in _TEXT_OPTIONS and (option := _OPTION.fullmatch(inner)) and option[2] in _FLAGS:
            groups.setdefault(option[1], _Group()).options[option[2]] = _TEXT_OPTIONS[text]
    return groups


def _options_of(entry: str, tensor: str, groups: Mapping[str, _Group]) -> Mapping[str, float]:
    """Return the options of an entry: those of its group, of a group named after it, or of the only group."""
    for name, group in groups.items():
        if entry in group.entries or name in (entry, tensor):
            return group.options
    (only, *others) = groups.values() if groups else [_Group()]
    return {} if others or only.members else only.options


def _owners(
    container: Container,
    optimizers: Sequence[_Optimizer],
    parameters: Mapping[str, LoggedTensor],
    trained: Collection[str],
    order: Sequence[str],
) -> dict[tuple[int, str], str] | str:
    """Return a mapping of entry (number of the optimizer, and name) to tensor, or the reason why there is none."""
    flat = [
        (number, entry)
        for number, optimizer in enumerate(optimizers)
        for entry in [entry for group in optimizer.members for entry in group] or optimizer.entries
    ]
    named = _named(optimizers, flat, parameters)
    if named is not None:
        unknown = [name for name in named.values() if name not in parameters]
        repeated = [name for name, count in Counter(named.values()).items() if count > 1]
        if repeated:
            return f"two entries of the optimizers are those of tensor {repeated[0]!r}"
        return f"the optimizer names {unknown[0]!r}, but the model has no such tensor" if unknown else named
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for number, optimizer in enumerate(optimizers):
        for entry, keys_by_name in optimizer.entries.items():
            for name, key in keys_by_name.items():
                if name in _SHAPED and key in container.tensors:
                    shapes[number, entry] = container.tensors[key].shape
            if (number, entry) not in shapes:
                shape = factors.shape_of(keys_by_name, container.tensors)
                shapes |= {} if shape is None else {(number, entry): shape}

    def fits(names: Sequence[str]) -> bool:
        return len(names) == len(flat) and all(
            shapes.get(entry, parameters[name].shape) == parameters[name].shape
            for entry, name in zip(flat, names, strict=True)
        )

    unknown = [name for name in order if name not in parameters]
    if unknown:
        return f"the order contains {unknown[0]!r}, but the model has no such tensor"
    names = list(order) or [
        name for name in parameters if (name in trained if trained else not is_running_statistic(name))
    ]
    groups = [[(number, entry) for entry in group] for number, o in enumerate(optimizers) for group in o.members]
    if order or container.ordered:
        arrangements = _arrangements(names, parameters, list(map(len, groups))) if len(optimizers) == 1 else []
        # The order may be that of the model or that of the optimizer.
        fitting = {
            tuple(arrangement) for arrangement in [*arrangements, *([names] if order else [])] if fits(arrangement)
        }
        if not fitting or len(optimizers) > 1:
            fitting |= _placements(names, parameters, groups, shapes)
        if len(fitting) == 1:
            return dict(zip(flat, fitting.pop(), strict=True))
        if order:
            verb, often = ("matches", " in two ways") if fitting else ("does not match", "")
            optimizer_text = f"{len(flat)} parameters in {len(groups)} groups"
            return f"the order of {len(order)} tensors {verb} the {optimizer_text}{often}"
    options = {tuple(group.options.items()) for optimizer in optimizers for group in optimizer.groups.values()}
    if not any(optimizer.entries for optimizer in optimizers) and len(flat) == len(names) and len(options) == 1:
        return dict(
            zip(flat, names, strict=True)
        )  # before the first update, all have the same options and no state
    by_shape = {parameters[name].shape: name for name in names}
    counts = Counter(parameters[name].shape for name in names)
    if len(shapes) == len(flat) == len(names) and all(counts[shape] == 1 for shape in shapes.values()):
        return {entry: by_shape[shapes[entry]] for entry in flat}
    which = "the optimizer" if len(optimizers) == 1 else f"{len(optimizers)} optimizers"
    return (
        f"the {len(flat)} parameters of {which} cannot be assigned to the {len(names)} tensors: it was "
        "saved without names, and neither the order of the file nor the shapes are sufficient"
    )


def _named(
    optimizers: Sequence[_Optimizer], flat: Sequence[tuple[int, str]], parameters: Mapping[str, LoggedTensor]
) -> dict[tuple[int, str], str] | None:
    """Return the tensors that the optimizers name, or None if they name none."""
    if all(entry in parameters for _, entry in flat):
        return {(number, entry): entry for number, entry in flat}
    groups = [(number, group) for number, optimizer in enumerate(optimizers) for group in optimizer.groups.values()]
    if any(set(group.names) != set(group.members) for _, group in groups):
        return None
    return {(n, group.members[index]): name for n, group in groups for index, name in group.names.items()}


def _placements(
    names: Sequence[str],
    parameters: Mapping[str, LoggedTensor],
    groups: Sequence[Sequence[tuple[int, str]]],
    shapes: Mapping[tuple[int, str], tuple[int, ...]],
) -> set[tuple[str, ...]]:
    """Return the ways to distribute tensors over groups such that each group is in the order of the model.

    The result has one element if there is only one way, in the order of the groups; otherwise it is empty.
    """
    sizes = tuple(map(len, groups))
    if sum(sizes) != len(names) or len(sizes) < 2:
        return set()
    # For each number of members that the groups have so far: the number of ways (2 for more), and one of them.
    ways: dict[tuple[int, ...], tuple[int, Any]] = {(0,) * len(sizes): (1, None)}
    for name in names:
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for filled, (count, way) in ways.items():
            for number, (size, group) in enumerate(zip(filled, groups, strict=True)):
                shape = parameters[name].shape
                if size < len(group) and shapes.get(group[size], shape) == shape:
                    more = (*filled[:number], size + 1, *filled[number + 1 :])
                    following[more] = (min(2, count + following.get(more, (0, None))[0]), (number, way))
        ways = following
        if len(ways) > _PLACEMENTS_LIMIT:
            return set()
    count, way = ways.get(sizes, (0, None))
    if count != 1:
        return set()
    numbers = []
    while way is not None:
        number, way = way
        numbers.append(number)
    placed: list[list[str]] = [[] for _ in sizes]
    for name, number in zip(names, reversed(numbers), strict=True):
        placed[number].append(name)
    return {tuple(name for group in placed for name in group)}


def _arrangements(
    names: Sequence[str], parameters: Mapping[str, LoggedTensor], sizes: Sequence[int]
) -> list[list[str]]:
    """Return the orders in which trainers pass tensors to an optimizer: unchanged, or decayed tensors first."""
    if len(sizes) < 2:
        return [list(names)]
    arrangements = []
    if len(sizes) == 2:
        for decayed in (
            [not _NOT_DECAYED.search(name) for name in names],
            [len(parameters[name].shape) > 1 for name in names],
            [not _NOT_DECAYED.search(name) and len(parameters[name].shape) > 1 for name in names],
        ):
            first = [name for name, is_decayed in zip(names, decayed, strict=True) if is_decayed]
            if len(first) == sizes[0]:
                arrangements.append(
                    [*first, *(name for name, is_decayed in zip(names, decayed, strict=True) if not is_decayed)]
                )
    return arrangements
