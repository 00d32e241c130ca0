"""The report page and the figures of the paper."""
