"""Environments as users have them: a wheel, installed without network beside links to chosen packages."""

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def copy_sources(folder):
    """Copy what a build reads, so that builds do not write into the work tree. The copy has no repository."""
    ignored = shutil.ignore_patterns("__pycache__", "_version.py")
    for name in ("pipeline", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source, kind, out):
    """Build a wheel or sdist with the installed hatchling, and return its path."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out], cwd=source, check=True)
    (path,) = out.iterdir()
    return path


def required(*names):
    """Return the installed distributions with these names and all that they require on this platform."""
    found, queue = {}, [(name, "") for name in names]
    seen = set(queue)
    while queue:
        name, extra = queue.pop()
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a lock leaves it out on purpose: tests/packaging/test_locks.py
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                canonical = canonicalize_name(requirement.name)
                new = {(canonical, ""), *((canonical, wanted) for wanted in requirement.extras)} - seen
                seen |= new
                queue += new
    return list(found.values())


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a wheel in it."""

    folder: Path

    @property
    def python(self):
        return self.folder / "bin" / "python"

    def run(self, *command, cwd, check=True, **variables):
        """Run a program of the environment by name, without what leads to the code of the work tree."""
        unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
        program, *arguments = map(str, command)
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=cwd,
            env=environment,
            check=check,
            capture_output=True,
            text=True,
        )


def make_environment(folder, wheel, distributions):
    """Make a virtual environment in which only a wheel and links to some distributions can be imported."""
    venv.create(folder, symlinks=True, with_pip=False)
    install = ["-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():  # packages of one namespace share a folder
                link.symlink_to(distribution.locate_file(top))
    return Environment(folder)
