"""How fast the pipeline is, beside what bounds it and what it replaces, measured in one run: ``make bench``."""
