"""The mathematics of the paper, on inner products and on vectors."""
