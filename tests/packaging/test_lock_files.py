"""Test that the lock files agree with each other, with pyproject.toml and with the exclusions in the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


@dataclass(frozen=True)
class Pin:
    name: str
    version: str
    marker: Marker | None
    hashes: frozenset[str]

    @property
    def is_for_this_platform(self):
        return self.marker is None or self.marker.evaluate()


def pins(lock):
    """Return the pins of a lock file."""
    entries = re.split(
        r"\n(?=\S)", re.sub(r"\n?^ *#.*$", "", (ROOT / lock).read_text(), flags=re.MULTILINE).strip()
    )
    found = []
    for entry in entries:
        line, *hashes = re.split(r"\s*\\\s+--hash=", entry)
        requirement = Requirement(line)
        ((operator, version),) = ((part.operator, part.version) for part in requirement.specifier)
        assert operator == "=="
        assert hashes
        found.append(Pin(canonicalize_name(requirement.name), version, requirement.marker, frozenset(hashes)))
    return found


def excluded(variable):
    """Return the packages in a variable of the Makefile."""
    return set(re.search(rf"^{variable} := (.*)$", MAKEFILE, re.MULTILINE)[1].split())


LOCKS = {"requirements.lock": excluded("EXCLUDED"), "requirements-demo.lock": excluded("EXCLUDED_FROM_DEMO")}
EXTRAS = {"requirements.lock": ("dev", "writers"), "requirements-demo.lock": ("build", "experiments")}


def test_the_lock_of_the_demo_is_a_part_of_the_other_one():
    complete = {(pin.name, pin.version): pin.hashes for pin in pins("requirements.lock")}
    for pin in pins("requirements-demo.lock"):
        assert complete[pin.name, pin.version] == pin.hashes


def test_the_demo_installs_at_most_150_packages():
    # pip and setuptools are in the environment from the start, and the project itself is installed last.
    names = {pin.name for pin in pins("requirements-demo.lock") if pin.is_for_this_platform}
    assert len(names | {"pip", "setuptools", "natgrad-pipeline"}) <= 150


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_contains_no_index_and_no_url(lock):
    assert not re.search(
        r"://|^\s*-{1,2}(i|f|index|extra-index|find-links)", (ROOT / lock).read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_contains_declared_and_build_requirements(lock):
    declared = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    queue = list(EXTRAS[lock])
    while queue:
        for line in PROJECT["project"]["optional-dependencies"][queue.pop()]:
            requirement = Requirement(line)
            if requirement.name == "natgrad-pipeline":
                queue += requirement.extras
            else:
                declared.append(line)
    found = {pin.name: pin.version for pin in pins(lock) if pin.is_for_this_platform}
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        assert name in LOCKS[lock] or requirement.specifier.contains(found[name]), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_omits_only_packages_listed_in_the_makefile(lock):
    # The set-up tells pip to ignore missing requirements, because these are excluded intentionally.
    names = {pin.name for pin in pins(lock) if pin.is_for_this_platform}
    assert not names & LOCKS[lock]
    missing = {}
    for name in names:
        for requirement in map(Requirement, metadata.distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                if needed not in names | LOCKS[lock] | {"setuptools"}:
                    missing[needed] = name
    assert not missing


def test_set_up_prints_the_errors_of_pip_and_the_path_of_its_log(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "set_up.py", tmp_path / ".ci")
    (tmp_path / "some.lock").write_text(f"no-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    done = subprocess.run(
        [sys.executable, tmp_path / ".ci" / "set_up.py", "some.lock"],
        env=os.environ | {"PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Installing the packages in some.lock" in done.stdout
    assert "ERROR: No matching distribution found for no-such-package==1.0" in done.stderr
    assert "no-such-package" in (tmp_path / ".venv" / "pip.log").read_text()
