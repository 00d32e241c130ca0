"""Describe a step by the names of its keys: parameters, gradients, numbers, and the state of the optimizer.

The files of a run usually differ only in their values. The meaning of the keys is found once for files with the
same keys, shapes and dtypes: an `_Interpretation`, which contains no values. A file that differs has its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_STATES, REPLICATES, SCALARS, STATES
from natgrad.sources.base import Difference, StepContent
from natgrad.sources.bounds import shown
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.container import Container
from natgrad.sources.families import ANY_NAME, SEPARATORS, left_out, members, usual_families
from natgrad.sources.names import MAP_FILE, MODEL_KEYS, ROOT, SINGLE_ARRAY, Names
from natgrad.sources.optimizers.saved_state import SavedOptimizer, optimizer_roots, saved_optimizer
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedTensor, where
from natgrad.sources.tensor_names import matched_names

__all__ = ["NamedStep"]

_REPLICATES_LIMIT = 1 << 16
_INTERPRETATIONS_KEPT, _KEYS_KEPT = 4, 1 << 15
"""Number of interpretations that are kept, and maximum number of keys of each."""


class _Interpretation:
    """The meaning of the keys of a container under some names, without values.

    Attributes
    ----------
    candidates : dict
        For each scalar, and for the step number, the keys that match each of its existing names.
    """

    def __init__(self, container: Container, names: Names) -> None:
        self.names = names
        self._tensors, self._numbers = dict(container.tensors), tuple(container.numbers)
        self._order = list(self._tensors)
        self._others = _others(container)
        quantities = [quantity for quantity in (*SCALARS, "step") if quantity in names.keys]
        self.candidates = {quantity: self._matching(container, quantity) for quantity in quantities}
        self._arrays: _Arrays | None = None

    @property
    def size(self) -> int:
        """Number of keys."""
        return len(self._order) + len(self._numbers)

    def is_of(self, container: Container, names: Names) -> bool:
        """Return True if the keys of a container have the same meaning."""
        return (
            self._tensors == container.tensors
            # Tensors of an optimizer may be matched by their order.
            and self._order == list(container.tensors)
            and self._numbers == tuple(container.numbers)
            and self._others == _others(container)
            and self.names == names
        )

    def _matching(self, container: Container, quantity: str) -> list[list[str]]:
        """Return the keys that match each existing key of a scalar, in order of preference."""
        found = []
        for pattern in self.names.keys[quantity]:
            if "*" in pattern:
                expression = re.compile("[^/]+".join(map(re.escape, pattern.split("*"))))
                keys = [key for key in (*self._numbers, *self._order) if expression.fullmatch(key)]
            else:
                keys = [pattern] if pattern in container.numbers or pattern in self._tensors else []
            if numeric := [key for key in keys if container.number(key) is not None]:
                found.append(numeric)
        return found

    def arrays(self, container: Container) -> _Arrays:
        """Return the meaning of the keys of tensors. An error names the step of this container, and is not kept."""
        if self._arrays is None:
            used = {key for candidates in self.candidates.values() for keys in candidates for key in keys}
            self._arrays = _Arrays(container, self.names, used)
        return self._arrays


def _others(container: Container) -> tuple[Any, ...]:
    """Return what else determines the meaning of keys."""
    parts = dict(container.ties), dict(container.aliases), dict(container.objects), dict(container.unread)
    return container.ordered, *parts


_known: list[_Interpretation] = []
"""The last interpretations, the most recent one first."""


def _interpretation(container: Container, names: Names) -> _Interpretation:
    """Return the interpretation of a container; that of an equal one, if one was used recently."""
    for known in _known[:]:
        if known.is_of(container, names):
            return known
    new = _Interpretation(container, names)
    if new.size <= _KEYS_KEPT:
        _known.insert(0, new)
        del _known[_INTERPRETATIONS_KEPT:]
    return new


class _Arrays:
    """The tensors of each array of a container.

    Attributes
    ----------
    keys : dict
        By array and tensor, the key of the tensor.
    logged : dict
        By array and name, the tensors; without empty arrays.
    full_model : bool
        The parameters are those of a full model.
    absent : list of str
        Arrays, or the losses of replicates, whose key the user specified, but which do not exist.
    replicate_loss : str, optional
        Key of the losses of the replicates.
    ties, aliases : dict
        See `StepContent`.

    Raises
    ------
    InputError
        If a tensor cannot be read, or has a dtype that cannot be stored.
    """

    def __init__(self, container: Container, names: Names, used: Collection[str]) -> None:
        self._container, self._names = container, names
        self._families: dict[str, str] = {}
        self._listed: list[str] = []
        self._rest: dict[tuple[str, ...], tuple[tuple[str, ...], list[str]]] = {}
        self.absent: list[str] = []
        self.full_model = names.model
        tensors, claimed = container.tensors, set(used)
        self.replicate_loss = next((key for key in names.keys.get(REPLICATE_LOSS, ()) if key in tensors), None)
        if self.replicate_loss is not None:
            claimed.add(self.replicate_loss)
        elif REPLICATE_LOSS in names.required:
            self.absent.append(REPLICATE_LOSS)
        self.keys = self._found(claimed)
        self.logged = {
            array: {name: tensors[key] for name, key in keys.items()} for array, keys in self.keys.items() if keys
        }
        claimed |= {key for keys in self.keys.values() for key in keys.values()}
        self._unused = {key: logged for key, logged in tensors.items() if key not in claimed}
        parameters = {key: name for name, key in self.keys.get("parameter", {}).items()}
        self.ties = {
            parameters[key]: parameters[target]
            for key, target in container.ties.items()
            if key in parameters and target in parameters
        }
        self.aliases = {
            alias.removeprefix(key.removesuffix(parameters[key])): parameters[key]
            for alias, key in container.aliases.items()
            if key in parameters
        }
        # Another log may have the gradients under the same keys as this one has the parameters.
        self.aliases |= parameters if self._families else {}
        self._without_optimizer = False
        del self._container  # this object is also used for other containers

    def rest(self, roots: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
        """Return the keys of tensors that belong to no quantity, apart from those of the optimizer, and notes.

        Parameters
        ----------
        roots : tuple of str
            Keys under which the state of the optimizer is saved.
        """
        if roots not in self._rest:
            starts = tuple(f"{root}/" for root in roots)
            unused = tuple(key for key in self._unused if not key.startswith(starts))
            self._rest[roots] = unused, self._family_notes(unused)
        return self._rest[roots]

    def _family_notes(self, unused: Collection[str]) -> list[str]:
        """Return notes on keys that were split, and on keys that select only a part of similar tensors."""
        split = ", ".join(f"{key} for {array}s" for array, key in self._families.items())
        notes = [f"the keys of the tensors are {split}, where * is the name"] if split else []
        notes += [
            f"the {array}s are a list: they have the names of the parameters, in the order of the file"
            for array in self._listed
        ]
        free = [key for key in unused if self._unused[key].dtype in STORAGE_DTYPES]
        for array in STATES:
            key = next(iter(self._names.keys.get(array, ())), "")
            own = self.keys.get(array, {})
            rest = left_out(key, own.values(), free) if array in self._names.required else []
            if rest:
                notes.append(
                    f"the key {key} of {array} selects {len(own)} tensors, and {len(rest)} tensors with similar "
                    f"keys are OMITTED from the model; the first is {rest[0]!r} (to include them, use --map "
                    f"{array}=KEY with what their keys have in common, in which * stands for the names)"
                )
        return notes

    def optimizer(self, container: Container) -> SavedOptimizer | None:
        """Return the state of the optimizer. Tensors that share memory are counted once."""
        if self._without_optimizer:
            return None
        parameters = self.keys.get("parameter", {})
        single = {name: container.tensors[key] for name, key in parameters.items() if key not in container.ties}
        names, arrays = self._names, self.logged
        gradients = arrays.get("gradient", {})
        matched = matched_names(arrays.get("parameter", {}), gradients, self.aliases)
        trained = [matched.get(name, name) for name in gradients]
        found = saved_optimizer(container, single, trained, names.order, names.optimizer)
        # The keys determine whether there is one.
        self._without_optimizer = found is None
        return found

    def _found(self, used: Collection[str]) -> dict[str, dict[str, str]]:
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
                    self.absent.append(array)
        if self._names.required.intersection(rooted):
            rooted = [array for array in rooted if array in self._names.required]
        elif found and not self._names.model:
            rooted = []  # a file with other native keys is not a model
        elif found:
            # Only a file without usual keys contains gradients, as its name indicates, under bare names.
            rooted = [array for array in rooted if array == STATES[0]]
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
            if len(families) == 1 and STATES[0] not in rooted:  # the name of the file indicates its contents
                families = dict.fromkeys(rooted[:1], *families.values())
            found = {array: self._floats(array, names, ROOT) for array, (_, names) in families.items()}
            self._families = {array: key for array, (key, _) in families.items()}
            rooted = [] if found else rooted
        self._name_lists(found)
        for array in rooted:
            names = {
                key: key for key in self._container.tensors if key not in claimed and not key.startswith(starts)
            }
            found[array] = self._floats(array, names, ROOT)
        return found

    def _name_lists(self, found: dict[str, dict[str, str]]) -> None:
        """Use the names of the parameters for the tensors of a list, if both are in the order of the model."""
        tensors, parameters = self._container.tensors, found.get(STATES[0], {})
        for array in STATES[1:]:
            keys = list(found.get(array, {}).values())
            positions = list(map(str, range(len(parameters))))
            if self._container.ordered and list(found.get(array, {})) == positions != list(parameters):
                pairs = zip(parameters.values(), keys, strict=True)
                if all(tensors[key].shape == tensors[other].shape for key, other in pairs):
                    found[array] = dict(zip(parameters, keys, strict=True))
                    self._listed.append(array)

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

    def _floats(self, array: str, names: dict[str, str], prefix: str) -> dict[str, str]:
        tensors: Mapping[str, LoggedTensor] = self._container.tensors
        if array == STATES[0] and names:
            self.full_model = self._names.model or prefix in MODEL_KEYS
        # A model may have integer buffers. A gradient shows that a tensor is trained.
        model, trained = self._names.model or prefix in MODEL_KEYS, array != STATES[0]
        for name, key in names.items():
            dtype = tensors[key].dtype
            if dtype == "object":
                raise InputError(
                    f"{shown(key)} contains pickled objects, which are never loaded",
                    where=where(self._container.step, array),
                    why="NumPy pickles dictionaries and lists of arrays",
                    remedy="save each array under a separate key: np.savez(path, **arrays)",
                )
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
"""Remedies for an object instead of a tensor, by a pattern of its class; the first match applies."""


_INEXACT = re.compile(r"complex|float|[CF]\d")
"""Names of the dtypes of trained tensors, as torch and safetensors write them."""


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

    def configuration(self) -> dict[str, Scalar]:
        """Return the plain values of the configuration of the run by key, if the step contains it."""
        return self._container.configuration()

    def content(self) -> StepContent:
        """Describe the step.

        Raises
        ------
        InputError
            If a tensor does not have a float dtype, or the file contains another step number.
        """
        step = self._container.step
        notes = [*self._container.remarks]
        notes += [f"{key} was not read: {why}" for key, why in self._container.unread.items()]
        notes += self._object_notes()
        scalars: dict[str, float] = {}
        absent: dict[str, InputError] = {}
        differences: list[Difference] = []
        ambiguous: dict[str, str] = {}
        for quantity in SCALARS:
            candidates = self._candidates(quantity)
            keys, values = candidates[0] if candidates else ([], [])
            others = candidates[1:]
            if len(set(values)) == 1:
                scalars[quantity] = values[0]
            elif values:
                ambiguous[quantity] = f"different values {sorted(set(values))} at {', '.join(keys)}"
            elif quantity in self._names.required:
                absent[quantity] = self._missing(quantity)
            elif (text := self._text(quantity)) is not None:
                notes.append(f"{quantity} is not used: its value {text} is not a number")
            value = scalars.get(quantity, math.nan)
            for other_keys, other_values in others:
                for key, other in zip(other_keys, other_values, strict=True):
                    if other not in values:
                        differences.append(Difference(quantity, keys[0], value, key, other))
        self._require_one_step()
        keys, values = self._values("step")
        if "step" not in self._names.required and any(value != step.number for value in values):
            raise InputError(
                f"the file contains {keys[0]} {values[0]:g}, but its name indicates step {step.number}",
                where=where(step),
                why="the file was renamed, or the number in its name does not count updates",
                remedy=f"use --map step={keys[0]} to take the step number from the file",
            )
        found, optimizer = self._arrays, self._optimizer
        losses = self._replicate_loss(found.replicate_loss)
        absent |= {quantity: self._missing(quantity) for quantity in found.absent}
        unused, family_notes = found.rest(() if optimizer is None else optimizer.roots)
        notes += family_notes
        state = None if optimizer is None else optimizer.state
        if state is not None and "learning_rate" in self._names.required:
            state = state.with_rates({}, ())  # the user specified another one
        notes += [state.decay_note] if state is not None and state.decay_note else []
        notes += [_ambiguity(quantity, text, state) for quantity, text in ambiguous.items()]
        return StepContent(
            found.logged,
            scalars,
            unused,
            tuple(notes),
            found.ties,
            found.full_model,
            state,
            losses,
            differences=tuple(difference for difference in differences if difference.matters),
            alignment=self._alignment(found.logged, scalars),
            aliases=found.aliases,
            absent=absent,
            evaluation=self._names.evaluation,
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self._container.read(self._keys(array)[tensor], start, out)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return self._container.ranges(self._keys(array)[tensor])

    def placement(self, arrays: Collection[str]) -> Placement | None:
        """Return where the ranges of some arrays begin; see `natgrad.sources.base.Ranged`."""
        found = self._container.placement()
        return None if found is None else found.of((found.table, [self._keys(array) for array in arrays]))

    def _keys(self, array: str) -> Mapping[str, str]:
        """Return the keys of the tensors of an array."""
        keys: Mapping[str, str] | None = self._arrays.keys.get(array)
        if keys is None and self._optimizer is not None:
            # The state of the optimizer is matched on first access: readers that do not need it skip this work.
            keys = self._optimizer.keys.get(array)
        return keys or {}

    @cached_property
    def _interpretation(self) -> _Interpretation:
        return _interpretation(self._container, self._names)

    @property
    def _arrays(self) -> _Arrays:
        return self._interpretation.arrays(self._container)

    @cached_property
    def _optimizer(self) -> SavedOptimizer | None:
        return self._arrays.optimizer(self._container)

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
        return next(iter(self._candidates(quantity)), ([], []))

    def _candidates(self, quantity: str) -> list[tuple[list[str], list[float]]]:
        """Return the keys and values that match each existing key of a scalar, in order of preference."""
        found = []
        for keys in self._interpretation.candidates.get(quantity, ()):
            values = [self._container.number(key) for key in keys]
            found.append((keys, [value for value in values if value is not None]))
        return found

    def _replicate_loss(self, key: str | None) -> tuple[float, ...]:
        if key is None:
            return ()
        logged = self._container.tensors[key]
        one_dimension = len(logged.shape) == 1 and logged.shape[0] <= _REPLICATES_LIMIT
        values = self._container.vector(key) if one_dimension else ()
        if not values:
            raise InputError(
                f"{REPLICATE_LOSS} has dtype {logged.dtype} and shape {logged.shape}",
                where=where(self._container.step, REPLICATE_LOSS),
                remedy="log it as a one-dimensional array with one float per replicate",
            )
        return values


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
