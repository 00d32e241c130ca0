"""The saved state of optimizers: which tensor each entry belongs to, and which metric it defines."""
