"""Labelled results, computed from the ledger."""
