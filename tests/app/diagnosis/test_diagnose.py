"""Inspect folders of many kinds, and execute the commands that are proposed exactly as they are printed."""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import natgrad
from commands import natgrad as command
from lazy import Lazy
from logs import random_walk, write_log, write_step
from natgrad.app.scan import find_runs
from natgrad.schema.names import SCALARS
from natgrad.store import open_trajectory
from optimizer_states import train

torch = Lazy("torch")

STATES = random_walk(4, tensors={"w": (3,), "b": ()}, dtype="float64")
LONG_AGO = 1_000_000_000


def part(states, *kinds):
    """Return the keys of states that belong to some kinds, such as the gradients."""
    return [{key: value for key, value in state.items() if key.split("/")[0] in kinds} for state in states]


def renamed(states, names):
    return [
        {
            names.get(key.split("/")[0], key.split("/")[0]) + key[len(key.split("/")[0]) :]: v
            for key, v in state.items()
        }
        for state in states
    ]


def write_arrays(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **state)


def nested(state):
    found = {}
    for key, value in state.items():
        array, slash, name = key.partition("/")
        if slash:
            found.setdefault(array, {})[name] = torch.from_numpy(np.array(value))
        else:
            found[key] = float(value)
    return found


def write_torch(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.utime(path, (LONG_AGO, LONG_AGO))


def scalar_rows(states, **names):
    names = {"step": "step", "loss": "loss", "learning_rate": "lr"} | names
    return [
        {names["step"]: number, names["loss"]: float(s["loss"]), names["learning_rate"]: float(s["learning_rate"])}
        for number, s in enumerate(states)
    ]


# Folders that can be processed: each writer returns the expected first and last step, and quantities -------------

TENSORS = ("parameter", "gradient")
ALL = {"parameter", "gradient", "loss", "learning_rate"}


def scripts_with_checkpoints_in_a_subfolder(root):
    (root / "train.py").write_text("print()\n")
    (root / "README.md").write_text("# Training\n")
    write_log(root / "outputs" / "checkpoints", STATES)
    return 0, 3, ALL


def gradients_in_a_second_folder(root):
    write_log(root / "ckpt", part(STATES, "parameter", "loss", "learning_rate"))
    write_log(root / "grads", part(STATES, "gradient"))
    return 0, 3, ALL


def gradients_in_a_second_folder_and_scalars_in_a_file(root):
    write_log(root / "ckpt", part(STATES, "parameter"))
    write_log(root / "grads", part(STATES, "gradient"))
    write_csv(root / "logs" / "metrics.csv", scalar_rows(STATES))
    return 0, 3, ALL


def scalars_next_to_the_states(root):
    write_log(root, part(STATES, *TENSORS))
    write_csv(root / "metrics.csv", scalar_rows(STATES))
    return 0, 3, ALL


def scalars_with_unknown_names(root):
    write_log(root / "run", part(STATES, *TENSORS))
    write_csv(root / "log.csv", scalar_rows(STATES, step="iteration", loss="total_loss", learning_rate="eta"))
    return 0, 3, ALL


def printed_lines(root):
    write_log(root / "run", part(STATES, *TENSORS, "learning_rate"))
    lines = [f"iter {number}: loss {float(state['loss']):.6f}, time 12ms\n" for number, state in enumerate(STATES)]
    (root / "train.log").write_text("".join(["compiling the model\n", *lines]))
    os.utime(root / "train.log", (LONG_AGO, LONG_AGO))
    return 0, 3, ALL


def printed_lines_of_an_unknown_form(root):
    write_log(root / "run", part(STATES, *TENSORS))
    lines = [
        f"[10:0{n}] Step {n}/100 - train loss: {float(s['loss']):.6f} ({n + 7} ms) lr={float(s['learning_rate'])}\n"
        for n, s in enumerate(STATES)
    ]
    (root / "out.txt").write_text("".join(["loss is printed at each step\n", *lines, "step 3 val loss 9.5\n"]))
    os.utime(root / "out.txt", (LONG_AGO, LONG_AGO))
    return 0, 3, ALL


def files_of_tensors_in_two_folders(root):
    for number, state in enumerate(STATES):
        for array, folder in (("parameter", "params"), ("gradient", "grads")):
            (root / folder / f"{number:04}").mkdir(parents=True)
            for name in ("w", "b"):
                np.save(root / folder / f"{number:04}" / name, state[f"{array}/{name}"])
    write_csv(root / "metrics.csv", scalar_rows(STATES))
    return 0, 3, ALL


def gradients_in_a_folder_with_a_name_of_several_words(root):
    write_log(root / "ckpt", part(STATES, "parameter", "loss", "learning_rate"))
    for number, state in enumerate(part(STATES, "gradient")):
        names = {key.removeprefix("gradient/"): value for key, value in state.items()}
        write_arrays(root / "grad_dump" / f"{number}.npz", names)
    return 0, 3, ALL


def gradients_between_the_checkpoints_of_a_trainer(root):
    for number, state in enumerate(STATES):
        folder = root / "output" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        names = (
            {key.partition("/")[2]: value for key, value in s.items()}
            for s in (*part([state], "parameter"), *part([state], "gradient"))
        )
        safetensors.numpy.save_file(next(names), folder / "model.safetensors")
        safetensors.numpy.save_file(next(names), root / "output" / f"grads_{number}.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": []}))
    write_csv(root / "output" / "log.csv", scalar_rows(STATES))
    return 0, 3, ALL


