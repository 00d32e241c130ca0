"""Readers of training logs: one small reader per format behind one protocol (`natgrad.sources.base`).

`natgrad.sources.formats` lists them, `natgrad.sources.opening` takes the one that fits a path.
"""
