"""Compute and sum inner products of the vectors of neighbouring states.

``gram`` and ``stream`` are compiled with numba. ``ledger_sums`` needs only NumPy.
"""
