"""Read the lines of a text log that have a stated form, such as those that a training script prints.

The form is a pattern like ``iter {step}: loss {loss}``, or the name of a known form (`LINE_FORMS`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS
from natgrad.sources.bounds import shown
from natgrad.sources.scalars.columns import LINE_KEY, Batch, Decoded, each_record
from natgrad.sources.scalars.record_files import COMPRESSED, complete_blocks, open_text
from natgrad.sources.scalars.scalar_log import Decoder, Kind, Wanted
from natgrad.sources.scalars.update_records import UNKNOWN_VERSION, at_states
from natgrad.storage import Storage

__all__ = ["LINE_FORMS", "TEXT_KIND", "known_form"]

_SUFFIXES = (".log", ".txt", ".out", ".err")
_LINES_EXAMINED, _BYTES_EXAMINED = 1000, 1 << 20
_FORMS_TRIED = 8
_LINE_LIMIT = 1 << 14
"""Maximum number of characters of a line that is searched; records are shorter."""

_PRINTED = "numbers of a text log are rounded to the digits that were printed: so are differences of losses"
COUNT = "line"
"""Key of the number of the matching line, counted from 1, for lines that contain no step."""

_NUMBERS = {"step", "epoch", *SCALARS}
# Possessive quantifiers and the assertions make a search linear in the length of a line.
_NUMBER = (
    r"(?<![\w.])([-+]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][-+]?+[0-9]++)?+|[-+]?+(?:nan|inf(?:inity)?+))"
    r"(?![\w]|\.[0-9])"
)
_WORD = r"(?<!\S)([^\s,;|]++)"
_ITEM = re.compile(r"""['"]([^'"]{1,256})['"]\s*:\s*('[^']*'|"[^"]*"|[^,{}'"\[\]]+)""")
_FIELDS = {
    field: re.compile(rf"(?<![\w/.-])(?:{key})\b[\"' ]{{0,2}}[:=]?[ \"']{{0,2}}(?P<value>{_NUMBER})", re.IGNORECASE)
    for field, key in {
        "step": "(?:global[_ ]?)?(?:step|iter|iteration|update)",
        "epoch": "epoch",
        "loss": r"(?<!val )(?<!valid )(?<!validation )(?<!eval )(?<!test )(?:train(?:ing)?[_/ ]?)?loss",
        "learning_rate": "lr|learning[_ ]rate",
    }.items()
}
"""Words before the numbers of a line, by the field that they become in a derived form."""

_ITERATION = re.compile(r"(?<!\w)iteration ([0-9]+) ?/ ?[0-9]+")
_SPACES = ("  ", " \n", "\n ", *"\t\v\f\x1c\x1d\x1e\x1f")
"""ASCII space that is not a single one between words."""
_PAIR = re.compile(r" ?([A-Za-z][\w ()/-]*?) ?: ?(\S+) ?")

Found = Mapping[str, Any]


@dataclass(frozen=True)
class LineForm:
    """A form of lines.

    Attributes
    ----------
    example : str
        A line of this form.
    parse : callable
        Function of a line, in which single spaces separate words. Returns the values of the line by key, or None if
        it has another form. Raises ValueError if a line has this form twice.
    records : callable, optional
        Function of these values, the key of the step, and notes, that yields the records by state, for a trainer
        that logs after the update.
    """

    example: str
    parse: Callable[[str], Found | None]
    records: Callable[[Iterator[Found], str, list[str]], Iterator[Found]] | None = None


