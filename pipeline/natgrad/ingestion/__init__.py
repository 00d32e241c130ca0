"""Read a training log into a trajectory, every step exactly once.

Memory use does not grow with the run or the model, because tensors are read slice by slice into one chunk per
array.
"""

from natgrad.ingestion.log_to_store import INCLUDES, IngestSummary, ingest
from natgrad.ingestion.new_updates import Extent
from natgrad.ingestion.waiting import StepWait

__all__ = ["INCLUDES", "Extent", "IngestSummary", "StepWait", "ingest"]
