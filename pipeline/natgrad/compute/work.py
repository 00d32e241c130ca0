"""Define the work that an executor divides among workers: items of tasks, and the functions that compute them.

`natgrad.compute.tasks.Job` is the work of a pass. `calls` calls one function for each of several arguments.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from natgrad.compute.plan import PlanLimits
from natgrad.schema.layout import LedgerChunk
from natgrad.storage import Storage

if TYPE_CHECKING:
    from natgrad.compute.executors import Executor

__all__ = ["Call", "Work", "WorkItem", "calls"]


class WorkItem(Protocol):
    """An item of work: its position (in a pass, a ledger chunk) and its tasks (in a pass, tiles)."""

    @property
    def chunk(self) -> LedgerChunk:
        """Position."""

    @property
    def tiles(self) -> Sequence[Any]:
        """Tasks."""


class Work(ABC):
    """Work for an executor. It is sent with every task, so it contains no arrays."""

    name: str
    """Name of the work, unique even on a scheduler that several users share."""
    kind: str
    """Prefix of the names of its tasks."""
    limits: PlanLimits

    @property
    @abstractmethod
    def out(self) -> Storage:
        """Folder OUT, which workers must be able to read."""

    @property
    @abstractmethod
    def writes(self) -> bool:
        """True if workers write to OUT."""

    @property
    @abstractmethod
    def threaded(self) -> bool:
        """True if threads of one process rarely wait for each other."""

    @property
    @abstractmethod
    def task_bytes(self) -> int:
        """Approximate number of bytes that a task reads."""

    @property
    @abstractmethod
    def worker_bytes(self) -> int:
        """Memory of a worker in addition to that of an idle process."""

    @property
    def again(self) -> str:
        """Advice to a user who continues the work after an error."""
        return f"continue with: natgrad analyze {self.out}"

    @abstractmethod
    def compute(self, task: Any) -> Any:
        """Compute one task."""

    @abstractmethod
    def finish(self, chunk: LedgerChunk, digest: str, parts: Sequence[Any]) -> Any:
        """Complete an item from the results of its tasks."""

    def compute_item(self, item: WorkItem, digest: str) -> Any:
        """Compute and complete an item in one task."""
        return self.finish(item.chunk, digest, [self.compute(task) for task in item.tiles])


@dataclass(frozen=True)
class Call:
    """One argument of a function as an item."""

    chunk: LedgerChunk
    tiles: tuple[Any]


@dataclass(frozen=True)
class _Calls(Work):
    function: Callable[[Any], Any]
    folder: Storage
    name: str
    kind: str
    limits: PlanLimits
    read_bytes: int
    memory_bytes: int
    writes = True
    threaded = True

    @property
    def out(self) -> Storage:
        return self.folder

    @property
    def task_bytes(self) -> int:
        return self.read_bytes

    @property
    def worker_bytes(self) -> int:
        return self.memory_bytes

    def compute(self, task: Any) -> Any:
        return self.function(task)

    def finish(self, chunk: LedgerChunk, digest: str, parts: Sequence[Any]) -> Any:
        return parts[0]


def calls(
    executor: Executor,
    function: Callable[[Any], Any],
    arguments: Sequence[Any],
    *,
    kind: str,
    out: Storage,
    task_bytes: int,
    worker_bytes: int,
    limits: PlanLimits = PlanLimits(),
) -> Iterator[Any]:
    """Call a function with each of several arguments on the workers of an executor, and yield the results.

    Parameters
    ----------
    executor : callable
        One of `natgrad.compute.executors`.
    function : callable
        It takes one argument and writes to OUT. The function, arguments and results are sent between processes.
    arguments : sequence
    kind : str
        Prefix of the names of tasks.
    out : Storage
        Folder OUT.
    task_bytes, worker_bytes : int
        Bytes that a call reads, and memory that it takes.
    limits : PlanLimits, optional
    """
    folder = out.absolute()
    work = _Calls(function, folder, f"{uuid.uuid4().hex}-{folder.name}", kind, limits, task_bytes, worker_bytes)
    items = [Call(LedgerChunk(index, index + 1), (argument,)) for index, argument in enumerate(arguments)]
    digests = dict.fromkeys(range(len(items)), "")
    yield from executor(work, items, lambda: digests)
