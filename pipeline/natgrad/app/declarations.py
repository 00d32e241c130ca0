"""Declare options and arguments, validate their values, and derive signatures and docstrings from them.

A set of options is a ``TypedDict``, from which a type checker derives the keyword arguments of a public function
(``**options: Unpack[ProcessOptions]``). An argument, such as OUT, is an annotation of a parameter (``out: Out``).
The `Option` in either has the description, the default and the validation. The command line, the parameter forms of
Prefect, and the signatures and docstrings of functions are derived from these declarations, and `with_options`
validates every value before the function runs. `natgrad.app.options` declares all options.
"""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from natgrad.compute.clusters import configuration_errors
from natgrad.schema.arguments import number, plain, shown
from natgrad.schema.errors import InputError

__all__ = [
    "DeclaredOption",
    "NoOptions",
    "Option",
    "declared",
    "declared_parameters",
    "selected",
    "validated",
    "with_options",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """Description, default and validation of an option or argument.

    Attributes
    ----------
    description : str
        One or two sentences. ``{name}`` refers to another option; it is replaced by ``--name`` on the command line.
        Doubled braces stand for braces.
    default : object
        Value if the option is not set.
    unset : str
        Description of the default, for help texts.
    flag : str
        Name on the command line. Default: the name with two leading dashes.
    metavar : str, optional
        Placeholder of the value in help texts.
    minimum, above, maximum : float, optional
        Bounds of a number; ``above`` is excluded.
    choices : callable, optional
        Returns the accepted values. It is called only for validation and forms, because it may load libraries.
    parse : callable, optional
        Returns the mapping that a list of strings such as ``QUANTITY=KEY`` denotes.
    check : callable, optional
        Takes a value of the right type and returns its normal form. It raises InputError for an invalid value.
    unordered : bool
        Order and repetitions of the items have no meaning. The normal form is sorted, without repetitions.
    required : bool
        There is no default.
    positional : bool
        The command line takes the value as an argument instead of an option.
    """

    description: str
    default: Any = None
    unset: str = ""
    flag: str = ""
    metavar: str | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    choices: Callable[[], Iterable[str]] | None = None
    parse: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    check: Callable[[Any], Any] | None = None
    unordered: bool = False
    required: bool = False
    positional: bool = False


_KIND_NAMES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    Path: "path",
    Callable: "callable",
}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


