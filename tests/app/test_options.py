"""Test that every interface lists, validates and describes an option in the same way."""

import inspect
import json
import re
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

import natgrad
from logs import random_walk, write_log
from natgrad.app import declarations, options
from natgrad.compute.plan import PlanLimits
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
OPENERS = ("open_results", "open_trajectory", "open_ledger")
SETS = (*COMMANDS.values(), options.ScheduleOptions)
NO_OPTIONS = {"source", "sources", "out", "outs", "root", "progress", "page", "serve", "port", "as_json", "quiet"}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_function_and_docstring_list_the_same_options(name):
    declared = declarations.declared(COMMANDS[name])
    command = {one.name: one for one in typer.main.get_command(app).commands[name].params}
    function = inspect.signature(getattr(natgrad, name)).parameters
    assert set(function) - NO_OPTIONS == set(declared)
    # The command `scan` uses Prefect, the function does not.
    of_prefect = (options.HistoryOptions, options.LinkOptions) if name == "scan" else ()
    shown = {option for kind in of_prefect for option in declarations.declared(kind)}
    assert set(command) - NO_OPTIONS == set(declared) | shown
    for one in declared.values():
        assert one.flag in command[one.name].opts
        assert command[one.name].help.startswith(one.description(command_line=True))
        assert function[one.name].default == one.option.default
        assert f"\n{one.name} : " in getattr(natgrad, name).__doc__
        assert one.option.description.split()[0] in getattr(natgrad, name).__doc__


def test_parameters_of_a_single_command_keep_their_defaults():
    commands = typer.main.get_command(app).commands
    (limit,) = (one for one in commands["serve"].params if one.name == "limit")
    (out,) = (one for one in commands["demo"].params if one.name == "out")
    assert limit.help.endswith("[default: 1]")
    assert str(out.default) == "demo"


@pytest.mark.parametrize("name", ["serve", "deploy"])
def test_scheduled_scans_have_the_options_of_a_scan(name):
    command = {one.name for one in typer.main.get_command(app).commands[name].params}
    assert command >= {*declarations.declared(options.ScanOptions), *declarations.declared(options.ScheduleOptions)}


def test_every_default_is_valid_and_a_description_is_a_sentence():
    for kind in SETS:
        defaults = {name: one.option.default for name, one in declarations.declared(kind).items()}
        assert declarations.validated(kind, {}) == declarations.validated(kind, defaults) == defaults
        for one in declarations.declared(kind).values():
            assert one.option.description.endswith(".")


def test_defaults_are_those_of_the_results():
    *first, last = (f"{gamma:g}" for gamma in dataset.GAMMAS)
    unset = declarations.declared(options.AnalyzeOptions)["gammas"].option.unset
    assert unset == f"{', '.join(first)} and {last}, for the model only"


@given(st.integers(-3, 3), st.floats(-1, 1), st.floats())
def test_numbers_are_accepted_only_in_their_range(window, rate, gamma):
    values = {"windows": [window], "learning_rate": rate, "gammas": [gamma]}
    valid = window >= 1 and rate > 0 and 0 < gamma < float("inf")
    if valid:
        assert declarations.validated(options.AnalyzeOptions, values) | values == declarations.validated(
            options.AnalyzeOptions, values
        )
    else:
        with pytest.raises(InputError, match=r"must be (at least 1|greater than 0|finite)"):
            declarations.validated(options.AnalyzeOptions, values)


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
    ({"memory_limit": 0}, "--memory-limit must be at least 1, got 0"),
    ({"memory_limit": "0B"}, "'0B' is not an amount of memory"),
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
    # There is no log, so a valid value would be refused for that reason.
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        natgrad.process(tmp_path / "no log", tmp_path / "out", **values)
    assert refusal.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_reported_with_the_closest_match(tmp_path):
    with pytest.raises(TypeError, match="unknown option 'window'; did you mean 'windows'"):
        natgrad.process(tmp_path, tmp_path, window=[1])


FUNCTIONS = ("process", "ingest", "analyze", "report", "inspect", "verify", "scan", *OPENERS)


def arguments_of(name):
    """Return the names of the arguments of a public function, positional ones first."""
    return list(inspect.signature(getattr(natgrad, name)).parameters)


# No function can use them as the value of any argument.
UNUSABLE = (
    *(object(), 1j, Ellipsis, b"bytes", np.datetime64("2026-01-01"), iter([1])),
    *([[]], [object()], {3: 4}, {(): ()}),
)
# Some arguments accept some of these values.
STRANGE = (
    *(3, -1, 0, 1.5, True, np.True_, "text", "", "a\0b", " ", float("nan"), float("inf"), 10**5000, -(10**5000)),
    *([], {}, (), set(), [3], [None], [""], ["text"], [True], {"a": 1}, {"a": None}, {"": ""}, {"a": []}, range(3)),
    *(np.array([]), np.array([1.5, np.nan]), np.array("x"), np.array(3), np.ones((2, 2)), np.array([1j])),
    *(print, int, Path("text"), "s3://", "unknown://text", "a" * 5000),
)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in FUNCTIONS for argument in arguments_of(name)]
)
def test_every_argument_refuses_every_wrong_value_before_a_file_is_created(tmp_path, monkeypatch, name, argument):
    monkeypatch.chdir(tmp_path)
    # There is no log and no run, so a call with a valid value is refused for that reason.
    valid = {"source": "no log", "root": "no log", "out": "no run", "outs": "no run"}
    call = {one: valid[one] for one in arguments_of(name) if one in valid}
    for value in (*UNUSABLE, *STRANGE):
        with pytest.raises(InputError) as refusal:
            getattr(natgrad, name)(**call | {argument: value})
        assert str(refusal.value)
        if any(value is one for one in UNUSABLE):
            assert refusal.value.where.split() in (["option", argument], ["argument", argument])
            assert refusal.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(natgrad.__all__) - {"__version__"}))
