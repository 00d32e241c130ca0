"""The version of the package, in one place."""

from __future__ import annotations

__all__ = ["RESULTS_VERSION", "__version__"]

__version__ = "0.1.0"

RESULTS_VERSION = 1
"""Version of the results. A scan recomputes runs whose results carry another number. Increase it with every change
after which the same log gives other results."""
