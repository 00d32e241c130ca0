"""Pickles as data: a machine that rebuilds plain containers and never imports or calls what a file names.

The standard library decodes the opcodes (`pickletools.genops`); what they do is done here. A name in the pickle
is looked up in the tables of the caller and nowhere else: it is a function of ours, a value of ours, or a class
whose objects are skipped unread. Anything else is refused. Time and memory are bounded by the length of the pickle.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "INERT",
    "PICKLE_LIMIT",
    "Attributes",
    "Global",
    "Record",
    "Skipped",
    "UnknownName",
    "flatten",
    "load",
]

PICKLE_LIMIT = 1 << 27
"""Largest pickle that is read, in bytes."""

_LEAVES_LIMIT, _DEPTH_LIMIT, _NAMES_LIMIT = 1 << 20, 64, 1 << 28
_TOO_MUCH = f"its pickle holds more than {_LEAVES_LIMIT} values or {_DEPTH_LIMIT} levels, or too long keys"

INERT = frozenset(
    {
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.dict",
        "builtins.float",
        "builtins.frozenset",
        "builtins.int",
        "builtins.list",
        "builtins.long",
        "builtins.set",
        "collections.Counter",
        "curvlinops.kfac.FisherType",
        "curvlinops.kfac.KFACType",
        "datetime.datetime",
        "datetime.timedelta",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "pytorch_optimizer.optimizer.utils.graft.*",
        "pytorch_optimizer.optimizer.utils.partition.*",
        "types.SimpleNamespace",
    }
)
"""Classes that trainers pickle beside their tensors: objects of them are skipped."""


@dataclass(eq=False)
class Record:
    """An object of a known data class: its name and state, and no behaviour.

    Attributes
    ----------
    name : str
    state : dict or other
        As pickled.
    """

    name: str
    state: Any = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        """Value of an attribute."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default

    def build(self, state: Any) -> None:
        """Take the state that was pickled."""
        self.state = state


class Attributes(Record):
    """A record whose attributes are walked as the items of a dict are; see `flatten`."""


@dataclass(frozen=True)
class Skipped:
    """An object that was not read: the name of its class."""

    name: str


class UnknownName(ValueError):
    """A pickle names what is in none of the tables."""


@dataclass(frozen=True)
class Global:
    """A function that is known, as an argument of another one: its name."""

    name: str


def load(
    pickle: bytes,
    *,
    functions: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    inert: Collection[str] = (),
) -> Any:
    """Rebuild what a pickle holds.

    Parameters
    ----------
    pickle : bytes
    functions : mapping
        Name ``module.attribute`` to a function of ours that is called in its place.
    values : mapping
        The same to a value.
    persistent : callable, optional
        Persistent identifier to what it stands for.
    inert : collection of str
        Further names, as `INERT`; ``package.*`` is all names of a package.

    Raises
    ------
    ValueError
        Where the pickle is malformed, too long, or (`UnknownName`) names what is not in the tables.
    """
    if len(pickle) > PICKLE_LIMIT:
        raise ValueError(f"its pickle has {len(pickle)} bytes, the limit is {PICKLE_LIMIT}")
    machine = _Machine(functions, values, persistent, INERT.union(inert))
    try:
        return machine.run(pickle)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its pickle is malformed ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
        inert: Collection[str],
    ) -> None:
        self._functions, self._values, self._persistent, self._inert = functions, values, persistent, inert
        self._inert_packages = [name.removesuffix("*") for name in inert if name.endswith(".*")]
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(pickle)):
            name = opcode.name
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(argument)
            elif name == "STOP":
                return self._stack.pop()
            else:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"its pickle holds the opcode {name}, which checkpoints do not need")
                step(argument)
        raise ValueError("its pickle does not stop")

    def _proto(self, version: int) -> None:
        pass

    def _frame(self, length: int) -> None:
        pass

    def _long1(self, number: int) -> None:
        self._stack.append(number)

    # Containers

    def _empty_list(self, _: None) -> None:
        self._stack.append([])

    def _empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _empty_set(self, _: None) -> None:
        self._stack.append(Skipped("builtins.set"))

    def _mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop_mark(self, _: None = None) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _pop(self, _: None) -> None:
        self._stack.pop()

    def _tuple(self, _: None) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _tuple1(self, _: None) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, _: None) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self, _: None) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._pop_mark())

    def _additems(self, _: None) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Skipped):
            raise ValueError(f"its pickle appends to a {type(target).__name__}")

    def _frozenset(self, _: None) -> None:
        self._pop_mark()
        self._stack.append(Skipped("builtins.frozenset"))

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: None) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Skipped):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # Memo

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _long_binput = _binput

    def _binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _long_binget = _binget

    # Names, and what is made of them

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, _: None) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        self._name(str(module), str(attribute))

    def _name(self, module: str, attribute: str) -> None:
        name = f"{_PYTHON_2.get(module, module)}.{attribute}"
        if name in self._values:
            self._stack.append(self._values[name])
        elif name in self._functions:
            self._stack.append(Global(name))
        elif name in self._inert or any(map(name.startswith, self._inert_packages)):
            self._stack.append(Skipped(name))
        else:
            raise UnknownName(
                f"its pickle names {name}, which is neither a tensor nor a plain container and was not imported "
                f"(where it is known to be harmless, list it under inert in the mapping file, to skip its objects)"
            )

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if isinstance(function, Skipped):
            self._stack.append(function)
        elif isinstance(function, Global) and isinstance(arguments, tuple):
            self._stack.append(self._functions[function.name](*arguments))
        else:
            raise ValueError(f"its pickle calls a {type(function).__name__}")

    _newobj = _reduce

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            target.build(state)

    def _binpersid(self, _: None) -> None:
        if self._persistent is None:
            raise ValueError("its pickle refers to what is outside of it")
        self._stack.append(self._persistent(self._stack.pop()))


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("SHORT_BINSTRING", "BINSTRING", "BYTEARRAY8"),
    )
)
_PYTHON_2 = {"__builtin__": "builtins"}


def _key(key: Any) -> Any:
    # Numbers chosen to collide would make a dict quadratic; these cannot.
    if isinstance(key, str | bool | Record | None) or (isinstance(key, int) and abs(key) < 1 << 60):
        return key
    if isinstance(key, tuple) and len(key) <= 16 and all(isinstance(part, str | int) for part in key):
        return "/".join(map(str, key))
    raise ValueError(f"its pickle has a {type(key).__name__} as key of a dict")


def flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    """Walk the leaves of nested dicts, lists, tuples and `Attributes`, their levels joined by a slash.

    Raises
    ------
    ValueError
        Where there are more leaves or levels than any checkpoint has (lists that hold themselves, for one).
    """
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    visited = characters = 0
    while stack:
        path, node, depth = stack.pop()
        visited, characters = visited + 1, characters + len(path)
        if visited > _LEAVES_LIMIT or depth > _DEPTH_LIMIT or characters > _NAMES_LIMIT:
            raise ValueError(_TOO_MUCH)
        items: list[tuple[str, Any]]
        node = node.state if isinstance(node, Attributes) else node
        if isinstance(node, dict):
            items = [(str(key), value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            items = [(str(index), value) for index, value in enumerate(node)]
        else:
            yield path, node
            continue
        if len(items) + len(stack) > _LEAVES_LIMIT or len(items) * len(path) > _NAMES_LIMIT:
            raise ValueError(_TOO_MUCH)
        stack.extend((f"{path}/{key}" if path else key, value, depth + 1) for key, value in reversed(items))
