"""Test the command line as a user calls it: exit codes, one JSON object, nothing else on standard output.

Properties that only a process shows (a terminal, real exit codes) are tested in separate processes; the other tests
call the same entry point in this one.
"""

import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from commands import NATGRAD, natgrad, natgrad_process
from logs import random_walk, write_log, write_step
from natgrad.app import cli
from natgrad.app.memory import memory_errors
from natgrad.schema.errors import Unavailable
from natgrad.schema.logs import logger
from natgrad.schema.times import now
from natgrad.schema.version import __version__
from natgrad.store import open_trajectory

WINDOWS = ("--window", "1", "--window", "3")


def answer(*arguments):
    done = natgrad(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Return the folder of a log and of the output of `natgrad process`, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    write_log(folder / "log", random_walk(12))
    done = natgrad_process("process", folder / "log", folder / "out", *WINDOWS, "--json")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def run(processed):
    """Return a log, the output folder of `natgrad process`, and its output."""
    folder, done = processed
    return folder / "log", folder / "out", json.loads(done.stdout)


def test_log_lines_after_a_command_go_to_the_current_standard_error(run, capfd, monkeypatch):
    # A command in this process may write to a standard error that is replaced and closed after it.
    monkeypatch.setattr(logging.getLogger("natgrad"), "handlers", [])
    with io.StringIO() as closed, redirect_stderr(closed):
        cli.app(["info", str(run[1])], standalone_mode=False)
    logger("natgrad.test").warning("a line after the command")
    assert capfd.readouterr().err == "WARNING a line after the command\n"


def test_process_runs_all_stages_and_prints_the_paths(run):
    log, out, shown = run
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "trajectory.zarr",
        "ledger.zarr",
        "results.zarr",
        "report.html",
    }
    assert shown["source"] == str(log)
    assert (shown["new_steps"], shown["updates"], shown["warnings"]) == (12, 11, [])
    assert [shown[name] for name in ("trajectory", "ledger", "results", "report")] == [
        str(out / name) for name in ("trajectory.zarr", "ledger.zarr", "results.zarr", "report.html")
    ]
    model = xr.open_datatree(out / "results.zarr")["model"].to_dataset()
    assert model.sizes["step"] == 11
    assert model["window"].values.tolist() == [1, 3]
    angle = model["angle"].sel(window=1, descent="gradient")
    assert shown["angle"] == [float(f(angle.dropna("step"))) for f in (np.min, np.median, np.max)]


def test_processing_again_reads_and_computes_nothing(run):
    log, out, _ = run
    shown = answer("process", log, out, *WINDOWS)
    assert (shown["new_steps"], shown["computed_chunks"], shown["computed_updates"]) == (0, 0, 0)


def test_info_describes_the_contents_of_a_folder(run):
    _, out, _ = run
    shown = answer("info", out)
    assert (shown["steps"], shown["first_step"], shown["last_step"], shown["elements"]) == (12, 0, 11, 17)
    assert shown["tensors"] == {"layer.bias": [4], "layer.weight": [4, 3], "scale": []}
    assert shown["report"] == str(out / "report.html")
    assert "angle" in natgrad("info", out).stdout


def test_the_time_of_the_last_verification_is_reported(run, tmp_path):
    log, out = run[0], tmp_path / "out"
    before = now()
    shown = answer("process", log, out)
    assert before <= shown["states_verified"] <= now()
    assert answer("info", out)["states_verified"] == shown["states_verified"]
    trusted = tmp_path / "trusted"
    assert answer("process", log, trusted, "--trust-states")["states_verified"] is None
    assert answer("info", trusted)["states_verified"] is None
    assert answer("verify", trusted) == {"damages": []}
    assert before <= answer("info", trusted)["states_verified"] <= now()
    answer("ingest", log, trusted, "--overwrite")
    # The ledger was computed from trusted states, and the old trajectory had been verified.
    assert answer("info", trusted)["states_verified"] is None
    chunk = next((trusted / "trajectory.zarr/gradient/c").glob("*/*"))
    chunk.write_bytes(bytes(byte ^ 255 for byte in chunk.read_bytes()))
    assert natgrad("verify", trusted).returncode == 1
    assert answer("info", trusted)["states_verified"] is None


