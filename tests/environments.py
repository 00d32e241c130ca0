"""Create environments like those of users: a wheel, installed offline, and links to selected packages."""

import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def copy_sources(folder):
    """Copy the files that a build reads, so that it does not write to the work tree. The copy has no repository."""
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
    """Return the installed distributions with these names and all their requirements on this platform."""
    found, queue = {}, [(name, "") for name in names]
    seen = set(queue)
    while queue:
        name, extra = queue.pop()
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a lock file excludes it on purpose: tests/packaging/test_lock_files.py
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                canonical = canonicalize_name(requirement.name)
                new = {(canonical, ""), *((canonical, wanted) for wanted in requirement.extras)} - seen
                seen |= new
                queue += new
    return list(found.values())


class Environment:
    """A virtual environment that contains a wheel.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder):
        self.bin = folder / "bin"
        unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # they point to the code of the work tree
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}

    def run(self, program, *arguments, environment=None, **options):
        """Run a program of the environment and return its output. If the program fails, fail with its output."""
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def make_environment(folder, wheel, distributions):
    """Create a virtual environment in which only a wheel and some linked distributions can be imported."""
    venv.create(folder, symlinks=True, with_pip=False)
    # uv is ten times as fast as pip.
    install = ["-m", "uv", "pip", "install", "--python", folder / "bin" / "python", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *install, "--no-cache", wheel], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():  # packages of one namespace share a folder
                link.symlink_to(distribution.locate_file(top))
    return Environment(folder)
