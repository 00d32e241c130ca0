"""The package as users have it: a wheel, installed into an environment without the source tree."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the source tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


class Installed:
    """An environment with the wheel, and with the libraries of the tests but not their installation of the package.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder):
        self.bin = folder / "bin"
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(self, program, *arguments, **options):
        """Run a program of the environment and return what it printed; fail with that where it failed."""
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)],
            env=self.environment | options.pop("environment", {}),
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", "--disable-pip-version-check", wheel], check=True)
    # The .pth files in a folder that a .pth file names are not read: the editable installation is not there.
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder)
