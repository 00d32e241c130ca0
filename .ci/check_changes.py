"""Check that a branch that changes a package also adds a fragment of the changelog.

``python .ci/check_changes.py`` compares HEAD, and files that are not committed, with the last commit that HEAD and
``main`` have in common. It fails if a file below ``pipeline`` or ``flows`` has changed but no fragment was added or
edited in ``changes``. On ``main`` itself there is nothing to compare. In a clone without ``main`` or its history,
the comparison is not possible; the program prints this and succeeds. The names of fragments are always checked.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline/", "flows/")
FRAGMENTS = "changes/"
MAIN = ("origin/main", "main")


def git(*arguments, root=ROOT):
    """Return the lines that git prints, or None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.splitlines()


def invalid_names(root=ROOT):
    """Return the files in the folder of fragments that towncrier would ignore."""
    with (root / "pyproject.toml").open("rb") as file:
        kinds = "|".join(kind["directory"] for kind in tomllib.load(file)["tool"]["towncrier"]["type"])
    valid = re.compile(rf"(\+[a-z0-9-]+|\d+)\.({kinds}|internal)\.md|\.gitignore")
    return sorted(path.name for path in (root / FRAGMENTS).iterdir() if not valid.fullmatch(path.name))


def changed_files(root=ROOT):
    """Return the files that differ from the last common commit with main; None if there is no such commit."""
    bases = [base[0] for name in MAIN if (base := git("merge-base", "HEAD", name, root=root))]
    if not bases:
        return None
    # The local main may be ahead of its remote, or behind it. The newer common commit is the right one.
    base = max(bases, key=lambda commit: int(git("rev-list", "--count", commit, root=root)[0]))
    different = git("diff", "--name-only", "--no-renames", "--diff-filter=d", base, root=root)
    deleted = git("diff", "--name-only", "--no-renames", "--diff-filter=D", base, root=root)
    added = git("ls-files", "--others", "--exclude-standard", root=root)
    # A deleted fragment does not describe the change.
    return different + added + [name for name in deleted if not name.startswith(FRAGMENTS)]


def main(root=ROOT):
    """Print the problem, if there is one, and return the exit status."""
    if wrong := invalid_names(root):
        sys.stdout.write(f"{FRAGMENTS}{wrong[0]}: name it SLUG.KIND.md, see CONTRIBUTING.md, 'Changelog'\n")
        return 1
    changed = changed_files(root)
    if changed is None:
        sys.stdout.write("no common commit with main: cannot check for a fragment of the changelog\n")
        return 0
    package = [name for name in changed if name.startswith(PACKAGES)]
    if package and not any(name.startswith(FRAGMENTS) for name in changed):
        sys.stdout.write(
            f"{len(package)} files of the packages differ from main, but {FRAGMENTS} has no new fragment: "
            "add one, see CONTRIBUTING.md, 'Changelog'\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
