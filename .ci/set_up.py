"""Install a lock file and this project into the environment .venv, and print plain lines about the progress.

``python3 .ci/set_up.py LOCK [REQUIREMENT ...]`` is called by the Makefile. It needs Python 3.11 and nothing else:
packages come from the index that pip is configured for. Requirements that are in no lock file follow the lock.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
LOG = ENVIRONMENT / "pip.log"

SECONDS_BETWEEN_LINES = 5


def say(line):
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def pip(*arguments):
    """Run pip, print how far it is, and exit with its errors if it fails."""
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    # Modules are compiled when they are first imported. Most never are, and compiling all doubles the time.
    command += ["--no-compile", "--no-input", "--progress-bar", "off", *arguments]
    collected, shown, output = 0, time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            output.append(line)
            collected += line.startswith(("Collecting ", "Processing "))
            if line.startswith("Installing collected packages: ") and collected:
                say(f"  unpacking {line.count(',') + 1} packages")
            elif collected and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                say(f"  {collected} packages fetched")
                shown = time.monotonic()
    with LOG.open("a") as log:
        log.writelines(output)
    if process.returncode:
        errors = [line for line in output if line.lstrip().startswith(("ERROR", "error"))]
        sys.exit(f"pip failed; its complete output is in {LOG}\n{''.join(errors or output[-10:])}")


def main(lock, *requirements):
    """Make the environment if it is not there, and install into it."""
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"natgrad-pipeline needs Python 3.11 or newer, and {sys.executable} is {found}.\n"
            "Name another one: make PYTHON=python3.12 demo"
        )
    start = time.monotonic()
    say(f"Environment {ENVIRONMENT} of Python {sys.version.split()[0]}")
    made = subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"The environment cannot be made:\n{made.stdout}{made.stderr}")
    say(f"Installing the packages of {lock} (log: {LOG})")
    # All dependencies are in the lock, with their hashes.
    pip("--no-deps", "--require-hashes", "--requirement", str(ROOT / lock))
    for requirement in requirements:
        say(f"Installing {requirement}")
        # pip would report here which requirements the lock leaves out on purpose (see `make lock`).
        # tests/packaging/test_locks.py checks that it leaves out nothing else.
        pip("--no-warn-conflicts", requirement)
    say("Installing natgrad-pipeline from this folder")
    pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    say(f"The environment is complete after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
