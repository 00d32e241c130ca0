"""Diagnose any folder or file: its contents, the command that processes it, and what prevents others."""
