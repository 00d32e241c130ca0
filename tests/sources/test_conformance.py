"""The conformance suite: every reader, by ability. All entries of the published table are checked."""

import re

import numpy as np
import pytest
from test_scalar_log import settled

from conformance import (
    SCALAR_WRITERS,
    STATES,
    TENSOR_WRITERS,
    Orbax,
    afresh,
    declared,
    native,
    states_of,
    with_last_state,
)
from logs import write_step
from natgrad.schema.errors import InputError
from natgrad.sources.formats import FORMATS
from natgrad.sources.opening import format_of
from natgrad.storage import open_storage
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest

SCALARS = ("loss", "learning_rate")


def content(out, ledger=False):
    """Return the newest states of a trajectory by step, and with the ledger, its products.

    The loss and the rate of the last state are omitted: no update follows it, and some formats do not log them.
    """
    trajectory = open_trajectory(out)
    rows = trajectory.current()
    found = {"step": trajectory.scalar("step")[rows].tolist()}
    found |= {name: trajectory.scalar(name)[rows][:-1].tolist() for name in SCALARS}
    for name in ("parameter", "gradient"):
        words = np.zeros((trajectory.n_states, trajectory.layout.elements), trajectory.dtypes[name])
        trajectory.read(name, 0, trajectory.n_states, 0, words)
        found[name] = words[rows].tobytes()
    # A level of a name is separated by a dot or a slash.
    found["tensors"] = [(tensor.name.replace("/", "."), tensor.shape) for tensor in trajectory.layout.tensors]
    if ledger:
        compute_ledger(out, out.with_name("ledger.zarr"))
        found["ledger"] = [array.tobytes() for array in open_ledger(out.with_name("ledger.zarr")).read()]
    return found


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    return Orbax(tmp_path_factory.mktemp("orbax"))


