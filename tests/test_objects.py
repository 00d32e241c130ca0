"""OUT and SOURCE in an object store: a real server that speaks S3, on this machine."""

import logs
import pytest
from processing import Serial
from servers import S3Server

from pipeline import cli, compute, run
from pipeline.places import is_url, place

STEPS = 12
"""Of the log: two thirds of them are there at first."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3") / "log") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        place("s3://bucket/any").fs.mkdir("bucket")
        yield server


@pytest.fixture
def url(server, request):
    """A place of the test's own."""
    return place(f"s3://bucket/{request.node.name}")


def content(folder):
    """Path below a place to bytes, of all stores and results; not of locks, nor of pages, which tell their names."""
    if is_url(folder):
        found = folder.fs.cat(folder.fs.find(folder.path))
        files = {name.removeprefix(f"{folder.path}/"): held for name, held in found.items()}
    else:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
    return {name: held for name, held in files.items() if not name.endswith((".lock", ".html"))}


@pytest.fixture(scope="module")
def both(server, tmp_path_factory):
    """A run that was processed, went on and was processed again, in a folder and in an object store."""
    folder = tmp_path_factory.mktemp("both")
    states = logs.random_walk(STEPS)
    log = logs.write_log(folder / "log", states[: STEPS * 2 // 3])
    outs = folder / "out", place("s3://bucket/both")
    for out in outs:
        run.ingest_run(log, out)
        compute.compute_ledger(out / "trajectory.zarr", out / "ledger.zarr")
    for number in range(STEPS * 2 // 3, STEPS):
        logs.write_step(log, number, states[number])
    for out in outs:
        assert run.ingest_run(log, out)["new_steps"] == STEPS // 3
        run.analyze_run(out, Serial())
    return outs


def test_every_byte_is_that_of_a_folder(both):
    here, there = map(content, both)
    assert len(here) > 100
    assert there == here


def test_nothing_is_left_locked(both):
    assert not [path for path in both[1].iterdir() if path.name.endswith(".lock")]


def test_the_commands_take_a_url(both, capsys):
    cli.app(["info", "s3://bucket/both"], standalone_mode=False)
    assert "s3://bucket/both/trajectory.zarr" in capsys.readouterr().out
    cli.app(["verify", "s3://bucket/both"], standalone_mode=False)
    assert capsys.readouterr().out == "all is as it was written\n"
    cli.app(["report", "s3://bucket/both"], standalone_mode=False)
    assert b"<title>both: natural gradient report" in (both[1] / "report.html").read_bytes()
