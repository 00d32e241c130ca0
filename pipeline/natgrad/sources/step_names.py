"""Find the step number in the name of a file or folder.

Every reader of a folder of steps applies this rule, through `Naming`. docs/reference/formats.md has it as a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from natgrad.schema.errors import InputError

__all__ = [
    "AUTOMATIC",
    "STEP_FIELD",
    "Naming",
    "StepName",
    "checked_pattern",
    "counts_other",
    "is_content",
    "is_step",
    "parse_name",
    "role_of",
    "step_number",
    "words",
]

STEP_FIELD = "{step}"
"""Field of a pattern that stands for the step number."""

_STEP_WORDS = {
    *("step", "steps", "iter", "iters", "iteration", "iterations", "itr", "it"),
    *("update", "updates", "batch", "batches", "ba"),
}
_PLURALS = {"steps", "iters", "iterations", "updates", "batches", "epochs"}
_CHECKPOINT_WORDS = {"checkpoint", "checkpoints", "ckpt", "ckpts", "chkpt", "snapshot"}
_EPOCH_WORDS = {"epoch", "epochs", "ep"}
# A number after one of these words counts something other than the progress of training.
_OTHER_WORDS = {
    *("rank", "shard", "part", "of", "gpu", "device", "node", "worker", "process", "stage", "tp", "pp", "dp", "mp"),
    *("layer", "layers", "block", "head", "expert", "member", "replica", "replicate", "group", "client"),
    *("run", "trial", "job", "task", "seed", "fold", "version", "v", "ver"),
    *("token", "tokens", "sample", "samples"),
}
# These words describe what a file contains. Other words may be the name of a model, such as gpt2, or of a metric.
_CONTENT_WORDS = {
    *("model", "net", "network", "param", "params", "parameter", "parameters", "weight", "weights", "theta"),
    *("grad", "grads", "gradient", "gradients", "hvp", "state", "states"),
}
_ROLES = {
    "gradient": {"grad", "grads", "gradient", "gradients"},
    "hvp": {"hvp"},
    # A copy of the model, or data that belong neither to the model nor to its gradient or optimizer.
    "other": {
        *("ema", "swa", "avg", "average", "averaged", "scheduler", "sched", "scaler", "rng", "random", "meta"),
        *("metadata", "config", "args", "trainer", "dataloader", "loader", "sampler"),
    },
    "optimizer": {"optimizer", "optimizers", "optim", "optims", "opt"},
}
"""Words that distinguish the files of one step. A file without these words contains the model."""

_QUALIFIERS = _CONTENT_WORDS | _CHECKPOINT_WORDS | {"global", "train", "trainer", "training", "optimizer", "opt"}

_SEPARATORS = "-_=. "
_MARKS = "|".join(_STEP_WORDS | _CHECKPOINT_WORDS | _EPOCH_WORDS)
_MARK = re.compile(rf"(?<![A-Za-z])(global[-_ ]?)?({_MARKS})?[{_SEPARATORS}]*$", re.I)
"""Words before a number that mark it as a step or an epoch."""

_PLURAL_MARK = re.compile(rf"[{_SEPARATORS}]*({'|'.join(_PLURALS)})(?![A-Za-z])", re.I)
_UNIT = "([kKmM](?![A-Za-z]))?"
_NUMBER = re.compile(rf"([0-9]+(?:\.[0-9]+)?(?:e[-+][0-9]+)?){_UNIT}")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LEAF = re.compile(r"\.(weight|bias|kernel|scale|gamma|beta)(?![A-Za-z])")
"""Ends of names of tensors, before which a number is that of a layer."""

_KEY = re.compile(r"[^-\s,;]*[-\s]*$")
_ATTEMPT = re.compile(r"(.+)-v([0-9]{1,4})((?:\.[A-Za-z][A-Za-z0-9]*)*)")
_PROGRESS = ("global step", "step", "checkpoint", "epoch")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_DIGITS_LIMIT = 18
_STARS_LIMIT = 3


@dataclass(frozen=True)
class StepName:
    """The step number in a name.

    Attributes
    ----------
    number : int, optional
        None if the name has none.
    taken : str
        The part of the name that contains it.
    attempt : int
        K in the ending ``-vK``, with which Lightning marks a file of a restarted run; otherwise 0.
    problem : str
        Why a number in the name is not used; empty if there is no number that may be intended as a step.
    span : tuple of int
        Position in the parsed text of the number that is used, or of the first number that is not.
    """

    number: int | None = None
    taken: str = ""
    attempt: int = 0
    problem: str = ""
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Number:
    """A number in a name, with the words before it and the kind of number that they indicate."""

    kind: str
    text: str
    value: Decimal
    span: tuple[int, int]


def parse_name(stem: str) -> StepName:
    """Return the step number in a name without its suffix.

    Examples
    --------
    >>> [parse_name(name).number for name in ("epoch=1-step=200", "ckpt_10k", "iter_0000010", "model000100")]
    [200, 10000, 10, 100]
    >>> [parse_name(name).number for name in ("epoch_3", "epoch=3-train_loss_step=0.25", "gpt2", "final")]
    [None, None, None, None]
    >>> parse_name("epoch=0-step=3-v1").attempt, parse_name("model_epoch_3").problem
    (1, 'its number 3 counts epochs, not updates')
    """
    base, attempt = _split_attempt(stem)
    numbers = _numbers(base)
    for kind in ("global step", "step", "checkpoint", "plain"):
        found = [number for number in numbers if number.kind == kind]
        if kind == "plain" and (epochs := [number for number in numbers if number.kind == "epoch"]):
            return StepName(
                attempt=attempt,
                problem=f"its number {epochs[0].text} counts epochs, not updates",
                span=epochs[0].span,
            )
        if not found:
            continue
        first = found[0]
        if len({number.value for number in found}) > 1:
            texts = " and ".join(number.text for number in found)
            return StepName(attempt=attempt, problem=f"its numbers {texts} may each be the step", span=first.span)
        if len(str(first.value)) > _DIGITS_LIMIT:
            return StepName(attempt=attempt, problem=f"its number {first.text[:40]} is too large", span=first.span)
        return StepName(int(first.value), first.text, attempt, span=first.span)
    unclear = [number for number in numbers if number.kind in ("metric", "size")]
    if not unclear:
        return StepName(attempt=attempt)
    return StepName(
        attempt=attempt,
        problem=f"its number {unclear[0].text} is not marked as a step",
        span=unclear[0].span,
    )


def _numbers(text: str) -> list[_Number]:
    """Return the numbers in a name, each with its kind."""
    matches = list(_NUMBER.finditer(text))
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(text)]
    between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    found = []
    for i, match in enumerate(matches):
        before, after = between[i], between[i + 1]
        key_start = match.start() - len(_key(before))
        kind = _kind(match, before, after, first=i == 0, last=i == len(matches) - 1)
        value = Decimal(0) if kind == "metric" else _value(match[1], match[2])
        found.append(_Number(kind, text[key_start : match.end()].lstrip("_-. "), value, match.span()))
    return found


def _kind(match: re.Match[str], before: str, after: str, *, first: bool, last: bool) -> str:
    """Return what the words next to a number indicate."""
    unit = match[2] is not None
    if "e" in match[1] or ("." in match[1] and not (unit and _is_integral(match))):
        return "metric"
    words, following = _words(before), _words(after)
    if not first and len(words) == 1 and words[0] in _PLURALS:
        words = []  # the word belongs to the number before: "200steps_3"
    if before.endswith(("=-", "=+")):
        return "metric"
    if before.endswith("="):
        words = _words(_key(before))
        if words[-1:] and words[-1] in _STEP_WORDS and not _QUALIFIERS.issuperset(words[:-1]):
            return "metric"
    word = words[-1] if words else ""
    if word in _STEP_WORDS:
        return "global step" if words[-2:-1] == ["global"] else "step"
    if word in ("globalstep", "globalsteps"):
        return "global step"
    if word in _CHECKPOINT_WORDS:
        return "checkpoint"
    if word in _EPOCH_WORDS:
        return "epoch"
    if before[-1:] in ("", ".") and _LEAF.match(after):
        return "other"  # 0.weight is the name of a tensor
    if word in _OTHER_WORDS or words[-2:] == ["rng", "state"] or following[:1] == ["of"]:
        return "other"
    if following and (following[0] in _PLURALS or (last and following[0] in _STEP_WORDS | _EPOCH_WORDS)):
        return "epoch" if following[0] in _EPOCH_WORDS else "step"
    if before.endswith("="):
        return "metric"
    if unit and word and word not in _CONTENT_WORDS:
        return "size"  # gpt-125m is a size
    glued = bool(before) and before[-1].isalpha()
    if glued and word not in _CONTENT_WORDS and not (match[1].startswith("0") and len(match[1]) > 1):
        return "other"  # gpt2 is a name
    return "plain"


def _value(digits: str, unit: str | None) -> Decimal:
    return Decimal(digits) * _UNITS[(unit or "").lower()]


def _is_integral(match: re.Match[str]) -> bool:
    value = _value(match[1], match[2])
    return value == value.to_integral_value()


def _key(before: str) -> str:
    """Return the key of a number: the text before it, from the last separator of key-value pairs on."""
    found = _KEY.search(before)
    return found[0] if found else ""


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def words(name: str) -> set[str]:
    """Return the words in a name, in lower case."""
    return set(_words(name))


def role_of(name: str) -> str:
    """Return what a file contains according to its name; empty if it may be the model or everything.

    Examples
    --------
    >>> [role_of(name) for name in ("model_3", "step_3_grads", "opt000100", "ema_0.9999_000100")]
    ['', 'gradient', 'optimizer', 'other']
    """
    found = set(_words(name))
    return next((role for role, words in _ROLES.items() if words & found), "")


def is_content(name: str) -> bool:
    """Return True if a name indicates parameters, gradients or states.

    Examples
    --------
    >>> [is_content(name) for name in ("params", "grads", "model_final", "loss", "run")]
    [True, True, True, False, False]
    """
    return bool(set(_words(name)) & _CONTENT_WORDS)


def counts_other(before: str) -> bool:
    """Return True if the text before a number shows that it does not count progress but, for example, shards.

    Examples
    --------
    >>> [counts_other(text) for text in ("seed-", "model_world_size_1_rank_", "weights-")]
    [True, True, False]
    """
    return bool(set(_words(before)[-1:]) & _OTHER_WORDS)


def step_number(stem: str) -> int | None:
    """Return the step in the name of a file or folder, or None if there is none; see `parse_name`.

    Examples
    --------
    >>> [step_number(name) for name in ("checkpoint-500", "epoch=3-step=40", "iter_0000010", "model_7")]
    [500, 40, 10, 7]
    >>> [step_number(name) for name in ("model-00001-of-00002", "epoch_3", "final")]
    [None, None, None]
    """
    return parse_name(stem).number


def is_step(name: str) -> bool:
    """Return True if a folder name is a step: it contains a word for a step, or it is a number.

    Examples
    --------
    >>> [is_step(name) for name in ("step-3", "100", "optimizer_0", "model")]
    [True, True, False, False]
    """
    kinds = {number.kind for number in _numbers(name)}
    return name.isdecimal() or bool(kinds & {"global step", "step", "checkpoint"})


# Naming -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """The rule by which entries of a log are recognized as steps.

    Attributes
    ----------
    pattern : str
        Value of ``--pattern``: only entries with such a name are steps. By default, the rule of `parse_name` holds.
    keyed : bool
        The step number is read from the files, so names need not contain it.
    """

    pattern: str = ""
    keyed: bool = False

    @cached_property
    def _parts(self) -> list[re.Pattern[str]]:
        return [_expression(part) for part in self.pattern.split("/")]

    @property
    def depth(self) -> int:
        """Number of levels below the log at which the steps are."""
        return self.pattern.count("/") + 1

    def admits(self, level: int, name: str) -> bool:
        """Return True if the name of an entry fits the pattern, one part of which describes each level."""
        return not self.pattern or self._matched(level, name) is not None

    def _matched(self, level: int, name: str) -> re.Match[str] | None:
        expression = self._parts[level]
        return expression.fullmatch(name) or expression.fullmatch(_split_attempt(name)[0])

    def parse(self, names: Sequence[str], stem: str) -> StepName:
        """Return the step number in the name of an entry.

        Parameters
        ----------
        names : sequence of str
            Name of the entry, after those of the folders above it. At least as many as the pattern has parts.
        stem : str
            Name of the entry without the suffix of its kind.
        """
        if not self.pattern:
            return parse_name(stem)
        matches = [self._matched(level, name) for level, name in enumerate(names[-self.depth :])]
        match = next((match for match in matches if match is not None and match.re.groups), None)
        if match is None or None in matches:
            return StepName()
        value = _value(match[1], match[2])
        if value != value.to_integral_value() or len(str(int(value))) > _DIGITS_LIMIT:
            return StepName(problem=f"its number {match[1][:40]}{match[2] or ''} is not a step number")
        return StepName(int(value), match[1] + (match[2] or ""), _split_attempt(names[-1])[1])

    def without_step(self, names: Sequence[str], stem: str) -> str:
        """Return what the name of an entry has in common with those of the same content at other steps.

        Parameters
        ----------
        names, stem
            See `parse`. The levels of a pattern are joined by slashes.

        Examples
        --------
        >>> Naming().without_step(["step3_fc.weight.npy"], "step3_fc.weight")
        'fc.weight'
        >>> Naming("*/{step}/*.npy").without_step(["grads", "000010", "fc.weight.npy"], "fc.weight")
        'grads/fc.weight'
        """
        if not self.pattern:
            counted = [number.span for number in _numbers(stem) if number.kind in _PROGRESS]
            return _without(stem, counted or [parse_name(stem).span])
        parts = [*names[-self.depth : -1], stem]
        for level, name in enumerate(names[-self.depth :]):
            match = self._matched(level, name)
            if match is not None and match.re.groups:
                parts[level] = _without(
                    parts[level], [(match.start(1), match.end(2) if match[2] else match.end(1))]
                )
        return "/".join(filter(None, parts))


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return a text without some numbers and the words that mark them."""
    for start, stop in sorted(spans, reverse=True):
        before, after = _MARK.sub("", text[:start]), _PLURAL_MARK.sub("", text[stop:], count=1)
        texts = before.rstrip(_SEPARATORS), after.strip(_SEPARATORS)
        text = "_".join(filter(None, texts))
    return text


