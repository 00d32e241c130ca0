"""Derive the version of the package from git, and define the version of the results.

hatchling runs `git_version` at build time (``[tool.hatch.version]`` in pyproject.toml) and writes the result to
``_version.py`` next to this file. Importing this module reads that file and never runs git. The version is 1.2.3 at
the tag ``v1.2.3``, and 1.2.4.dev5+g<commit> five commits later. Without a tag the base is 0.1: the version of the
300th commit is 0.1.dev300+g<commit>. Without a repository it is `FALLBACK_VERSION`. If git is not installed, as in
a small container image, the commit is appended to `FALLBACK_VERSION`.

An editable install keeps the ``_version.py`` from the time of its installation, although the code may change.
Therefore the commit is compared with HEAD, by reading files in ``.git``. If HEAD has moved, the version contains
both commits: 0.1.dev300+g1111111.moved.g2222222. Uncommitted changes are not detected in an editable install. An
installed wheel is not in a repository, and its version is fixed. The version of a wheel built with uncommitted
changes ends in ``.dirty``.

hatch-vcs is not used, because it needs setuptools-scm, vcs-versioning and setuptools in every environment that is
installed from the lock files, and because it does not detect that HEAD has moved and does not work without git.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

__all__ = ["FALLBACK_VERSION", "RESULTS_VERSION", "__version__", "git_version", "installed_version"]

RESULTS_VERSION = 9
"""Version of the numbers in ``results.zarr``. A scan processes a run again if its results have another version.

Increment it in every commit that changes the results for the same log and options: a changed formula or default, a
new, renamed or removed variable, or a corrected error. Do not increment it for changes to speed, texts or figures.
For a change to the layout of the stores, increment `natgrad.schema.layout.LAYOUT_VERSION` instead.
"""

FALLBACK_VERSION = "0.1.dev0"

_PACKAGES = Path(__file__).resolve().parents[2]

# None in an installed wheel. Only a checkout has the packages in a folder "pipeline" next to pyproject.toml.
_REPOSITORY = (
    _PACKAGES.parent if _PACKAGES.name == "pipeline" and (_PACKAGES.parent / "pyproject.toml").is_file() else None
)

_DESCRIPTION = re.compile(r"v(?P<tag>.+)-(?P<commits>\d+)-(?P<commit>g[0-9a-f]+)(?P<dirty>\.dirty)?")


def git_version(repository: Path | None = _REPOSITORY) -> str:
    """Return the version that git derives for a repository; this runs git.

    Parameters
    ----------
    repository : Path, optional
        Top folder of the repository. The default is the repository that contains this file.
    """
    # git would also search the parent folders, but an unpacked archive is not part of the repository around it.
    if repository is None or not (repository / ".git").exists():
        return FALLBACK_VERSION
    described = _git(
        repository, "describe", "--tags", "--match", "v[0-9]*", "--long", "--abbrev=7", "--dirty=.dirty"
    )
    found = _DESCRIPTION.fullmatch(described)
    if found:
        dirty = found["dirty"] or ""
        if found["commits"] == "0":
            return found["tag"] + (f"+{found['commit']}.dirty" if dirty else "")
        # The next version that the tag allows: 1.2.3 becomes 1.2.4, and 1.0rc1 becomes 1.0rc2.
        base = re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), found["tag"])
        return f"{base}.dev{found['commits']}+{found['commit']}{dirty}"
    commits = _git(repository, "rev-list", "--count", "HEAD")
    commit = _git(repository, "describe", "--always", "--exclude", "*", "--abbrev=7", "--dirty=.dirty")
    if commits and commit:
        return f"0.1.dev{commits}+g{commit}"
    return installed_version(FALLBACK_VERSION, repository)


def _git(repository: Path, *arguments: str) -> str:
    """Return the output of a git command, or an empty string if it fails or git is not installed."""
    import os
    import subprocess

    # A git hook sets GIT_DIR, which would redirect the command to the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True, env=environment
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def installed_version(recorded: str, repository: Path) -> str:
    """Return the version of the code in a repository, without running git.

    Parameters
    ----------
    recorded : str
        Version at the time of the installation.
    repository : Path
        Top folder of the repository.
    """
    head = _head(repository / ".git")
    public, _, local = recorded.removesuffix(".dirty").partition("+")
    if not head:
        return recorded
    if not local:  # the code was never installed, or its version is a tag, which does not contain the commit
        return f"{public}+g{head[:7]}"
    return f"{public}+{local}" + ("" if head.startswith(local.removeprefix("g")) else f".moved.g{head[:7]}")


def _head(git: Path) -> str:
    """Return the commit of HEAD from the files of a git folder, or an empty string if there is none."""
    try:
        if git.is_file():  # the file of a work tree contains "gitdir: <path>"
            git = git.parent / git.read_text().partition(":")[2].strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        reference = head.partition(":")[2].strip()
        # A work tree shares the branches of its repository. The file "commondir" contains the path of that folder.
        pointer = git / "commondir"
        common = git / pointer.read_text().strip() if pointer.is_file() else git
        if (common / reference).is_file():
            return (common / reference).read_text().strip()
        packed = re.search(rf"^([0-9a-f]+) {re.escape(reference)}$", (common / "packed-refs").read_text(), re.M)
        return packed[1] if packed else ""
    except (OSError, UnicodeDecodeError):
        return ""


try:
    # Written at build time, so type checkers of a checkout do not find it.
    _installed = str(import_module("natgrad.schema._version").__version__)
except ImportError:  # at build time, and in a checkout that was never installed
    _installed = FALLBACK_VERSION

__version__: str = _installed if _REPOSITORY is None else installed_version(_installed, _REPOSITORY)
