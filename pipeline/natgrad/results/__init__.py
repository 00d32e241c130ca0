"""Compute labelled results from the ledger."""
