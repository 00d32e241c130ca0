"""Compute inner products of the vectors of neighbouring states, and sum them.

``gram`` and ``stream`` are compiled with numba. ``ledger_sums`` needs only NumPy.
"""