AUTOMATIC = Naming()
"""The usual names."""


def _split_attempt(name: str) -> tuple[str, int]:
    """Return a name, with or without its suffix, without Lightning's ``-vK``, and K."""
    found = _ATTEMPT.fullmatch(name)
    return (found[1] + found[3], int(found[2])) if found else (name, 0)


def _expression(part: str) -> re.Pattern[str]:
    number = rf"(?<![0-9])([0-9]+(?:\.[0-9]+)?){_UNIT}(?![0-9])"
    texts = {"*": "[^/]*?", STEP_FIELD: number}
    return re.compile("".join(texts.get(text, re.escape(text)) for text in re.split(r"(\*|\{step\})", part)))


def checked_pattern(pattern: str, location: str = "--pattern") -> str:
    """Return a pattern of names if it is valid.

    Raises
    ------
    InputError
        If it does not contain ``{step}`` exactly once, or leaves the folder of the log.
    """
    fixed = pattern.replace(STEP_FIELD, "")
    parts = pattern.split("/")
    if (
        pattern.count(STEP_FIELD) != 1
        or any(brace in fixed for brace in "{}")
        or any(part in ("", ".", "..") or part.count("*") > _STARS_LIMIT for part in parts)
    ):
        raise InputError(
            f"{pattern!r} is not a pattern of names",
            where=location,
            why=f"it must contain {STEP_FIELD} once, no other braces, at most {_STARS_LIMIT} stars in a name, "
            "and be relative to the folder of the log",
            remedy="write the name of a step with {step} for its number and * for any other text, "
            "for example 'epoch=*-step={step}.ckpt' or '{step}/weights.pt'",
        )
    return pattern
