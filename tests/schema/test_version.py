"""Test the version: derived from git at build time, then read from files, and correct in an editable install."""

import subprocess
import sys
from pathlib import Path

import pytest

from environments import copy_sources
from natgrad.schema.version import FALLBACK_VERSION, git_version, installed_version


def git(repository, *arguments):
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", repository, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(repository):
    git(repository, "commit", "--allow-empty", "--message", "Change something")
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "file").write_text("content")
    git(folder, "add", "file")
    commit(folder)
    return folder


def test_without_a_tag_the_version_has_the_number_of_commits_and_the_last_commit(repository):
    last = commit(repository)
    assert git_version(repository) == f"0.1.dev2+g{last[:7]}"


@pytest.mark.parametrize(
    ("tag", "after"), [("v1.2.3", "1.2.4.dev2"), ("v1.9", "1.10.dev2"), ("v2.0rc1", "2.0rc2.dev2")]
)
def test_a_tag_gives_the_version_and_later_commits_lead_to_the_next(repository, tag, after):
    git(repository, "tag", "--annotate", tag, "--message", "Release")
    git(repository, "tag", "unrelated")
    assert git_version(repository) == tag.removeprefix("v")
    commit(repository)
    last = commit(repository)
    assert git_version(repository) == f"{after}+g{last[:7]}"


@pytest.mark.parametrize("tagged", [False, True])
def test_uncommitted_changes_are_in_the_version(repository, tagged):
    last = git(repository, "rev-parse", "HEAD")
    if tagged:
        git(repository, "tag", "v1.2.3")
    (repository / "file").write_text("other content")
    base = "1.2.3" if tagged else "0.1.dev1"
    assert git_version(repository) == f"{base}+g{last[:7]}.dirty"


def test_a_shallow_clone_without_tags_has_a_version_that_names_its_commit(repository, tmp_path):
    git(repository, "tag", "v1.2.3")
    last = commit(repository)
    git(tmp_path, "clone", "--quiet", "--depth", "1", "--no-tags", repository.as_uri(), "shallow")
    assert git_version(tmp_path / "shallow") == f"0.1.dev1+g{last[:7]}"


def test_without_a_repository_the_version_is_the_fallback_and_without_git_it_has_the_commit(
    repository, tmp_path, monkeypatch
):
    unpacked = repository / "archive"
    unpacked.mkdir()
    # The repository around an unpacked archive is not that of its code.
    assert git_version(unpacked) == FALLBACK_VERSION
    assert git_version(None) == FALLBACK_VERSION
    last = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert git_version(repository) == f"{FALLBACK_VERSION}+g{last[:7]}"


def test_a_hook_of_another_repository_does_not_change_the_version(repository, tmp_path, monkeypatch):
    expected = git_version(repository)
    git(tmp_path, "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert git_version(repository) == expected


def test_an_editable_install_shows_that_its_repository_has_moved(repository):
    recorded = git_version(repository)
    assert installed_version(recorded, repository) == recorded
    new = commit(repository)
    assert installed_version(recorded, repository) == f"{recorded}.moved.g{new[:7]}"
    # It is unknown whether changes that were not committed when it was installed still exist.
    assert installed_version(f"{recorded}.dirty", repository) == f"{recorded}.moved.g{new[:7]}"


@pytest.mark.parametrize("recorded", [FALLBACK_VERSION, "1.2.3"])
def test_a_checkout_always_names_its_commit(repository, recorded):
    last = git(repository, "rev-parse", "HEAD")
    assert installed_version(recorded, repository) == f"{recorded}+g{last[:7]}"


def test_the_commit_is_found_detached_packed_and_in_a_further_work_tree(repository, tmp_path):
    recorded = git_version(repository)
    new = commit(repository)
    expected = f"{recorded}.moved.g{new[:7]}"
    git(repository, "worktree", "add", "--quiet", "-b", "branch", tmp_path / "tree")
    assert installed_version(recorded, tmp_path / "tree") == expected
    git(repository, "pack-refs", "--all")
    assert installed_version(recorded, repository) == expected
    assert installed_version(recorded, tmp_path / "tree") == expected
    git(repository, "checkout", "--quiet", "--detach")
    assert installed_version(recorded, repository) == expected


def test_without_a_readable_repository_the_recorded_version_is_used(tmp_path, repository):
    assert installed_version("0.1.dev3+g1234567", tmp_path) == "0.1.dev3+g1234567"
    git(tmp_path, "init", "--quiet", "new")  # it has no commit yet
    assert installed_version("0.1.dev3+g1234567", tmp_path / "new") == "0.1.dev3+g1234567"


LOADED = """
import sys
import natgrad.schema.version as module
print(module.__version__)
print(*sys.modules)
"""


def test_importing_the_version_runs_no_program_and_loads_nothing_heavy(tmp_path):
    source = copy_sources(tmp_path)
    git(source, "init", "--quiet")
    last = commit(source)
    (source / "pipeline" / "natgrad" / "schema" / "_version.py").write_text("__version__ = '0.1.dev7+g7654321'\n")
    command = [sys.executable, "-S", "-c", LOADED]
    environment = {"PYTHONPATH": str(source / "pipeline"), "PATH": str(Path(sys.executable).parent)}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    version, modules = printed.splitlines()
    assert version == f"0.1.dev7+g7654321.moved.g{last[:7]}"
    assert not {"numpy", "subprocess", "importlib.metadata"} & set(modules.split())
