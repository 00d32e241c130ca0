"""Warnings about a log that is only tried are collected, and all others are logged."""

import logging

from natgrad.schema.logs import collected_warnings, logger


def test_the_messages_of_some_loggers_are_collected_with_escaped_names(caplog):
    with collected_warnings("natgrad.sources.joined", "natgrad.sources.checkpoints") as messages:
        logger("natgrad.sources.checkpoints.step_folder").warning("%s is skipped", "a\nb")
        logger("natgrad.sources.joined").info("not a warning")
        logger("natgrad.schema.extensions").warning("outdated")
    logger("natgrad.sources.joined").warning("again")
    assert messages == ["a\\nb is skipped"]
    assert [record.getMessage() for record in caplog.records] == ["outdated", "again"]


def test_loggers_are_as_before_even_after_an_error():
    root = logging.getLogger("natgrad.sources.joined")
    before = (root.handlers, root.propagate)
    try:
        with collected_warnings("natgrad.sources.joined"):
            raise KeyError
    except KeyError:
        assert (root.handlers, root.propagate) == before