def names_with_an_unknown_pattern(root):
    for number, state in enumerate(STATES):
        write_arrays(root / f"gpt2w{10 * number}x.npz", state)
    return 0, 30, ALL


def folders_with_an_unknown_pattern(root):
    for number, state in enumerate(STATES):
        write_arrays(root / f"out{number}" / "tensors" / "all.npz", state)
    return 0, 3, ALL


def names_with_an_unknown_ending(root):
    for number, state in enumerate(STATES):
        write_step(root, number, state).rename(root / f"weights_{number}.model")
    return 0, 3, ALL


def two_files_of_a_step(root):
    for number, state in enumerate(STATES):
        write_arrays(root / f"model_{number}.npz", part([state], *TENSORS)[0])
        write_arrays(root / f"scheduler_{number}.npz", {"state/last": np.ones(2)})
    return 0, 3, {"parameter", "gradient"}


def two_files_of_a_step_and_gradients(root):
    for number, state in enumerate(STATES):
        write_arrays(root / "run" / f"model_{number}.npz", part([state], "parameter", "loss")[0])
        write_arrays(root / "run" / f"ema_{number}.npz", part([state], "parameter")[0])
    write_log(root / "grads", part(STATES, "gradient", "learning_rate"))
    return 0, 3, ALL


def unknown_keys(root):
    names = {"parameter": "net", "gradient": "dL/grad", "loss": "objective", "learning_rate": "eta"}
    for number, state in enumerate(renamed(STATES, names)):
        write_arrays(root / f"step_{number}.npz", state)
    return 0, 3, ALL


def keys_with_spaces(root):
    names = {"parameter": "the net", "gradient": "the grad"}
    for number, state in enumerate(renamed(STATES, names)):
        write_arrays(root / f"step_{number}.npz", state)
    return 0, 3, ALL


def nested_model(root):
    for number, state in enumerate(STATES):
        found = nested(state)
        write_torch(
            root / f"ep0-ba{number + 5}.pt",
            {"outer": {"inner": found["parameter"]}, "grads": found["gradient"], "lr": 0.1, "loss": found["loss"]},
        )
    return 5, 8, ALL


def epochs_with_steps_in_the_files(root):
    for number, state in enumerate(STATES):
        found = nested(state)
        write_torch(
            root / f"epoch_{number}.pt",
            {
                "model": found["parameter"],
                "grad": found["gradient"],
                "global_step": 50 * number,
                "lr": 0.1,
                "loss": found["loss"],
            },
        )
    return 0, 150, ALL


