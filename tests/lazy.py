"""Import large libraries at their first use, so that collecting the tests loads none of them."""

import importlib


class Lazy:
    """Module that is imported when one of its public attributes is first used.

    Other attributes are missing, because pytest looks for some on each object in a test module.

    Parameters
    ----------
    name : str
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
