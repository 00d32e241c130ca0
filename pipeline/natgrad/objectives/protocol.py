"""Define what an objective is, load one from the user's module, and call it with checks of its results.

An objective is a function of the tensors of a state::

    objective(tensors) -> (loss, gradients)
    objective.hvp(tensors, direction) -> products         optional
    objective.fingerprint -> mapping                      optional

States, gradients and products are mappings of names to arrays. Gradients may lack tensors that are not trained.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from natgrad.recording.arrays import host_array, numbers_of
from natgrad.schema.arguments import real_array, shown
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.version import __version__

__all__ = [
    "Objective",
    "ObjectiveError",
    "Tensors",
    "checked_fingerprint",
    "evaluate",
    "load_objective",
    "product",
    "split_name",
]

Tensors = Mapping[str, NDArray[Any]]
"""Arrays by the name of the tensor. bfloat16 has the dtype of the package ``ml_dtypes``."""


class ObjectiveError(InputError):
    """Error for an objective that fails, or whose result is not valid."""


class Objective(Protocol):
    """A loss that is evaluated at states of a model."""

    def __call__(self, tensors: Tensors) -> tuple[float, Tensors]:
        """Return the loss at a state, and its gradient.

        Parameters
        ----------
        tensors : mapping of str to array
            All tensors of the state, including those that are not trained. They are read-only.

        Returns
        -------
        loss : float
        gradients : mapping of str to array
            Gradient of each trained tensor, with its shape.
        """
        ...


def split_name(name: str) -> tuple[str, str]:
    """Return the module and the factory that ``package.module:factory`` names.

    Raises
    ------
    InputError
        If the text has another form.

    Examples
    --------
    >>> split_name("package.module:factory")
    ('package.module', 'factory')
    """
    module, colon, factory = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *factory.split("."))):
        raise InputError(
            f"{name!r} does not name the factory of an objective",
            where="option objective",
            remedy="write package.module:factory, for example --objective my_objective:factory for a function "
            "factory() in my_objective.py",
        )
    return module, factory


def load_objective(name: str, folder: str) -> tuple[Any, dict[str, Any]]:
    """Import a factory and call it.

    Parameters
    ----------
    name : str
        ``package.module:factory``.
    folder : str
        Folder in which modules are found in addition to installed ones.

    Returns
    -------
    objective : callable
    fingerprint : dict
        Description of everything that may change the values of the objective; see `checked_fingerprint`.

    Raises
    ------
    InputError
        If the factory cannot be imported, fails, or does not return a function.
    """
    module_name, factory_name = split_name(name)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        factory: Any = module
        for part in factory_name.split("."):
            factory = getattr(factory, part)
        objective = factory()
    except InputError:
        raise
    except Exception as error:  # code of the user
        raise InputError(
            f"cannot create the objective: {_described(error)}",
            where=f"{name}, {_line_of(error)}",
            why=f"modules are found in {folder} and among the installed packages",
            remedy=f"check that python -c 'from {module_name} import {factory_name}; {factory_name}()' works in "
            "this folder",
        ) from error
    if not callable(objective):
        raise InputError(
            f"the factory returns {shown(objective)}, which is not a function",
            where=name,
            remedy="return a function objective(tensors) -> (loss, gradients)",
        )
    return objective, checked_fingerprint(name, module, objective)


def checked_fingerprint(name: str, module: Any, objective: Any) -> dict[str, Any]:
    """Return the name and the source of an objective, the versions of packages, and its own description.

    Raises
    ------
    InputError
        If the fingerprint of the objective is not a mapping of plain values.
    """
    own = getattr(objective, "fingerprint", {})
    if not isinstance(own, Mapping) or not all(
        isinstance(value, str | int | float | bool | list | dict | None) for value in own.values()
    ):
        raise InputError(
            f"the fingerprint of the objective is {shown(own)}",
            where=name,
            remedy="return a mapping of names to strings and numbers, or omit the attribute fingerprint",
        )
    file = inspect.getsourcefile(module)
    source = "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    versions = {"natgrad": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return {
        "objective": name,
        "source": source,
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
        **own,
        "versions": {**versions, **own.get("versions", {})},
    }


def evaluate(objective: Any, tensors: Tensors, where: str) -> tuple[float, dict[str, NDArray[Any]]]:
    """Return the loss and the gradients of an objective at a state.

    Raises
    ------
    ObjectiveError
        If the objective fails, or its result is not a loss and gradients of some of the tensors.
    """
    found = _called(objective, (tensors,), where)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ObjectiveError(
            f"the objective returns {shown(found)}",
            where=where,
            remedy="return two values, the loss and a mapping of names to gradients",
        )
    try:
        loss = real_array(numbers_of(found[0]))
    except ValueError as error:
        raise ObjectiveError(f"the loss {error}", where=where, remedy="return a float") from error
    if loss.size != 1:
        raise ObjectiveError(f"the loss has shape {loss.shape}", where=where, remedy="return one number")
    return float(loss.item()), _checked(found[1], tensors, "gradient", where)


def product(objective: Any, tensors: Tensors, direction: Tensors, where: str) -> dict[str, NDArray[Any]]:
    """Return the product of the Hessian of an objective at a state with a direction.

    Raises
    ------
    ObjectiveError
        If the objective has no such product or fails, or its result is not a product.
    """
    hvp = getattr(objective, "hvp", None)
    if not callable(hvp):
        raise ObjectiveError(
            "the objective has no Hessian-vector product",
            where=where,
            remedy="add a method hvp(tensors, direction), which natgrad.TorchObjective and natgrad.JaxObjective "
            "have, or omit the option that needs it",
        )
    return _checked(_called(hvp, (tensors, direction), where), direction, "product", where)


def _called(function: Any, arguments: tuple[Any, ...], where: str) -> Any:
    try:
        return function(*arguments)
    except InputError as error:
        raise ObjectiveError(
            error.what, where=f"{where}, {error.where}".rstrip(", "), why=error.why, remedy=error.remedy
        ) from error
    except Exception as error:  # code of the user
        raise ObjectiveError(
            f"the objective failed: {_described(error)}",
            where=f"{where}, {_line_of(error)}",
            remedy="correct the objective and run the command again: evaluated states are kept",
        ) from error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:400]


def _line_of(error: BaseException) -> str:
    """Return the last line of the traceback of an error of the user's code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"line {trace.tb_lineno} of {trace.tb_frame.f_code.co_filename}"


def _checked(found: Any, tensors: Tensors, what: str, where: str) -> dict[str, NDArray[Any]]:
    """Return arrays of an objective by name if they belong to some of the tensors."""
    if not isinstance(found, Mapping) or not found:
        raise ObjectiveError(
            f"the {what}s are {shown(found)}",
            where=where,
            remedy=f"return a mapping with the {what} of each trained tensor",
        )
    arrays = {}
    for name, value in found.items():
        here = f"{where}, {what} of tensor {shown(name)}"
        if name not in tensors:
            raise ObjectiveError(
                f"there is a {what} of {shown(name)}, but no such tensor",
                where=here,
                why=f"the tensors are {shown(list(tensors)[:6])}",
                remedy="use the names of the tensors",
            )
        array = host_array(value, here)
        if array.shape != tensors[name].shape or array.dtype.name not in STORAGE_DTYPES:
            raise ObjectiveError(
                f"the {what} is {array.dtype} of shape {array.shape}, and the tensor has shape "
                f"{tensors[name].shape}",
                where=here,
                remedy=f"return the shape of the tensor, in one of the dtypes {', '.join(STORAGE_DTYPES)}",
            )
        arrays[name] = array
    return arrays
