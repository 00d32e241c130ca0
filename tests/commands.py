"""Run the command ``natgrad``, in this process or in a new one."""

import io
import os
import subprocess
import sys
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from natgrad_flows import cli

NATGRAD = Path(sys.executable).with_name("natgrad")

Done = namedtuple("Done", "returncode stdout stderr")


def natgrad_process(*arguments, environment=None):
    """Run the installed command in a new process."""
    done = subprocess.run(
        [NATGRAD, *map(str, arguments)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def started(*arguments):
    """Start the command without Prefect in a new process, whose output is read from pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", "from natgrad.app.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def natgrad(*arguments):
    """Run the entry point of the command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["natgrad", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())
