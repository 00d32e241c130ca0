"""Test that a log which is examined is listed once, and that each of its first steps is opened once."""

from collections import Counter
from contextlib import contextmanager

from logs import random_walk, write_log
from natgrad.ingestion.rehearsal import rehearse
from natgrad.sources.listed import OpenedOnce
from natgrad.sources.opening import open_source
from natgrad.storage import LocalStorage


class Counted:
    """A log that counts how often it is listed, and how often each step is opened and closed."""

    def __init__(self, path):
        self._log, self.location = open_source(LocalStorage(path)), path
        self.listings, self.opened, self.closed = 0, Counter(), Counter()

    def steps(self):
        self.listings += 1
        return self._log.steps()

    @contextmanager
    def open(self, step):
        self.opened[step.number] += 1
        with self._log.open(step) as reader:
            yield reader
        self.closed[step.number] += 1


def test_the_first_steps_are_opened_once_and_all_are_closed(tmp_path):
    log = Counted(write_log(tmp_path / "log", random_walk(14, tensors={"w": (3,)})))
    examined = OpenedOnce(log)
    for session in (1, 2):
        with examined:
            for _ in range(3):
                contents = []
                for step in examined.steps():
                    with examined.open(step) as reader:
                        contents.append(reader.content().scalars["loss"])
                assert len(set(contents)) == 14
            kept = [number for number, count in log.opened.items() if count == session]
            assert kept == list(range(10))
        assert log.opened == log.closed
    assert log.listings == 1


def test_a_rehearsal_opens_each_state_once(tmp_path):
    log = Counted(write_log(tmp_path / "log", random_walk(14, tensors={"w": (3,)})))
    found = rehearse(log)
    assert log.listings == 1
    assert log.opened == log.closed == Counter({0: 1, 1: 1, 13: 1})
    with found.log as examined, examined.open(found.steps[0]) as reader:
        assert reader.content().arrays == found.content.arrays
    assert log.listings == 1
