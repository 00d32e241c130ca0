"""The experiments of the paper (section 3.1), as training programs that log themselves as any user's would."""
