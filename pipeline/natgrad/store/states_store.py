"""A read-only Zarr store of a trajectory, whose states are copies or parts of the files of its log.

Any program that reads Zarr can open it. A chunk of states is read as in a pass, and compared with its checksums.
All other data are those of the trajectory.
"""

from __future__ import annotations

import numpy as np
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.storage import StorePath

from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import REPLICATE_STATES, of_replicate
from natgrad.store.checked_store import ReadOnlyStore
from natgrad.store.trajectory import Trajectory

__all__ = ["StatesStore"]


class StatesStore(ReadOnlyStore):
    """The trajectory as a Zarr group.

    Parameters
    ----------
    store : zarr.abc.store.Store
        Store that contains the files of the trajectory.
    trajectory : Trajectory
    path : str, optional
        Path of the trajectory in the store. Default: its root.
    """

    def __init__(self, store: Store, trajectory: Trajectory, path: str = "") -> None:
        super().__init__(store, path)
        self._trajectory = trajectory

    @classmethod
    def of(cls, trajectory: Trajectory) -> StatesStore | StorePath:
        """Return the store of a trajectory, or a path in it if `Storage.zarr_store` returns a path."""
        trajectory.require_states()
        found = trajectory.storage.zarr_store()
        if isinstance(found, StorePath):
            return StorePath(cls(found.store, trajectory, found.path), found.path)
        return cls(found, trajectory)

    def _with_store(self, store: Store) -> StatesStore:
        return type(self)(store, self._trajectory, self._path)

    def _states(self, key: str) -> bytes | None:
        """Return the content of a chunk of states; None for all other keys."""
        array, *parts = self._name(key).split("/")
        trajectory = self._trajectory
        if array not in trajectory.array_dtypes or parts[:1] != ["c"] or trajectory.is_compressed(array):
            return None
        index, *replicate, column = map(int, parts[1:])
        name = of_replicate(array, *replicate) if array in REPLICATE_STATES else array
        start = index * trajectory.chunk[0]
        stop = max(min(start + trajectory.chunk[0], trajectory.n_states), start)
        block = np.zeros(trajectory.chunk, storage_dtype(trajectory.dtypes[name]))
        trajectory.read(name, start, stop, column, block[: stop - start])
        return block.tobytes()

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file or of a chunk of states, or a range of it."""
        content = self._states(key)
        if content is None:
            return await self._store.get(key, prototype, byte_range)
        return self._part(prototype.buffer.from_bytes(content), byte_range)
