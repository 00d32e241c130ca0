"""Readers of checkpoints and other files with tensors, one module per container or layout."""
