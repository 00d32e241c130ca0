"""Read a training log into a trajectory, every step exactly once.

Tensors are read slice by slice into one chunk per array, so memory use does not depend on the size of the run or
the model.
"""

from natgrad.ingestion.log_to_store import INCLUDES, IngestSummary, ingest
from natgrad.ingestion.new_updates import Extent
from natgrad.ingestion.transfer import buffer_bytes
from natgrad.ingestion.waiting import StepWait

__all__ = ["INCLUDES", "Extent", "IngestSummary", "StepWait", "buffer_bytes", "ingest"]
