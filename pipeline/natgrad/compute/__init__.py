"""Compute the ledger from the trajectory store: plan, tasks, executors and clusters."""
