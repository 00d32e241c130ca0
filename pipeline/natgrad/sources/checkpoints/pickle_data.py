"""Interpret pickles as data: rebuild plain containers, and never import or call anything that a file names.

The standard library decodes the opcodes (`pickletools.genops`), and this module executes them. A name in the pickle
is looked up only in the tables of the caller: it is one of our functions, one of our values, or a class whose
objects are skipped without reading them. Objects of any other class are skipped as well, and marked as unknown.
Time and memory are bounded by its length.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from natgrad.sources.bounds import Budget, shown

__all__ = [
    "INERT",
    "PICKLE_LIMIT",
    "Attributes",
    "Global",
    "Record",
    "Skipped",
    "flatten",
    "load",
]

PICKLE_LIMIT = 1 << 27
"""Maximum size of a pickle, in bytes."""

_DEPTH_LIMIT, _NAME_LIMIT, _KEY_PARTS = 64, 1 << 10, 16
_LEAF_OPERATIONS = 4
_OPCODES_AT_ONCE = 1 << 10

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
"""Classes that trainers pickle in addition to tensors. Their objects are skipped."""

_ARRAYS = re.compile(r"torch\._(utils|tensor)\._rebuild_\w+|numpy\.(_core|core)\.multiarray\._reconstruct")
"""Functions that rebuild tensors and arrays."""


@dataclass(eq=False)
class Record:
    """An object of a known data class, represented by its name and state without behavior.

    Attributes
    ----------
    name : str
    state : dict or other
        State as pickled.
    """

    name: str
    state: Any = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return the value of an attribute."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default

    def build(self, state: Any) -> None:
        """Set the pickled state."""
        self.state = state


class Attributes(Record):
    """A record whose attributes `flatten` visits like the items of a dict."""


@dataclass(frozen=True)
class Skipped:
    """An object that was not read, represented by the name of its class.

    Attributes
    ----------
    name : str
        Class, or function that rebuilds the object.
    unknown : bool
        None of the tables contains the name.
    array : bool
        The object is a tensor or an array.
    """

    name: str
    unknown: bool = False
    array: bool = False


@dataclass(frozen=True)
class Global:
    """A known function that is an argument of another one, represented by its name."""

    name: str


def load(
    pickle: bytes,
    *,
    functions: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    inert: Collection[str] = (),
    budget: Budget | None = None,
) -> Any:
    """Rebuild the contents of a pickle; see `load_all`, whose first object it returns."""
    return next(
        load_all(pickle, functions=functions, values=values, persistent=persistent, inert=inert, budget=budget)
    )


def load_all(
    pickle: bytes,
    *,
    functions: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    inert: Collection[str] = (),
    budget: Budget | None = None,
) -> Iterator[Any]:
    """Rebuild the objects of a file, one for each call of ``pickle.dump``.

    Parameters
    ----------
    pickle : bytes
    functions : mapping
        Name ``module.attribute`` to the function that is called instead.
    values : mapping
        Name ``module.attribute`` to the value that replaces it.
    persistent : callable, optional
        Function of a persistent identifier that returns the object.
    inert : collection of str
        Additional names, as in `INERT`; ``package.*`` matches all names of a package.
    budget : Budget, optional
        Budget of the pickle. By default, that of a file which contains only the pickle.

    Raises
    ------
    ValueError
        If the pickle is malformed or too long.
    """
    if len(pickle) > PICKLE_LIMIT:
        raise ValueError(f"its pickle has {len(pickle)} bytes, but the limit is {PICKLE_LIMIT}")
    budget = budget or Budget(len(pickle))
    file = io.BytesIO(pickle)
    try:
        while True:
            yield _Machine(functions, values, persistent, inert, budget).run(file)
            if file.tell() == len(pickle):
                return
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its pickle is malformed ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
        inert: Collection[str],
        budget: Budget,
    ) -> None:
        self._budget = budget
        self._functions, self._values, self._persistent, self._inert = functions, values, persistent, inert
        self._inert_packages = [name.removesuffix("*") for name in (*inert, *INERT) if name.endswith(".*")]
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        # The budget also pays for calls of the functions: subtract its opcodes one block at a time.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file), 1):
            if not count % _OPCODES_AT_ONCE:
                self._budget.spend(_OPCODES_AT_ONCE)
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
                    raise ValueError(f"its pickle contains the opcode {name}, which checkpoints do not need")
                step(argument)
        raise ValueError("its pickle has no STOP opcode")

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

    # A set is rebuilt as a list.
    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Skipped):
            raise ValueError(f"its pickle appends to a {type(target).__name__}")

    def _frozenset(self, _: None) -> None:
        self._pop_mark()
        self._stack.append(Skipped("builtins.frozenset"))

    def _key(self, key: Any) -> Any:
        """Return a dict key; a tuple is joined by slashes."""
        if isinstance(key, str | bool | Record | None) or _is_integer(key):
            return key
        if (
            isinstance(key, tuple)
            and len(key) <= _KEY_PARTS
            and all(isinstance(part, str) or _is_integer(part) for part in key)
        ):
            self._budget.spend(characters=sum(len(part) for part in key if isinstance(part, str)))
            return "/".join(map(str, key))
        raise ValueError(f"its pickle has {shown(key)} as a dict key")

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
            if isinstance(key, Skipped):  # a value without a key that was read is skipped, too
                target[f"<{key.name} {len(target)}>"] = key
            else:
                target[self._key(key)] = value

    # Memo

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _long_binput = _binput

    def _binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _long_binget = _binget

    # Names and objects

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, _: None) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        self._name(module, attribute)

    def _name(self, module: Any, attribute: Any) -> None:
        names = (module, attribute)
        if not all(isinstance(name, str) and len(name) <= _NAME_LIMIT for name in names):
            raise ValueError(f"its pickle names a class by {' and '.join(map(shown, names))}")
        name = f"{_PYTHON_2.get(module, module)}.{attribute}"
        if name in self._values:
            self._stack.append(self._values[name])
        elif name in self._functions:
            self._stack.append(Global(name))
        elif name in self._inert or any(map(name.startswith, self._inert_packages)):
            self._stack.append(Skipped(name))
        else:
            self._stack.append(Skipped(name, name not in INERT, bool(_ARRAYS.fullmatch(name))))

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
            raise ValueError("its pickle refers to an external object")
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


def _is_integer(key: Any) -> bool:
    # Integers chosen to have equal hashes would make a dict quadratic; these cannot.
    return isinstance(key, int) and abs(key) < 1 << 60


def flatten(tree: Any, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts, lists, tuples and `Attributes`, with their levels joined by slashes.

    Parameters
    ----------
    tree
    budget : Budget
        Budget of the leaves and their names.

    Raises
    ------
    ValueError
        If there are more leaves or levels than in any checkpoint, for example because a list contains itself.
    """
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > _DEPTH_LIMIT:
            raise ValueError(f"its pickle has more than {_DEPTH_LIMIT} levels")
        items: list[tuple[str, Any]]
        node = node.state if isinstance(node, Attributes) else node
        if isinstance(node, dict):
            if any(isinstance(key, Record) for key in node):
                raise ValueError("its pickle has an object as a dict key")
            items = [(str(key), value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            items = [(str(index), value) for index, value in enumerate(node)]
        else:
            yield path, node
            continue
        characters = len(items) * (len(path) + 1) + sum(len(key) for key, _ in items)
        budget.spend(_LEAF_OPERATIONS * len(items), characters)
        stack.extend((f"{path}/{key}" if path else key, value, depth + 1) for key, value in reversed(items))
