"""The trajectory store and the Gram ledger in Zarr v3; the only room that knows Zarr.

**Commit rule.** Chunks are written and flushed to disk first; then one record, written aside and renamed, makes
them visible, all arrays together. Readers trust recorded rows only: the shape of an array is no evidence of data.
In an object store chunks are objects, and the record is one more, which is put where there is none yet.
"""

from natgrad.schema.layout import storage_dtype
from natgrad.store.group import exists
from natgrad.store.ledger import Ledger
from natgrad.store.states import checksum
from natgrad.store.trajectory import Trajectory
from natgrad.store.writer import only_writer

__all__ = ["Ledger", "Trajectory", "checksum", "exists", "only_writer", "storage_dtype"]
