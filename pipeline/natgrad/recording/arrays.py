"""Convert arrays and tensors of a training program to NumPy arrays, without importing other libraries."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.arguments import shown
from natgrad.schema.errors import InputError

__all__ = ["host_array", "is_tensor", "numbers_of", "require_dense", "tensor_array"]


def is_tensor(value: Any) -> bool:
    """Return True for a PyTorch tensor, which includes parameters."""
    torch = sys.modules.get("torch")  # whoever passes a tensor has imported torch
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def host_array(value: Any, where: str) -> NDArray[Any]:
    """Convert a value to an array in C order, because safetensors writes the memory of an array unchanged.

    The array may share memory with the value.

    Parameters
    ----------
    value : object
        An array, or a tensor with or without a graph, on any device.
    where : str
        Location of the value, for errors.

    Raises
    ------
    InputError
        If the value cannot be converted.
    """
    if is_tensor(value):
        return tensor_array(value, where)
    try:
        return np.asarray(value, order="C")
    except Exception as error:  # converting an array of another library may raise any exception
        raise InputError(
            f"{shown(value)} cannot be converted to an array: {error}",
            where=where,
            why="it is not an array, its rows differ in length, or it is not in host memory",
            remedy="pass a NumPy array",
        ) from error


def numbers_of(value: Any) -> Any:
    """Convert a PyTorch tensor of numbers, such as a loss with a graph, to an array; return other values unchanged.

    Floats are converted to float64, which represents every number of the other dtypes.
    """
    if not is_tensor(value) or hasattr(value, "full_tensor") or _problem(value)[0]:
        return value
    host = value.detach().to("cpu")
    return (host.double() if host.is_floating_point() else host).resolve_conj().resolve_neg().numpy()


def tensor_array(tensor: Any, where: str, *, copy: bool = False) -> NDArray[Any]:
    """Convert a PyTorch tensor to an array.

    Parameters
    ----------
    tensor : torch.Tensor
        Its graph is ignored. It may be on any device.
    where : str
        Location of the tensor, for errors.
    copy : bool
        Never share memory with the tensor.

    Raises
    ------
    InputError
        If the tensor is sparse or distributed, has no values yet, or has a dtype without a NumPy equivalent.
    """
    torch = sys.modules["torch"]
    require_dense(tensor, where)
    if hasattr(tensor, "full_tensor"):
        raise InputError(
            "the tensor is distributed (DTensor): this process has only a part of it",
            where=where,
            remedy="pass tensor.full_tensor(), record ledgers (natgrad.watch with mode='ledger'), or record the "
            "checkpoints of the run instead",
        )
    try:
        host = tensor.detach().to("cpu", copy=copy).resolve_conj().resolve_neg().contiguous()
        if host.dtype is not torch.bfloat16:
            array: NDArray[Any] = host.numpy()
            return array
        words = host.view(torch.int16).numpy()
    except Exception as error:  # subclasses of tensors may raise any exception
        raise InputError(
            f"a tensor of dtype {tensor.dtype} cannot be converted to an array: {error}",
            where=where,
            remedy="pass a dense tensor of float64, float32, float16 or bfloat16",
        ) from error
    try:
        import ml_dtypes
    except ImportError as error:
        raise InputError(
            "a tensor of dtype bfloat16 cannot be recorded",
            where=where,
            why="NumPy has no bfloat16, and the package ml_dtypes is not installed",
            remedy="pip install ml_dtypes",
        ) from error
    array = words.view(ml_dtypes.bfloat16)
    return array


def require_dense(tensor: Any, where: str) -> None:
    """Raise InputError if a PyTorch tensor is sparse or has no values yet."""
    problem, remedy = _problem(tensor)
    if problem:
        raise InputError(problem, where=where, remedy=remedy)


def _problem(tensor: Any) -> tuple[str, str]:
    """Return why a tensor has no dense values, and the remedy; empty if it has."""
    if tensor.layout is not sys.modules["torch"].strided:
        return (
            f"the tensor is sparse ({tensor.layout})",
            "use dense gradients (sparse=False), or record the other tensors only",
        )
    if tensor.is_meta or hasattr(tensor, "materialize"):
        return (
            "the tensor has no values yet (a meta tensor, or a parameter of a lazy module)",
            "run one forward pass first",
        )
    return "", ""
