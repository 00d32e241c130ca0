"""Read a step from several files, each of which contains a part of it: model, gradients, state of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.sources.bounds import JSON_LIMIT, Budget, parse_json, read_limited, shown
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints.pickle_data import flatten
from natgrad.sources.checkpoints.torch_archive import flat_numbers
from natgrad.sources.container import Container
from natgrad.sources.step_names import words
from natgrad.sources.steps import LoggedStep

__all__ = ["SeveralFiles", "holds_numbers", "numbers_of"]

_SCALARS = {
    *("info", "metric", "metrics", "scalar", "scalars", "log", "logs", "loss", "losses", "stats", "statistics"),
    *("meta", "metadata", "step", "state", "train", "training", "result", "results"),
}
_SETTINGS = {"config", "args", "hparams", "settings", "options", "trainer", "tokenizer", "index"}
"""Words of names of JSON files that contain, and that do not contain, the scalars of a step."""


class SeveralFiles(Container):
    """The files of one step, with their contents under the keys of one container.

    Parameters
    ----------
    step : LoggedStep
    """

    def __init__(self, step: LoggedStep) -> None:
        super().__init__(step)
        self._origins: dict[str, tuple[Container, str]] = {}
        self._parts: list[Container] = []
        self._stack = ExitStack()

    def include(self, container: Container, role: str = "", rename: Callable[[str], str] | None = None) -> None:
        """Add the contents of a file, which is closed together with this container.

        Parameters
        ----------
        container : Container
            The open file.
        role : str
            Prefix for its numbers that have a different value in another file.
        rename : callable, optional
            Function of a key in the file that returns the key in this container.

        Raises
        ------
        ValueError
            If two files contain a tensor under the same key.
        """
        self._stack.push(container)
        self._parts.append(container)
        rename = rename or (lambda key: key)
        # Every file has paid for its own description.
        self.budget = Budget(self.budget.size + container.budget.size)
        for key, logged in container.tensors.items():
            if rename(key) in self.tensors:
                raise ValueError(f"two files contain {shown(rename(key))}")
            self.tensors[rename(key)] = logged
            self._origins[rename(key)] = container, key
        for key, value in container.numbers.items():
            other = role and self.numbers.get(rename(key), value) != value
            self.numbers[f"{role}/{key}" if other else rename(key)] = value
        self.texts |= _renamed(container.texts, rename)
        self.objects |= _renamed(container.objects, rename)
        self.unread |= _renamed(container.unread, rename)
        self.ties |= {rename(key): rename(target) for key, target in container.ties.items()}
        self.aliases |= {rename(name): rename(key) for name, key in container.aliases.items()}

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        container, inner = self._origins[key]
        container.read(inner, start, out)

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        container, inner = self._origins[key]
        return container.ranges(inner)

    def configuration(self) -> dict[str, Scalar]:
        """Return the configuration of the run; see `natgrad.sources.container.Container`."""
        return {key: value for part in self._parts for key, value in part.configuration().items()}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def holds_numbers(path: Path) -> bool:
    """Return True if a file is named like one with the scalars of a step, such as ``info.json``."""
    return path.suffix == ".json" and bool(words(path.stem) & _SCALARS) and not words(path.stem) & _SETTINGS


def numbers_of(path: Path) -> dict[str, float]:
    """Return the numbers in a JSON file, with their levels joined by slashes.

    Raises
    ------
    ValueError, OSError
        If the file cannot be read.
    """
    content = read_limited(path, JSON_LIMIT)
    budget = Budget(len(content))
    tree = parse_json(content, path.name, budget)
    return flat_numbers([*flatten(tree, budget)]) if isinstance(tree, dict) else {}


def _renamed(items: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(key): value for key, value in items.items()}
