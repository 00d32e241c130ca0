"""Kill ingest and analysis at random times, repeatedly until they finish, and count the consequences.

Each process is a fork of this one, which has imported and compiled everything but has no threads. It is killed
after a random fraction of the time that the undisturbed work takes. After each kill, a fresh process inspects the
stores. Committed data must exist (otherwise they are lost), exist once (otherwise doubled), have the checksums of
the undisturbed run (otherwise differing), and match these checksums (otherwise damaged). When the work is
finished, all bytes must equal those of the undisturbed run.

    python tests/torture.py --kills 200 --seed 0

`damage_trials` damages one file of OUT at a time, in each of `WAYS` and for each kind of file, and processes the
run again. Each trial must give the results of the undamaged run, or a refusal that names the file and whose remedy
gives these results.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from logs import random_walk, write_log
from natgrad.app import scan
from natgrad.app.describe import describe_run
from natgrad.app.folder import RunFolder
from natgrad.app.opening import open_results
from natgrad.app.run import Analysis, analyze_run, ingest_run
from natgrad.app.status import status_of_run
from natgrad.app.verification import verify_run
from natgrad.compute.plan import PlanLimits
from natgrad.kernel import gram
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.schema.names import VECTORS
from natgrad.store import copies, open_ledger, open_trajectory
from opened import TIMES

STEPS, KILLED_COPIES = 24, 5
TENSORS = {"layer.weight": (20, 30), "layer.bias": (20,), "scale": ()}
INGEST = IngestLimits(chunk_elements=700, commit_bytes=1)
PLAN = PlanLimits(tile_bytes=1, least_tile_bytes=1, least_updates=1)
"""Limits with several chunks, ledger chunks and tiles, and a commit for each row of chunks."""


def warm():
    """Compile the kernel, so that processes spend their time on the work; no thread is started."""
    os.fsync = lambda descriptor: None  # these tests do not simulate power failures
    state = np.ones((2, 3), np.float32)
    products = np.empty((1, 1, len(VECTORS[:5]), len(VECTORS[:5])))
    gram.products([state], [state], np.array([0, 3]), products, np.empty((1, 1)), None)


def report(text):
    """Print the progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def work(log, out, in_place=False):
    ingest_run(log, out, limits=INGEST, in_place=in_place)
    analyze_run(out, Analysis(workers=1), limits=PLAN)


def copy_later(out):
    copies.materialize(RunFolder.of(out).trajectory)


