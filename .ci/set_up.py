"""Install the packages of a lock file and this project into .venv, and print progress as plain lines.

The Makefile runs ``python3 .ci/set_up.py LOCK [REQUIREMENT ...]``, which needs only Python 3.11 and the package
index that pip is configured for. Requirements that are not in a lock file come after LOCK.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
LOG = ENVIRONMENT / "pip.log"

SECONDS_BETWEEN_LINES = 5


def log_line(line):
    """Print a line without buffering, even to a pipe."""
    print(line, flush=True)


def pip(*arguments):
    """Run pip and print its progress. If it fails, exit with its errors."""
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    # Modules are compiled when they are first imported. Most never are, and compiling all of them doubles the time.
    command += ["--no-compile", "--no-input", "--progress-bar", "off", *arguments]
    collected, shown, output = 0, time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            output.append(line)
            collected += line.startswith(("Collecting ", "Processing "))
            if line.startswith("Installing collected packages: ") and collected:
                log_line(f"  unpacking {line.count(',') + 1} packages")
            elif collected and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                log_line(f"  {collected} packages downloaded")
                shown = time.monotonic()
    with LOG.open("a") as log:
        log.writelines(output)
    if process.returncode:
        errors = [line for line in output if line.lstrip().startswith(("ERROR", "error"))]
        sys.exit(f"pip failed; the full output is in {LOG}\n{''.join(errors or output[-10:])}")


def main(lock, *requirements):
    """Create the environment if it does not exist, and install the packages into it."""
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"natgrad-pipeline needs Python 3.11 or newer, and {sys.executable} is {found}.\n"
            "Specify another one: make PYTHON=python3.12 demo"
        )
    start = time.monotonic()
    log_line(f"Creating the environment {ENVIRONMENT} with Python {sys.version.split()[0]}")
    created = subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], capture_output=True, text=True)
    if created.returncode:
        sys.exit(f"The environment cannot be created:\n{created.stdout}{created.stderr}")
    log_line(f"Installing the packages in {lock} (log: {LOG})")
    # The lock file contains all dependencies, with their hashes.
    pip("--no-deps", "--require-hashes", "--requirement", str(ROOT / lock))
    for requirement in requirements:
        log_line(f"Installing {requirement}")
        # pip would warn about the requirements that the lock file excludes (see `make lock`).
        # tests/packaging/test_lock_files.py checks that nothing else is missing.
        pip("--no-warn-conflicts", requirement)
    log_line("Installing natgrad-pipeline from this folder")
    pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    log_line(f"The environment is complete after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
