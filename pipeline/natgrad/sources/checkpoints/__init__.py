"""Readers of checkpoints and other files that hold tensors, one module per container or layout."""
