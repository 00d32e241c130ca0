"""Parse and check the values of single options, and list the accepted ones.

The functions import what they need when they are called, so that ``natgrad --help`` is fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from natgrad.schema.errors import InputError

__all__ = [
    "alignments",
    "checked_map",
    "checked_pattern",
    "checked_shift",
    "clusters",
    "decay_by_pattern",
    "deployment_name",
    "evaluations",
    "formats",
    "gradients",
    "included",
    "memory_bytes",
    "objective_name",
    "parsed_decay",
    "parsed_map",
    "parsed_shift",
    "report_url",
    "scheduler_address",
    "storage_kinds",
]

_ADDRESS = re.compile(r"(?:[a-z]+://)?(?:\[[^]/]+\]|[^:/]+):\d+(?:/.*)?")


def parsed_map(pairs: Sequence[str]) -> Mapping[str, str]:
    """Return the keys that ``QUANTITY=KEY`` texts set."""
    from natgrad.sources.names import parse_map

    return parse_map(pairs)


def checked_map(mapping: dict[str, str]) -> dict[str, str]:
    """Return a mapping of quantities to keys in its normal form."""
    from natgrad.sources.names import MAPPED

    for quantity, key in mapping.items():
        if quantity not in MAPPED or not key:
            raise InputError(
                f"--map: {quantity}={key} does not name a quantity and its key",
                where="option mapping",
                remedy=f"write QUANTITY=KEY; the quantities are {', '.join(MAPPED)}",
            )
    return mapping


def parsed_decay(texts: Sequence[str]) -> Mapping[str, Any]:
    """Return the coefficients that texts set, for all tensors or by pattern."""
    values: dict[str, Any] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            # A later value of a pattern replaces an earlier one, and its place in the order.
            values.pop(pattern if equals else "*", None)
            values[pattern if equals else "*"] = float(value)
        except ValueError:
            raise InputError(
                f"--weight-decay must be LAMBDA or TENSOR=LAMBDA, got {text!r}",
                where="option weight_decay",
                remedy="write, for example, --weight-decay 0.01 --weight-decay '*.bias=0'",
            ) from None
    return values


def decay_by_pattern(value: float | Mapping[str, float]) -> Mapping[str, float]:
    """Return coefficients by pattern, if only one is set for all tensors."""
    return value if isinstance(value, Mapping) else {"*": value}


def parsed_shift(pairs: Sequence[str]) -> Mapping[str, int]:
    """Return the shifts that ``QUANTITY=STEPS`` texts set."""
    from natgrad.sources.names import parse_shift

    return parse_shift(pairs)


def checked_shift(shift: dict[str, int]) -> dict[str, int]:
    """Return a mapping of quantities to shifts in its normal form."""
    from natgrad.sources.names import checked_shift

    return checked_shift(shift, "option shift")


def checked_pattern(pattern: str) -> str:
    """Return a pattern of file names if it is valid."""
    from natgrad.sources.step_names import checked_pattern

    return checked_pattern(pattern, "option pattern")


def memory_bytes(value: int | str, option: str = "memory_limit") -> int:
    """Return a number of bytes, from a number or a text with a unit."""
    from natgrad.compute.clusters import memory_bytes

    return value if isinstance(value, int) else memory_bytes(value, option)


def deployment_name(name: str) -> str:
    """Return the name of a deployment if Prefect accepts it."""
    if re.search("[/%&<>]", name):
        raise InputError(
            f"--name must not contain any of / % & < >, got {name!r}",
            where="option name",
            why="Prefect does not accept them in the name of a deployment",
            remedy="use letters, digits and dashes",
        )
    return name


def scheduler_address(address: str) -> str:
    """Return the address of a Dask scheduler if it has the form of one."""
    if not _ADDRESS.fullmatch(address):
        raise InputError(
            f"{address!r} is not the address of a Dask scheduler",
            where="option scheduler",
            remedy="use protocol, host and port, for example tcp://host:8786",
        )
    return address


def objective_name(name: str) -> str:
    """Return ``module:factory`` if it has this form."""
    from natgrad.objectives.protocol import split_name

    split_name(name)
    return name


def formats() -> Iterable[str]:
    """Return the formats of logs."""
    from natgrad.sources.formats import FORMATS

    return tuple(FORMATS)


def included() -> Iterable[str]:
    """Return the kinds of data that can be included."""
    from natgrad.ingestion import INCLUDES

    return INCLUDES


def gradients() -> Iterable[str]:
    """Return the origins of gradients that can be selected."""
    from natgrad.schema.names import GRADIENTS

    return GRADIENTS


def storage_kinds() -> Iterable[str]:
    """Return the kinds of stores."""
    from natgrad.storage import KINDS

    return KINDS


def report_url(value: str) -> str:
    """Return ``FOLDER=URL`` if it has this form, and a URL for a browser."""
    folder, separator, url = value.partition("=")
    if not (folder and separator and url.startswith(("http://", "https://"))):
        raise InputError(
            f"report_url must be FOLDER=URL, got {value!r}",
            where="option report_url",
            remedy="use a folder and the address at which a web server shows it: /data/runs=http://lab:8000",
        )
    return value


def evaluations() -> Iterable[str]:
    """Return the kinds of data on which losses are evaluated."""
    from natgrad.schema.names import EVALUATIONS

    return EVALUATIONS


def alignments() -> Iterable[str]:
    """Return the quantities by which runs can be aligned."""
    from natgrad.results.comparison import ALIGNMENTS

    return ALIGNMENTS


def clusters() -> Iterable[str]:
    """Return the kinds of clusters."""
    from natgrad.compute.clusters import CLUSTERS

    return tuple(CLUSTERS)