def test_a_damaged_state_is_refused_and_the_advice_restores_the_results(run, tmp_path):
    log, out = run[0], tmp_path / "out"
    answer("ingest", log, out)
    chunk = next((out / "trajectory.zarr/gradient/c").glob("*/*"))
    chunk.write_bytes(bytes(byte ^ 255 for byte in chunk.read_bytes()))
    refused = natgrad("analyze", out)
    assert refused.returncode == 2
    assert str(chunk) in refused.stderr
    assert "gradient, steps 0 to 11, tensors layer.bias to scale: checksum mismatch" in refused.stderr
    assert not (out / "results.zarr").exists()
    answer("process", log, out, "--overwrite")
    answer("process", log, tmp_path / "same")
    one, other = (xr.open_datatree(folder / "results.zarr") for folder in (out, tmp_path / "same"))
    xr.testing.assert_equal(one, other)


def test_separate_commands_give_the_same_results_as_process(run, tmp_path):
    log, out, _ = run
    for arguments in (["ingest", log, tmp_path], ["analyze", tmp_path, "--window", "3"], ["report", tmp_path]):
        assert natgrad(*arguments).returncode == 0
    one, other = (xr.open_datatree(folder / "results.zarr") for folder in (out, tmp_path))
    xr.testing.assert_equal(one, other)
    assert one.attrs["fingerprint"] == other.attrs["fingerprint"]


def test_the_learning_rate_option_applies_if_the_log_has_no_rate(tmp_path):
    states = random_walk(4)
    for state in states:
        del state["learning_rate"]
    log = write_log(tmp_path / "log", states)
    without = natgrad("process", log, tmp_path / "without")
    assert without.returncode == 0
    assert "--learning-rate" in without.stderr
    given = answer("process", log, tmp_path / "given", "--learning-rate", "0.1")
    assert answer("info", tmp_path / "without")["status"] == given["status"]
    one, other = (xr.open_datatree(tmp_path / name / "results.zarr")["model"] for name in ("without", "given"))
    assert np.isnan(one["update_norm"]).all()
    assert np.isfinite(other["update_norm"]).all()


def test_weight_decay_is_set_for_all_tensors_or_by_patterns_of_their_names(tmp_path):
    log, out = write_log(tmp_path / "log", random_walk(4)), tmp_path / "out"
    answer("process", log, out)
    decays = {}
    for options in ([], ["--weight-decay", "0.25"], ["--weight-decay", "0.25", "--weight-decay", "*=0"]):
        found = answer("analyze", out, *options)
        tree = xr.open_datatree(out / "results.zarr", engine="zarr")
        assert ("without_decay" in tree.children) == bool(options) == ("angle_without_decay" in found)
        decays[len(options)] = {*tree["tensor/weight_decay"].values.ravel()} if options else None
    assert decays == {0: None, 2: {0.25}, 4: {0.0}}
    for value, message in (
        ("a", "must be LAMBDA or TENSOR=LAMBDA"),
        ("nothing=1", "no tensor has a name"),
        ("-1", "must be at least 0"),
    ):
        done = natgrad("analyze", out, f"--weight-decay={value}")
        assert done.returncode == 2
        assert message in done.stderr


