"""The numba kernel that turns neighbouring states into inner products."""
