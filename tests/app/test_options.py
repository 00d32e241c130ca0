"""Test that every interface lists, validates and describes an option in the same way."""

import inspect
import re
import sys

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

import natgrad
from logs import random_walk, write_log
from natgrad.app import options
from natgrad.results import dataset
from natgrad.schema.errors import InputError
from natgrad_flows.cli import app

COMMANDS = {
    "process": options.ProcessOptions,
    "ingest": options.IngestOptions,
    "analyze": options.AnalyzeOptions,
    "report": options.VersionOptions,
    "inspect": options.InspectOptions,
    "verify": options.VersionOptions,
    "scan": options.ScanOptions,
}
SETS = (*COMMANDS.values(), options.ScheduleOptions)
NO_OPTIONS = {"source", "sources", "out", "outs", "root", "progress", "page", "as_json", "quiet"}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_function_and_docstring_list_the_same_options(name):
    declared = options.declared(COMMANDS[name])
    command = {one.name: one for one in typer.main.get_command(app).commands[name].params}
    function = inspect.signature(getattr(natgrad, name)).parameters
    assert set(command) - NO_OPTIONS == set(function) - NO_OPTIONS == set(declared)
    for one in declared.values():
        assert one.flag in command[one.name].opts
        assert command[one.name].help.startswith(one.option.description)
        assert function[one.name].default == one.option.default
        assert f"\n{one.name} : " in getattr(natgrad, name).__doc__
        assert one.option.description.split()[0] in getattr(natgrad, name).__doc__


def test_parameters_of_a_single_command_keep_their_defaults():
    commands = typer.main.get_command(app).commands
    defaults = {(name, one.name): one.default for name in ("serve", "demo") for one in commands[name].params}
    assert defaults["serve", "limit"] == 1
    assert str(defaults["demo", "out"]) == "demo"


@pytest.mark.parametrize("name", ["serve", "deploy"])
def test_scheduled_scans_have_the_options_of_a_scan(name):
    command = {one.name for one in typer.main.get_command(app).commands[name].params}
    assert command >= {*options.declared(options.ScanOptions), *options.declared(options.ScheduleOptions)}


def test_every_default_is_valid_and_a_description_is_a_sentence():
    for kind in SETS:
        defaults = {name: one.option.default for name, one in options.declared(kind).items()}
        assert options.validated(kind, {}) == options.validated(kind, defaults) == defaults
        for one in options.declared(kind).values():
            assert one.option.description.endswith(".")


def test_defaults_are_those_of_the_results():
    assert tuple(options.declared(options.AnalyzeOptions)["gammas"].option.default) == tuple(dataset.GAMMAS)


@given(st.integers(-3, 3), st.floats(-1, 1), st.floats())
def test_numbers_are_accepted_only_in_their_range(window, rate, gamma):
    values = {"windows": [window], "learning_rate": rate, "gammas": [gamma]}
    valid = window >= 1 and rate > 0 and 0 < gamma < float("inf")
    if valid:
        assert options.validated(options.AnalyzeOptions, values) | values == options.validated(
            options.AnalyzeOptions, values
        )
    else:
        with pytest.raises(InputError, match=r"must be (at least 1|greater than 0|finite)"):
            options.validated(options.AnalyzeOptions, values)