def test_losses_that_gradients_do_not_explain_are_reported_by_every_command(tmp_path):
    rng = np.random.default_rng(0)
    states = [state | {"loss": np.float64(rng.random())} for state in random_walk(8)]
    log, out = write_log(tmp_path / "log", states), tmp_path / "out"
    done = natgrad("process", log, out, "--json")
    assert "The batches probably change" in done.stderr
    found = json.loads(done.stdout)["objective"]
    assert (found["evaluation"], found["consistency"], len(found["warnings"])) == ("unknown", "inconsistent", 1)
    assert answer("info", out)["objective"] == found
    # Following the remedy removes the warning.
    done = natgrad("analyze", out, "--evaluation", "batch", "--json")
    assert "batches" not in done.stderr
    assert json.loads(done.stdout)["objective"]["warnings"] == []
    assert natgrad("analyze", out, "--evaluation", "other").returncode == 2


def test_log_messages_go_to_standard_error_and_quiet_shows_only_warnings(processed, tmp_path):
    folder, loud = processed
    assert "INFO 11 updates in 1 task" in loud.stderr
    assert "projected peak memory per worker" in loud.stderr
    assert "updates in 1 task" not in loud.stdout
    assert natgrad_process("process", folder / "log", tmp_path, "--quiet").stderr == ""


def test_help_and_formats():
    text = natgrad_process("--help").stdout
    assert all(command in text for command in ("process", "ingest", "analyze", "report", "info", "demo", "formats"))
    assert "step_<N>.safetensors" in natgrad("formats").stdout
    assert set(answer("formats")) >= {"steps", "torch", "dcp", "huggingface", "lightning"}


def test_no_command_prints_the_help_with_and_without_two_dashes():
    shown = [natgrad_process(*arguments) for arguments in ((), ("--",))]
    assert [(one.returncode, one.stdout) for one in shown] == [(2, "")] * 2
    assert shown[0].stderr == shown[1].stderr
    assert shown[0].stderr.startswith("Usage: natgrad")


PROGRAM = """
import gc, sys, threading
from natgrad_flows.cli import program
sys.argv = ["natgrad", "formats"]
try:
    program()
except SystemExit as end:
    assert not end.code
(timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
assert not gc.isenabled()
assert timer.daemon
assert timer.interval <= 10
timer.function()
assert gc.isenabled()
"""


def test_a_short_command_does_not_search_for_cycles_and_a_long_one_does():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "safetensors" in done.stdout


def test_a_malformed_configuration_of_dask_is_named(tmp_path, monkeypatch):
    file = tmp_path / ".config" / "dask" / "natgrad.yaml"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, text, why in (
        (("report", tmp_path), "distributed:\n  comm:\n   tls: [\n", "line 4, column 1"),
        (("process", tmp_path, tmp_path / "out"), "text", "it is not a mapping"),
    ):
        file.write_text(text)
        done = natgrad_process(*arguments)
        assert done.returncode == 2
        for part in ("a configuration file of Dask is malformed", f"where: {file}\n", why, "correct this file"):
            assert part in done.stderr
    # The remedy works.
    file.unlink()
    assert "is malformed" not in natgrad_process("report", tmp_path).stderr


