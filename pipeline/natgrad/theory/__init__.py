"""Implement the mathematics of the paper, for inner products and for vectors."""
