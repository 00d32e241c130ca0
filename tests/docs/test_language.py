"""The language check rejects the listed phrases, and accepts their replacements."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECIFICATION = importlib.util.spec_from_file_location("check_language", ROOT / ".ci" / "check_language.py")
check_language = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(check_language)

EXAMPLES = [
    (
        "'foo' is no way of storing; choose of plain, icechunk",
        "unknown storage kind 'foo'; choose one of: plain, icechunk",
    ),
    (
        "'foo' cannot be included; choose of optimizer",
        "unknown value 'foo' for --include; the only choice is: optimizer",
    ),
    (
        "0 workers cannot work",
        "--workers must be at least 1, got 0",
    ),
    (
        "every 0.0 seconds is no schedule",
        "--every must be greater than 0 seconds, got 0.0",
    ),
    (
        "another process is writing this trajectory: it has not said yet which",
        "another process holds the write lock (holder not recorded yet)",
    ),
    (
        "Compare all that OUT's stores hold with its checksums; exits with 1 where something was damaged.",
        "Verify all stored data against its checksums. Exits with 1 if anything is corrupt.",
    ),
    (
        "all is as it was written",
        "OK: all checksums match",
    ),
    (
        "Say of every run below ROOT how far it is, how far behind its log, and what failed last.",
        "Show progress, lag and last error of every run under ROOT.",
    ),
    (
        "Log format (natgrad formats); found if left out.",
        "Log format (see 'natgrad formats'). Detected automatically by default.",
    ),
    (
        "No progress, no remarks; warnings and errors only.",
        "Show only warnings and errors.",
    ),
    (
        "Store this too: optimizer, what it keeps between steps (may be repeated).",
        "Also store the optimizer state (--include optimizer). Repeatable.",
    ),
    (
        "What is written is on disk whole, under its name, or it is told why not.",
        "Durable, atomic file writes with actionable errors.",
    ),
    (
        "Ask the system to read the file where its ends are not in the cache; whether it was asked.",
        "Request kernel read-ahead unless the file is already cached. Return True if requested.",
    ),
    (
        "Read to an address; whether all came.",
        "Read exactly size bytes into memory at address. Return False on a short read.",
    ),
    (
        "Whether what the optimizer keeps is stored: as a trajectory was begun, so it goes on.",
        "Return whether to store optimizer state. An existing trajectory keeps its original setting.",
    ),
    (
        "Return how to read on: as the trajectory was begun, whether it is said again or not.",
        "Return the read options for resuming; they are fixed when the trajectory is created.",
    ),
    (
        "Who waits has been told the same at the pass before.",
        "With --follow these warnings were already shown on the previous scan.",
    ),
    (
        "Analysis of the options of a face, of which the others are passed over",
        "Build an Analysis from command-line or flow options, ignoring unrelated ones.",
    ),
    (
        "What a user may say to commands: each argument and option that several of them take, once.",
        "Shared command-line options.",
    ),
    (
        "The share of a tensor in the change of the loss is told by the model's pair.",
        "A tensor's share of the loss change is computed from the model's pair.",
    ),
    (
        "Quotient, 0 where the denominator is 0: no component along a vector that is none.",
        "Divide, returning 0 where the denominator is 0 (projection onto a zero vector).",
    ),
    (
        "Of a small learning rate rho is small as well. More is not to be had from this ledger.",
        "rho shrinks with the learning rate. The ledger carries no further precision.",
    ),
    (
        "Forget the bands, which do not say as this version does what they were computed from, and be of it.",
        "Drop records written by an older layout version and mark the ledger as current.",
    ),
    (
        "Place as it is now, with what others have committed since; of a version that was asked for, that.",
        "Return the latest snapshot, or the pinned version if one was requested.",
    ),
    (
        "What a look found in OUT before it started a flow: where it stands otherwise, another one was faster.",
        "Outcome seen before scheduling. If it changed since, another worker has already processed the run.",
    ),
]
"""Rejected texts, and how to write them."""


EXAMPLES += [
    ("give a smaller learning rate, or use the method exponential", "use a smaller learning rate"),
    ("--map KEY, or give the log that contains it", "--map KEY, or pass the log that contains it"),
    ("Number of tensors with curves of their own", "Number of tensors that are drawn separately"),
    ("Largest number of threads.", "Maximum number of threads."),
    ("Name of each tensor to its value", "Value of each tensor, by name"),
    ("the same names to the gradient", "the gradient, with the names of the parameters"),
    ("2 steps are left out", "2 steps are omitted"),
    ("It then goes on without the step", "It then continues without the step"),
    ("contiguous states are read at once", "contiguous states are read together"),
    ("a number in place of a name", "a number instead of a name"),
    ("A lock file takes their place.", "A lock file replaces them."),
    ("the scheduler does not answer", "the scheduler does not respond"),
    ("the files of this step do not exist any more", "the files of this step no longer exist"),
    ("contourpy is none any more", "contourpy is no longer one"),
    ("an object in the place of a tensor", "an object instead of a tensor"),
    ("The attribute means nothing without a log.", "The attribute has no meaning without a log."),
    ("states that are at most so many updates apart", "states that are at most this many updates apart"),
    ("a loss of another state than the gradient", "a loss and a gradient of different states"),
    ("a file that was changed lately", "a file that was changed recently"),
    ("The optimizer is put together from its parts.", "The optimizer is assembled from its parts."),
    ("Size from which on a copy is announced.", "Size above which a copy is announced."),
    ("the same bits, whatever the executor", "the same bits, regardless of the executor"),
    ("a gradient, as the file name says", "a gradient, as the file name indicates"),
    ("that nothing waits for ever", "that nothing waits forever"),
    ("it returns something else than a function", "it does not return a function"),
    ("the objective cannot be made", "cannot create the objective"),
    ("evaluates an objective of yours", "evaluates your objective"),
    ("Tensor name to its metric.", "Metric by tensor name."),
    ("Compute it anew", "Compute it from scratch"),
    ("Stored beside it", "Stored next to it"),
    ("equal but for the names", "equal except for the names"),
    ("the mean, and the error thereof", "the mean, and its error"),
    ("the rest is not definite, and neither is the matrix", "the rest and the matrix are not definite"),
    ("Return it.\n\n    Notes ----- It is short.", "Return it.\n\n    Notes\n    -----\n    It is short."),
]


@pytest.mark.parametrize(("rejected", "accepted"), EXAMPLES)
def test_rejected_phrases_are_found_and_their_replacements_are_not(rejected, accepted):
    assert check_language.findings(rejected, docstring=True)
    assert check_language.findings(accepted, docstring=True) == []


def test_every_rule_has_an_example():
    found = {rule for rejected, _ in EXAMPLES for rule in check_language.findings(rejected)}
    assert found >= {*check_language.RULES}


@pytest.mark.parametrize(
    "text", ["Whether it is", "What a user wants", "Of a sweep, the runs", "Who writes it", "How it is stored"]
)
def test_docstrings_do_not_start_with_these_words(text):
    assert check_language.findings(text, docstring=True)


def test_comments_docstrings_messages_and_pages_are_checked(tmp_path):
    code = tmp_path / "code.py"
    code.write_text('"""Whether it is."""\n\nx = 1  # computed anew\nraise ValueError(f"{x} is no number")\n')
    assert sorted(line for line, _, _ in check_language.check(code)) == [1, 3, 4]
    page = tmp_path / "page.md"
    page.write_text("Fine.\n\n```\nanew\n```\n\nStart anew.\n")
    assert [line for line, _, _ in check_language.check(page)] == [7]
