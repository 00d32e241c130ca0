"""Interpret the keys of a file: which ones are parameters, gradients, loss, learning rate and step number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_STATES, REPLICATES, SCALARS, STATES
from natgrad.sources.base import Difference, StepContent
from natgrad.sources.bounds import parse_toml, shown
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.container import Container
from natgrad.sources.families import ANY_NAME, SEPARATORS, left_out, members, usual_families
from natgrad.sources.optimizers.factors import USER_OPTIONS
from natgrad.sources.optimizers.saved_state import SavedOptimizer, optimizer_roots, saved_optimizer
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.step_names import Naming, checked_pattern, role_of
from natgrad.sources.steps import LoggedTensor, where
from natgrad.storage import Storage

__all__ = [
    "CHECKPOINT",
    "MAPPED",
    "MAP_FILE",
    "MODEL",
    "NATIVE",
    "QUANTITIES",
    "ROOT",
    "SCALAR_LOG_QUANTITIES",
    "SINGLE_ARRAY",
    "STATE_QUANTITIES",
    "NamedStep",
    "Names",
    "checked_shift",
    "parse_map",
    "parse_shift",
]

STATE_QUANTITIES = (*STATES, *SCALARS, *REPLICATES)
"""Quantities of a state. A log may store them with another step; see ``--shift``."""

QUANTITIES = (*STATE_QUANTITIES, "step")
"""Quantities to which a key can be mapped."""

SCALAR_LOG_QUANTITIES = (*SCALARS, "step", "run", "line")
"""Quantities to which a key can be mapped in a log of scalars, the run to select, and the form of lines of text."""

MAPPED = tuple(dict.fromkeys((*QUANTITIES, *SCALAR_LOG_QUANTITIES)))
"""Quantities of ``--map``, in logs with tensors or logs of scalars."""

_REPLICATES_LIMIT = 1 << 16
_SHIFT_LIMIT = 10**9

ROOT = "."
"""Key of the complete file."""

MAP_FILE = "natgrad.toml"
"""Name of the mapping file in the folder of a log."""


@dataclass(frozen=True)
class Names:
    """The keys under which a log stores its quantities.

    Attributes
    ----------
    keys : mapping
        Quantity from `QUANTITIES` to its possible keys; the first one that exists is used. Levels are joined by
        slashes, or by dots if the file has flat keys. In the key of a number, ``*`` matches any single level, and
        all numbers that match must be equal.
    required : frozenset of str
        Quantities whose key the user specified. These keys must exist.
    model : bool
        Parameters are those of a full model. Tensors that are not floats or have no gradient are not trained.
    inert : tuple of str
        Classes whose pickled objects are skipped without reading them, in addition to the known ones.
    order : tuple of str
        Tensor names in the order in which they were passed to the optimizer.
    optimizer : mapping
        Options of the optimizer that no file contains; see `natgrad.sources.optimizers.factors.USER_OPTIONS`.
    late : str
        Why gradients and what is saved with them may belong to the state before the update. Empty if they do not.
    pattern : str
        Pattern of the names of steps; see `natgrad.sources.step_names.Naming`.
    step_span : int
        Number of steps between the states before and after an update, if not all states are connected; see
        `LoggedStep`.

    Examples
    --------
    >>> NATIVE.mapped({"parameter": "model", "learning_rate": "lr"}).keys["parameter"]
    ('model',)
    """

    keys: Mapping[str, tuple[str, ...]]
    required: frozenset[str] = frozenset()
    model: bool = False
    inert: tuple[str, ...] = field(default=())
    order: tuple[str, ...] = ()
    optimizer: Mapping[str, str | int] = field(default_factory=dict)
    late: str = ""
    pattern: str = ""
    step_span: int = 0

    @property
    def naming(self) -> Naming:
        """The rule by which steps are recognized."""
        return Naming(self.pattern, keyed="step" in self.required)

    def mapped(self, mapping: Mapping[str, str], location: str = "--map") -> Names:
        """Return a copy in which the given quantities have the given keys.

        Raises
        ------
        InputError
            If a quantity is unknown or a key is not a string.
        """
        for quantity, key in mapping.items():
            stars = key.count(ANY_NAME) if isinstance(key, str) and quantity in (*STATES, *REPLICATE_STATES) else 0
            if quantity not in QUANTITIES or not isinstance(key, str) or not key or stars > 1:
                raise InputError(
                    f"{quantity}={key} is not a valid mapping of a quantity to a key",
                    where=location,
                    remedy=f"write QUANTITY=KEY with QUANTITY one of {', '.join(QUANTITIES)}; the key of the "
                    f"complete file is {ROOT}, and {ANY_NAME} may stand once for the names of the tensors",
                )
        required = {quantity: (key,) for quantity, key in mapping.items()}
        return replace(
            self,
            keys={**self.keys, **required},
            required=self.required | required.keys(),
            model=self.model or bool(required.keys() & set(STATES)),
        )

    def of_file(self, stem: str) -> Names:
        """Return a copy for a file whose name may say that it contains gradients, such as ``grad-000001``.

        If it has none of the usual keys, its tensors are gradients instead of parameters.
        """
        if role_of(stem) != "gradient" or self.required & set(STATES):
            return self
        parameter = tuple(key for key in self.keys["parameter"] if key != ROOT)
        return replace(self, keys={**self.keys, "parameter": parameter, "gradient": (*_GRADIENT, ROOT)})

    def of_part(self, role: str, container: Container) -> tuple[Names, Callable[[str], str]]:
        """Return names, and a function that renames the keys of a file of a step with several files.

        A file that has none of the usual keys of its role contains the tensors of this role under bare names.

        Parameters
        ----------
        role : str
            From `natgrad.sources.step_names.role_of`.
        container : Container
            The open file.
        """
        keys = [*container.numbers, *container.tensors]
        if role == "optimizer" and optimizer_roots(container):
            return self, lambda key: key
        if role == "optimizer" and any(_BARE_OPTIMIZER.match(key) for key in keys):
            return self, lambda key: f"{role}/{key}"
        array, prefix = (role, role) if role in STATES else (STATES[0], _BARE_MODEL)
        usual = [key for key in self.keys[array] if key != ROOT]
        if any(key == known or key.startswith(f"{known}/") for key in container.tensors for known in usual):
            return self, lambda key: key
        claimed = [key for name in (*STATES, *REPLICATE_STATES) for key in self.keys.get(name, ()) if key != ROOT]
        scalars = {key for name in (*SCALARS, *REPLICATES, "step") for key in self.keys.get(name, ())}
        starts = tuple(f"{key}/" for key in claimed)

        def renamed(key: str) -> str:
            return key if key in scalars or key in claimed or key.startswith(starts) else f"{prefix}/{key}"

        own = [prefix if key == ROOT else key for key in self.keys[array]]
        return replace(self, keys={**self.keys, array: tuple(dict.fromkeys((*own, prefix)))}), renamed

    def of_folder(self, folder: Storage) -> Names:
        """Return a copy changed by the mapping file of a log folder.

        Raises
        ------
        InputError
            If the mapping file is not valid.
        """
        path = folder / MAP_FILE
        try:
            table = parse_toml(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the mapping file: {error}", where=str(path)) from error
        mapping, inert, order = table.pop("map", {}), table.pop("inert", []), table.pop("order", [])
        optimizer, pattern = table.pop("optimizer", {}), table.pop("pattern", "")
        span = table.pop("step_span", 0)
        if pattern:
            checked_pattern(str(pattern), str(path))
        valid = isinstance(inert, list) and isinstance(order, list) and type(span) is int and span >= 0
        if table or not isinstance(mapping, dict) or not valid or not _valid_options(optimizer):
            raise InputError(
                f"the mapping file has {'unknown keys: ' + ', '.join(table) if table else 'invalid values'}",
                where=str(path),
                remedy='write a table [map] with QUANTITY = "KEY", and lists inert = ["module.Class"] and '
                'order = ["tensor"]; [optimizer] may contain compute_method = "eigen" or "inverse", '
                "start_preconditioning_step = N and decoupled_weight_decay = true or false; "
                'pattern = "...{step}..." gives the names of steps, and '
                "step_span = N the number of steps between the two states of an update",
            )
        return replace(
            self.mapped(mapping, str(path)),
            inert=(*self.inert, *map(str, inert)),
            order=tuple(map(str, order)),
            optimizer={**self.optimizer, **optimizer},
            pattern=str(pattern) or self.pattern,
            step_span=span or self.step_span,
        )


def _valid_options(optimizer: Any) -> bool:
    """Return True if a table contains only known optimizer options with valid values."""
    return (
        isinstance(optimizer, dict)
        and set(optimizer) <= set(USER_OPTIONS)
        and optimizer.get("compute_method", "eigen") in ("eigen", "inverse")
        and type(optimizer.get("start_preconditioning_step", 0)) is int
        and type(optimizer.get("decoupled_weight_decay", False)) is bool
    )


_GRADIENT = ("gradient", "gradients", "grad", "grads")
_BARE_OPTIMIZER = re.compile(r"(\d+/)?(state|param_groups)[/.]")
_BARE_MODEL = "model"
"""Key of the tensors of a file with bare names, among other files of the same step."""

_MODEL_KEYS = (_BARE_MODEL, "state_dict", "model_state_dict", "module", "state/model", ROOT)
"""Keys of a full model, in which some tensors may not be trained."""

SINGLE_ARRAY = "theta"
"""Name of the tensor if a quantity is one array, without names of tensors."""

_RATE = (
    # The optimizer uses its own rate; a rate that is saved next to it may be that of another update.
    *(f"{root}/param_groups/*/lr" for root in ("optimizer", "optimizer_state_dict", "optim", "optimizer_states/*")),
    "optimizer/optimizer/param_groups/*/lr",
    *(f"{root}/*/param_groups/*/lr" for root in ("optimizers", "optimizer", "state/optimizers")),
    *("learning_rate", "lr"),
)

CHECKPOINT = Names(
    {
        "parameter": ("parameter", "parameters", "params", *_MODEL_KEYS),
        "gradient": _GRADIENT,
        "hvp": ("hvp",),
        "loss": ("loss",),
        "learning_rate": _RATE,
        "loss_time_derivative": ("loss_time_derivative",),
        "hessian_min_eigenvalue": ("hessian_min_eigenvalue",),
        "decoupled_weight_decay": ("decoupled_weight_decay", "weight_decay"),
        **{quantity: (quantity,) for quantity in REPLICATES},
        "step": ("step", "global_step", "iteration", "iter_num"),
    },
    model=True,
)
"""Names that trainers use in checkpoints. A file without any of these names is treated as a model."""

NATIVE = replace(CHECKPOINT, model=False)
"""Names in containers of the native format: every logged tensor is trained, unless it is that of a full model."""

MODEL = replace(CHECKPOINT, keys={**CHECKPOINT.keys, "parameter": (ROOT,)})
"""Names in a file that contains only a model."""


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """Parse ``quantity=key`` pairs from the command line. A form of lines may contain spaces.

    Raises
    ------
    InputError
        If an argument is not such a pair, or if a quantity is repeated.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        for word in [pair] if pair.startswith("line=") else pair.split():
            quantity, equals, key = word.partition("=")
            if not equals or quantity in mapping:
                raise InputError(
                    f"{word!r} {'repeats a quantity' if equals else 'is not of the form QUANTITY=KEY'}",
                    where="--map",
                    remedy="write, for example, --map parameter=model --map gradient=grad",
                )
            mapping[quantity] = key
    return mapping


