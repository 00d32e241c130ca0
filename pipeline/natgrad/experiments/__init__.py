"""Experiments that illustrate the paper: training programs that record logs as any user's program would."""
