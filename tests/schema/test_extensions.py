"""Broken formats of other packages: they are reported and skipped, and all other formats work."""

import json

from distributions import install, natgrad
from logs import random_walk, write_log

FORMAT = """
from natgrad.sources.formats import Format

def find(path):
    {find}

READER = Format(name={name!r}, layout="", gives="", lacks="", find=find, open=None)
"""

BROKEN = {
    "raises at import": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
    "does not exist": ("", "AttributeError"),
    "is not Python": ("def", "SyntaxError"),
    "is not a format": ("READER = 1", "is not an instance of natgrad.sources.formats.Format, but 1"),
    "has a name in use": (FORMAT.format(name="csv", find="return True"), "the name 'csv' is already in use"),
    "cannot examine": (FORMAT.format(name="mine", find="return 1 / 0"), "ZeroDivisionError"),
}


def test_broken_extensions_are_reported_and_the_others_work(tmp_path):
    site = tmp_path / "site"
    for number, (text, _) in enumerate(BROKEN.values()):
        points = {"natgrad.formats": {f"x{number}": f"broken_reader_{number}:READER"}}
        install(site, f"broken-reader-{number}", {f"broken_reader_{number}": text}, points)
    good = FORMAT.format(name="good", find="return False")
    install(site, "good-reader", {"good_reader": good}, {"natgrad.formats": {"y": "good_reader:READER"}})
    log = write_log(tmp_path / "log", random_walk(3))
    found = natgrad("inspect", log, "--json", installed=[site])
    assert json.loads(found.stdout)["steps"] == 3
    # Formats of this package take precedence over those of others.
    (tmp_path / "empty").mkdir()
    refused = natgrad("inspect", tmp_path / "empty", installed=[site], check=False)
    assert refused.returncode == 2
    for number, (_, reason) in enumerate(BROKEN.values()):
        (warning,) = {line for line in refused.stderr.splitlines() if f"broken-reader-{number}" in line}
        assert reason in warning
    assert "Traceback" not in refused.stderr
    listed = json.loads(natgrad("formats", "--json", installed=[site]).stdout)
    assert "good" in listed
    assert listed["csv"]["layout"]
