"""Select the parameters of PyTorch optimizers to record, by the names that they have in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from natgrad.schema.arguments import shown
from natgrad.schema.errors import InputError

__all__ = ["Model", "Names", "Selection", "parameters_of", "shapes_of"]


class Model(Protocol):
    """A module of PyTorch."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and the parameters."""
        ...


@dataclass(frozen=True)
class Selection:
    """Parameters of an optimizer that are recorded, and those that did not require a gradient at the first step."""

    trained: dict[str, Any]
    frozen: dict[str, Any]
    known: frozenset[int]

    def versions(self) -> list[int]:
        """Return a number for each parameter that changes when its values are set."""
        return [parameter._version for parameter in self.trained.values()]

    def rates(self, optimizer: Any) -> dict[str, tuple[int, float]]:
        """Return the group of each parameter and its learning rate, NaN if the optimizer has none."""
        rates: dict[int, tuple[int, float]] = {}
        for index, group in enumerate(optimizer.param_groups):
            rate = math.nan if group.get("lr") is None else float(group["lr"])
            rates |= {id(parameter): (index, rate) for parameter in group["params"]}
        return {name: rates[id(parameter)] for name, parameter in self.trained.items()}

    def changes(self, optimizer: Any) -> str | None:
        """Return a message about a parameter that is trained only since a later step; None if there is none.

        Raises
        ------
        InputError
            If the optimizer no longer updates a recorded parameter.
        """
        now = {id(parameter): parameter for parameter in parameters_of(optimizer)}
        for name, parameter in self.trained.items():
            if id(parameter) not in now:
                raise InputError(
                    f"the optimizer no longer updates parameter {name!r}",
                    why="its parameter groups were changed",
                    remedy="call natgrad.watch again, with another folder",
                )
        added = [parameter for key, parameter in now.items() if key not in self.known]
        if added:
            return f"a parameter of shape {tuple(added[0].shape)} was added to the optimizer"
        thawed = [name for name, parameter in self.frozen.items() if parameter.grad is not None]
        return f"parameter {thawed[0]!r} started to require a gradient after the first step" if thawed else None


class Names:
    """Names of the parameters of optimizers."""

    def __init__(self, model: Model | None, patterns: Sequence[str]) -> None:
        self._model, self._patterns = model, patterns

    def select(self, optimizers: Sequence[Any]) -> list[Selection]:
        """Return the parameters to record of each optimizer.

        Raises
        ------
        InputError
            If the model lacks a parameter, optimizers share one, or there are none to record.
        """
        names = self._of_model() if self._model is not None else _names_of_optimizers(optimizers)
        selections, used = [], set[str]()
        for optimizer in optimizers:
            trained: dict[str, Any] = {}
            frozen: dict[str, Any] = {}
            for parameter in parameters_of(optimizer):
                if id(parameter) not in names:
                    raise InputError(
                        f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that is not in "
                        "the model",
                        where="argument model",
                        remedy="pass the model whose parameters the optimizer updates, several of them as "
                        "torch.nn.ModuleList([...]), or omit it",
                    )
                name = names[id(parameter)]
                if name in used:
                    raise InputError(
                        f"two optimizers update parameter {name!r}",
                        where="argument optimizer",
                        remedy="pass optimizers of different parameters",
                    )
                used.add(name)
                if any(fnmatchcase(name, pattern) for pattern in self._patterns):
                    (trained if parameter.requires_grad else frozen)[name] = parameter
            selections.append(Selection(trained, frozen, frozenset(map(id, parameters_of(optimizer)))))
        if not any(selection.trained for selection in selections):
            raise InputError(
                f"no trained parameter has a name that matches {', '.join(self._patterns)}",
                where="argument parameters",
                why=f"the names are {', '.join(sorted(used)[:6])}{', ...' if len(used) > 6 else ''}",
                remedy="pass patterns such as 'encoder.*'",
            )
        return selections

    def _of_model(self) -> dict[int, str]:
        """Return the names in the model, without the prefixes of its wrappers. Tied parameters have one name."""
        model: Any = self._model
        while (inner := getattr(model, "_orig_mod", None) or _replicated(model)) is not None:
            model = inner
        if not callable(getattr(model, "named_parameters", None)):
            raise InputError(
                f"the model must be a torch.nn.Module, got {shown(model)}",
                where="argument model",
                remedy="pass the module whose parameters the optimizer updates",
            )
        return {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}


def _replicated(model: Any) -> Any:
    """Return the module inside a wrapper for data parallel training; None if there is no such wrapper."""
    wrappers = ("DistributedDataParallel", "DataParallel")
    return getattr(model, "module", None) if type(model).__name__ in wrappers else None


def _names_of_optimizers(optimizers: Iterable[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            known: Sequence[str] = group.get("param_names") or [""] * len(group["params"])
            for name, parameter in zip(known, group["params"], strict=True):
                names[id(parameter)] = name or f"parameter_{len(names)}"
    return names


def parameters_of(optimizer: Any) -> Iterator[Any]:
    """Yield the parameters of an optimizer, in the order of its groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def shapes_of(optimizer: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of an optimizer."""
    return [tuple(parameter.shape) for parameter in parameters_of(optimizer)]
