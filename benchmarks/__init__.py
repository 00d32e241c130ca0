"""Compare the speed of the pipeline with its limits and with alternatives: ``make bench``."""
