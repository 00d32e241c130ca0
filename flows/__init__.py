"""Prefect flows: one task per run or batch of steps; they pass paths, never arrays."""
