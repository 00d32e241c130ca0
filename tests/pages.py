"""Run the examples of a page in the current folder."""

import doctest
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from commands import natgrad

ROOT = Path(__file__).parents[1]


def _run(line):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        # These commands set up an environment, and one of them runs these tests.
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "pip":
        # tests/packaging installs the wheel of this name and then runs the demonstration.
        name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
        assert arguments[0] == "install"
        assert set(arguments[1:]) <= {"--no-deps", name, "numpy", "safetensors"}
    elif program == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert program == "natgrad"
        done = natgrad(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return ""


def _run_shell(example):
    for line in example.parsed.splitlines():
        if line and not line.startswith("#"):
            _run(line)


def _run_console(example):
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        found = _run(command)
        # Trailing spaces are invisible in a page.
        found = "".join(f"{line.rstrip()}\n" for line in found.splitlines())
        if not doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS):
            return f"{command} printed\n{found}\nand not\n{expected}"
    return None


def run_page(path, languages=("python", "sh", "console")):
    """Run the examples of a page, in their order, and return their number.

    The lines of ``sh`` are commands. ``console`` has commands after ``$`` and their output, where ``...`` stands
    for any text. ``python`` is a program, or a session with ``>>>``. Blocks with a title are files.
    """
    for name, content in re.findall(
        r'^```\w+ title="([\w.]+)"\n(.*?)^```$', path.read_text(), re.DOTALL | re.MULTILINE
    ):
        Path(name).write_text(content)
    parsers = {
        "python": PythonCodeBlockParser(),
        "sh": CodeBlockParser(language="sh", evaluator=_run_shell),
        "console": CodeBlockParser(language="console", evaluator=_run_console),
    }
    examples = list(Sybil([parsers[language] for language in languages]).parse(path))
    for example in examples:
        example.evaluate()
    return len(examples)


def blocks(path, languages=("python", "sh", "console")):
    """Return the number of code blocks of a page in these languages."""
    return len(re.findall(rf"^```(?:{'|'.join(languages)})$", path.read_text(), re.MULTILINE))