def parse_shift(pairs: Sequence[str]) -> dict[str, int]:
    """Parse ``quantity=steps`` pairs from the command line. A shift of 0 means no shift.

    Raises
    ------
    InputError
        If an argument is not such a pair, or if a quantity is repeated.
    """
    shift: dict[str, Any] = {}
    for pair in pairs:
        quantity, _, steps = pair.partition("=")
        if quantity in shift:
            raise InputError(f"{quantity!r} is repeated", where="--shift", remedy="pass each quantity only once")
        shift[quantity] = int(steps) if re.fullmatch(r"[+-]?\d{1,9}", steps) else steps
    return checked_shift(shift, "--shift")


def checked_shift(shift: Mapping[str, Any], location: str = "shift") -> dict[str, int]:
    """Return shifts of quantities if they are valid. A shift of 0 declares that a quantity is logged with its step.

    Raises
    ------
    InputError
        If a quantity is unknown, or if its shift is not a valid number of steps.
    """
    for quantity, steps in shift.items():
        if quantity not in STATE_QUANTITIES or type(steps) is not int or abs(steps) > _SHIFT_LIMIT:
            raise InputError(
                f"{quantity}={steps} is not a valid shift",
                where=location,
                remedy=f"write, for example, gradient=-1; QUANTITY is one of {', '.join(STATE_QUANTITIES)}",
            )
    return dict(shift)


