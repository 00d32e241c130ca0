"""The pass from the trajectory store to the ledger: plan, tasks, executors and clusters."""