@dataclass(frozen=True)
class DeclaredOption:
    """An option or argument with its name and the types of its values.

    Attributes
    ----------
    name : str
        Name of the parameter.
    option : Option
    kinds : tuple of type
        Types of the value, or of each item. ``Path`` stands for a path or URL as text or as a path object.
    single : bool
        Whether the value may be one item.
    containers : frozenset of type
        ``list``, ``dict``: the value may be a sequence, or a mapping whose keys are text.
    optional : bool
        Whether None is a value.
    """

    name: str
    option: Option
    kinds: tuple[Any, ...]
    single: bool
    containers: frozenset[type]
    optional: bool

    @classmethod
    def of(cls, name: str, annotation: Any) -> DeclaredOption | None:
        """Return the declaration in an annotation of a parameter, None if it has no `Option`."""
        if get_origin(annotation) is not Annotated:
            return None
        inner, option = get_args(annotation)
        members = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
        kinds: list[Any] = []
        containers = set()
        for member in members:
            origin = get_origin(member)
            if origin in (Sequence, Mapping):
                containers.add(list if origin is Sequence else dict)
                item = get_args(member)[-1]
                kinds += get_args(item) if get_origin(item) in (Union, UnionType) else (item,)
            elif member is not NoneType:
                kinds.append(origin or member)
        single = any(get_origin(member) not in (Sequence, Mapping) for member in members if member is not NoneType)
        distinct = tuple(kind for kind in dict.fromkeys(kinds) if not (kind is str and Path in kinds))
        return cls(name, option, distinct, single, frozenset(containers), NoneType in members)

    @property
    def flag(self) -> str:
        """Name on the command line."""
        if self.option.positional:
            return self.option.metavar or self.name.upper()
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def repeatable(self) -> bool:
        """True if there can be several values."""
        return bool(self.containers)

    # Validation

    def validated(self, value: Any) -> Any:
        """Return a value in its normal form. None and empty collections are replaced by the default.

        Raises
        ------
        InputError
            If the value is not valid, or it is missing and there is no default.
        """
        found = None if value is None else self._normal(value)
        if found is None:
            if self.option.required:
                raise self._refusal(f"is required, got {shown(value)}")
            # A copy, because the caller may change a list.
            return copy(self.option.default)
        return found if self.option.check is None else self.option.check(found)

    def _normal(self, value: Any) -> Any:
        """Return a value of the right type, or None if it is empty."""
        if dict in self.containers and isinstance(value, Mapping):
            entries = {self._text(key): self._item(value[key]) for key in value}
            return dict(sorted(entries.items()) if self.option.unordered else entries) or None
        if self.single and not (self.containers and _is_list(value)):
            if str in self.kinds and isinstance(value, str) and not value:
                # A form may send an empty text for a value that is not set.
                return None if self.optional else self._refuse("must not be empty")
            return self._item(value)
        if not _is_list(value):
            raise self._refusal(
                f"must be a list{' or mapping' if dict in self.containers else ''}, got {shown(value)}"
            )
        if self.option.parse is not None:
            texts = [self._text(item) for item in value]
            return self._normal(self.option.parse(texts)) if texts else None
        items = [self._item(item) for item in value]
        return (sorted(set(items)) if self.option.unordered else items) or None

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refusal(f"must consist of text, got {shown(value)}")
        return str(value)

    def _item(self, value: Any) -> Any:
        found = plain(value)
        if Path in self.kinds and isinstance(found, str | os.PathLike):
            return self._location(found)
        if str in self.kinds and isinstance(found, str):
            if self.option.choices is not None:
                self._require_choice(found, tuple(self.option.choices()))
            return str(found)
        if bool in self.kinds and isinstance(found, bool):
            return found
        if Callable in self.kinds and callable(found):
            return found
        for kind in (int, float):
            if kind in self.kinds:
                option = self.option
                try:
                    return number(found, kind, minimum=option.minimum, above=option.above, maximum=option.maximum)
                except ValueError as error:
                    raise self._refusal(str(error)) from error
        wanted = {bool: "True or False", Path: "a path or URL", str: "text", Callable: "a function"}
        return self._refuse(f"must be {' or '.join(wanted[kind] for kind in self.kinds)}, got {shown(value)}")

    def _location(self, value: str | os.PathLike[Any]) -> str | Path:
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise self._refusal(f"must be a path or URL, got {shown(value)}")
        from natgrad.storage import open_storage

        location = value if isinstance(value, Path) else text
        path = open_storage(location).local_path
        try:
            if path is not None:
                os.lstat(path)
        except OSError as error:  # the path may not exist yet
            if error.errno == errno.ENAMETOOLONG:
                raise self._refusal(f"must be a path, but its name is too long: {shown(value)}") from error
        return location

    def _require_choice(self, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            known = ", ".join(choices)
            choose = "the only choice is" if len(choices) == 1 else "choose one of"
            raise InputError(
                f"unknown value {value!r} for {self.flag}; {choose}: {known}",
                where=f"option {self.name}",
                remedy="use one of these values, or omit the option",
            )

    def _refuse(self, problem: str) -> Any:
        raise self._refusal(problem)

    def _refusal(self, problem: str) -> InputError:
        role = "argument" if self.option.positional else "option"
        omit = "" if self.option.required else f", or omit the {role} to use the default ({self.default_text})"
        return InputError(f"{self.flag} {problem}", where=f"{role} {self.name}", remedy=f"correct the value{omit}")

    # Descriptions

    def description(self, *, command_line: bool = False) -> str:
        """Return the description for the command line, or for Python and forms."""
        pattern = (lambda match: f"--{match[1].replace('_', '-')}") if command_line else (lambda match: match[1])
        text = re.sub(r"(?<!\{)\{(\w+)\}", pattern, self.option.description)
        text = text.replace("{{", "{").replace("}}", "}")
        return f"{text} Repeatable." if command_line and self.repeatable and not self.option.positional else text

    @property
    def default_text(self) -> str:
        """Default for help texts."""
        if self.option.unset or self.option.default is None:
            return self.option.unset or "none"
        if isinstance(self.option.default, list):
            return " ".join(item if isinstance(item, str) else f"{item:g}" for item in self.option.default)
        return str(self.option.default)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the option, for forms."""
        limits = {
            "minimum": self.option.minimum,
            "exclusiveMinimum": self.option.above,
            "maximum": self.option.maximum,
            "enum": None if self.option.choices is None else list(self.option.choices()),
        }
        items: list[dict[str, Any]] = [
            {
                "type": _JSON_TYPES[kind],
                **({"format": "path"} if kind is Path else {}),
                **{
                    name: limit
                    for name, limit in limits.items()
                    if limit is not None and (kind in (int, float) or name == "enum")
                },
            }
            for kind in self.kinds
        ]
        item = items[0] if len(items) == 1 else {"anyOf": items}
        forms = [
            *(items if self.single else []),
            *([{"type": "array", "items": item}] if list in self.containers and self.option.parse is None else []),
            *([{"type": "object", "additionalProperties": item}] if dict in self.containers else []),
            *([{"type": "null"}] if self.optional else []),
        ]
        schema: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
        unset = f" Default: {self.option.unset}." if self.option.unset else ""
        return {**schema, "description": self.description() + unset}

    def numpydoc(self) -> str:
        """Return the entry of a numpydoc section ``Parameters``."""
        item = " or ".join(_KIND_NAMES[kind] for kind in self.kinds)
        forms = [
            *([item] if self.single else []),
            *([f"sequence of {item}"] if list in self.containers and self.option.parse is None else []),
            *([f"mapping of str to {item}"] if dict in self.containers else []),
        ]
        words = " or ".join(forms) if len(forms) < 3 else f"{', '.join(forms[:-1])} or {forms[-1]}"
        default = "" if self.option.required else f" Default: {self.default_text}."
        lines = textwrap.wrap(self.description() + default, 100)
        optional = "" if self.option.required else ", optional"
        return "\n".join([f"{self.name} : {words}{optional}", *(f"    {line}" for line in lines)])


def _is_list(value: Any) -> bool:
    """Return True for a collection of known size that is neither text nor a mapping, such as a list or an array."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | os.PathLike):
        return False
    # An array without dimensions has these methods too, but no size.
    return isinstance(value, Sized) and isinstance(value, Iterable) and getattr(value, "shape", None) != ()


# Reading the declarations -------------------------------------------------------------------------------------


@cache
def declared(kind: Any) -> dict[str, DeclaredOption]:
    """Return the options of a set by name, in the order of help texts."""
    return _declarations(get_type_hints(kind, include_extras=True))


def declared_parameters(function: Callable[..., Any]) -> dict[str, DeclaredOption]:
    """Return the options and arguments that the annotations of a function's parameters declare, by name."""
    return _declarations(get_type_hints(function, include_extras=True))


def _declarations(annotations: Mapping[str, Any]) -> dict[str, DeclaredOption]:
    found = {name: DeclaredOption.of(name, annotation) for name, annotation in annotations.items()}
    return {name: option for name, option in found.items() if option is not None}


def validated(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a set in their normal form, with defaults. This opens no log and no store.

    Parameters
    ----------
    kind : type
        Set of options, for example `ProcessOptions`.
    values : mapping
        Options that are set, from the command line, a flow or Python code.

    Raises
    ------
    InputError
        If a value is not valid, or two options exclude each other.
    TypeError
        If an option is unknown.
    """
    options = declared(kind)
    for name in values:
        if name not in options:
            close = difflib.get_close_matches(name, options, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the options are {', '.join(options)}"
            raise TypeError(f"unknown option {name!r}{hint}")
    checked = {name: option.validated(values.get(name)) for name, option in options.items()}
    if checked.get("scheduler") is not None and checked.get("cluster") is not None:
        raise InputError(
            "--scheduler and --cluster exclude each other",
            where="options scheduler, cluster",
            remedy="use --scheduler for an existing Dask cluster, or --cluster to start one",
        )
    return checked


def selected(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a mapping that are options of a set."""
    return {name: values[name] for name in declared(kind) if name in values}


class NoOptions(TypedDict):
    """The empty set, for functions that have arguments only."""


def with_options(
    kind: Any = NoOptions,
    parameter_type: Callable[[DeclaredOption], Any] | None = None,
    default: Callable[[DeclaredOption], Any] | None = None,
) -> Callable[[F], F]:
    """Decorate a function: declare its arguments and options, and validate all of them at each call.

    The options of the set replace the parameter ``**options`` in the signature. The line ``**options`` in the
    docstring is replaced by an entry for each argument and option. The function runs only if all arguments and
    options are valid, and receives them in their normal form, with defaults.

    Parameters
    ----------
    kind : type, optional
        Set of options, for example `ProcessOptions`. Default: none.
    parameter_type : callable, optional
        Returns the annotation of an option or argument in the signature. Default: its type.
    default : callable, optional
        Returns the default of an option in the signature. Default: that of its declaration.
    """
    types = get_type_hints(kind)

    def decorate(function: F) -> F:
        own, of_kind = declared_parameters(function), declared(kind)
        signature, hints = inspect.signature(function), get_type_hints(function)
        variadic = inspect.Parameter.VAR_KEYWORD
        rest = [one.name for one in signature.parameters.values() if one.kind is variadic]

        def annotation(option: DeclaredOption) -> Any:
            if parameter_type is not None:
                return parameter_type(option)
            return hints[option.name] if option.name in own else types[option.name]

        def parameter(option: DeclaredOption, of: inspect.Parameter) -> inspect.Parameter:
            value = option.option.default if default is None else default(option)
            missing = option.option.required
            return of.replace(default=inspect.Parameter.empty if missing else value, annotation=annotation(option))

        parameters = [
            parameter(own[one.name], one)
            if one.name in own
            else one.replace(annotation=hints.get(one.name, one.annotation))
            for one in signature.parameters.values()
            if one.name not in rest
        ]
        for name, option in of_kind.items():
            parameters.append(parameter(option, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)))

        @functools.wraps(function)
        def validating(*arguments: Any, **values: Any) -> Any:
            call = signature.bind(*arguments, **values)
            call.apply_defaults()
            call.arguments |= {name: option.validated(call.arguments[name]) for name, option in own.items()}
            for name in rest:
                call.arguments[name] = validated(kind, call.arguments[name])
            with configuration_errors():
                return function(*call.args, **call.kwargs)

        validating.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect reads it
            parameters=parameters, return_annotation=hints.get("return", inspect.Signature.empty)
        )
        entries = "\n".join(option.numpydoc() for option in (*own.values(), *of_kind.values()))
        if function.__doc__:
            validating.__doc__ = inspect.cleandoc(function.__doc__).replace("**options", entries, 1)
        # Tools that document functions describe the wrapped one.
        function.__signature__ = validating.__signature__  # type: ignore[attr-defined]
        function.__doc__ = validating.__doc__
        return cast(F, validating)

    return decorate