def files_without_a_number(root):
    for name, number, state in zip("abcd", (10, 20, 30, 40), STATES, strict=True):
        found = nested(state)
        write_torch(
            root / f"{name}.pt",
            {
                "model": found["parameter"],
                "grad": found["gradient"],
                "iteration": number,
                "lr": 0.1,
                "loss": found["loss"],
            },
        )
    return 10, 40, ALL


def a_gap(root):
    write_log(root, STATES, numbers=[0, 1, 2, 5])
    return 0, 5, ALL


def names_that_need_quotes(root):
    write_log(root / "my run's $HOME", STATES)
    return 0, 3, ALL


def one_file_of_all_steps(root):
    stacked = {key: np.stack([state[key] for state in STATES]) for key in STATES[0]}
    write_arrays(root / "history.npz", stacked)
    return 0, 3, ALL


ACCEPTED = [
    scripts_with_checkpoints_in_a_subfolder,
    gradients_in_a_second_folder,
    gradients_in_a_second_folder_and_scalars_in_a_file,
    scalars_next_to_the_states,
    scalars_with_unknown_names,
    printed_lines,
    printed_lines_of_an_unknown_form,
    files_of_tensors_in_two_folders,
    gradients_in_a_folder_with_a_name_of_several_words,
    gradients_between_the_checkpoints_of_a_trainer,
    names_with_an_unknown_pattern,
    folders_with_an_unknown_pattern,
    names_with_an_unknown_ending,
    two_files_of_a_step,
    two_files_of_a_step_and_gradients,
    unknown_keys,
    keys_with_spaces,
    a_gap,
    names_that_need_quotes,
    one_file_of_all_steps,
]

WRITTEN_BY_TORCH = [nested_model, epochs_with_steps_in_the_files, files_without_a_number]


