"""Reject words and constructions that are not plain English, in docstrings, comments, messages and documentation.

``python .ci/check_language.py [FILE ...]`` checks the files, or all files of the repository, prints one line per
finding (file, line, rule and text) and exits with 1 if there are any.
``docs/reference/glossary.md`` lists the terms to use.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

RULES = {
    "'anew'; write 'again' or 'from scratch'": r"\banew\b",
    "'beside'; write 'next to', 'besides' or 'in addition to'": r"\bbeside\b",
    "'but for'; write 'except'": r"\bbut for\b",
    "'is no ...'; write 'is not a ...' or 'there is no ...'": (
        r"(?<!there )(?<!here )\b(?:is|are) no (?!longer\b|more\b|less\b|greater\b|larger\b|smaller\b|other\b)\w+"
    ),
    "'choose of'; write 'choose one of'": r"\bchoose of\b",
    "'said' or 'told' as a participle": (
        r"\b(?:is|are|was|were|be|been|being|has|have|had|what|as|not|it|he|she|user|they)\s+(?:\w+ly\s+)?(?:said|told)\b|"
        r"\b(?:said|told)\s+(?:here|twice|once|again|with|by|of|beforehand|yet|now)\b"
    ),
    "'do not say'; write 'do not state'": r"\bdo(?:es)? not say\b",
    "'say of'; write 'show' or 'state'": r"\bsay of\b",
    "'if/where left out'; write 'by default'": r"\b(?:if|where|when) (?:it is )?left out\b",
    "'no remarks'": r"\bno remarks\b",
    "'this too'": r"\bthis too:",
    "'whole' as an adverb": r"\bon disk whole\b|\bwritten whole\b|\bread whole\b|\bwhole,? (?:or|under)\b",
    "'; whether ...' without a verb": r"; whether\b",
    "'begun'; write 'started' or 'created'": r"\b(?:was|were|is|are|been) begun\b",
    "'to be had'; write 'available'": r"\bto be had\b|\bcan be had\b",
    "'passed over'; write 'ignored' or 'skipped'": r"\bpassed over\b",
    "'face'; write 'interface'": r"\ba face\b|\bfaces of\b|\bthin faces?\b",
    "'a look'; write 'a scan'": (
        r"\b(?:a|each|one|first|next|last) looks?\b(?! (?:at|like|up|into))|\bthe looks?\b|\btwo looks\b"
    ),
    "'as it was written'; write 'unchanged'": r"\bas (?:it|they) (?:was|were) written\b",
    "'all that'; write 'all ...'": r"\ball that (?:OUT|it|they|the|is|are|was|were)\b",
    "'that is none'": r"\bthat is none\b",
    "'cannot work'": r"\bcannot work\b",
    "a relative clause without its noun": r"; of an? \w+ that\b",
    "a sentence that starts with 'Who'": r"(?:^|[.:] )Who \w+s? (?:has|is|opens|writes|waits|asks)\b",
    "'thereof', 'whereof'": r"\b(?:there|where)of\b",
    "'give' as an instruction; write 'use', 'pass' or 'set'": (
        r"(?:^|[,;:] (?:or |and )?|\bor )give (?:a|an|the|at|both|another|other|finite|it|its|them)\b"
    ),
    "'of its own'; write 'its own ...' or 'separate'": r"\bof (?:its|their) own(?! (?!module\b)[a-z])",
    "'largest number of'; write 'maximum number of'": r"\blargest number of\b",
    "'name to value'; write 'value by name'": (
        r"\b(?:name|quantity|array) of each \w+ to\b|\bsame names to\b|"
        r"(?:^|\. |\n *)(?:array|key|quantity|run|state|step|tensor)(?: names?)? to (?:the|its|their|bytes)\b"
    ),
    "'left out'; write 'omitted', 'excluded' or 'skipped'": r"\bleft out\b|\bleaves? out\b",
    "'goes on'; write 'continues'": r"\b(?:goes|go|went|gone|going) (?:on|past)\b(?! to\b)",
    "'at once'; write 'immediately', 'together' or 'at a time'": r"\bat once\b",
    "'takes the place of'; write 'replaces'": r"\btak(?:es?|ing) (?:the|its|their) places?\b|\bin place of\b",
    "'does not answer'; write 'does not respond'": r"\bdo(?:es)? not answer\b",
    "'any more'; write 'no longer'": (
        r"\b(?:not|no|none|never|nothing|cannot|n't)\b[^.;:]{0,60}\bany ?more\b(?! than\b)"
    ),
    "'in the place of'; write 'instead of'": r"\bin the places? of\b",
    "'means nothing'; write 'has no meaning'": r"\bmeans? nothing\b",
    "'so many of'; write 'this many' or 'as many'": (
        r"\bat most so (?:many|long|much)\b|\bso many of (?:them|it|these)\b"
    ),
    "'another ... than'; write 'a different ... than'": (
        r"\b(?:another|other) (?:(?!is|are|was|were)\w+ )?"
        r"(?!more|less|fewer|larger|smaller|longer|shorter|greater|higher|lower|later|earlier|older|newer|faster|slower)"
        r"\w+ than\b"
    ),
    "'lately'; write 'recently'": r"\blately\b",
    "'put together'; write 'assembled' or 'combined'": r"\bput together\b",
    "'from which on'; write 'above which' or 'after which'": r"\bfrom which on\b",
    "'whatever'; write 'regardless of'": r"\bwhatever\b",
    "a name that 'says'; write 'indicates' or 'states'": r"\b(?:file|name|word|text|key|version|log)s? says?\b",
    "'something else than'; write 'something other than'": r"\b(?:any|some|no)thing else than\b",
    "'cannot be made'; write 'cannot create'": r"\bcannot be made\b",
    "'of yours'; write 'your'": r"\bof yours\b",
    "'for ever'; write 'forever'": r"\bfor ever\b",
    "', neither is'; write 'also not'": r", (?:and )?(?:nor|neither) (?:is|are|does|do|was|were)\b",
}
_COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in RULES.items()}
_COMPILED["a sentence that starts with 'Who'"] = re.compile(RULES["a sentence that starts with 'Who'"])

EXCLUDED = (".ci/check_language.py", "tests/docs/test_language.py")
"""Files that quote the rejected phrases."""

_JOINED_HEADING = re.compile(
    r"^[ ]*(?:Attributes|Examples|Notes|Parameters|Raises|References|Returns|Yields) -{3,} \S", re.MULTILINE
)
"""A heading of a docstring on the same line as the text that follows it, for example after wrapping lines."""

FIRST_WORDS = re.compile(r"(?:Whether|What|Of|Who|Which|How)\b")
"""Words that a docstring must not start with: its summary starts with a verb or names a thing."""


def findings(text: str, *, docstring: bool = False) -> list[str]:
    """Return the names of the rules that a text breaks.

    Parameters
    ----------
    text : str
        A docstring, comment, message or paragraph.
    docstring : bool
        The text is a docstring, so its first word is also checked.
    """
    joined = re.sub(r"\s+", " ", re.sub(r"``[^`]*``|`[^`]*`", "x", text)).strip()
    found = [name for name, pattern in _COMPILED.items() if pattern.search(joined)]
    if _JOINED_HEADING.search(text):
        found.append("a heading on the line of its text")
    if docstring and FIRST_WORDS.match(joined):
        found.append(f"a docstring that starts with {joined.split()[0]!r}")
    return found


def _of_python(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and kind of each docstring, comment and message."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # The string after an assignment documents it, as the first one of a body does.
            docstrings |= {id(part.value) for part in body if isinstance(part, ast.Expr)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value, id(node) in docstrings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: "), False


def _of_markdown(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line and text of each line outside code blocks."""
    inside = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line, False


def check(path: Path) -> list[tuple[int, str, str]]:
    """Return line, rule and text of each finding in a file."""
    source = path.read_text(encoding="utf-8")
    parts = _of_python(source) if path.suffix == ".py" else _of_markdown(source)
    return [(line, rule, text) for line, text, kind in parts for rule in findings(text, docstring=kind)]


def main() -> int:
    """Check the files of the command line, or all of the repository."""
    listed = (
        sys.argv[1:]
        or subprocess.run(
            ["git", "ls-files", "*.py", "*.md", "*.html"], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    count = 0
    for name in listed:
        if name in EXCLUDED:
            continue
        for line, rule, text in check(Path(name)):
            count += 1
            shown = " ".join(text.split())
            sys.stdout.write(f"{name}:{line}: {rule}: {shown[:100]}\n")
    if count:
        sys.stdout.write(f"{count} findings; the glossary and CONTRIBUTING.md describe the language\n")
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main())