REFUSED = [
    ({"windows": [0]}, "--window must be at least 1, got 0"),
    ({"windows": 3}, "--window must be a list, got 3"),
    ({"windows": ["3"]}, "--window must be a whole number"),
    ({"windows": [1.5]}, "--window must be a whole number"),
    ({"gammas": [-1.0]}, "--gamma must be greater than 0"),
    ({"learning_rate": 0}, "--learning-rate must be greater than 0"),
    ({"learning_rate": float("nan")}, "--learning-rate must be finite"),
    ({"workers": 0}, "--workers must be at least 1, got 0"),
    ({"workers": True}, "--workers must be a whole number"),
    ({"memory_limit": "plenty"}, "'plenty' is not an amount of memory"),
    ({"memory_limit": 0}, "is not an amount of memory"),
    ({"attempt": -1}, "--attempt must be at least 0"),
    ({"scheduler": "tcp://host:1", "cluster": "slurm"}, "--scheduler and --cluster exclude each other"),
    ({"cluster": "mainframe"}, "unknown value 'mainframe' for --cluster; choose one of: slurm"),
    ({"format": "tape"}, "unknown value 'tape' for --format; choose one of"),
    ({"include": ["scheduler"]}, "unknown value 'scheduler' for --include; the only choice is: optimizer"),
    ({"include": "optimizer"}, "--include must be a list"),
    ({"store": "zip"}, "unknown value 'zip' for --store; choose one of: plain, icechunk"),
    ({"mapping": ["theta"]}, "is not of the form"),
    ({"mapping": {"gradients": "g"}}, "gradients=g does not name a quantity"),
    ({"mapping": {"gradient": ""}}, "gradient= does not name a quantity"),
    ({"shift": ["gradient=next"]}, "gradient=next is not a valid shift"),
    ({"shift": {"step": 1}}, "step=1 is not a valid shift"),
    ({"follow": 1}, "--follow must be True or False"),
    ({"interval": -1.0}, "--interval must be at least 0"),
    ({"idle_timeout": -0.5}, "--idle-timeout must be at least 0"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_an_invalid_option_is_rejected_before_the_log_is_opened(tmp_path, values, message):
    # There is no log: it would be refused for that reason otherwise.
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        natgrad.process(tmp_path / "no log", tmp_path / "out", **values)
    assert refusal.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_reported_with_the_closest_match(tmp_path):
    with pytest.raises(TypeError, match="unknown option 'window'; did you mean 'windows'"):
        natgrad.process(tmp_path, tmp_path, window=[1])


OPENED = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.parametrize(
    ("values", "message", "may_list"),
    [
        ({"windows": [0]}, "--window must be at least 1", False),
        ({"workers": 0}, "--workers must be at least 1", False),
        ({"windows": [12]}, "--window 12 is longer than the run, which has 11 updates", True),
        ({"attempt": 1}, "there is no attempt 1; the last attempt is 0", True),
    ],
)
def test_a_real_log_stays_closed_and_nothing_is_stored(tmp_path, values, message, may_list):
    log = write_log(tmp_path / "log", random_walk(12))
    OPENED.clear()
    with pytest.raises(InputError, match=message):
        natgrad.process(log, tmp_path / "out", **values)
    opened = [path for path in OPENED if str(log) in path]
    assert may_list or not opened
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and log not in path.parents]


def test_options_that_depend_on_the_steps_count_stored_and_new_steps(tmp_path):
    states = random_walk(12)
    log = write_log(tmp_path / "log", states[:6])
    natgrad.process(log, tmp_path / "out", windows=[5])
    write_log(log, states)
    with pytest.raises(InputError, match="--window 12 is longer than the run, which has 11 updates"):
        natgrad.process(log, tmp_path / "out", windows=[12])
    assert natgrad.open_trajectory(tmp_path / "out").n_states == 6
    natgrad.process(log, tmp_path / "out", windows=[11])
    before = (tmp_path / "out" / "results.zarr" / "zarr.json").read_bytes()
    for values in ({"windows": [12]}, {"attempt": 1}):
        with pytest.raises(InputError):
            natgrad.analyze(tmp_path / "out", **values)
    assert (tmp_path / "out" / "results.zarr" / "zarr.json").read_bytes() == before


def test_a_window_of_an_earlier_attempt_is_counted_in_that_attempt(tmp_path):
    log = write_log(tmp_path / "log", random_walk(5))
    natgrad.process(log, tmp_path / "out")
    write_log(log, random_walk(9, seed=1)[3:], numbers=range(3, 9))
    with pytest.raises(InputError, match="--window 5 is longer than the run, which has 4 updates"):
        natgrad.process(log, tmp_path / "out", windows=[5], attempt=0)
    # Steps 0 to 2 of the first attempt, and 3 to 8 of the second.
    with pytest.raises(InputError, match="--window 8 is longer than the run, which has 7 updates"):
        natgrad.process(log, tmp_path / "out", windows=[8])
    assert natgrad.process(log, tmp_path / "out", windows=[7]).updates == 7


def test_no_scheduler_is_contacted_if_there_is_nothing_to_compute(tmp_path):
    log = write_log(tmp_path / "log", random_walk(4))
    natgrad.process(log, tmp_path / "out")
    assert natgrad.process(log, tmp_path / "out", scheduler="tcp://127.0.0.1:9").computed_chunks == 0
