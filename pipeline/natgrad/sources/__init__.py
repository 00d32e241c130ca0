"""Readers of training logs, one per format, which implement the protocol in `natgrad.sources.base`.

`natgrad.sources.formats` lists the formats. `natgrad.sources.opening` opens a log with the matching reader.
"""
