"""A storage in the memory of one process, as a third-party package would implement it."""

import itertools
from threading import Lock

from zarr.buffer import cpu
from zarr.storage import MemoryStore, StorePath

from natgrad.storage import Stat, Storage

_objects = {}
_changes = itertools.count(1)
_guard = Lock()


class MemoryStorage(Storage):
    """Objects by key: (content, number of the change)."""

    def __init__(self, key):
        self.key = key

    def __str__(self):
        return f"inmemory://{self.key}"

    def __truediv__(self, name):
        return type(self)(f"{self.key}/{name}")

    @property
    def name(self):
        return self.key.rpartition("/")[2]

    @property
    def parent(self):
        return type(self)(self.key.rpartition("/")[0])

    def get_tagged(self):
        if self.key not in _objects:
            raise FileNotFoundError(str(self))
        content, change = _objects[self.key]
        return content.to_bytes(), str(change)

    def list(self):
        below = f"{self.key}/"
        return sorted(
            {key.removeprefix(below).partition("/")[0] for key in list(_objects) if key.startswith(below)}
        )

    def stat(self, *, fresh=True):
        content, tag = self.get_tagged()
        return Stat(len(content), int(tag), tag)

    def is_folder(self):
        return bool(self.list())

    def put(self, content):
        _objects[self.key] = cpu.Buffer.from_bytes(bytes(content)), next(_changes)

    def put_new(self, content):
        with _guard:
            if self.key in _objects:
                raise FileExistsError(str(self))
            self.put(content)

    def put_if(self, content, tag):
        with _guard:
            if self.get_tagged()[1] != tag:
                raise FileExistsError(str(self))
            self.put(content)

    def delete(self):
        if _objects.pop(self.key, None) is None:
            raise FileNotFoundError(str(self))

    def zarr_store(self):
        return StorePath(MemoryStore(_Buffers()), self.key)


class _Buffers:
    """The objects as a Zarr store: key to buffer."""

    def __getitem__(self, key):
        return _objects[key][0]

    def __setitem__(self, key, buffer):
        _objects[key] = buffer, next(_changes)

    def __delitem__(self, key):
        del _objects[key]

    def __contains__(self, key):
        return key in _objects

    def __iter__(self):
        return iter(list(_objects))

    def __len__(self):
        return len(_objects)

    def get(self, key, default=None):
        return _objects[key][0] if key in _objects else default

    def pop(self, key, *default):
        return _objects.pop(key, *default)

    def keys(self):
        return list(_objects)


def open_memory(location):
    """Open a URL; the entry point names this function."""
    return MemoryStorage(location.removeprefix("inmemory://"))
