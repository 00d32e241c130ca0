"""Create distributions with entry points, in the form that pip installs, for tests of extensions."""

import os
import subprocess
import sys
from pathlib import Path


def install(folder, name, modules, entry_points, version="1.0"):
    """Install a distribution in a folder.

    ``modules`` maps names to their source text, ``entry_points`` groups to mappings of names to ``module:object``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


HOSTILE = """
import os, signal, time
from dataclasses import replace
from natgrad.sources.formats import FORMATS

steps = FORMATS["steps"]

def found(path):
    if (path / "search").exists():
        time.sleep(1000)
    return any((path / name).exists() for name in ("hang", "kill", "allocate"))

def opened(path, mapping):
    if (path / "hang").exists():
        time.sleep(1000)
    if (path / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    bytearray(64 << 30)

HOSTILE = replace(steps, name="hostile", find=found, open=opened)
"""
"""A reader that hangs, crashes or exhausts memory, if a folder has a file of such a name."""


def install_hostile(folder):
    """Install the reader `HOSTILE` in a folder."""
    points = {"natgrad.formats": {"hostile": "natgrad_hostile:HOSTILE"}}
    return install(folder, "natgrad-hostile", {"natgrad_hostile": HOSTILE}, points)


def natgrad(*arguments, installed=(), check=True):
    """Run the command in a process that also has the distributions of some folders."""
    path = os.pathsep.join([*map(str, installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [Path(sys.executable).with_name("natgrad"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=check,
    )
