"""The kernel that turns neighbouring states into inner products, and the sums of its results.

``gram`` and ``stream`` are compiled with numba. ``ledger_sums`` needs NumPy alone.
"""