def test_version_and_shell_completion():
    assert natgrad_process("--version").stdout == f"natgrad {__version__}\n"
    assert "--install-completion" in natgrad("--help").stdout
    words = {"_NATGRAD_COMPLETE": "complete_bash", "COMP_WORDS": "natgrad ver", "COMP_CWORD": "1"}
    done = natgrad_process(environment=words)
    assert done.stdout.split() == ["verify", "versions"]


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--store", "plain icechunk"),
        ("--cluster", "slurm pbs lsf sge oar htcondor kubernetes"),
        ("--include", "optimizer"),
    ],
)
def test_the_shell_completes_the_values_of_an_option(option, choices):
    words = f"natgrad process LOG OUT {option} "
    environment = {"_NATGRAD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
    done = natgrad_process(environment=environment)
    assert done.stdout.split() == choices.split()


# Bad input ---------------------------------------------------------------------------------------------------


def bad_logs(folder, case):
    """Write a log with one error, and return the text that the message must contain."""
    states = random_walk(6)
    log = folder / "log"
    if case == "empty folder":
        log.mkdir()
        return [str(log), "no step files"]
    if case == "no folder":
        return [str(log), "no such file or folder"]
    if case == "truncated":
        write_log(log, states)
        path = log / "step_3.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        return [str(path), "step 3", "truncated"]
    if case == "shape change":
        states[4]["parameter/layer.bias"] = states[4]["gradient/layer.bias"] = np.zeros(5, np.float32)
        write_log(log, states)
        return ["step_4.safetensors", "step 4", "'layer.bias'", "(4,) to (5,)"]
    if case == "missing step":
        write_log(log, states, [0, 1, 2, 4, 5, 6])
        return ["step 3 is missing", "--allow-gaps"]
    if case == "doubled step":
        write_log(log, states)
        write_step(log, 2, states[2], "npz")
        return ["step 2", "twice", "step_2.npz", "step_2.safetensors"]
    if case == "other names":
        states[1]["gradient/weight"] = states[1].pop("gradient/layer.weight")
        write_log(log, states)
        return ["step_1.safetensors", "step 1", "'layer.weight'"]
    write_log(log, states)
    path = log / "step_5.safetensors"
    path.unlink()
    path.mkdir()
    return [str(path), "step 5"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Return the results of a valid run in a new folder."""
    folder = tmp_path_factory.mktemp("clean")
    answer("ingest", write_log(folder / "log", random_walk(6)), folder / "out")
    answer("analyze", folder / "out")
    return xr.open_datatree(folder / "out" / "results.zarr")


CASES = [
    "empty folder",
    "no folder",
    "truncated",
    "shape change",
    "missing step",
    "doubled step",
    "other names",
    "unreadable",
]


@pytest.mark.parametrize("case", CASES)
def test_invalid_input_exits_with_2_and_leaves_no_files_behind(tmp_path, clean, case):
    named = bad_logs(tmp_path, case)
    call = natgrad_process if case == "truncated" else natgrad
    done = call("process", tmp_path / "log", tmp_path / "out", "--json")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in named:
        assert part in done.stderr
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"what", "where", "why", "do"}
    assert error["what"]
    answer("ingest", write_log(tmp_path / "good", random_walk(6)), tmp_path / "out")
    answer("analyze", tmp_path / "out")
    results = xr.open_datatree(tmp_path / "out" / "results.zarr")
    xr.testing.assert_equal(results, clean)
    assert results.attrs["fingerprint"] == clean.attrs["fingerprint"]


def test_a_nan_gradient_is_processed_with_a_warning(tmp_path):
    states = random_walk(6)
    states[2]["gradient/layer.bias"] = np.array([0, np.nan, 0, 0], np.float32)
    done = natgrad("process", write_log(tmp_path / "log", states), tmp_path / "out", "--json")
    assert done.returncode == 0
    warning = " ".join(json.loads(done.stdout)["warnings"])
    for part in ("step_2.safetensors", "step 2", "'layer.bias'"):
        assert part in warning
    assert json.loads(done.stdout)["status"]["non_finite"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gamma", "-1"], "--gamma must be greater than 0"),
        (["--window", "0"], "--window must be at least 1"),
        (["--window", "99"], "--window 99 is longer than the run, which has 11 updates"),
        (["--learning-rate", "-1"], "--learning-rate must be greater than 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--memory-limit", "plenty"], "'plenty' is not an amount of memory"),
        (["--memory-limit", "1MiB"], "raise --memory-limit"),
        (["--scheduler", "tcp://127.0.0.1:9"], "does not respond"),
        (["--format", "tape"], "unknown value 'tape' for --format"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_invalid_options_exit_with_2(run, tmp_path, options, message):
    log, _, _ = run
    done = natgrad("process", log, tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", ["analyze", "report", "info"])
def test_a_folder_without_a_run_is_refused(tmp_path, command):
    done = natgrad(command, tmp_path)
    assert done.returncode == 2
    assert "natgrad" in done.stderr.split("do:")[1]


def test_a_foreign_folder_is_not_overwritten(run, tmp_path):
    log, _, _ = run
    (tmp_path / "trajectory.zarr").mkdir()
    (tmp_path / "trajectory.zarr" / "thesis.txt").write_text("irreplaceable")
    assert natgrad("process", log, tmp_path, "--overwrite").returncode == 2
    assert (tmp_path / "trajectory.zarr" / "thesis.txt").read_text() == "irreplaceable"


def test_other_errors_exit_with_3():
    # Standard output is closed, so nothing can be printed.
    done = subprocess.run(["sh", "-c", f"'{NATGRAD}' formats --json >&-"], capture_output=True, check=False)
    assert done.returncode == 3
    assert b"Traceback" in done.stderr


def test_progress_is_drawn_on_a_terminal(run, tmp_path):
    log, _, _ = run
    main, worker = os.openpty()
    with subprocess.Popen([NATGRAD, "ingest", log, tmp_path], stdout=subprocess.PIPE, stderr=worker) as process:
        os.close(worker)
        drawn = b""
        while True:
            try:
                drawn += os.read(main, 4096)
            except OSError:  # the terminal ends with the process
                break
        process.communicate()
    os.close(main)
    assert process.returncode == 0
    assert b"ingest" in drawn
    assert b"12/12" in drawn


def test_a_mapping_and_several_sources_reach_the_ingest(tmp_path):
    states = random_walk(3)
    for step, state in enumerate(states):
        native = {f"theta/{key.partition('/')[2]}": state[key] for key in state if key.startswith("parameter/")}
        write_step(tmp_path / "states", step, native | {"l": state["loss"]})
        write_step(tmp_path / "gradients", step, {key: state[key] for key in state if key.startswith("gradient/")})
    pairs = ("--map", "parameter=theta", "loss=l", "gradient=theta")
    assert answer("ingest", tmp_path / "states", tmp_path / "one", *pairs)["new_steps"] == 3
    (tmp_path / "run.toml").write_text(
        '[[source]]\npath = "states"\nmap = { parameter = "theta", loss = "l" }\n[[source]]\npath = "gradients"\n'
    )
    assert answer("ingest", tmp_path / "run.toml", tmp_path / "two")["new_steps"] == 3
    refused = natgrad("ingest", tmp_path / "states", tmp_path / "gradients", tmp_path / "three", *pairs)
    assert refused.returncode == 2
    assert "list the sources in a run file" in refused.stderr
    refused = natgrad("ingest", tmp_path / "states", "--map", "parameter=theta", "loss=l")
    assert refused.returncode == 2
    assert "OUT is missing" in refused.stderr
    refused = natgrad("ingest", tmp_path / "states", tmp_path / "four", "--map", "theta")
    assert "is not of the form" in refused.stderr


def test_commands_take_shifts(tmp_path):
    # Gradient and loss of a state are logged one step after it.
    states = random_walk(6)
    logged = [
        {key: (before if key[0] in "gl" else here)[key] for key in here}
        for before, here in zip([states[0], *states], states, strict=False)
    ]
    log = write_log(tmp_path / "log", logged)
    shifts = ("--shift", "gradient=-1", "--shift", "loss=-1")
    found = answer("inspect", log, *shifts)
    assert (found["steps"], found["first_step"], found["last_step"]) == (6, 0, 5)
    ingested = answer("ingest", log, tmp_path / "out", *shifts)
    assert (ingested["steps"], ingested["last_step_lacks"]) == (6, ["gradient", "loss"])
    losses = open_trajectory(tmp_path / "out" / "trajectory.zarr").scalar("loss")
    np.testing.assert_array_equal(losses, [*(state["loss"] for state in states[:5]), np.nan])
    done = natgrad("ingest", log, tmp_path / "out", "--shift", "gradient=next")
    assert done.returncode == 2
    assert "gradient=next is not a valid shift" in done.stderr


def test_each_of_several_sources_takes_its_own_part_of_a_map(tmp_path):
    states = [{key.replace("gradient/", "g/"): v for key, v in state.items()} for state in random_walk(6)]
    log = write_log(tmp_path / "log", [{k: v for k, v in state.items() if k != "loss"} for state in states])
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("count,nll\n" + "".join(f"{step},{step / 8}\n" for step in range(6)))
    os.utime(metrics, (1, 1))
    found = answer("ingest", log, metrics, tmp_path / "out", "--map", "gradient=g", "loss=nll", "step=count")
    assert found["steps"] == 6
    losses = open_trajectory(tmp_path / "out" / "trajectory.zarr").scalar("loss")
    assert losses.tolist() == [step / 8 for step in range(6)]
    done = natgrad("inspect", log, log, "--map", "gradient=g")
    assert done.returncode == 2
    assert "ambiguous which SOURCE" in done.stderr


def unreadable(out, name):
    """Replace a file by one from which reads fail with EIO: the memory of a process at address 0."""
    path = out / name
    path.unlink()
    path.symlink_to("/proc/self/mem")
    return path


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("report", "results.zarr/model/angle/c.0.0.0"),
        ("info", "trajectory.zarr/loss/zarr.json"),
        ("analyze", "ledger.zarr/gram/c/0/0/0/0"),
        ("verify", "ledger.zarr/gram/c/0/0/0/0"),
    ],
)
def test_a_disk_that_fails_gives_a_message_with_the_file(tmp_path, run, command, name):
    out = shutil.copytree(run[1], tmp_path / "out")
    path = unreadable(out, name)
    done = natgrad(command, out)
    assert (done.returncode, "the disk failed: Input/output error" in done.stderr) == (2, True), done.stderr
    assert f"where: {path}\n" in done.stderr
    assert "check the disk" in done.stderr


def test_a_page_that_cannot_be_written_can_be_written_elsewhere(tmp_path, run, monkeypatch):
    def read_only(self, *arguments, **options):
        if self.parent == run[1] and set("wx") & set(str(arguments[:1])):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return opened(self, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", read_only)
    done = natgrad("report", run[1])
    assert done.returncode == 2
    assert "cannot write the page: Read-only file system" in done.stderr
    assert f"where: {run[1] / 'report.html'}\n" in done.stderr
    assert "--page PAGE" in done.stderr
    assert natgrad("report", run[1], "--page", tmp_path / "page.html").returncode == 0
    assert (tmp_path / "page.html").read_bytes()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))
from natgrad.app.cli import main
main()
"""


@pytest.mark.parametrize("command", ["ingest", "analyze", "report"])
def test_a_limit_of_one_gigabyte_gives_a_message_with_the_plan(tmp_path, run, command):
    log, out, _ = run
    arguments = {"ingest": (log, tmp_path / "new"), "analyze": (out,), "report": (out,)}[command]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "limited to 954 MiB" in done.stderr
    assert re.search(r"why: +3\d\d MiB of memory are planned", done.stderr)
    least = int(re.search(r"at least (\d+) \(ulimit -v", done.stderr)[1])
    enough = LIMITED.replace("10**9", str(least * 1024))
    subprocess.run([sys.executable, "-c", enough, command, *map(str, arguments)], check=True)


@pytest.mark.parametrize(
    ("error", "what"), [(MemoryError(), "an allocation failed"), (RuntimeError("can't start new thread"), "thread")]
)
def test_missing_memory_gives_a_message_with_the_plan(error, what):
    with (
        pytest.raises(Unavailable, match=what) as refusal,
        memory_errors(lambda: 5 << 20),
    ):
        raise error
    assert "5 MiB are planned" in refusal.value.why
    with pytest.raises(RuntimeError, match="another"), memory_errors(lambda: 0):
        raise RuntimeError("another")


# Terminal ----------------------------------------------------------------------------------------------------


def on_a_terminal(*arguments, environment=None, when=None):
    """Run the command with a terminal as standard error; return what it drew and its exit status.

    ``when`` is a text and a signal that is sent once the text is drawn.
    """
    main, worker = os.openpty()
    command = [NATGRAD, *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"} | (environment or {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=worker, env=environment) as process:
        os.close(worker)
        drawn, sent = b"", False
        while True:
            try:
                drawn += os.read(main, 4096)
            except OSError:  # the terminal ends with the process
                break
            if when is not None and not sent and when[0].encode() in drawn:
                process.send_signal(when[1])
                sent = True
        process.communicate()
    os.close(main)
    return drawn.decode(), process.returncode


def test_progress_has_rates_and_starts_before_the_number_of_states_is_known(run, tmp_path):
    drawn, code = on_a_terminal("process", run[0], tmp_path, environment={"NO_COLOR": "1"})
    assert code == 0
    stages = ("look for the log", "describe", "ingest", "analyze", "results", "report")
    positions = [drawn.index(stage) for stage in stages]
    assert positions == sorted(positions)
    assert re.search(r"12/12 [\d.]+ states/s", drawn)
    # Only sequences that set colours are affected by NO_COLOR.
    assert not re.search(r"\x1b\[[\d;]*(3\d|4\d|9\d)m", drawn)
    assert re.search(r"\x1b\[[\d;]*3\dm", on_a_terminal("ingest", run[0], tmp_path / "colours")[0])


def test_without_a_terminal_nothing_is_drawn(run, tmp_path):
    done = natgrad_process("ingest", run[0], tmp_path, environment={"FORCE_COLOR": ""})
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_after_an_interrupt_the_same_command_continues(tmp_path, option):
    states = random_walk(40)
    log = write_log(tmp_path / "log", states[:20])
    # The command waits for further steps until it is interrupted, in its first or in a later stage.
    drawn, code = on_a_terminal("process", log, tmp_path / "out", *option, when=("describe", signal.SIGINT))
    assert code == 1
    assert "natgrad: interrupted. What is finished is stored: " in drawn
    assert ("without --overwrite, " in drawn) == bool(option)
    done = answer("process", log, tmp_path / "out")
    assert done["steps"] == 20


@pytest.mark.parametrize("command", ["process", "ingest"])
def test_a_missing_out_is_named(command, monkeypatch):
    done = natgrad(command, "logs/my run")
    assert done.returncode == 2
    assert "OUT is missing" in done.stderr
    assert f"natgrad {command} 'logs/my run' OUT" in done.stderr
    assert "OUT" in natgrad(command).stderr


def test_a_summary_is_printed_whatever_the_encoding_of_the_output(run):
    done = natgrad_process("info", run[1], environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"angle course +[1-8 ]+  0", done.stdout)
    assert re.search("angle course +[▁▂▃▄▅▆▇█ ]+  0", natgrad("info", run[1]).stdout)
    assert "worst tensors\n  tensor " in done.stdout


def test_runs_are_compared_on_one_page(run, tmp_path):
    _, out, _ = run
    other = write_log(tmp_path / "log", random_walk(9, seed=1))
    assert natgrad("process", other, tmp_path / "other", "--window", "2").returncode == 0
    found = answer("compare", out, tmp_path / "other", "--align", "length", "--page", tmp_path / "page.html")
    assert [row["run"] for row in found["runs"]] == ["out", "other"]
    assert {row["option"] for row in found["differing_options"]} >= {"window"}
    assert len(found["differing_tensors"]) == 3
    assert found["report"] == str(tmp_path / "page.html")
    assert "Comparison of 2 runs" in (tmp_path / "page.html").read_text()
    text = natgrad("compare", out, tmp_path / "other").stdout
    assert "differing options\n  option  " in text
    assert (out / "comparison.html").is_file()
    (out / "comparison.html").unlink()
    assert natgrad("compare", out).returncode == 2
