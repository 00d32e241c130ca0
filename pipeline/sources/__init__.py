"""Readers of training logs: one small reader per format behind one protocol (`pipeline.sources.base`).

`pipeline.sources.formats` lists them, `pipeline.sources.opening` takes the one that fits a path.
"""
