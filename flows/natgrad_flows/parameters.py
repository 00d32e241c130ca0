"""Derive the parameters of the flows (types, descriptions and validation) from `natgrad.app.options`.

Prefect shows the descriptions in its forms, and its server rejects values that the JSON schema excludes before a
run starts. Conditions that a schema cannot express are checked by the same functions as on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import PlainValidator, WithJsonSchema

from natgrad.app import options

__all__ = ["Out", "Root", "RunsFolder", "Source", "with_parameters"]

F = TypeVar("F", bound=Callable[..., Any])

Location = str | Path


def _location(value: Any) -> Location:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"must be a folder or URL, got {value!r}")
    return value


def _locations(value: Any) -> Location | list[Location]:
    if isinstance(value, str | Path):
        return _location(value)
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"must be one or more folders or URLs, got {value!r}")
    return [_location(one) for one in value]


_PATH = {"type": "string", "format": "path"}

Source = Annotated[
    Location | Sequence[Location],
    PlainValidator(_locations),
    WithJsonSchema({"anyOf": [_PATH, {"type": "array", "items": _PATH}], "description": options.SOURCE}),
]
Out = Annotated[Location, PlainValidator(_location), WithJsonSchema({**_PATH, "description": options.OUT})]
Root = Annotated[Location, PlainValidator(_location), WithJsonSchema({**_PATH, "description": options.ROOT})]
RunsFolder = Annotated[Location, PlainValidator(_location), WithJsonSchema({**_PATH, "description": options.RUNS})]


def with_parameters(kind: Any) -> Callable[[F], F]:
    """Decorate the function of a flow that takes ``**options``: add the options to its signature and docstring.

    Parameters
    ----------
    kind : type
        Set of options of `natgrad.app.options`.
    """
    return options.with_options(kind, _parameter_type)


def _parameter_type(declared: options.DeclaredOption) -> Any:
    # An InputError is a ValueError, so pydantic reports its text.
    return Annotated[Any, PlainValidator(declared.validated), WithJsonSchema(declared.json_schema())]
