"""The command line, and the operations on one run or on many runs."""
