"""Compute and sum inner products of the vectors of neighbouring states.

``gram``, ``stream`` and ``in_situ`` are compiled with numba. ``ledger_sums`` and ``updates`` need only NumPy.
"""
