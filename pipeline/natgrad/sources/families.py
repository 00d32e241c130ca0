"""Find arrays whose flat keys begin or end with their kind, such as ``param_<name>`` and ``grad_<name>``.

Such keys have no levels, so only the other keys show what belongs together. The keys are split only if
every gradient then has the name and the shape of a parameter. A part of a family is never selected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from natgrad.sources.step_names import words
from natgrad.sources.steps import LoggedTensor

__all__ = ["ANY_NAME", "SEPARATORS", "left_out", "members", "usual_families"]

ANY_NAME = "*"
"""Stands for the names of the tensors in the key of an array."""

SEPARATORS = "/.:_-"
"""Separators of a key from the names of its tensors, the most common one first."""

_PARAMETER = ("parameter", "parameters", "param", "params", "theta", "weight", "weights", "p", "w")
_GRADIENT = ("gradient", "gradients", "grad", "grads", "g", "dw", "dp", "d")
_HVP = "hvp"
_ROLES = {"parameter": {"parameter", "parameters", "param", "params", "theta", "p"}, "gradient": {*_GRADIENT[:4]}}
"""Words that indicate the kind of tensors if the keys of all tensors of a file begin with the same word."""

_ROLE_WORDS = {*_PARAMETER[:5], *_GRADIENT[:4]}
_GLUED = ("grad", "g", "d")
"""Words of gradients without a separator, as in ``dW1``."""

_FORMS = (re.compile("([A-Za-z]+)([/.:_-])(?=.)", re.DOTALL), re.compile(".+([/.:_-])([A-Za-z]+)", re.DOTALL))


def members(key: str, keys: Collection[str]) -> dict[str, str]:
    """Return the keys that a pattern of a key selects, by the names for which its star stands.

    Examples
    --------
    >>> members("param_*", ["param_0.weight", "grad_0.weight"])
    {'0.weight': 'param_0.weight'}
    >>> members("*.grad", ["fc.weight", "fc.weight.grad"])
    {'fc.weight': 'fc.weight.grad'}
    """
    start, _, end = key.partition(ANY_NAME)
    return {
        one[len(start) : len(one) - len(end)]: one
        for one in keys
        if len(one) > len(start) + len(end) and one.startswith(start) and one.endswith(end)
    }


def usual_families(tensors: Mapping[str, LoggedTensor]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the pattern and the keys by name of parameters and gradients, and of Hessian-vector products if any.

    Parameters
    ----------
    tensors : mapping
        Tensors that may be parameters or gradients, by key.

    Returns
    -------
    dict
        Empty if the keys do not show which tensors are parameters. If all tensors are of one kind, only this one.

    Examples
    --------
    >>> w = LoggedTensor((3,), "float32")
    >>> {array: found for array, (found, _) in usual_families({"p_fc.w": w, "g_fc.w": w}).items()}
    {'parameter': 'p_*', 'gradient': 'g_*'}
    >>> {array: found for array, (found, _) in usual_families({"w": w, "w.grad": w}).items()}
    {'parameter': '*', 'gradient': '*.grad'}
    >>> {array: found for array, (found, _) in usual_families({"W1": w, "dW1": w}).items()}
    {'parameter': '*', 'gradient': 'd*'}
    >>> usual_families({"a_w": w, "b_w": w})
    {}
    """
    groups = _groups(tensors)
    for gradient, parameter, hvp in _pairs(groups):
        claimed = {*groups[gradient].values(), *groups.get(hvp, {}).values()}
        parameters = (
            groups[parameter] if parameter in groups else {key: key for key in tensors if key not in claimed}
        )
        found = {"parameter": (parameter, parameters)}
        found |= {
            array: (key, groups[key]) for array, key in (("gradient", gradient), (_HVP, hvp)) if key in groups
        }
        if all(_belong(names, parameters, tensors) for _, names in found.values()):
            used = {*claimed, *parameters.values()}
            rest = [key for key in tensors if key not in used]
            is_part = any(left_out(key, names.values(), rest) for key, names in found.values())
            return {} if is_part else found
    for array, roles in _ROLES.items():
        for pattern, names in groups.items():
            if _word(pattern) in roles and pattern.endswith(ANY_NAME) and len(names) == len(tensors):
                return {array: (pattern, names)}
    return {}


def _groups(tensors: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the keys by name for each pattern of a word, at one end of a key, for the kind of a tensor."""
    roles = {*_PARAMETER, *_GRADIENT, _HVP}
    start, end = _FORMS
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = start.match(key)
        if match and match[1] in roles:
            found.setdefault(f"{match[0]}{ANY_NAME}", {})[key[match.end() :]] = key
        match = end.fullmatch(key)
        if match and match[2] in roles:
            found.setdefault(f"{ANY_NAME}{match[1]}{match[2]}", {})[key[: match.start(1)]] = key
        for word in _GLUED:
            if key.startswith(word) and key != word and key[len(word)] not in SEPARATORS:
                found.setdefault(f"{word}{ANY_NAME}", {})[key.removeprefix(word)] = key
    return found


def _word(pattern: str) -> str:
    return pattern.strip(ANY_NAME + SEPARATORS)


def _pairs(groups: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield patterns of gradients, each with one of parameters and of Hessian-vector products of the same form."""
    for word in _GRADIENT:
        for gradient in groups:
            if _word(gradient) == word:
                hvp, *parameters = (gradient.replace(word, other) for other in (_HVP, *_PARAMETER))
                yield from ((gradient, key, hvp) for key in (*parameters, ANY_NAME) if key in (*groups, ANY_NAME))


def _belong(names: Mapping[str, str], parameters: Mapping[str, str], tensors: Mapping[str, LoggedTensor]) -> bool:
    """Return True if every tensor has the name and the shape of a parameter."""
    return all(
        name in parameters and tensors[parameters[name]].shape == tensors[key].shape for name, key in names.items()
    )


def left_out(key: str, selected: Collection[str], others: Collection[str]) -> list[str]:
    """Return the keys that resemble a family of keys, if a key selects only a part of it.

    These are keys that differ from it in its last number, or in what follows a word such as ``param``.

    Parameters
    ----------
    key : str
        Key of an array, or a pattern of it.
    selected : collection of str
        Keys that it selects.
    others : collection of str
        Keys that belong to nothing.

    Examples
    --------
    >>> left_out("param_0", ["param_0.weight"], ["param_2.weight", "mean"])
    ['param_2.weight']
    >>> left_out("grad_*", ["grad_w"], ["mean"])
    []
    """
    if not selected:
        return []
    start, star, _ = key.partition(ANY_NAME)
    start = start.rstrip(SEPARATORS) if star else start
    forms = []
    if numbered := re.fullmatch(r"(.*?)[0-9]+", start, re.DOTALL):
        forms.append(re.escape(numbered[1]) + "[0-9]+(?![0-9])")
    for match in re.finditer(r"(?:^|(?<=[/.]))([A-Za-z]+)([.:_-])(?=.)", start):
        if words(match[1]) & _ROLE_WORDS:
            forms.append(re.escape(start[: match.end()]))
    return [other for other in others if any(re.match(form, other) for form in forms)]