class _Pattern:
    """Function that parses lines with a pattern.

    Raises
    ------
    ValueError
        If the pattern is not valid.
    """

    def __init__(self, pattern: str) -> None:
        parts = re.split(r"\{([^{}]*)\}", " ".join(pattern.split()))
        texts, fields = parts[::2], parts[1::2]
        if (
            not fields
            or len(set(fields)) < len(fields)
            or not all(fields)
            or any(c in t for t in texts for c in "{}")
        ):
            raise ValueError(
                "it must contain fields with different names, such as {step} and {loss}, and no other braces"
            )
        if any(not text for text in texts[1:-1]):
            raise ValueError("there must be text between two fields")
        self._fields = fields
        self._expression = self._compiled(texts, re.IGNORECASE)
        # Without the flag, the text before the first field is searched for much faster.
        self._lower = self._compiled([text.lower() for text in texts]) if _NUMBERS.issuperset(fields) else None

    def _compiled(self, texts: Sequence[str], flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
        groups = [_NUMBER if field in _NUMBERS else _WORD for field in self._fields]
        # A field is delimited by itself where it touches a word.
        parts = (re.escape(text) + group for text, group in zip(texts, groups, strict=False))
        return re.compile("".join(parts) + re.escape(texts[-1]), flags)

    def __call__(self, line: str) -> Found | None:
        """Return the values of a line; see `LineForm.parse`."""
        matches = list(islice(self._expression.finditer(line), 2))
        if len(matches) > 1:
            raise ValueError(f"matches the pattern twice: {shown(line)}")
        return dict(zip(self._fields, matches[0].groups(), strict=True)) if matches else None

    def batch(self, block: str, number: int) -> Batch | None:
        """Return the values of several lines; None if they must be parsed one by one.

        Parameters
        ----------
        block : str
            Lines with newline characters.
        number : int
            Number of the first line.
        """
        ends = np.flatnonzero(np.frombuffer(block.encode(), np.uint8) == ord("\n"))
        if not block.isascii() or np.diff(ends, prepend=-1).max() > _LINE_LIMIT:
            return None
        if block.startswith(" ") or any(space in block for space in _SPACES):
            block = "".join(f"{' '.join(line.split())}\n" for line in block[:-1].split("\n"))
            ends = np.flatnonzero(np.frombuffer(block.encode(), np.uint8) == ord("\n"))
        expression, block = (self._expression, block) if self._lower is None else (self._lower, block.lower())
        matches = list(expression.finditer(block))
        lines = number + np.searchsorted(ends, [match.start() for match in matches])
        if (np.diff(lines) == 0).any():
            return None
        columns = list(zip(*(match.groups() for match in matches), strict=True)) or [()] * len(self._fields)
        return Batch(len(matches), dict(zip(self._fields, columns, strict=True)), lines.tolist())


def _dictionary(line: str) -> Found | None:
    start, stop = line.find("{"), line.rfind("}")
    items = _ITEM.findall(line[start:stop]) if 0 <= start < stop else []
    found = {key: value.strip().strip("'\"") for key, value in items}
    if len(found) < len(items):
        raise ValueError(f"contains a key twice: {shown(line)}")
    return found or None


def _megatron(line: str) -> Found | None:
    step = _ITERATION.search(line)
    if step is None:
        return None
    pairs = [_PAIR.fullmatch(part) for part in line[step.end() :].split("|")]
    found = {pair[1]: pair[2] for pair in pairs if pair is not None}
    names = {"learning rate": "learning_rate", "lm loss": "loss"}
    return {"step": step[1], **{names.get(key, key): value for key, value in found.items()}}


def _trainer_records(found: Iterator[Found], step: str, notes: list[str]) -> Iterator[Found]:
    notes.append(UNKNOWN_VERSION)
    counted = ({**values, COUNT: number} for number, values in enumerate((v for v in found if "loss" in v), 1))
    yield from at_states(_with_step(counted, step), notes, step=step)


def _megatron_records(found: Iterator[Found], step: str, notes: list[str]) -> Iterator[Found]:
    yield from at_states(_with_step(found, step), notes, step=step, rate_of_next=True)


def _with_step(found: Iterator[Found], step: str) -> Iterator[Found]:
    for values in found:
        if step not in values:
            raise InputError(
                f"the lines contain no {step}",
                where=f"line {values.get(LINE_KEY)} of the text log",
                why="the Trainer prints no step numbers",
                remedy=f"use --map step={COUNT} to count the lines, if every update is logged (logging_steps=1)",
            )
        if not str(values[step]).isdecimal():
            raise ValueError(f"line {values.get(LINE_KEY)} has {shown(values[step])} as its step")
        yield values


LINE_FORMS: dict[str, LineForm] = {
    "nanogpt": LineForm("iter 10: loss 3.2, time 12.00ms, mfu 5.00%", _Pattern("iter {step}: loss {loss}")),
    "megatron": LineForm(
        "iteration 10/ 100 | learning rate: 1.0E-04 | lm loss: 2.3E+00 |", _megatron, _megatron_records
    ),
    "trainer": LineForm(
        "{'loss': 1.2, 'grad_norm': 0.3, 'learning_rate': 5e-05, 'epoch': 0.1}", _dictionary, _trainer_records
    ),
    "dictionary": LineForm("{'step': 10, 'loss': 1.2, 'lr': 5e-05}", _dictionary),
}
"""Known forms of lines, by name."""


def known_form(log: Storage) -> str:
    """Return the form that lines at the beginning of a text file have; empty if none is found.

    It is the name of a known form, or a pattern of lines with a step and a loss after words for them.
    """
    if not log.name.removesuffix(COMPRESSED).endswith(_SUFFIXES):
        return ""
    with open_text(log) as file:
        head = file.read(_BYTES_EXAMINED).decode("utf-8", errors="replace")
    lines = [" ".join(line[:_LINE_LIMIT].split()) for line in re.split(r"[\r\n]", head)[:_LINES_EXAMINED]]
    for line in lines:
        for name, form in LINE_FORMS.items():
            try:
                found = form.parse(line)
            except ValueError:
                continue
            # A dictionary without a step is one of the Trainer.
            if found and "loss" in found and (name != "trainer" or not {"step", "iter", "iteration"} & set(found)):
                return name
    derived = islice(dict.fromkeys(filter(None, map(_derived, lines))), _FORMS_TRIED)
    return next((pattern for pattern in derived if _recurs(pattern, lines)), "")


def _derived(line: str) -> str:
    """Return the pattern of a line that contains a step and a loss, and perhaps a rate; empty otherwise.

    Examples
    --------
    >>> _derived("[12:00:01] step=3 epoch 1 train_loss: 2.5 lr=1e-3 tokens/s 12")
    'step={step} epoch {epoch} train_loss: {loss} lr={learning_rate}'
    >>> _derived("Step 3/100 (12.5ms) | loss 2.5")
    'Step {step}/100 {word1} | loss {loss}'
    """
    matches = {field: match for field, known in _FIELDS.items() if (match := known.search(line))}
    if not {"step", "loss"} <= set(matches):
        return ""
    first, last = (choose(matches.values(), key=re.Match.start) for choose in (min, max))
    start, stop = first.start(), last.end()
    for field, match in sorted(matches.items(), key=lambda item: -item[1].start()):
        line = f"{line[: match.start('value')]}{{{field}}}{line[match.end('value') :]}"
        stop += (len(field) + 2) - len(match["value"])
    # Other words with digits may change from line to line.
    texts = [
        text if "{" in text else re.sub(r"^[^,;|]*[0-9][^,;|]*", f"{{word{position}}}", text)
        for position, text in enumerate(line[start:stop].split(" "))
    ]
    return " ".join(texts)


def _recurs(pattern: str, lines: Sequence[str]) -> bool:
    """Return True if several lines with different steps have a form."""
    steps = set[str]()
    with suppress(ValueError):
        parse = _Pattern(pattern)
        for line in lines:
            found = parse(line)
            steps |= {found["step"]} if found else set()
    return len(steps) > 1


def _files(location: Storage) -> list[Storage]:
    entries = location.files()
    try:
        return entries if entries == [location] and known_form(location) else []
    except OSError:
        return []


def _of_line(line: str, step: str) -> Decoder:
    """Return the decoder of a text log whose lines have a form.

    Raises
    ------
    InputError
        If the form is not valid.
    """
    form = LINE_FORMS.get(line)
    if form is None:
        try:
            form = LineForm(line, _Pattern(line))
        except ValueError as error:
            raise InputError(
                f"{line!r} is not a form of lines: {error}",
                where="--map line",
                remedy="write a line with fields in braces, such as 'iter {step}: loss {loss}', or one of "
                f"{', '.join(LINE_FORMS)}",
            ) from error
    records = form.records

    def decode(log: Storage, wanted: Wanted, notes: list[str]) -> Decoded:
        found = _matching(log, form, notes)
        yield from _counted(found) if records is None else records(each_record(found), step, notes)
        notes.append(_PRINTED)

    return decode


def _counted(found: Decoded) -> Decoded:
    """Yield records with their number, counted from 1."""
    number = 1
    for values in found:
        if isinstance(values, Batch):
            counts = range(number, number + values.size)
            yield replace(values, columns={**values.columns, COUNT: counts})
            number += values.size
        else:
            yield {**values, COUNT: number}
            number += 1


def _matching(log: Storage, form: LineForm, notes: list[str]) -> Decoded:
    """Yield the values of the lines of a form."""
    matched, number = 0, 1
    for block in complete_blocks(log, notes, lambda line: form.parse(line) is not None):
        batch = form.parse.batch(block, number) if isinstance(form.parse, _Pattern) else None
        if batch is not None:
            matched += batch.size
            number += block.count("\n")
            yield batch
            continue
        for line in block[:-1].split("\n"):
            try:
                found = form.parse(" ".join(line.split())) if len(line) <= _LINE_LIMIT else None
            except ValueError as error:
                raise ValueError(f"line {number} {error}") from error
            if found is not None:
                matched += 1
                yield {**found, LINE_KEY: number}
            number += 1
    if not matched:
        raise InputError(
            "no line has the stated form",
            where=str(log),
            why=f"the form is that of {form.example!r}",
            remedy=f"state another form: a line with fields in braces, or one of {', '.join(LINE_FORMS)}",
        )


def _unstated(log: Storage, wanted: Wanted, notes: list[str]) -> Iterator[Found]:
    known = known_form(log)
    example = "use --map 'line=iter {step}: loss {loss}', for example, or one of these names of forms: "
    raise InputError(
        "the form of the lines of a text log must be stated",
        where=str(log),
        why="text may contain numbers of several kinds",
        remedy=f"use --map {shlex.quote(f'line={known}')}, because its lines look like this form"
        if known
        else example + ", ".join(LINE_FORMS),
    )


TEXT_KIND = Kind("a text log", _files, _unstated, of_line=_of_line)
"""Kind of a text log whose lines have no stated form yet."""
