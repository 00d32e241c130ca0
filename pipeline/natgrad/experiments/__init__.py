"""Experiments on what the paper says, as training programs that log themselves as any user's would."""
