"""Suggest options with which a log may be read: patterns of its names, and keys of its quantities.

The suggestions are derived from names alone. They must be tried, and shown to the user, before they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import HESSIAN_NUMBERS, SCALARS
from natgrad.sources.families import ANY_NAME, left_out
from natgrad.sources.search import array_suffixes, is_step_file, names_below, skeleton, step_suffixes
from natgrad.sources.step_names import STEP_FIELD, counts_other, role_of, words
from natgrad.sources.steps import LoggedTensor

__all__ = ["suggested_map", "suggested_patterns"]

_PATTERNS = 8
_CANDIDATES = 32
"""Number of keys of gradients that are tried."""

_STARS = 3
_DEPTH = 3

_ARRAY_FORMS = {
    re.compile(r"(?P<before>[A-Za-z]*[-_. ]?)(?P<number>[0-9]+)"): "{before}{step}",
    re.compile(r".*(?P<before>[-_. ])(?P<number>[0-9]+)"): f"{ANY_NAME}{{before}}{{step}}",
    re.compile(r"(?P<before>[A-Za-z]*[-_. ]?)(?P<number>[0-9]+)[^0-9].*"): f"{{before}}{{step}}{ANY_NAME}",
}
"""Forms of the level of a path with the step, if other parts of the path are the name of an array."""

_GRADIENT = {
    *("gradient", "gradients", "grad", "grads", "g", "dw", "dtheta", "dparams"),
    *("dldw", "dldtheta", "dldp", "dl_dw", "dl_dtheta", "dl_dp"),
}
_PARAMETER = {
    *("parameter", "parameters", "param", "params", "weight", "weights", "theta", "w"),
    *("model", "net", "network", "module", "state", "variables"),
}
_NO_PARAMETER = {
    *("optim", "optimizer", "opt", "ema", "momentum", "velocity", "exp", "avg", "moment", "hvp", "buffer", "sq"),
    *("m", "v", "mom"),
}
_SCALAR_WORDS: dict[str, tuple[set[str], ...]] = {
    "loss": ({"loss"}, {"objective"}, {"cost"}, {"nll"}, {"j"}),
    "learning_rate": ({"learning", "rate"}, {"lr"}, {"eta"}, {"step", "size"}, {"stepsize"}),
    "loss_time_derivative": ({"loss", "time", "derivative"},),
    **{name: ({*name.split("_")},) for name in HESSIAN_NUMBERS},
    "step": ({"step"}, {"steps"}, {"iteration"}, {"iter"}, {"update"}, {"updates"}, {"batch"}, {"it"}),
}
_OTHER_SCALARS = {
    *("val", "valid", "validation", "eval", "evaluation", "test", "dev", "time", "derivative", "min", "max", "std"),
    *("initial", "base", "scale", "size", "epoch", "accuracy"),
}
_PREFERRED = {"train", "training", "total", "trainer", "global"}


# Names --------------------------------------------------------------------------------------------------------


def suggested_patterns(folder: Path) -> list[str]:
    """Return patterns of names (``--pattern``) that each select several files, the most likely one first.

    Files whose names differ only in numbers have one pattern for each number that differs. Files in folders whose
    names differ in the same way are found as well. Files with other endings count if their content is that of a
    format.
    """
    groups: dict[str, list[str]] = {}
    names = names_below(folder, _DEPTH)
    for name in names:
        groups.setdefault(skeleton(name), []).append(name)
    suffixes = step_suffixes()
    ordered = sorted(groups.values(), key=lambda group: (bool(role_of(group[0])), -len(group)))
    patterns = [
        pattern
        for group in ordered
        if group[0].endswith(suffixes) or is_step_file(folder / group[0])
        for pattern in _patterns_of(group)
    ]
    patterns = [*_array_patterns([name for name in names if name.endswith(array_suffixes())]), *patterns]
    return list(dict.fromkeys(patterns))[:_PATTERNS]


def _array_patterns(names: Sequence[str]) -> list[str]:
    """Return patterns that each select all files, several of which contain the arrays of one step.

    The step is at one end of the name of a file or folder: ``grads/000010/fc.weight.npy`` or ``fc.weight_10.npy``.
    """
    steps: dict[str, list[int]] = {}
    for name in names:
        path = PurePosixPath(name)
        levels = [*path.parts[:-1], path.stem]
        for at, level in enumerate(levels):
            for expression, form in _ARRAY_FORMS.items():
                match = expression.fullmatch(level)
                if match is not None and not counts_other(match["before"]):
                    own = form.format(**{"step": STEP_FIELD, **match.groupdict()})
                    pattern = "/".join((*[ANY_NAME] * at, own, *[ANY_NAME] * (len(levels) - at - 1)))
                    steps.setdefault(pattern + path.suffix, []).append(int(match["number"]))
    found = [pattern for pattern, numbers in steps.items() if len(numbers) == len(names) > len(set(numbers)) > 1]
    return sorted(found, key=lambda pattern: (f"{STEP_FIELD}{ANY_NAME}" in pattern, -len(set(steps[pattern]))))


def _patterns_of(names: Sequence[str]) -> list[str]:
    """Return a pattern for each number in which names of the same form differ, from the last one on."""
    if len(names) < 2:
        return []
    numbers = [re.findall(r"[0-9]+", name) for name in names]
    texts = re.split(r"[0-9]+", names[0])
    distinct = [len({int(value) for value in column}) for column in zip(*numbers, strict=True)]
    patterns = []
    possible = [
        at
        for at, count in enumerate(distinct)
        if count == len(names) and not counts_other(texts[at].split("/")[-1])
    ]
    for position in reversed(possible):
        fields = [
            STEP_FIELD if at == position else numbers[0][at] if count == 1 else "*"
            for at, count in enumerate(distinct)
        ]
        pattern = texts[0] + "".join(field + text for field, text in zip(fields, texts[1:], strict=True))
        if all(part.count("*") <= _STARS for part in pattern.split("/")) and not set("{}") & set(
            pattern.replace(STEP_FIELD, "")
        ):
            patterns.append(pattern)
    return patterns


# Keys ---------------------------------------------------------------------------------------------------------


def suggested_map(keys: Mapping[str, LoggedTensor | float], lacking: Collection[str]) -> dict[str, str]:
    """Return keys (``--map``) of quantities that a log lacks under the usual ones.

    Parameters
    ----------
    keys : mapping
        All keys of a step; see `natgrad.sources.base.Keyed`.
    lacking : collection of str
        Quantities for which a key is needed.

    Examples
    --------
    >>> w = LoggedTensor((3,), "float32")
    >>> suggested_map({"net/w": w, "dL/grad/w": w, "eta": 0.1}, {"gradient", "learning_rate"})
    {'parameter': 'net', 'gradient': 'dL/grad', 'learning_rate': 'eta'}
    >>> suggested_map({"dL/grad/w": w}, {"gradient"})
    {'gradient': 'dL/grad'}
    """
    found = _arrays(keys) if {"parameter", "gradient"} & set(lacking) else {}
    for quantity in (*SCALARS, "step"):
        if quantity in lacking:
            key = _scalar(keys, quantity)
            found |= {quantity: key} if key else {}
    return found


def _arrays(keys: Mapping[str, LoggedTensor | float]) -> dict[str, str]:
    """Return the keys of gradients, named as such, and of parameters with the same names and shapes.

    If there are no other tensors, the parameters may be in another log. Keys that select only a part of similar
    tensors are not candidates.
    """
    tensors = {
        key: tensor
        for key, tensor in keys.items()
        if isinstance(tensor, LoggedTensor) and tensor.dtype in STORAGE_DTYPES
    }
    groups = _groups(tensors)
    gradients = [key for key in groups if _last_words(key) & _GRADIENT]
    # Words before single letters, then the keys of most tensors.
    gradients.sort(key=lambda key: (_last_words(key).isdisjoint(_GRADIENT - {"g"}), -len(groups[key]), len(key)))
    marks = (
        _GRADIENT - {"g"}
        if gradients and not _last_words(gradients[0]).isdisjoint(_GRADIENT - {"g"})
        else _GRADIENT
    )
    for gradient in gradients[:_CANDIDATES]:
        names = groups[gradient]
        candidates = [
            key
            for key, group in groups.items()
            if not _overlap(key, gradient) and not words(key) & (_NO_PARAMETER | marks) and _includes(group, names)
        ]
        hinted = [key for key in candidates if _without_marks(gradient) == key]
        hinted = hinted or [key for key in candidates if _last_words(key) & _PARAMETER] or candidates
        smallest = min((len(groups[key]) for key in hinted), default=0)
        best = [key for key in hinted if len(groups[key]) == smallest]
        if len(best) == 1 and not _is_part({"parameter": best[0], "gradient": gradient}, groups, tensors):
            return {"parameter": best[0], "gradient": gradient}
    alone = [gradient for gradient in gradients if len(groups[gradient].keys() - {""}) == len(tensors)]
    return {"gradient": alone[-1]} if alone else {}


def _groups(tensors: Mapping[str, LoggedTensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of tensors by name for each key, and each pattern, that may be that of an array."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(key, {})[""] = tensor.shape
        for match in re.finditer("[/.]", key):
            groups.setdefault(key[: match.start()], {})[key[match.end() :]] = tensor.shape
        flat = re.match("[^/.]*?[:_-]", key)
        if flat:
            groups.setdefault(f"{flat[0]}{ANY_NAME}", {})[key[flat.end() :]] = tensor.shape
        last = re.search("[/.:_-][A-Za-z]+$", key)
        if last and words(last[0]) & _GRADIENT:
            groups.setdefault(f"{ANY_NAME}{last[0]}", {})[key[: last.start()]] = tensor.shape
    return groups


def _is_part(
    found: Mapping[str, str],
    groups: Mapping[str, Mapping[str, tuple[int, ...]]],
    tensors: Mapping[str, LoggedTensor],
) -> bool:
    """Return True if keys select only a part of tensors with similar keys."""
    used = {one for key in found.values() for name in groups[key] for one in _named(key, name)}
    rest = [key for key in tensors if key not in used]
    return any(left_out(key, groups[key], rest) for key in found.values())


def _named(key: str, name: str) -> list[str]:
    """Return the keys that a tensor of an array may have."""
    return [key.replace(ANY_NAME, name)] if ANY_NAME in key else [key, *(f"{key}{end}{name}" for end in "/.")]


def _last_words(key: str) -> set[str]:
    last = re.split("[/.]", key.strip(f"{ANY_NAME}/."))[-1]
    return words(last) | {last.lower()}


def _without_marks(gradient: str) -> str:
    """Return the key of gradients without the word for them: ``G_grads`` belongs to ``G``."""
    found = re.fullmatch(r"(.+)[_.-](?:grads?|gradients?)|(?:grads?|gradients?)[_.-](.+)", gradient, re.IGNORECASE)
    return "" if found is None else found[1] or found[2]


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith((f"{other}/", f"{other}.")) or other.startswith((f"{key}/", f"{key}."))


def _includes(group: Mapping[str, tuple[int, ...]], names: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True if tensors have the names and shapes of others, or are a list of tensors of the same shapes."""
    is_list = [*names] == [str(position) for position in range(len(names))]
    return all(group.get(name) == shape for name, shape in names.items()) or (
        is_list and [*group.values()] == [*names.values()]
    )


def _scalar(keys: Mapping[str, LoggedTensor | float], quantity: str) -> str:
    """Return the only key whose name is that of a scalar; empty if there is none, or several."""
    for required in _SCALAR_WORDS[quantity]:
        found = [
            key
            for key, value in keys.items()
            if required <= words(key)
            and not words(key) & (_OTHER_SCALARS - required)
            and (not isinstance(value, LoggedTensor) or math.prod(value.shape) == 1)
        ]
        preferred = [key for key in found if words(key) & _PREFERRED] or found
        if len(preferred) == 1:
            return preferred[0]
    return ""
