"""The check that a branch adds a fragment of the changelog, in real repositories."""

import importlib.util
import subprocess
import sys

import pytest

from pages import ROOT

SPECIFICATION = importlib.util.spec_from_file_location("check_changes", ROOT / ".ci" / "check_changes.py")
check_changes = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(check_changes)


class Repository:
    """A repository on the branch ``topic``, which has the files of ``main``."""

    def __init__(self, folder):
        self.folder = folder
        self.write("pipeline/a.py", "a = 1\n")
        self.write("changes/+old.added.md", "Old.\n")
        self.write("pyproject.toml", (ROOT / "pyproject.toml").read_text())
        self.git("init", "--initial-branch", "main")
        self.commit()
        self.git("switch", "--create", "topic")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def git(self, *arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)

    def commit(self):
        self.git("add", ".")
        self.git("commit", "--message", "Change")

    def check(self):
        return check_changes.main(self.folder)


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "repository").mkdir()
    return Repository(tmp_path / "repository")


@pytest.mark.parametrize("committed", [True, False])
def test_a_change_of_a_package_needs_a_fragment(repository, committed, capsys):
    assert repository.check() == 0
    repository.write("pipeline/a.py", "a = 2\n")
    if committed:
        repository.commit()
    assert repository.check() == 1
    assert "1 files of the packages differ from main" in capsys.readouterr().out
    repository.write("changes/+new.fixed.md", "New.\n")
    if committed:
        repository.commit()
    assert repository.check() == 0


def test_a_new_and_a_deleted_file_are_changes(repository):
    repository.write("flows/b.py", "b = 1\n")
    assert repository.check() == 1
    repository.git("rm", "--quiet", "pipeline/a.py")
    (repository.folder / "flows" / "b.py").unlink()
    assert repository.check() == 1


def test_other_files_need_no_fragment(repository):
    repository.write("docs/page.md", "Text.\n")
    assert repository.check() == 0


def test_a_deleted_fragment_describes_nothing(repository):
    repository.git("rm", "--quiet", "changes/+old.added.md")
    repository.write("changes/.gitignore", "!.gitignore\n")
    repository.write("changes/+kept.internal.md", "Kept.\n")
    repository.git("switch", "main")
    repository.commit()
    repository.git("switch", "topic")
    repository.git("merge", "--ff-only", "main")
    repository.git("rm", "--quiet", "changes/+kept.internal.md")
    repository.write("pipeline/a.py", "a = 2\n")
    assert repository.check() == 1


def test_main_itself_is_not_compared_with_anything(repository):
    repository.git("switch", "main")
    repository.write("pipeline/a.py", "a = 2\n")
    repository.commit()
    assert repository.check() == 0


def test_changes_that_main_made_since_are_not_those_of_the_branch(repository):
    repository.git("switch", "main")
    repository.write("pipeline/a.py", "a = 2\n")
    repository.commit()
    repository.git("switch", "topic")
    assert repository.check() == 0


def test_a_fresh_clone_and_a_clone_without_history_pass(repository, tmp_path, capsys):
    repository.write("pipeline/a.py", "a = 2\n")
    repository.commit()
    for name, arguments in {"shallow": ("--depth", "1", "--branch", "topic"), "main": ("--branch", "main")}.items():
        command = ["git", "clone", "--quiet", *arguments, repository.folder.as_uri(), tmp_path / name]
        subprocess.run(command, check=True, capture_output=True)
        assert check_changes.main(tmp_path / name) == 0
        assert ("no common commit with main" in capsys.readouterr().out) == (name == "shallow")


@pytest.mark.parametrize("name", ["+new.md", "new.added.md", "+new.invented.md", "+new.added.txt"])
def test_a_fragment_that_towncrier_would_not_find_is_named(repository, name, capsys):
    repository.write(f"changes/{name}", "New.\n")
    assert repository.check() == 1
    assert f"changes/{name}: name it SLUG.KIND.md" in capsys.readouterr().out


def test_the_changelog_has_every_fragment_except_internal_ones(repository):
    repository.write("changes/+new.fixed.md", "A corrected error.\n")
    repository.write("changes/+hidden.internal.md", "A hidden change.\n")
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "1.0"]
    draft = subprocess.run(command, cwd=repository.folder, check=True, capture_output=True, text=True).stdout
    assert "### Fixed\n\n- A corrected error.\n" in draft
    assert "### Added\n\n- Old.\n" in draft
    assert "hidden" not in draft
