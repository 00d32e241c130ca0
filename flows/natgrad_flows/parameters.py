"""Derive the parameters of the flows (types, descriptions and validation) from `natgrad.app.options`.

Prefect shows the descriptions in its forms, and its server rejects values that the JSON schema excludes before a
run starts. Conditions that a schema cannot express are checked by the same functions as on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import PlainValidator, WithJsonSchema

from natgrad.app import declarations

__all__ = ["with_parameters"]

F = TypeVar("F", bound=Callable[..., Any])


def with_parameters(kind: Any) -> Callable[[F], F]:
    """Decorate the function of a flow: declare its arguments and options as parameters, and validate them.

    Parameters
    ----------
    kind : type
        Set of options of `natgrad.app.options`.
    """
    return declarations.with_options(kind, _parameter_type)


def _parameter_type(declared: declarations.DeclaredOption) -> Any:
    # An InputError is a ValueError, so pydantic reports its text.
    return Annotated[Any, PlainValidator(declared.validated), WithJsonSchema(declared.json_schema())]
