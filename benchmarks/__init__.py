"""Measure the speed of the pipeline, its limits and its alternatives in one run: ``make bench``."""
