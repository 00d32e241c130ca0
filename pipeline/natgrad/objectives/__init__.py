"""Evaluate the user's objective at the states of a log, to obtain gradients that the log does not contain."""