def fork(task, *arguments):
    """Start a task in a separate process; return its id and the pipe for its result."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(read)
            with open(write, "w") as answer:  # noqa: PTH123
                json.dump(task(*arguments), answer)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    os.close(write)
    return process, read


def answer(task, *arguments):
    """Run a task in a separate process, and return its result."""
    return result(*fork(task, *arguments))


def result(process, read):
    """Wait for a process that was started by `fork`, and return its result."""
    with open(read) as pipe:  # noqa: PTH123
        text = pipe.read()
    assert os.waitpid(process, 0)[1] == 0
    return json.loads(text)


def files(out):
    """Files of the stores, except times."""
    return {
        str(path.relative_to(out)): path.read_bytes().hex()
        for store in ("trajectory.zarr", "ledger.zarr")
        for path in sorted((out / store).rglob("*"))
        if path.is_file() and path.suffix not in (".partial", ".tmp") and path.name != TIMES
    }


def observe(out):
    """Return what a reader finds: committed steps, their checksums, ledger chunks and damage."""
    folder = RunFolder.of(out)
    if not folder.trajectory.exists():
        return {"steps": [], "checksums": [], "ledger chunks": {}, "damages": []}
    states = open_trajectory(folder.trajectory)
    # Those of states in place are unknown before a pass has read them.
    rows = [
        {name: found.values[name][i].tolist() for name in states.dtypes if found.known[name][i]}
        for found in states.checksums.each()
        for i in range(len(next(iter(found.known.values()))))
    ]
    chunks = {}
    if folder.ledger.exists():
        book = open_ledger(folder.ledger)
        chunks = {name: (book.journal.folder / f"{name}.json").get().decode() for name in book.journal.names()}
    return {
        "steps": states.scalar("step").tolist(),
        "checksums": rows,
        "ledger chunks": chunks,
        "damages": [str(damage) for damage in verify_run(out)],
    }


def torture(folder, kills, seed, in_place=False):
    """Kill the given number of processes, and count the consequences."""
    rng = np.random.default_rng(seed)
    log, undisturbed = folder / "log", folder / "undisturbed"
    write_log(log, random_walk(STEPS, TENSORS, seed=seed))
    began = time.monotonic()
    answer(work, log, undisturbed, in_place)
    duration = time.monotonic() - began
    truth, expected = answer(observe, undisturbed), answer(files, undisturbed)
    names = ("kills", "runs", "in_ingest", "in_analysis", "lost", "doubled", "differing", "damaged", "other_bytes")
    counts = Counter(dict.fromkeys(names, 0))
    while counts["kills"] < kills:
        out = folder / f"run-{counts['runs']}"
        before = {"steps": [], "ledger chunks": {}}
        finished = False
        while not finished:
            process, read = fork(work, log, out, in_place)
            time.sleep(rng.uniform(0, duration))
            os.kill(process, signal.SIGKILL)
            os.close(read)
            status = os.waitpid(process, 0)[1]
            assert status in (0, signal.SIGKILL), status
            counts["kills"] += status == signal.SIGKILL
            finished = status == 0 or counts["kills"] >= kills
            now = answer(observe, out)
            if status == signal.SIGKILL:
                counts["in_ingest" if len(now["steps"]) < STEPS else "in_analysis"] += 1
            counts["lost"] += len(set(before["steps"]) - set(now["steps"])) + len(
                set(before["ledger chunks"]) - set(now["ledger chunks"])
            )
            counts["doubled"] += len(now["steps"]) - len(set(now["steps"]))
            counts["differing"] += sum(
                a != {name: b[name] for name in a}
                for a, b in zip(now["checksums"], truth["checksums"], strict=False)
            )
            counts["differing"] += sum(
                record != truth["ledger chunks"][name] for name, record in now["ledger chunks"].items()
            )
            counts["damaged"] += len(now["damages"])
            before = now
        answer(work, log, out, in_place)
        counts["runs"] += 1
        counts["other_bytes"] += answer(files, out) != expected
        report(f"{counts['kills']} kills in {counts['runs']} runs: {dict(counts)}")
        if in_place:
            began = time.monotonic()
            answer(copy_later, shutil.copytree(out, folder / "copied"))
            duration_of_copy = time.monotonic() - began
            for _ in range(KILLED_COPIES):
                process, read = fork(copy_later, out)
                time.sleep(rng.uniform(0, duration_of_copy))
                os.kill(process, signal.SIGKILL)
                os.close(read)
                os.waitpid(process, 0)
                now = answer(observe, out)
                counts["damaged"] += len(now["damages"]) + (now["steps"] != truth["steps"])
                counts["differing"] += now["checksums"] != truth["checksums"]
            answer(copy_later, out)
            counts["other_bytes"] += answer(files, out) != answer(files, folder / "copied")
            shutil.rmtree(folder / "copied")
    return dict(counts)


# Damaged files ------------------------------------------------------------------------------------------------


def flip(content, rng):
    """Change one bit."""
    position, bit = rng.integers(len(content)), rng.integers(8)
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


WAYS = {
    "flip": flip,
    "truncate": lambda content, rng: content[: rng.integers(len(content))],
    "zero": lambda content, rng: bytes(len(content)),
    "append": lambda content, rng: content + rng.bytes(rng.integers(1, 17)),
    "delete": lambda content, rng: None,
}

GOOD = ("same", "refused")
"""Acceptable consequences of damage. The others are silent, traceback, unnamed and bad_advice."""

DAMAGE_STEPS, DAMAGE_GROWN = (15, 16), 20
"""Steps before the log grows: with and without a last chunk to which the growth appends states."""

DAMAGE_INGEST = IngestLimits(chunk=(3, 400), commit_bytes=1)
"""Two columns of chunks."""

REPORTED_TRIALS = 100
"""Trials of a process after which it prints its counts."""

DAMAGE_SUMMARY = {"new_steps": DAMAGE_GROWN}


def kind_of(name):
    """Return the kind of a file of OUT: its store, and the role of the file in it."""
    store, *parts = name.split("/")
    if not parts:
        return store
    if parts[:2] == ["commits", "reads"]:
        return f"{store} reads"
    if parts[0] == "commits" and parts[-1] != "zarr.json":
        return f"{store} record" if parts[-1][0].isdigit() else f"{store} {parts[-1]}"
    if parts[-1] == "zarr.json":
        return f"{store} {'/'.join(parts) if len(parts) == 1 or parts[0] == 'commits' else 'zarr.json of an array'}"
    array = "state" if parts[0] in ("parameter", "gradient") and store == "trajectory.zarr" else parts[0]
    return f"{store} {'array' if store == 'results.zarr' and 'c' in parts else array}"


def values(out):
    """All values of the results, by name."""
    leaves = open_results(out).load().leaves
    return {f"{leaf.path}/{name}": leaf[name].values for leaf in leaves for name in leaf.to_dataset().variables}


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name], equal_nan=expected[name].dtype.kind == "f") for name in expected
    )


def process(log, out, **options):
    ingest_run(log, out, limits=DAMAGE_INGEST, **options)
    analyze_run(out, Analysis(workers=1), limits=PLAN)
    return values(out)


def follow_advice(error, log, out):
    """Follow the remedy of a refusal, and return the results."""
    if "remove the folder" in error.remedy:
        shutil.rmtree(Path(error.where).parent)
        return process(log, out)
    if "--overwrite" in error.remedy:
        return process(log, out, overwrite=True)
    assert "natgrad analyze OUT" in error.remedy, error
    return process(log, out)


def outcome_of(task, *arguments):
    """Return the result of a task, the refusal, or the name of another error."""
    try:
        return task(*arguments)
    except InputError as error:
        return error
    except Exception:
        return traceback.format_exc()


def try_damaged(log, out, path, before, after):
    """Read and process a damaged run; return the consequences, and the reason of a bad one."""
    original = shutil.copytree(out, out.with_name("advised"))
    try:
        readers = [(describe_run, None), (verify_run, None), (partial(status_of_run, source=None), None)]
        readers += [(values, before)] if "results.zarr" in path.parts else []
        for task, expected in readers:
            found = outcome_of(task, out)
            if isinstance(found, str):
                return "traceback", found
            if expected is not None and not isinstance(found, InputError) and not equal(found, expected):
                return "silent", "the damaged results were read"
        if path.parent == out:
            kept = scan.Outcome.of(out)
            same = kept is None or kept.summary == DAMAGE_SUMMARY
            return ("same" if same else "silent"), ""
        found = outcome_of(process, log, out)
        if isinstance(found, str):
            return "traceback", found
        if not isinstance(found, InputError):
            return ("same", "") if equal(found, after) else ("silent", "other results")
        if str(path) not in str(found) and str(path.parent) not in str(found):
            return "unnamed", str(found)
        shutil.rmtree(out)
        shutil.copytree(original, out)
        advised = outcome_of(follow_advice, found, log, out)
        if isinstance(advised, dict) and equal(advised, after):
            return "refused", ""
        return "bad_advice", f"{found}\n{advised if isinstance(advised, str | InputError) else 'other results'}"
    finally:
        shutil.rmtree(original)


def damage_trials(
    folder, trials, seed, ways=tuple(WAYS), kinds=None, steps=DAMAGE_STEPS[-1], part=(0, 1), in_place=False
):
    """Damage random files; yield the consequence of each trial, and its description.

    Parameters
    ----------
    folder : Path
    trials : int
        Number of trials for each way and kind of file, with a log that has grown and with one that has not.
    seed : int
    ways : sequence of str
        Ways in which files are damaged.
    kinds : sequence of str, optional
        Kinds of files, see `kind_of`; all by default.
    steps : int
        Steps before the log grows.
    part : (int, int)
        Number of this part of the kinds, and the number of parts.
    in_place : bool
        Do not copy the states.
    """
    log, grown, whole = folder / "log", folder / "grown", folder / "whole"
    states = random_walk(DAMAGE_GROWN, TENSORS, seed=seed)
    write_log(log, states[: steps - 4])
    ingest_run(log, whole, limits=DAMAGE_INGEST, in_place=in_place)
    write_log(log, states[:steps])  # the trajectory has several commits, and its ledger grew
    before = process(log, whole)
    scan.Outcome(str(log), scan.listing(log), {}, DAMAGE_SUMMARY).record(whole)
    shutil.copytree(log, grown)
    write_log(grown, states)
    after = process(grown, folder / "grown-out", in_place=in_place)
    files = [path.relative_to(whole).as_posix() for path in sorted(whole.rglob("*")) if path.is_file()]
    of_kind = {}
    for name in files:
        if not name.endswith(".lock"):
            of_kind.setdefault(kind_of(name), []).append(name)
    first, parts = part
    chosen = list(kinds or of_kind)[first::parts]
    for kind, way, source, number in itertools.product(chosen, ways, (log, grown), range(trials)):
        # Each trial has its own seed, so it does not depend on the others.
        rng = np.random.default_rng([seed, *f"{kind} {way} {source.name} {steps} {number}".encode()])
        out = shutil.copytree(whole, folder / "trial")
        path = out / rng.choice(of_kind[kind])
        content = WAYS[way](path.read_bytes(), rng)
        path.unlink() if content is None else path.write_bytes(content)
        consequence, why = try_damaged(source, out, path, before, before if source == log else after)
        yield consequence, f"{consequence}: {way} {path.relative_to(out)} ({source.name}, {steps} steps): {why}"
        shutil.rmtree(out)


def damage(folder, trials, seed, part, in_place=False):
    """Return the numbers of the consequences of one part of the kinds of files, and the descriptions of bad ones.

    One half of the trials has each number of steps.
    """
    logging.getLogger("natgrad").setLevel(logging.CRITICAL)
    counts, bad = Counter(), []
    for steps, some in zip(DAMAGE_STEPS, (trials - trials // 2, trials // 2), strict=True):
        where = folder / f"{steps}-{part[0]}"
        found = damage_trials(where, some, seed, steps=steps, part=part, in_place=in_place) if some else ()
        for consequence, description in found:
            counts[consequence] += 1
            if consequence not in GOOD:
                bad.append(description)
                report(description)
            if counts.total() % REPORTED_TRIALS == 0:
                report(f"part {part[0] + 1} of {part[1]}, {counts.total()} trials: {dict(counts)}")
    return counts, bad


# Two writers, and a reader ------------------------------------------------------------------------------------


def try_to_work(log, out):
    try:
        ingest_run(log, out, limits=INGEST)
    except InputError as error:
        return "refused" if "another process is writing" in error.what else str(error)
    return "done"


def race(folder, rounds, seed):
    """Start two writers together; return how each ended, and how many stores differ from that of one writer."""
    log, alone = folder / "log", folder / "alone"
    write_log(log, random_walk(STEPS, TENSORS, seed=seed))
    answer(try_to_work, log, alone)
    expected, ends, others = answer(files, alone), Counter(), 0
    for number in range(rounds):
        out = folder / f"race-{number}"
        two = [fork(try_to_work, log, out) for _ in range(2)]
        ends.update(result(process, read) for process, read in two)
        others += answer(files, out) != expected
    return dict(ends), others


def poll(out, truth, stop):
    """Open a store repeatedly while it is written, and verify its content; count the reads and their results."""
    looks, torn, seen = 0, 0, set()
    while not stop.exists() or not seen:
        if not (out / "trajectory.zarr").exists():
            continue
        now = observe(out)
        seen.add(len(now["steps"]))
        torn += now["steps"] != truth["steps"][: len(now["steps"])] or bool(now["damages"])
        torn += now["checksums"] != truth["checksums"][: len(now["checksums"])]
        looks += 1
    return {"looks": looks, "torn": torn, "seen": sorted(seen)}


def read_while_written(folder, seed):
    """Poll a store while it is written step by step; return what `poll` counted."""
    log, alone, out, stop = (folder / name for name in ("log", "alone", "out", "stop"))
    states = random_walk(STEPS, TENSORS, seed=seed)
    write_log(log, states)
    answer(try_to_work, log, alone)
    truth = answer(observe, alone)
    growing = folder / "growing"
    write_log(growing, states[:1])
    reader, read = fork(poll, out, truth, stop)
    for step in range(1, STEPS):
        write_log(growing, states[: step + 1])
        answer(try_to_work, growing, out)
    stop.touch()
    return result(reader, read)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--damages", type=int, default=20, help="trials per kind of file, way and log")
    parser.add_argument("--in-place", action="store_true", help="do not copy the states")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warm()
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / name for name in ("torture", "race", "reader", "damage")]
        ends, others = race(parts[1], options.races, options.seed)
        counted = {
            "seed": options.seed,
            **torture(parts[0], options.kills, options.seed, options.in_place),
            "races": ends,
            "race_other_bytes": others,
            "reader": read_while_written(parts[2], options.seed),
        }
        count = len(os.sched_getaffinity(0))
        running = [
            fork(damage, parts[3], options.damages, options.seed, (part, count), options.in_place)
            for part in range(count)
        ]
        parts_of_damage = [result(process, read) for process, read in running]
    counted["damages"] = sum((Counter(counts) for counts, _ in parts_of_damage), Counter())
    bad_damages = [description for _, bad in parts_of_damage for description in bad]
    sys.stdout.write(json.dumps(counted) + "\n")
    bad = [counted[name] for name in ("lost", "doubled", "differing", "damaged", "other_bytes", "race_other_bytes")]
    return int(any(bad) or bool(bad_damages) or counted["reader"]["torn"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
