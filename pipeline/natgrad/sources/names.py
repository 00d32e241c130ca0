"""Interpret the keys of a file: which ones are parameters, gradients, loss, learning rate and step number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.names import EVALUATIONS, HESSIAN_NUMBERS, REPLICATE_STATES, REPLICATES, SCALARS, STATES
from natgrad.sources.bounds import parse_toml
from natgrad.sources.container import Container
from natgrad.sources.families import ANY_NAME
from natgrad.sources.optimizers.factors import USER_OPTIONS
from natgrad.sources.optimizers.saved_state import OPTIMIZER_KEYS, optimizer_roots
from natgrad.sources.step_names import Naming, checked_pattern, role_of
from natgrad.storage import Storage

__all__ = [
    "CHECKPOINT",
    "MAPPED",
    "MAP_FILE",
    "MODEL",
    "MODEL_KEYS",
    "NATIVE",
    "QUANTITIES",
    "ROOT",
    "SCALAR_LOG_QUANTITIES",
    "SINGLE_ARRAY",
    "STATE_QUANTITIES",
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
    evaluation : str
        What loss and gradient are evaluated on, one of `natgrad.schema.names.EVALUATIONS`.

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
    evaluation: str = EVALUATIONS[-1]

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

    def of_file(self, name: str, folder: str = "") -> Names:
        """Return a copy for a file whose name, or folder, may indicate that it contains gradients.

        If it has none of the usual keys, its tensors are gradients instead of parameters.

        Parameters
        ----------
        name : str
            Such as ``grad-000001.pt``.
        folder : str
            Name of the folder of the log. Only a single word counts: ``grads``, but not ``gradient_descent``.
        """
        in_folder = not role_of(name) and folder.lower() in _GRADIENT
        if (role_of(name) != STATES[1] and not in_folder) or self.required & set(STATES):
            return self
        parameter = tuple(key for key in self.keys["parameter"] if key != ROOT)
        return replace(self, keys={**self.keys, "parameter": parameter, "gradient": (*_GRADIENT, ROOT)})

    def of_part(self, role: str, container: Container) -> tuple[Names, Callable[[str], str]]:
        """Return names, and a function that renames the keys of one of several files of a step.

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
        span, evaluation = table.pop("step_span", 0), table.pop("evaluation", self.evaluation)
        if pattern:
            checked_pattern(str(pattern), str(path))
        valid = isinstance(inert, list) and isinstance(order, list) and type(span) is int and span >= 0
        valid = valid and evaluation in EVALUATIONS
        if table or not isinstance(mapping, dict) or not valid or not _valid_options(optimizer):
            raise InputError(
                f"the mapping file has {'unknown keys: ' + ', '.join(table) if table else 'invalid values'}",
                where=str(path),
                remedy='write a table [map] with QUANTITY = "KEY", and lists inert = ["module.Class"] and '
                'order = ["tensor"]; [optimizer] may contain compute_method = "eigen" or "inverse", '
                "start_preconditioning_step = N and decoupled_weight_decay = true or false; "
                'pattern = "...{step}..." gives the names of steps, and '
                "step_span = N the number of steps between the two states of an update, and "
                f"evaluation what loss and gradient are evaluated on ({', '.join(EVALUATIONS)})",
            )
        return replace(
            self.mapped(mapping, str(path)),
            inert=(*self.inert, *map(str, inert)),
            order=tuple(map(str, order)),
            optimizer={**self.optimizer, **optimizer},
            pattern=str(pattern) or self.pattern,
            step_span=span or self.step_span,
            evaluation=evaluation,
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

MODEL_KEYS = (_BARE_MODEL, "state_dict", "model_state_dict", "module", "state/model", ROOT)
"""Keys of a full model, in which some tensors may not be trained."""

SINGLE_ARRAY = "theta"
"""Name of the tensor if a quantity is one array, without names of tensors."""

_RATE = (
    # The optimizer uses its own rate; a rate that is saved next to it may be that of another update.
    *(f"{root}/param_groups/*/lr" for root in (*OPTIMIZER_KEYS, "optimizer_states/*")),
    "optimizer/optimizer/param_groups/*/lr",
    *(f"{root}/*/param_groups/*/lr" for root in ("optimizers", "optimizer", "state/optimizers")),
    *("learning_rate", "lr", "learning_rates", "lrs"),
)

CHECKPOINT = Names(
    {
        "parameter": ("parameter", "parameters", "params", *MODEL_KEYS),
        "gradient": _GRADIENT,
        "hvp": ("hvp",),
        "loss": ("loss", "losses"),
        "learning_rate": _RATE,
        "loss_time_derivative": ("loss_time_derivative",),
        **{quantity: (quantity,) for quantity in HESSIAN_NUMBERS},
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