def follow(found, folder, monkeypatch, stage="ingest"):
    """Execute a proposed command in a folder, with its run file if the command names it."""
    words = shlex.split(found.command)
    assert words[:2] == ["natgrad", "process"]
    if found.run_file is not None and words[2] == found.run_file["path"]:
        Path(found.run_file["path"]).write_text(found.run_file["content"])
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    done = command(stage, *words[2:], "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states_of(source, out):
    """Return the number of states that an ingest of a source stores, 0 if it is refused."""
    try:
        return natgrad.ingest(source, out).steps
    except natgrad.InputError:
        return 0


def require_all_states_and_quantities(tmp_path, monkeypatch, write):
    root = tmp_path / "root"
    root.mkdir()
    first, last, quantities = write(root)
    found = natgrad.inspect(root)
    assert found.command is not None, found
    assert (found.steps, found.first_step, found.last_step) == (4, first, last)
    assert set(found.holds) >= quantities
    assert found.step_span == (last - first) // 3 or found.gaps
    summary = follow(found, tmp_path / "here", monkeypatch)
    assert (summary["steps"], summary["first_step"], summary["last_step"]) == (4, first, last)
    trajectory = open_trajectory(tmp_path / "here" / "OUT" / "trajectory.zarr")
    assert all(np.isfinite(trajectory.scalar(name)).all() for name in SCALARS if name in quantities)
    assert {tensor.name for tensor in trajectory.layout.tensors} == {"w", "b"}
    assert str(found.command) in str(found)


@pytest.mark.parametrize("write", ACCEPTED, ids=lambda write: write.__name__)
def test_the_proposed_command_reads_all_states_and_quantities(tmp_path, monkeypatch, write):
    require_all_states_and_quantities(tmp_path, monkeypatch, write)


@pytest.mark.parametrize("write", WRITTEN_BY_TORCH, ids=lambda write: write.__name__)
def test_the_proposed_command_reads_files_of_torch(tmp_path, monkeypatch, write):
    require_all_states_and_quantities(tmp_path, monkeypatch, write)


@pytest.mark.parametrize("write", [gradients_in_a_second_folder, names_with_an_unknown_pattern])
def test_the_proposed_command_gives_results(tmp_path, monkeypatch, write):
    root = tmp_path / "root"
    root.mkdir()
    write(root)
    found = natgrad.inspect(root)
    summary = follow(found, tmp_path / "here", monkeypatch, stage="process")
    assert sum(summary["status"].values()) == summary["updates"] == 3
    assert found.process_seconds > found.ingest_seconds + found.pass_seconds
    assert found.log_bytes == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_a_run_file_joins_the_logs_of_a_run(tmp_path):
    gradients_in_a_second_folder(tmp_path)
    found = natgrad.inspect(tmp_path)
    assert found.run_file["path"] == str(tmp_path / "run.toml")
    Path(found.run_file["path"]).write_text(found.run_file["content"])
    assert natgrad.ingest(tmp_path, tmp_path / "out").steps == 4
    lines = str(found).splitlines()
    assert lines[lines.index(f"run file {tmp_path}/run.toml (optional; natgrad scan reads it)") + 1 :] == [
        f"  {line}".rstrip() for line in found.run_file["content"].splitlines()
    ]


# Several runs -------------------------------------------------------------------------------------------------


def test_a_scan_is_proposed_for_a_folder_of_runs(tmp_path):
    for name in ("seed-1", "seed-2", "seed-3"):
        write_log(tmp_path / "runs" / name, STATES)
    found = natgrad.inspect(tmp_path / "runs")
    words = shlex.split(found.command)
    assert words == ["natgrad", "scan", str(tmp_path / "runs"), "OUT"]
    assert len(found.other_commands) == 3
    assert [run.name for run in find_runs(words[2], tmp_path / words[3])] == ["seed-1", "seed-2", "seed-3"]
    for accepted in found.other_commands:
        assert natgrad.ingest(shlex.split(accepted)[2], tmp_path / shlex.split(accepted)[2][-6:] / "out").steps == 4


def test_numbered_folders_of_runs_are_not_the_steps_of_one_run(tmp_path):
    for name in ("1", "2"):
        one_file_of_all_steps(tmp_path / name)
    found = natgrad.inspect(tmp_path)
    assert shlex.split(found.command)[:2] == ["natgrad", "scan"]
    assert not any("{step}" in accepted for accepted in found.other_commands)


def test_a_log_is_joined_with_the_nearest_run_only(tmp_path):
    write_log(tmp_path / "a" / "run", part(STATES, *TENSORS))
    write_log(tmp_path / "b" / "run", part(STATES, *TENSORS))
    write_csv(tmp_path / "b" / "log.csv", scalar_rows(STATES))
    found = natgrad.inspect(tmp_path)
    sources = [shlex.split(accepted)[2:-1] for accepted in (found.command, *found.other_commands)]
    assert sources == [
        [str(tmp_path / "b" / "run"), str(tmp_path / "b" / "log.csv")],
        [str(tmp_path / "a" / "run")],
    ]


@pytest.mark.parametrize("there", ["grads", "logs/grads"])
def test_what_a_folder_lacks_is_searched_next_to_it(tmp_path, monkeypatch, there):
    write_log(tmp_path / "run" / "ckpt", part(STATES, "parameter"))
    write_log(tmp_path / "run" / there, part(STATES, "gradient"))
    write_csv(tmp_path / "run" / "metrics.csv", scalar_rows(STATES))
    (tmp_path / "run" / "train.py").write_text("print()\n")
    found = natgrad.inspect(tmp_path / "run" / "ckpt")
    locations = [str(tmp_path / "run" / name) for name in ("ckpt", there, "metrics.csv")]
    assert shlex.split(found.command) == ["natgrad", "process", *locations, "OUT"]
    assert [note for note in found.notes if "same run" in note] == [
        f"{location} is not in {locations[0]}: check that it belongs to the same run" for location in locations[1:]
    ]
    assert follow(found, tmp_path / "here", monkeypatch)["steps"] == len(STATES)


def test_other_runs_next_to_a_folder_are_not_joined(tmp_path):
    write_log(tmp_path / "runs" / "one", part(STATES, "parameter"))
    write_log(tmp_path / "runs" / "other", part(STATES, "parameter"))
    write_csv(tmp_path / "runs" / "other" / "metrics.csv", scalar_rows(STATES))
    write_log(tmp_path / "runs" / "third", part(STATES, "gradient"))
    found = natgrad.inspect(tmp_path / "runs" / "one")
    assert shlex.split(found.command) == ["natgrad", "process", str(tmp_path / "runs" / "one"), "OUT"]
    assert not any("same run" in note for note in found.notes)


def test_the_declaration_is_shown_with_what_the_losses_show(tmp_path):
    write_log(tmp_path, STATES)
    plain = natgrad.inspect(tmp_path).objective
    assert not plain.startswith("declared")
    assert natgrad.inspect(tmp_path, evaluation="batch").objective == f"declared batch; {plain}"


def test_one_checkpoint_for_each_seed_is_not_a_run(tmp_path):
    for seed, state in enumerate(STATES):
        write_arrays(tmp_path / f"seed-{seed}" / "model.npz", state)
    found = natgrad.inspect(tmp_path)
    assert found.command is None
    assert "{step}" not in str(found)


# Folders and files that cannot be processed ---------------------------------------------------------------------


def empty(root):
    return "the folder is empty"


def files_of_an_unknown_format(root):
    for number in range(3):
        (root / f"checkpoint_{number}").write_bytes(b"\x84\xa6params" + bytes(40))
    return "the content of 'checkpoint_0' is of no known format"


def images(root):
    for number in range(12):
        (root / f"img_{number}.png").write_bytes(b"\x89PNG\r\n")
    return "12, img_0.png to img_11.png"


def a_pipe(root):
    os.mkfifo(root / "step_0.safetensors")
    return "named pipe"


def a_pipe_of_unknown_name(root):
    os.mkfifo(root / "metrics.csv")
    return "named pipe"


def one_state(root):
    write_log(root, STATES[:1])
    return "at least two states"


def damaged_states(root):
    for path in write_log(root, STATES).iterdir():
        path.write_bytes(path.read_bytes()[:-8])
        os.utime(path, (LONG_AGO, LONG_AGO))
    return "cannot read a safetensors file"


def text_named_like_states(root):
    for number in range(3):
        (root / f"step_{number}.pt").write_text("hello")
        os.utime(root / f"step_{number}.pt", (LONG_AGO, LONG_AGO))
    return "torch"


def links_to_nowhere(root):
    for number in range(3):
        (root / f"step_{number}.npz").symlink_to(root / "gone")
    return "broken links"


REFUSED = [
    empty,
    files_of_an_unknown_format,
    images,
    a_pipe,
    a_pipe_of_unknown_name,
    one_state,
    damaged_states,
    text_named_like_states,
    links_to_nowhere,
]


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_the_contents_and_the_reason_are_reported_if_nothing_works(tmp_path, write):
    root = tmp_path / "root"
    root.mkdir()
    reason = write(root)
    found = natgrad.inspect(root)
    assert found.command is None
    assert reason in str(found)
    assert found.contents
    assert set(found.error) == {"what", "where", "why", "do"}
    assert states_of(root, tmp_path / "out") < 2
    done = command("inspect", root)
    assert done.returncode == (0 if found.readable else 2)
    assert (str(found.refusal) in done.stderr) == (not found.readable)
    assert str(found) == done.stdout
    assert json.loads(command("inspect", root, "--json").stdout)["error"] == found.error


def test_a_log_of_scalars_alone_is_described_with_its_steps(tmp_path):
    write_csv(tmp_path / "metrics.csv", scalar_rows(STATES))
    for source in (tmp_path, tmp_path / "metrics.csv"):
        found = natgrad.inspect(source)
        assert found.command is None
        assert (found.steps, found.first_step, found.last_step) == (4, 0, 3)
        assert "loss at every step" in found.provides[str(tmp_path / "metrics.csv")]
        assert "does not contain any tensors" in found.error["what"]


def test_a_file_of_a_step_leads_to_the_log_in_its_folder(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log", STATES)
    found = natgrad.inspect(log / "step_2.safetensors")
    assert shlex.split(found.command)[:3] == ["natgrad", "process", str(log)]
    assert follow(found, tmp_path / "here", monkeypatch)["steps"] == 4


def test_gradients_alone_are_described_but_not_proposed(tmp_path):
    write_log(tmp_path, part(STATES, "gradient"))
    found = natgrad.inspect(tmp_path)
    assert found.command is None
    assert set(found.holds) == {"gradient"}
    assert "parameter" in found.error["what"]


def test_a_file_with_the_ending_of_no_format_is_recognized_by_its_content(tmp_path):
    write_step(tmp_path, 0, STATES[0]).rename(tmp_path / "final.weights")
    found = natgrad.inspect(tmp_path)
    assert found.command is None
    assert "the content of 'final.weights' is that of step_<N>.safetensors" in found.nearest_format


def test_names_without_a_number_are_explained(tmp_path):
    for name in ("best", "last"):
        write_arrays(tmp_path / f"{name}.npz", STATES[0])
    found = natgrad.inspect(tmp_path)
    assert found.command is None
    assert "its name has no number that may be a step" in found.nearest_format


def test_options_that_are_refused_are_an_error(tmp_path):
    log = write_log(tmp_path / "log", STATES)
    with pytest.raises(natgrad.InputError, match="there is no gradient under the key 'g'"):
        natgrad.inspect(log, mapping={"gradient": "g"})
    with pytest.raises(natgrad.InputError, match="no such file or folder"):
        natgrad.inspect(tmp_path / "no")


def test_ambiguous_records_are_not_used_without_a_choice(tmp_path):
    write_log(tmp_path / "run", part(STATES, *TENSORS))
    rows = [{"rank": rank, "step": step, "loss": 10.0 - step + 50 * rank} for step in range(4) for rank in (0, 1)]
    write_csv(tmp_path / "ranks.csv", rows)
    found = natgrad.inspect(tmp_path)
    assert "loss" not in found.holds
    assert any("differ in rank" in note for note in found.notes)


# Agreement with ingest ------------------------------------------------------------------------------------------


@given(
    form=st.sampled_from(["step_{}", "ckpt-{}", "w{}x", "epoch_{}", "run{}_final"]),
    arrays=st.lists(st.sampled_from(["parameter", "gradient", "loss", "learning_rate"]), unique=True, min_size=1),
    prefix=st.sampled_from(["", "net", "a b"]),
    gradient=st.sampled_from(["gradient", "dw/grad", "unknown"]),
    numbers=st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=4),
    separate=st.booleans(),
)
def test_a_command_is_proposed_only_if_it_is_accepted(
    form, arrays, prefix, gradient, numbers, separate, tmp_path_factory
):
    root = tmp_path_factory.mktemp("root")
    names = {"parameter": prefix or "parameter", "gradient": gradient}
    for number, state in zip(sorted(numbers), STATES, strict=False):
        kinds = [kind for kind in arrays if kind != "gradient"] if separate else arrays
        write_arrays(root / "run" / f"{form.format(number)}.npz", renamed(part([state], *kinds), names)[0])
        if separate and "gradient" in arrays:
            write_arrays(
                root / "grads" / f"{form.format(number)}.npz", renamed(part([state], "gradient"), names)[0]
            )
    found = natgrad.inspect(root)
    with pytest.MonkeyPatch.context() as patch:
        if found.command is not None:
            assert follow(found, root / "here", patch)["steps"] == found.steps
        else:
            assert found.error is not None
            assert states_of(root / "run", root / "out") < 2


def test_the_notebook_table_contains_the_command_and_escapes_names(tmp_path):
    write_log(tmp_path / "<b>x</b>" / "run", STATES)
    table = natgrad.inspect(tmp_path / "<b>x</b>")._repr_html_()
    assert "natgrad process" in table
    assert "<b>" not in table
    assert re.search("<th[^>]*>command</th>", table)


# Gradients from optimizer states -----------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def rprop(model):
    return torch.optim.Rprop(model.parameters(), lr=1e-2)


@pytest.mark.parametrize(("optimizer_of", "recovers"), [(adamw, True), (rprop, False)])
def test_recovery_is_proposed_if_the_states_of_the_optimizer_can_be_inverted(tmp_path, optimizer_of, recovers):
    trees, _ = train(optimizer_of, 3)
    for step, tree in enumerate(trees):
        (tmp_path / "log").mkdir(exist_ok=True)
        torch.save(tree, tmp_path / "log" / f"step-{step}.pt")
    found = natgrad.inspect([tmp_path / "log"])
    plain = f"natgrad process {tmp_path}/log OUT"
    recovering = f"{plain} --gradient from-optimizer"
    if recovers:
        assert found.command == recovering
        assert found.other_commands == [plain]
        assert any("mini-batch" in note for note in found.notes)
        assert found.gradient_from["recover"].startswith(f"{recovering}: about ")
        assert [*found.gradient_from] == ["recover", "replay", "record"]
    else:
        assert [*found.gradient_from] == ["replay", "record", "recover"]
        assert "Rprop cannot be inverted" in found.gradient_from["recover"]
        assert found.command == plain
        assert "Rprop cannot be inverted" in found.refused[recovering]


def test_replay_is_proposed_for_states_of_parameters_alone(tmp_path):
    states = [{key: state[key] for key in state if key.startswith("parameter")} for state in random_walk(5)]
    found = natgrad.inspect(write_log(tmp_path / "log", states, numbers=[0, 1, 2, 4, 8]))
    replay, elements = found.gradient_from["replay"], 17
    assert replay.startswith(f"natgrad replay {tmp_path}/log OUT --objective MODULE:FACTORY: ")
    assert "takes 5 forward and backward passes" in replay
    assert f"{5 * elements * 4 / 1e9:.3g} GB of gradients" in replay
    assert found.gradient_from["recover"].startswith("not possible: the states of the optimizer")
    assert "takes 9 forward and backward passes" in found.gradient_from["record"]
    assert [*found.gradient_from] == ["replay", "record", "recover"]
    assert natgrad.inspect(write_log(tmp_path / "other", random_walk(3))).gradient_from is None


def test_recovery_is_not_proposed_if_states_are_far_apart(tmp_path):
    trees, _ = train(adamw, 30)
    for step in (0, 30):
        (tmp_path / "log").mkdir(exist_ok=True)
        torch.save(trees[step], tmp_path / "log" / f"step-{step}.pt")
    found = natgrad.inspect([tmp_path / "log"])
    assert found.command == f"natgrad process {tmp_path}/log OUT"
    assert "30 updates apart" in found.refused[f"{found.command} --gradient from-optimizer"]


def test_a_shift_that_the_updates_prove_is_proposed(tmp_path):
    theta, gradient = np.arange(40.0), np.zeros(40)
    for step in range(6):  # as in a callback after the update
        state = {"parameter/w": theta, "gradient/w": gradient, "learning_rate": 0.1}
        np.savez(tmp_path / f"step_{step}.npz", **state)
        gradient = np.sin(theta + step)
        theta = theta - 0.1 * gradient
    found = natgrad.inspect(tmp_path)
    assert "--shift gradient=-1" in found.command
    assert any("inferred from the first updates" in note for note in found.notes)