def test_the_types_of_every_public_name_can_be_read(name):
    public = getattr(natgrad, name)
    members = vars(public).values() if isinstance(public, type) else ()
    for one in (public, *filter(inspect.isfunction, members)):
        hints = typing.get_type_hints(one, include_extras=True)
        assert "return" in hints or isinstance(one, type)


VALUES = {
    "windows": ([1], (1, 1), np.array([1, 1]), range(1, 2), [np.int64(1)]),
    "gammas": ([0.5, 1], (1, 0.5, 0.5), np.array([1, 0.5]), [np.float32(0.5), 1]),
    "mapping": ({"loss": "l", "gradient": "g"}, ["gradient=g", "loss=l"], {"gradient": "g", "loss": "l"}),
    "shift": ({"loss": -1}, ["loss=-1"], {"loss": np.int64(-1)}),
    "include": (["optimizer"], ("optimizer", "optimizer"), {"optimizer"}),
    "memory_limit": (2**30, "1GiB", "1024 MiB", np.int64(2**30)),
    "learning_rate": (1, 1.0, np.float32(1), np.array(1)),
    "weight_decay": (0.5, np.float32(0.5), {"*": 0.5}, ["0.5"], ["*=0.5"], ["*=1", "0.5"]),
    "sweep": (True, np.True_),
}


@pytest.mark.parametrize("name", VALUES)
def test_equivalent_values_have_one_normal_form_which_is_valid(name):
    option = declarations.declared(options.ProcessOptions)[name]
    first, *others = (option.validated(value) for value in VALUES[name])
    assert json.dumps(first) == json.dumps(option.validated(first))
    assert all(json.dumps(other) == json.dumps(first) for other in others)


def test_an_equivalent_list_does_not_process_a_run_again(tmp_path):
    write_log(tmp_path / "logs" / "a", random_walk(4))
    assert natgrad.scan(tmp_path / "logs", tmp_path / "out", windows=[2, 1], gammas=[1.0]).processed == 1
    same = natgrad.scan(tmp_path / "logs", tmp_path / "out", windows=np.array([1, 2, 2]), gammas=(1, 1))
    assert (same.processed, same.unchanged) == (0, 1)


def test_docstrings_do_not_use_words_of_the_command_line():
    for name in FUNCTIONS:
        text = getattr(natgrad, name).__doc__
        # {step} is part of a pattern. Other braces are names that were not filled in.
        assert not re.search(r"--\w|Repeatable|[{}]", text.replace("{step}", ""))
    assert "windows : sequence of int, optional" in natgrad.process.__doc__
    assert "Repeatable." in declarations.declared(options.ProcessOptions)["windows"].description(command_line=True)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    log = write_log(tmp_path / "log", random_walk(3))
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for call in (
            lambda out=out: natgrad.process(log, out),
            lambda out=out: natgrad.open_results(out),
            lambda out=out: natgrad.scan(tmp_path, out),
        ):
            with pytest.raises(InputError, match="OUT must be a folder"):
                call()
    assert (tmp_path / "file").read_text() == "text"


def test_a_page_that_is_a_folder_is_refused(tmp_path):
    natgrad.process(write_log(tmp_path / "log", random_walk(3)), tmp_path / "out")
    with pytest.raises(InputError, match="the page must be a file"):
        natgrad.report(tmp_path / "out", tmp_path)


OPENED = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.parametrize(
    ("values", "message", "may_list"),
    [
        ({"windows": [0]}, "--window must be at least 1", False),
        ({"workers": 0}, "--workers must be at least 1", False),
        ({"windows": [12]}, "--window 12 is longer than the run, which has 11 updates", True),
        ({"attempt": 1}, "there is no attempt 1; the last attempt is 0", True),
        # More than an idle worker needs, but not enough for one read block.
        ({"memory_limit": PlanLimits().reserved_bytes + 1}, "a worker would need 321 MiB", True),
        ({"cluster": "pbs"}, "the cluster cannot be started", True),
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
    assert natgrad.open_trajectory(tmp_path / "out").sizes["step"] == 6
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
    assert natgrad.process(log, tmp_path / "out", cluster="pbs").computed_chunks == 0
    natgrad.scan(tmp_path, tmp_path / "runs")
    assert natgrad.scan(tmp_path, tmp_path / "runs", cluster="pbs").unchanged == 1


def test_a_scan_starts_nothing_without_the_workers_that_it_needs(tmp_path):
    write_log(tmp_path / "logs" / "a", random_walk(4))
    with pytest.raises(InputError, match="the cluster cannot be started") as refusal:
        natgrad.scan(tmp_path / "logs", tmp_path / "out", cluster="pbs")
    assert "jobqueue.pbs" in str(refusal.value)
    with pytest.raises(InputError, match="a worker needs more than"):
        natgrad.scan(tmp_path / "logs", tmp_path / "out", memory_limit=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["/data/runs", "=http://lab", "/data=ftp://lab", "http://lab"])
def test_an_address_of_reports_is_a_folder_and_a_url(value):
    with pytest.raises(InputError, match="report_url must be FOLDER=URL"):
        declarations.validated(options.LinkOptions, {"report_url": value})
    checked = declarations.validated(options.LinkOptions, {"report_url": "/data=https://lab/x?a=b"})
    assert checked == {"report_url": "/data=https://lab/x?a=b", "alert_angle": None}
