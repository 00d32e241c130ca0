"""Readers of training logs: one small reader per format behind one protocol (`pipeline.sources.base`).

`pipeline.sources.formats` finds the reader that fits a path.
"""