@pytest.fixture
def write(request, format):
    """The writer of a format."""
    writer = TENSOR_WRITERS[format]
    return request.getfixturevalue("orbax") if writer.write is Orbax else writer.write


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The content of the native log of some states."""
    known = {}

    def of(states, **options):
        key = tuple(state.tag for state in states.values())
        if key not in known:
            folder = tmp_path_factory.mktemp("native")
            ingest(native("safetensors")(folder / "log", states), folder / "out.zarr")
            known[key] = content(folder / "out.zarr", ledger=True)
        return known[key]

    return of


def require(found, expected):
    """Compare two contents; the first may have no ledger."""
    assert found == {name: expected[name] for name in found}


def entry(kind, ability, format):
    return declared()[kind][ability][format]


def check(action, declaration):
    """Run an ability if it is declared; otherwise require that it is refused with the declared reason."""
    if declaration == "yes":
        action()
    else:
        with pytest.raises(InputError) as refused:
            action()
        assert declaration.lower() in " ".join(str(refused.value).lower().split())


# Logs of tensors -----------------------------------------------------------------------------------------------


def same_ledger(tmp_path, format, write, expected):
    states = states_of("a")
    sources = write(tmp_path / "log", states)
    assert format_of(open_storage(sources[0])) == format.partition(",")[0].replace("npz", format_name(format))
    ingest(sources, tmp_path / "out.zarr", **TENSOR_WRITERS[format].options)
    require(content(tmp_path / "out.zarr", ledger=True), expected(states))


def format_name(format):
    return "steps" if format == "npz" else "npz"


def last_state(tmp_path, format, write, expected):
    states = with_last_state(states_of("a"))
    ingest(write(tmp_path / "log", states), tmp_path / "out.zarr", **TENSOR_WRITERS[format].options)
    require(content(tmp_path / "out.zarr", ledger=True), expected(states))


def other_source(tmp_path, format, write, expected):
    states = states_of("a")
    if format in ("verl", "bergson"):  # which always need another source
        sources = write(tmp_path / "log", states)
    else:
        sources = write(tmp_path / "log", {n: s.only("parameter", *SCALARS) for n, s in states.items()})
        sources += native("safetensors")(tmp_path / "grads", {n: s.only("gradient") for n, s in states.items()})
    ingest(sources, tmp_path / "out.zarr")
    require(content(tmp_path / "out.zarr"), expected(states))


def other_names(tmp_path, format, write, expected):
    states, pattern = states_of("a"), TENSOR_WRITERS[format].pattern
    log, *others = write(tmp_path / "log", states)
    if log.name.startswith("run."):  # all steps are in one file, which may have any name
        pattern, log = "", log.rename(log.with_name(f"odd 3 name{log.suffix}"))
    for path in log.iterdir() if pattern else ():
        number = re.search(r"(\d+)\D*$", path.name.partition(".")[0])
        if number and path.suffix not in (".txt", ".toml"):
            part = path.name.partition("_")[0]
            path.rename(path.with_name(pattern.replace("{step}", str(int(number[1]))).replace("*", part)))
    tables = [f"[[source]]\npath = '{path.relative_to(tmp_path)}'\n" for path in (log, *others)]
    tables[0] += f"pattern = '{pattern}'\n" if pattern else ""
    (tmp_path / "run.toml").write_text("".join(tables))
    ingest(tmp_path / "run.toml", tmp_path / "out.zarr")
    require(content(tmp_path / "out.zarr"), expected(states))


def restart(tmp_path, format, write, expected):
    options = TENSOR_WRITERS[format].options
    sources = write(tmp_path / "log", states_of("a"))
    assert ingest(sources, tmp_path / "out.zarr", **options).attempts == 1
    states = states_of("b")
    assert ingest(write(tmp_path / "log", states), tmp_path / "out.zarr", **options).attempts == 2
    require(content(tmp_path / "out.zarr"), expected(states))


def later_steps(tmp_path, format, write, expected):
    options, states = TENSOR_WRITERS[format].options, states_of("a")
    first = {number: states[number] for number in range(3)}
    assert ingest(write(tmp_path / "log", first), tmp_path / "out.zarr", **options).steps == 3
    summary = ingest(write(tmp_path / "log", states), tmp_path / "out.zarr", **options)
    assert (summary.new_steps, summary.attempts) == (STATES - 3, 1)
    require(content(tmp_path / "out.zarr"), expected(states))


TENSOR_ABILITIES = {
    "same ledger": same_ledger,
    "last state without gradient": last_state,
    "gradients in another SOURCE": other_source,
    "other names": other_names,
    "restart": restart,
    "later steps": later_steps,
}


@pytest.mark.parametrize("format", TENSOR_WRITERS)
@pytest.mark.parametrize("ability", TENSOR_ABILITIES)
def test_a_log_of_tensors_has_the_abilities_of_the_table(tmp_path, ability, format, write, expected):
    action = TENSOR_ABILITIES[ability]
    check(lambda: action(tmp_path, format, write, expected), entry("tensors", ability, format))


# Logs of scalars -----------------------------------------------------------------------------------------------


def values_of(run, steps=range(STATES - 1)):
    """Return step, loss and rate, which float32 represents."""
    return [(s, (8.0 if run == "a" else 16.0) - s / 4, 0.125 * (s + 1) if run == "a" else 0.0625) for s in steps]


def stored(out):
    trajectory = open_trajectory(out)
    rows = trajectory.current()
    numbers = [trajectory.scalar(name)[rows].tolist() for name in ("step", *SCALARS)]
    return [(int(step), loss, rate) for step, loss, rate in zip(*numbers, strict=True)][:-1]


def tensors_alone(folder, run="a"):
    states = {n: state.only("parameter", "gradient") for n, state in states_of(run).items()}
    return native("safetensors")(folder, states)


def with_scalars(tmp_path, format, values, out="out.zarr", **options):
    writer = SCALAR_WRITERS[format]
    source = afresh(writer.write)(tmp_path / "scalars", values)
    settled(tmp_path / "scalars")
    ingest([*tensors_alone(tmp_path / "log"), source], tmp_path / out, **writer.options | options)
    return source


def same_scalars(tmp_path, format):
    source = with_scalars(tmp_path, format, values_of("a"))
    assert format_of(open_storage(source)) == format.partition(",")[0] or format == "text"
    assert stored(tmp_path / "out.zarr") == values_of("a")


def restarted_scalars(tmp_path, format):
    values = [*values_of("a", range(4)), *values_of("b", range(2, STATES - 1))]
    with_scalars(tmp_path, format, values)
    assert stored(tmp_path / "out.zarr") == [*values_of("a", range(2)), *values_of("b", range(2, STATES - 1))]


def later_scalars(tmp_path, format):
    log = tmp_path / "log"
    for number, state in states_of("a").items():
        write_step(log, number, state.only("parameter", "gradient")) if number < 3 else None
    writer = SCALAR_WRITERS[format]
    for steps in (range(2), range(STATES - 1)):
        source = afresh(writer.write)(tmp_path / "scalars", values_of("a", steps))
        settled(tmp_path / "scalars")
        ingest([log, source], tmp_path / "out.zarr", **writer.options)
        for number, state in states_of("a").items():
            if number >= 3:
                write_step(log, number, state.only("parameter", "gradient"))
        if steps.stop > 2:
            break
    found = stored(tmp_path / "out.zarr")
    assert found[:2] == values_of("a", range(2))
    assert found[3:] == values_of("a", range(3, STATES - 1))


def two_logs(tmp_path, format):
    """The loss of one log of this format, and the rate of another one."""
    writer = SCALAR_WRITERS[format]
    one, other = (afresh(writer.write)(tmp_path / name, values_of(name)) for name in "ab")
    for name in "ab":
        settled(tmp_path / name)
    mapping = writer.options.get("mapping", {})
    tables = [
        f'[[source]]\npath = "{path.relative_to(tmp_path)}"\nmap = {{ {", ".join(maps)} }}\n'
        for path, maps in (
            (tensors_alone(tmp_path / "log")[0], []),
            (one, [f'{key} = "{value}"' for key, value in mapping.items()]),
            (other, [f'{key} = "{value}"' for key, value in mapping.items()]),
        )
    ]
    (tmp_path / "run.toml").write_text("".join(tables))
    summary = ingest(tmp_path / "run.toml", tmp_path / "out.zarr")
    # The first log takes precedence, and the differences are reported.
    assert stored(tmp_path / "out.zarr") == values_of("a")
    assert any("loss" in warning and "differs" in warning for warning in summary.warnings)


SCALAR_ABILITIES = {
    "same numbers": same_scalars,
    "restart": restarted_scalars,
    "later records": later_scalars,
    "several logs": two_logs,
}


@pytest.mark.parametrize("format", SCALAR_WRITERS)
@pytest.mark.parametrize("ability", SCALAR_ABILITIES)
def test_a_log_of_scalars_has_the_abilities_of_the_table(tmp_path, ability, format):
    action = SCALAR_ABILITIES[ability]
    check(lambda: action(tmp_path, format), entry("scalars", ability, format))


# The table -----------------------------------------------------------------------------------------------------


def test_the_table_has_every_format_and_every_ability():
    table = declared()
    for kind, abilities, writers in (
        ("tensors", TENSOR_ABILITIES, TENSOR_WRITERS),
        ("scalars", SCALAR_ABILITIES, SCALAR_WRITERS),
    ):
        assert set(table[kind]) == set(abilities)
        for ability in abilities:
            assert set(table[kind][ability]) == set(writers), ability
        written = {format.partition(",")[0] for format in writers}
        known = {name for name, format in FORMATS.items() if (format.scalars is not None) == (kind == "scalars")}
        # A log of ledgers has no states. Ledgers and results of both are compared in test_products.py.
        assert written == known - {"ledgers"}


def test_a_refusal_is_not_taken_for_another_one():
    def refuse():
        raise InputError("one reason", where="here")

    check(refuse, "one reason")
    with pytest.raises(AssertionError):
        check(refuse, "another reason")
    with pytest.raises(pytest.fail.Exception):
        check(lambda: None, "one reason")