class NamedStep:
    """Reader of one step, which assigns names to the contents of a container.

    Parameters
    ----------
    container : Container
        Container to read from. It is closed together with this reader.
    names : Names
    """

    def __init__(self, container: Container, names: Names) -> None:
        self._container, self._names = container, names
        self._keys: dict[str, Mapping[str, str]] | None = None
        self._full_model = names.model
        self._absent: dict[str, InputError] = {}
        self._families: dict[str, str] = {}

    def __enter__(self) -> NamedStep:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def number(self, quantity: str) -> float | None:
        """Return the value of a quantity, or None if it has no unique value."""
        values = self._values(quantity)[1]
        return values[0] if len(set(values)) == 1 else None

    def key(self, quantity: str) -> str:
        """Return the first key that has the value of a quantity; empty if there is none."""
        return next(iter(self._values(quantity)[0]), "")

    def keys(self) -> dict[str, LoggedTensor | float]:
        """Return all tensors and numbers; see `natgrad.sources.base.Keyed`."""
        return {**self._container.tensors, **self._container.numbers}

    def content(self) -> StepContent:
        """Describe the step.

        Raises
        ------
        InputError
            If a tensor does not have a float dtype, or the file contains another step number.
        """
        step, tensors = self._container.step, self._container.tensors
        notes = [f"{key} was not read: {why}" for key, why in self._container.unread.items()]
        notes += self._object_notes()
        used, scalars = set(), {}
        differences: list[Difference] = []
        ambiguous: dict[str, str] = {}
        for quantity in SCALARS:
            candidates = [*self._candidates(quantity)]
            keys, values = candidates[0] if candidates else ([], [])
            others = candidates[1:]
            used |= {key for candidate, _ in candidates for key in candidate}
            if len(set(values)) == 1:
                scalars[quantity] = values[0]
            elif values:
                ambiguous[quantity] = f"different values {sorted(set(values))} at {', '.join(keys)}"
            elif quantity in self._names.required:
                self._absent[quantity] = self._missing(quantity)
            elif (text := self._text(quantity)) is not None:
                notes.append(f"{quantity} is not used: its value {text} is not a number")
            value = scalars.get(quantity, math.nan)
            for other_keys, other_values in others:
                for key, other in zip(other_keys, other_values, strict=True):
                    if other not in values:
                        differences.append(Difference(quantity, keys[0], value, key, other))
        self._require_one_step()
        keys, values = self._values("step")
        used |= set(keys)
        if "step" not in self._names.required and any(value != step.number for value in values):
            raise InputError(
                f"the file contains {keys[0]} {values[0]:g}, but its name indicates step {step.number}",
                where=where(step),
                why="the file was renamed, or the number in its name does not count updates",
                remedy=f"use --map step={keys[0]} to take the step number from the file",
            )
        losses = self._replicate_loss(used)
        found = self._arrays(used)
        arrays = {
            array: {name: tensors[key] for name, key in names.items()} for array, names in found.items() if names
        }
        used |= {key for names in found.values() for key in names.values()}
        optimizer = self._optimizer(found)
        if optimizer is not None:
            starts = tuple(f"{root}/" for root in optimizer.roots)
            used |= {key for key in tensors if key.startswith(starts)}
        parameters = {key: name for name, key in found.get("parameter", {}).items()}
        ties = {
            parameters[key]: parameters[target]
            for key, target in self._container.ties.items()
            if key in parameters and target in parameters
        }
        aliases = {
            alias.removeprefix(key.removesuffix(parameters[key])): parameters[key]
            for alias, key in self._container.aliases.items()
            if key in parameters
        }
        # Another log may have the gradients under the same keys as this one has the parameters.
        aliases |= {key: name for key, name in parameters.items() if self._families}
        unused = tuple(key for key in tensors if key not in used)
        notes += self._family_notes(found, unused)
        state = None if optimizer is None else optimizer.state
        if state is not None and "learning_rate" in self._names.required:
            state = state.with_rates({}, ())  # the user specified another one
        notes += [state.decay_note] if state is not None and state.decay_note else []
        notes += [_ambiguity(quantity, text, state) for quantity, text in ambiguous.items()]
        return StepContent(
            arrays,
            scalars,
            unused,
            tuple(notes),
            ties,
            self._full_model,
            state,
            losses,
            differences=tuple(difference for difference in differences if difference.matters),
            alignment=self._alignment(arrays, scalars),
            aliases=aliases,
            absent=self._absent,
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self._container.read(self._key_of(array, tensor), start, out)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return self._container.ranges(self._key_of(array, tensor))

    def _key_of(self, array: str, tensor: str) -> str:
        if self._keys is None:
            self._keys = {**self._arrays(set())}
        if array not in self._keys:
            # Match the optimizer state on first access: readers that do not need it skip this work.
            optimizer = self._optimizer(self._keys)
            self._keys |= {} if optimizer is None else optimizer.keys
        return self._keys[array][tensor]

    def _text(self, quantity: str) -> str | None:
        """Return the text under the key of a scalar, for a message."""
        texts = self._container.texts
        return next((shown(texts[key]) for key in self._names.keys.get(quantity, ()) if key in texts), None)

    def _require_one_step(self) -> None:
        """Refuse a file with the states of several steps: its arrays have an additional dimension."""
        for key in self._names.keys.get("step", ()):
            logged = self._container.tensors.get(key)
            if logged is not None and len(logged.shape) == 1 and logged.shape[0] > 1:
                raise InputError(
                    f"{key!r} has {logged.shape[0]} values, so this file contains several steps",
                    where=where(self._container.step),
                    why="it was found in a folder of files that contain one step each",
                    remedy="pass the file itself as SOURCE; for a folder of such files, each of which is a run, "
                    "use --sweep",
                )

    def _optimizer(self, found: Mapping[str, Mapping[str, str]]) -> SavedOptimizer | None:
        """Return the state of the optimizer. Tensors that share memory are counted once."""
        tensors, ties = self._container.tensors, self._container.ties
        parameters = {name: tensors[key] for name, key in found.get("parameter", {}).items() if key not in ties}
        names = self._names
        return saved_optimizer(self._container, parameters, found.get("gradient", ()), names.order, names.optimizer)

    def _object_notes(self) -> list[str]:
        """Return a note for each class whose objects were not read because it is unknown."""
        keys: dict[str, list[str]] = {}
        for key, item in self._container.objects.items():
            if not item.known:
                keys.setdefault(item.kind, []).append(key)
        return [
            f"{shown(found[0]) if found[0] else 'the file'} was not read"
            + (f", like {len(found) - 1} other objects" if found[1:] else "")
            + f": its class is {shown(kind)}, which was not imported (to omit this note, list the class under "
            f"inert in {MAP_FILE})"
            for kind, found in keys.items()
        ]

    def _family_notes(self, found: Mapping[str, Mapping[str, str]], unused: Collection[str]) -> list[str]:
        """Return notes on keys that were split, and on keys that select only a part of similar tensors."""
        notes = [f"{array}s have the keys {key}, where * is the name" for array, key in self._families.items()]
        free = [key for key in unused if self._container.tensors[key].dtype in STORAGE_DTYPES]
        for array in STATES:
            key = self._names.keys.get(array, ("",))[0]
            rest = left_out(key, found.get(array, {}).values(), free) if array in self._names.required else []
            if rest:
                notes.append(
                    f"the key {key} of {array} selects {len(found[array])} tensors, and {len(rest)} tensors with "
                    f"similar keys are OMITTED from the model; the first is {rest[0]!r} (to include them, use --map "
                    f"{array}=KEY with what their keys have in common, in which * stands for the names)"
                )
        return notes

    def _lost(self, array: str, prefix: str) -> list[str]:
        """Return the keys at and below a prefix of what was not read because of its class, but may be a tensor.

        Below the root, arrays of known classes count at the first level only: others are random states.
        """
        objects = self._container.objects
        if prefix != ROOT:
            return [
                key for key in objects if key == prefix or (objects[key].array and key.startswith(f"{prefix}/"))
            ]
        starts = tuple(f"{root}/" for root in optimizer_roots(self._container))
        return [
            key
            for key, item in objects.items()
            if not key or (item.array and not (item.known and "/" in key) and not key.startswith(starts))
        ]

    def _require_read(self, array: str, lost: Sequence[str]) -> None:
        """Refuse a step if objects that belong to an array were not read because of their class."""
        if not lost:
            return
        kind = self._container.objects[lost[0]].kind
        remedy = next(remedy for pattern, remedy in _OBJECT_REMEDIES.items() if re.search(pattern, kind))
        raise InputError(
            f"{shown(lost[0]) if lost[0] else 'the file'} is an object of {shown(kind)}, but {array}s must be "
            "plain tensors",
            where=where(self._container.step, array),
            why="objects are never imported or executed"
            + (f"; {len(lost) - 1} other objects of this array are not plain tensors either" if lost[1:] else ""),
            remedy=remedy + f", or select other keys with --map {array}=KEY",
        )

    def _alignment(self, arrays: Collection[str], scalars: Collection[str]) -> str:
        """Return the question about the states of the gradients, naming all quantities saved with them."""
        if not self._names.late or not set(arrays) - {"parameter"}:
            return ""
        added = [name for name in (*arrays, *scalars) if name not in ("parameter", "learning_rate")]
        added += [name for name in scalars if name == "learning_rate" and "/" not in self._values(name)[0][0]]
        shifts = " ".join(f"--shift {name}=-1" for name in added)
        return (
            f"{self._names.late}: if so, use {shifts}; if they were computed at the saved state, pass --shift "
            "gradient=0 to state this"
        )

    def _missing(self, quantity: str) -> InputError:
        known = sorted({*self._container.tensors, *self._container.numbers})
        return InputError(
            f"there is no {quantity} under the key {self._names.keys[quantity][0]!r}",
            where=where(self._container.step),
            why=f"the keys are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}",
            remedy=f"specify the key with --map {quantity}=KEY, or in {MAP_FILE} in the folder of the log",
        )

    def _values(self, quantity: str) -> tuple[list[str], list[float]]:
        """Return the keys and values that match the first existing key of a scalar."""
        return next(self._candidates(quantity), ([], []))

    def _candidates(self, quantity: str) -> Iterator[tuple[list[str], list[float]]]:
        """Yield the keys and values that match each existing key of a scalar, in order of preference."""
        tensors, numbers = self._container.tensors, self._container.numbers
        for pattern in self._names.keys.get(quantity, ()):
            if "*" in pattern:
                expression = re.compile("[^/]+".join(map(re.escape, pattern.split("*"))))
                keys = [key for key in (*numbers, *tensors) if expression.fullmatch(key)]
            else:
                keys = [pattern] if pattern in numbers or pattern in tensors else []
            values = [(key, value) for key in keys if (value := self._container.number(key)) is not None]
            if values:
                yield [key for key, _ in values], [value for _, value in values]

    def _replicate_loss(self, used: set[str]) -> tuple[float, ...]:
        tensors = self._container.tensors
        key = next((key for key in self._names.keys.get(REPLICATE_LOSS, ()) if key in tensors), None)
        if key is None:
            if REPLICATE_LOSS in self._names.required:
                self._absent[REPLICATE_LOSS] = self._missing(REPLICATE_LOSS)
            return ()
        used.add(key)
        one_dimension = len(tensors[key].shape) == 1 and tensors[key].shape[0] <= _REPLICATES_LIMIT
        values = self._container.vector(key) if one_dimension else ()
        if not values:
            raise InputError(
                f"{REPLICATE_LOSS} has dtype {tensors[key].dtype} and shape {tensors[key].shape}",
                where=where(self._container.step, REPLICATE_LOSS),
                remedy="log it as a one-dimensional array with one float per replicate",
            )
        return values

    def _arrays(self, used: Collection[str]) -> dict[str, dict[str, str]]:
        """Return tensor names and keys of each array. The root contains the tensors that no other array claims."""
        found: dict[str, dict[str, str]] = {}
        claimed = set(used)
        rooted = []
        for array in (*STATES, *REPLICATE_STATES):
            lost: list[str] = []
            for prefix in self._names.keys.get(array, ()):
                if prefix == ROOT:
                    self._require_read(array, lost or self._lost(array, prefix))
                    rooted.append(array)
                    break
                names = self._under(array, prefix)
                lost += self._lost(array, prefix)
                if names:
                    self._require_read(array, [key for key in lost if key.startswith(f"{prefix}/")])
                    found[array] = names
                    claimed |= set(names.values())
                    break
            else:
                self._require_read(array, lost)
                if array in self._names.required:
                    self._absent[array] = self._missing(array)
        if self._names.required.intersection(rooted):
            rooted = [array for array in rooted if array in self._names.required]
        elif found and not self._names.model:
            rooted = []  # a file with other native keys is not a model
        starts = tuple(f"{root}/" for root in optimizer_roots(self._container)) if rooted else ()
        if rooted and not found and not self._names.required.intersection(rooted):
            scalars = {key for name in (*SCALARS, *REPLICATES, "step") for key in self._names.keys.get(name, ())}
            free = {
                key: logged
                for key, logged in self._container.tensors.items()
                if key not in claimed
                and key not in scalars
                and not key.startswith(starts)
                and logged.dtype in STORAGE_DTYPES
            }
            families = usual_families(free)
            if len(families) == 1 and STATES[0] not in rooted:  # the name of the file says what it contains
                families = dict.fromkeys(rooted[:1], *families.values())
            found = {array: self._floats(array, names, ROOT) for array, (_, names) in families.items()}
            self._families = {array: key for array, (key, _) in families.items()}
            rooted = [] if found else rooted
        for array in rooted:
            names = {
                key: key for key in self._container.tensors if key not in claimed and not key.startswith(starts)
            }
            found[array] = self._floats(array, names, ROOT)
        return found

    def _under(self, array: str, prefix: str) -> dict[str, str]:
        # Many names contain dots: other characters separate levels only after a prefix that the user specified.
        required = array in self._names.required
        if ANY_NAME in prefix and required:
            return self._floats(array, members(prefix, self._container.tensors), prefix)
        for separator in SEPARATORS if required else "/":
            start = prefix + separator
            names = {key.removeprefix(start): key for key in self._container.tensors if key.startswith(start)}
            names = self._floats(array, {name: key for name, key in names.items() if name}, prefix)
            if names:
                return names
        return self._floats(array, {SINGLE_ARRAY: prefix}, prefix) if prefix in self._container.tensors else {}

    def _floats(self, array: str, names: dict[str, str], prefix: str) -> dict[str, str]:
        tensors: Mapping[str, LoggedTensor] = self._container.tensors
        if array == STATES[0] and names:
            self._full_model = self._names.model or prefix in _MODEL_KEYS
        # A model may have integer buffers. A gradient shows that a tensor is trained.
        model, trained = self._names.model or prefix in _MODEL_KEYS, array != STATES[0]
        for name, key in names.items():
            dtype = tensors[key].dtype
            if dtype not in STORAGE_DTYPES and (not model or (trained and _INEXACT.match(dtype))):
                raise InputError(
                    f"dtype {dtype} is not a float dtype that can be stored",
                    where=where(self._container.step, array, name),
                    remedy=f"log it with one of the dtypes {', '.join(STORAGE_DTYPES)}, and a complex tensor as "
                    "its real and imaginary parts (torch.view_as_real)",
                )
        return {name: key for name, key in names.items() if tensors[key].dtype in STORAGE_DTYPES}


_OBJECT_REMEDIES = {
    r"DTensor|distributed": "merge the shards into one file of plain tensors (DTensor.full_tensor(), or "
    "get_model_state_dict with full_state_dict=True; for files of verl: python -m verl.model_merger merge), or "
    "save them with torch.distributed.checkpoint",
    r"sparse": "save dense tensors (tensor.to_dense())",
    r"quant|qtensor|8bit|4bit": "save dequantized tensors (tensor.dequantize())",
    r"^numpy\.": "save tensors (torch.from_numpy(array)) with torch.save, or write .npz files",
    r"": "save plain tensors: model.state_dict() for a model, and torch.Tensor for a subclass of it "
    "(tensor.as_subclass(torch.Tensor))",
}
"""Remedies for an object in the place of a tensor, by a pattern of its class; the first match applies."""


_INEXACT = re.compile(r"complex|float|[CF]\d")
"""Names of the dtypes of trained tensors, as torch and safetensors write them."""


def _ambiguity(quantity: str, values: str, optimizer: OptimizerState | None) -> str:
    """Return the note on a scalar that has several values."""
    if quantity != "learning_rate" or optimizer is None or not optimizer.group_rates:
        return f"{quantity} has {values}: none is used"
    if optimizer.rates:
        return "the parameter groups have different learning rates: each tensor has that of its group"
    return (
        f"learning_rate has {values}: none is used, because the groups cannot be assigned to tensors "
        f"({optimizer.problem}); list the tensors in {MAP_FILE} (order), or pass --learning-rate"
    )
