"""Readers of scalar logs: CSV, JSON lines, Parquet, SQLite, TensorBoard and W&B."""
