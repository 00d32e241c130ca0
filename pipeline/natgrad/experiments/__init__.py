"""Experiments that illustrate the paper: training programs that record logs like a user's program."""
