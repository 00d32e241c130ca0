"""What the keys of a file mean: where parameters, gradients, loss, learning rate and step number stand."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_STATES, REPLICATES, SCALARS, STATES
from natgrad.sources.base import StepContent
from natgrad.sources.container import Container
from natgrad.sources.optimizers.factors import SAID
from natgrad.sources.optimizers.saved_state import SavedOptimizer, optimizer_root, saved_optimizer
from natgrad.sources.steps import LoggedTensor, where
from natgrad.storage import Storage

__all__ = [
    "CHECKPOINT",
    "MAP_FILE",
    "MODEL",
    "NATIVE",
    "OF_A_STATE",
    "QUANTITIES",
    "ROOT",
    "NamedStep",
    "Names",
    "checked_shift",
    "is_step",
    "parse_map",
    "parse_shift",
    "step_number",
]

OF_A_STATE = (*STATES, *SCALARS, *REPLICATES)
"""Quantities of a state, which may be logged at another step."""

QUANTITIES = (*OF_A_STATE, "step")
"""What a key can be said to hold."""

_MOST_REPLICATES = 1 << 16
_FARTHEST = 10**9

ROOT = "."
"""Key of the whole file."""

MAP_FILE = "natgrad.toml"
"""Mapping file in the folder of a log."""


@dataclass(frozen=True)
class Names:
    """Keys under which a log keeps its quantities.

    Attributes
    ----------
    keys : mapping
        Quantity of `QUANTITIES` to the keys it may stand under; the first that is there counts. Levels are joined
        by a slash, or by a dot where the file has flat keys; in the key of a number ``*`` is any one level, and
        all numbers it matches must be equal.
    given : frozenset of str
        Quantities whose key the user gave, so it must be there.
    model : bool
        Parameters are a whole model: what is no float, or has no gradient, is not trained.
    inert : tuple of str
        Classes whose pickled objects are skipped unread, beside those that are known.
    order : tuple of str
        Tensors in the order in which the optimizer was given them.
    optimizer : mapping
        What no file says of an optimizer: see `natgrad.sources.optimizers.factors.SAID`.

    Examples
    --------
    >>> NATIVE.mapped({"parameter": "model", "learning_rate": "lr"}).keys["parameter"]
    ('model',)
    """

    keys: Mapping[str, tuple[str, ...]]
    given: frozenset[str] = frozenset()
    model: bool = False
    inert: tuple[str, ...] = field(default=())
    order: tuple[str, ...] = ()
    optimizer: Mapping[str, str | int] = field(default_factory=dict)

    def mapped(self, mapping: Mapping[str, str], place: str = "--map") -> Names:
        """Return these names with some quantities under the keys given.

        Raises
        ------
        InputError
            Where a quantity is not known.
        """
        for quantity, key in mapping.items():
            if quantity not in QUANTITIES or not isinstance(key, str) or not key:
                raise InputError(
                    f"{quantity}={key} does not say where a quantity is",
                    where=place,
                    remedy=f"write QUANTITY=KEY, QUANTITY of {', '.join(QUANTITIES)}; the whole file is {ROOT}",
                )
        given = {quantity: (key,) for quantity, key in mapping.items()}
        return replace(
            self,
            keys={**self.keys, **given},
            given=self.given | given.keys(),
            model=self.model or bool(given.keys() & set(STATES)),
        )

    def of_folder(self, folder: Storage) -> Names:
        """Return these names as the mapping file of a log folder changes them.

        Raises
        ------
        InputError
            Where the file is no mapping.
        """
        path = folder / MAP_FILE
        try:
            table = tomllib.loads(path.get().decode())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the mapping file: {error}", where=str(path)) from error
        mapping, inert, order = table.pop("map", {}), table.pop("inert", []), table.pop("order", [])
        optimizer = table.pop("optimizer", {})
        lists = isinstance(inert, list) and isinstance(order, list)
        if table or not isinstance(mapping, dict) or not lists or not _said(optimizer):
            raise InputError(
                f"the mapping file holds {', '.join(table) or 'other values than it may'}",
                where=str(path),
                remedy='write a table [map] of QUANTITY = "KEY", and lists inert = ["module.Class"] and '
                'order = ["tensor"]; [optimizer] may have compute_method = "eigen" or "inverse", and '
                "start_preconditioning_step = N",
            )
        return replace(
            self.mapped(mapping, str(path)),
            inert=(*self.inert, *map(str, inert)),
            order=tuple(map(str, order)),
            optimizer={**self.optimizer, **optimizer},
        )


def _said(optimizer: Any) -> bool:
    """Whether a table says what may be said of an optimizer, and nothing else."""
    return (
        isinstance(optimizer, dict)
        and set(optimizer) <= set(SAID)
        and optimizer.get("compute_method", "eigen") in ("eigen", "inverse")
        and type(optimizer.get("start_preconditioning_step", 0)) is int
    )


NATIVE = Names({quantity: (quantity,) for quantity in (*STATES, *SCALARS, *REPLICATES)})
"""Names of the native format."""

_GRADIENT = ("gradient", "gradients", "grad", "grads")
_RATE = ("learning_rate", "lr", "optimizer/param_groups/*/lr", "optimizer_state_dict/param_groups/*/lr")

CHECKPOINT = Names(
    {
        "parameter": ("parameter", "parameters", "model", "state_dict", "model_state_dict", "module", ROOT),
        "gradient": _GRADIENT,
        "hvp": ("hvp",),
        "loss": ("loss",),
        "learning_rate": (
            *_RATE,
            "optim/param_groups/*/lr",
            "optimizer_states/*/param_groups/*/lr",
            "optimizer/optimizer/param_groups/*/lr",
        ),
        "loss_time_derivative": ("loss_time_derivative",),
        "hessian_min_eigenvalue": ("hessian_min_eigenvalue",),
        **{quantity: (quantity,) for quantity in REPLICATES},
        "step": ("step", "global_step", "iteration", "iter_num"),
    },
    model=True,
)
"""Names under which trainers save checkpoints; a file that has none of them is a model."""

MODEL = replace(CHECKPOINT, keys={**CHECKPOINT.keys, "parameter": (ROOT,)})
"""Names of a file that is a model and nothing else."""


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``quantity=key`` pairs of a command line.

    Raises
    ------
    InputError
        Where one is no such pair, or a quantity is given twice.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        for word in pair.split():
            quantity, equals, key = word.partition("=")
            if not equals or quantity in mapping:
                raise InputError(
                    f"{word!r} is {'given twice' if equals else 'no pair QUANTITY=KEY'}",
                    where="--map",
                    remedy="write, for example, --map parameter=model --map gradient=grad",
                )
            mapping[quantity] = key
    return mapping


def parse_shift(pairs: Sequence[str]) -> dict[str, int]:
    """Read ``quantity=steps`` pairs of a command line; a shift by 0 says that there is none.

    Raises
    ------
    InputError
        Where one is no such pair, or a quantity is given twice.
    """
    shift: dict[str, Any] = {}
    for pair in pairs:
        quantity, _, steps = pair.partition("=")
        if quantity in shift:
            raise InputError(f"{quantity!r} is given twice", where="--shift", remedy="give each quantity once")
        shift[quantity] = int(steps) if re.fullmatch(r"[+-]?\d{1,9}", steps) else steps
    checked_shift(shift, "--shift")
    return shift


def checked_shift(shift: Mapping[str, Any], place: str = "shift") -> dict[str, int]:
    """Return shifts of quantities that can be.

    Raises
    ------
    InputError
        Where a quantity is not known, or what it is shifted by is no number of steps.
    """
    for quantity, steps in shift.items():
        if quantity not in OF_A_STATE or type(steps) is not int or abs(steps) > _FARTHEST:
            raise InputError(
                f"{quantity}={steps} does not say by how many steps a quantity is shifted",
                where=place,
                remedy=f"write, for example, gradient=-1; QUANTITY of {', '.join(OF_A_STATE)}",
            )
    return {quantity: steps for quantity, steps in shift.items() if steps}


class NamedStep:
    """Reader of one step: a container, and the names of what is in it.

    Parameters
    ----------
    container : Container
        Closed with this.
    names : Names
    """

    def __init__(self, container: Container, names: Names) -> None:
        self._container, self._names = container, names
        self._keys: dict[str, Mapping[str, str]] | None = None

    def __enter__(self) -> NamedStep:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def number(self, quantity: str) -> float | None:
        """Value of a quantity that is one number, None where there is none."""
        values = self._values(quantity)[1]
        return values[0] if len(set(values)) == 1 else None

    def content(self) -> StepContent:
        """Describe the step.

        Raises
        ------
        InputError
            Where a key that the user gave is not there, a tensor is not of a float dtype, or the file says that
            it is of another step.
        """
        step, tensors = self._container.step, self._container.tensors
        notes = [f"{key} was not read: {why}" for key, why in self._container.unread.items()]
        used, scalars = set(), {}
        for quantity in SCALARS:
            keys, values = self._values(quantity)
            used |= set(keys)
            if len(set(values)) == 1:
                scalars[quantity] = values[0]
            elif values:
                notes.append(f"{quantity} is {sorted(set(values))} at {', '.join(keys)}: none is taken")
            elif quantity in self._names.given:
                raise self._missing(quantity)
        keys, values = self._values("step")
        used |= set(keys)
        if "step" not in self._names.given and any(value != step.number for value in values):
            raise InputError(
                f"the file says {keys[0]} {values[0]:g}, its name step {step.number}",
                where=where(step),
                why="the file was renamed, or its name counts something else than updates",
                remedy=f"give --map step={keys[0]} to take the file's number",
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
            parameters[key]: parameters[kept]
            for key, kept in self._container.ties.items()
            if key in parameters and kept in parameters
        }
        unused = tuple(key for key in tensors if key not in used)
        state = None if optimizer is None else optimizer.state
        return StepContent(arrays, scalars, unused, tuple(notes), ties, self._names.model, state, losses)

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        if self._keys is None:
            self._keys = {**self._arrays(set())}
        if array not in self._keys:
            # Matched where it is asked for: a step that is read without it need not wait for that.
            optimizer = self._optimizer(self._keys)
            self._keys |= {} if optimizer is None else optimizer.keys
        self._container.read(self._keys[array][tensor], start, out)

    def _optimizer(self, found: Mapping[str, Mapping[str, str]]) -> SavedOptimizer | None:
        """State of the optimizer, which counts a tensor that lies in the memory of another one once."""
        tensors, ties = self._container.tensors, self._container.ties
        parameters = {name: tensors[key] for name, key in found.get("parameter", {}).items() if key not in ties}
        names = self._names
        return saved_optimizer(self._container, parameters, found.get("gradient", ()), names.order, names.optimizer)

    def _missing(self, quantity: str) -> InputError:
        known = sorted({*self._container.tensors, *self._container.numbers})
        return InputError(
            f"no {quantity} under the key {self._names.keys[quantity][0]!r}",
            where=where(self._container.step),
            why=f"keys are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}",
            remedy=f"say where it is with --map {quantity}=KEY, or in {MAP_FILE} in the folder of the log",
        )

    def _values(self, quantity: str) -> tuple[list[str], list[float]]:
        """Keys and values of the first key of a scalar that is there."""
        tensors, numbers = self._container.tensors, self._container.numbers
        for pattern in self._names.keys.get(quantity, ()):
            if "*" in pattern:
                expression = re.compile("[^/]+".join(map(re.escape, pattern.split("*"))))
                keys = [key for key in (*numbers, *tensors) if expression.fullmatch(key)]
            else:
                keys = [pattern] if pattern in numbers or pattern in tensors else []
            values = [(key, value) for key in keys if (value := self._container.number(key)) is not None]
            if values:
                return [key for key, _ in values], [value for _, value in values]
        return [], []

    def _replicate_loss(self, used: set[str]) -> tuple[float, ...]:
        tensors = self._container.tensors
        key = next((key for key in self._names.keys.get(REPLICATE_LOSS, ()) if key in tensors), None)
        if key is None:
            if REPLICATE_LOSS in self._names.given:
                raise self._missing(REPLICATE_LOSS)
            return ()
        used.add(key)
        one_dimension = len(tensors[key].shape) == 1 and tensors[key].shape[0] <= _MOST_REPLICATES
        values = self._container.vector(key) if one_dimension else ()
        if not values:
            raise InputError(
                f"{REPLICATE_LOSS} is {tensors[key].dtype} of shape {tensors[key].shape}",
                where=where(self._container.step, REPLICATE_LOSS),
                remedy="log one float for each replicate, in one dimension",
            )
        return values

    def _arrays(self, used: Collection[str]) -> dict[str, dict[str, str]]:
        """Tensor names of each array and their keys; what the root holds is what nothing else claims."""
        found: dict[str, dict[str, str]] = {}
        claimed = set(used)
        rooted = []
        for array in (*STATES, *REPLICATE_STATES):
            for prefix in self._names.keys.get(array, ()):
                if prefix == ROOT:
                    rooted.append(array)
                    break
                names = self._under(array, prefix)
                if names:
                    found[array] = names
                    claimed |= set(names.values())
                    break
            else:
                if array in self._names.given:
                    raise self._missing(array)
        if self._names.given.intersection(rooted):
            rooted = [array for array in rooted if array in self._names.given]
        root = optimizer_root(self._container) if rooted else None
        for array in rooted:
            names = {
                key: key
                for key in self._container.tensors
                if key not in claimed and (root is None or not key.startswith(f"{root}/"))
            }
            found[array] = self._floats(array, names)
        return found

    def _under(self, array: str, prefix: str) -> dict[str, str]:
        # A dot is part of many names: it parts levels only where the user says what is before it.
        for separator in "/." if array in self._names.given else "/":
            start = prefix + separator
            names = {key.removeprefix(start): key for key in self._container.tensors if key.startswith(start)}
            names = self._floats(array, {name: key for name, key in names.items() if name})
            if names:
                return names
        return {}

    def _floats(self, array: str, names: dict[str, str]) -> dict[str, str]:
        tensors: Mapping[str, LoggedTensor] = self._container.tensors
        if self._names.model:
            return {name: key for name, key in names.items() if tensors[key].dtype in STORAGE_DTYPES}
        for name, key in names.items():
            if tensors[key].dtype not in STORAGE_DTYPES:
                raise InputError(
                    f"dtype {tensors[key].dtype} is not a float that can be stored as it is",
                    where=where(self._container.step, array, name),
                    remedy=f"log it as one of {', '.join(STORAGE_DTYPES)}",
                )
        return names


_STEP = re.compile(r"(?:^|[^a-z])(?:global_?step|step|iter(?:ation)?|checkpoint|ckpt)[-_=]?(\d+)", re.IGNORECASE)
_ONE_NUMBER = re.compile(r"(?:[a-z_]*[-_.])?(\d+)", re.IGNORECASE)


def step_number(stem: str) -> int | None:
    """Step that the name of a file or folder says, None where it says none.

    Examples
    --------
    >>> [step_number(name) for name in ("checkpoint-500", "epoch=3-step=40", "iter_0000010", "model_7")]
    [500, 40, 10, 7]
    >>> [step_number(name) for name in ("model-00001-of-00002", "epoch_3", "final")]
    [None, None, None]
    """
    told = _STEP.findall(stem)
    if told:
        return int(told[-1]) if len(told[-1]) <= 18 else None
    match = _ONE_NUMBER.fullmatch(stem)
    if not match or stem.lower().startswith("epoch") or len(match[1]) > 18:
        return None
    return int(match[1])


def is_step(name: str) -> bool:
    """Whether the name of a folder is that of a step by itself, with a word that says so, or a number alone.

    Examples
    --------
    >>> [is_step(name) for name in ("step-3", "100", "optimizer_0", "model")]
    [True, True, False, False]
    """
    return name.isdecimal() or bool(_STEP.search(name))
