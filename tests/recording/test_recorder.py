"""Test that the pipeline reads the states that the recorder writes, and that a reader sees only complete steps."""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from lazy import Lazy
from logs import DTYPES
from natgrad.recording.recorder import CONTAINERS, Recorder
from natgrad.schema.errors import InputError
from natgrad.schema.names import SCALARS
from natgrad.sources.completion import complete
from natgrad.sources.steps import LoggedTensor
from opened import open_source

torch = Lazy("torch")

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
shapes = st.dictionaries(names, st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)


def words(array):
    """Return an array as the reader does: flat, bfloat16 as its bits."""
    flat = array.ravel()
    return flat.view(np.uint16) if flat.dtype == ml_dtypes.bfloat16 else flat


def read(folder):
    """Return the content and the arrays of each step by number, with the reader of the pipeline."""
    steps = {}
    source = open_source(folder)
    for step in source.steps():
        with source.open(step) as reader:
            content = reader.content()
            arrays = {}
            for array, tensors in content.arrays.items():
                for tensor, logged in tensors.items():
                    dtype = np.uint16 if logged.dtype == "bfloat16" else logged.dtype
                    arrays[array, tensor] = np.empty(int(np.prod(logged.shape)), dtype)
                    reader.read(array, tensor, 0, arrays[array, tensor])
        steps[step.number] = content, arrays
    return steps


@pytest.mark.parametrize("container", CONTAINERS)
@given(shapes=shapes, step=st.integers(0, 10**12), seed=st.integers(0, 9), with_hvp=st.booleans())
def test_recorded_states_are_read_back_with_the_same_bits(
    tmp_path_factory, container, shapes, step, seed, with_hvp
):
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(seed)
    dtypes = [dtype for dtype in DTYPES if container == "safetensors" or dtype != "bfloat16"]
    states = {
        state: {
            name: random.standard_normal(shape).astype(DTYPES[dtype])
            for (name, shape), dtype in zip(shapes.items(), random.choice(dtypes, len(shapes)), strict=True)
        }
        for state in ("parameter", "gradient", *["hvp"] * with_hvp)
    }
    loss, rate = random.standard_normal(2)
    path = Recorder(folder, container).record(step, loss=loss, learning_rate=rate, **states)
    assert path == folder / f"step_{step}.{container}"
    ((number, (content, arrays)),) = read(folder).items()
    assert number == step
    assert content.scalars == {"loss": loss, "learning_rate": rate}
    assert content.unused == ()
    expected = {(state, name): array for state, tensors in states.items() for name, array in tensors.items()}
    assert arrays.keys() == expected.keys()
    for (state, name), array in expected.items():
        assert content.arrays[state][name] == LoggedTensor(array.shape, array.dtype.name)
        np.testing.assert_array_equal(arrays[state, name], words(array))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_transposed_or_strided_tensor_is_recorded_by_its_values(tmp_path, container):
    whole = np.arange(24.0).reshape(4, 6)
    parameter = {"transposed": whole.T, "strided": whole[::2, ::3], "swapped": whole.astype(">f8")}
    Recorder(tmp_path, container).record(0, parameter=parameter, gradient=parameter)
    _, arrays = read(tmp_path)[0]
    for name, array in parameter.items():
        np.testing.assert_array_equal(arrays["parameter", name], array.ravel())


@pytest.mark.parametrize("container", CONTAINERS)
def test_omitted_keys_are_not_written(tmp_path, container):
    Recorder(tmp_path, container).record(0, parameter={"theta": [1.0]}, gradient={"theta": [np.nan]})
    content, arrays = read(tmp_path)[0]
    assert content.scalars == {}
    assert set(content.arrays) == {"parameter", "gradient"}
    assert np.isnan(arrays["gradient", "theta"]).all()


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_incomplete_step_is_not_visible(tmp_path, container, monkeypatch):
    one = Recorder(tmp_path, container)
    one.record(3, parameter={"theta": [1.0]}, gradient={"theta": [1.0]})
    source = open_source(tmp_path)
    replace, seen = Path.replace, []

    def inspect_and_replace(path, target):
        seen.append(([path.name for path in tmp_path.iterdir()], [step.number for step in source.steps()]))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", inspect_and_replace)
    one.record(4, parameter={"theta": [1.0]}, gradient={"theta": [1.0]})
    ((files, numbers),) = seen
    assert len(files) == 2  # the step before, and the complete file under its temporary name
    assert numbers == [3]
    assert [step.number for step in source.steps()] == [3, 4]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_write_that_fails_leaves_the_step_before_it_and_nothing_else(tmp_path, container):
    one = Recorder(tmp_path, container)
    path = one.record(0, parameter={"theta": [1.0]}, gradient={"theta": [1.0]})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensor = np.ones(10_000)
    for step in (0, 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                one.record(step, parameter={"theta": tensor}, gradient={"theta": tensor})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path] == list(tmp_path.iterdir())
    assert path.read_bytes() == before


def test_the_loss_is_a_0_d_float64_also_from_an_array_of_one_number(tmp_path):
    one = Recorder(tmp_path)
    tensors = {"parameter": {"theta": [1.0]}, "gradient": {"theta": [1.0]}}
    path = one.record(0, loss=np.float32([0.1]), learning_rate=1, **tensors)
    arrays = safetensors.numpy.load_file(path)
    assert arrays["loss"].shape == arrays["learning_rate"].shape == ()
    assert arrays["loss"].dtype == arrays["learning_rate"].dtype == np.float64
    assert arrays["loss"] == np.float32(0.1)
    with pytest.raises(InputError, match=r"loss must be one number, got an array of shape \(2,\)"):
        one.record(1, loss=[0.1, 0.2], **tensors)


def test_every_known_scalar_can_be_recorded_and_no_other(tmp_path):
    tensors = {"parameter": {"theta": [1.0]}, "gradient": {"theta": [1.0]}}
    numbers = {name: float(index) for index, name in enumerate(SCALARS)}
    Recorder(tmp_path).record(0, **tensors, **numbers)
    source = open_source(tmp_path)
    with source.open(source.steps()[0]) as reader:
        assert reader.content().scalars == numbers
    with pytest.raises(InputError, match=r"(?s)unknown scalar 'accuracy'.*loss_time_derivative"):
        Recorder(tmp_path, resume=True).record(0, **tensors, accuracy=0.5)


def test_a_second_run_in_the_folder_is_refused_and_a_resumed_one_replaces_its_steps(tmp_path):
    tensors = {"gradient": {"theta": [1.0]}}
    for step in range(3):
        if step == 0:
            first = Recorder(tmp_path)
        first.record(step, parameter={"theta": [0.0]}, **tensors)
    with pytest.raises(InputError, match="already contains steps"):
        Recorder(tmp_path)
    with pytest.raises(InputError, match="already contains steps"):
        Recorder(tmp_path, "npz", resume=True)
    Recorder(tmp_path, resume=True).record(2, parameter={"theta": [5.0]}, **tensors)
    assert [arrays["parameter", "theta"][0] for _, arrays in read(tmp_path).values()] == [0.0, 0.0, 5.0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_state_after_the_last_update_needs_no_gradient(tmp_path, container):
    one, tensors = Recorder(tmp_path, container), {"a": np.ones(2), "frozen": np.ones(3)}
    one.record(0, parameter=tensors, gradient={"a": np.ones(2)})
    with pytest.raises(InputError, match="parameter 'a' is missing"):
        one.record(1, parameter={"frozen": np.ones(3)})
    one.record(1, parameter=tensors)
    found = read(tmp_path)
    assert list(found[1][1]) == [("parameter", "a")]
    for arguments in ({"gradient": {"a": np.ones(2)}}, {}):
        with pytest.raises(InputError, match="the state at step 1 has no gradient, but is not the last"):
            one.record(2, parameter=tensors, **arguments)
    one.record(1, parameter=tensors, gradient={"a": np.ones(2)})
    one.record(2, parameter=tensors)
    assert [len(arrays) for _, arrays in read(tmp_path).values()] == [2, 2, 1]
    with pytest.raises(InputError, match="no parameters in this step"):
        Recorder(tmp_path / "empty").record(0, parameter={})


def test_other_files_do_not_prevent_a_run_in_the_folder(tmp_path):
    (tmp_path / "step_notes.txt").write_text("notes")
    (tmp_path / ".step_7.npz.1.partial").write_bytes(b"left by a killed writer")
    Recorder(tmp_path).record(0, parameter={"theta": [0.0]}, gradient={"theta": [1.0]})
    assert list(read(tmp_path)) == [0]


GOOD = {"layer": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "the step must be at least 0, got -1"),
        ({"parameter": {}, "gradient": {}}, "no parameters"),
        ({"gradient": {}}, "no tensor has a gradient"),
        ({"gradient": {"layer": None}}, "no tensor has a gradient"),
        ({"gradient": {"other": np.ones((2, 3))}}, "gradient and parameter differ in name: 'other'.*'layer'"),
        ({"learning_rate": {"other": 0.1}}, r"learning rates are not those .*\['layer', 'other'\]"),
        ({"learning_rate": {"layer": "fast"}}, "learning_rate must consist of real numbers, got 'fast'"),
        ({"gradient": {"layer": np.ones((3, 2))}}, r"(?s)\(3, 2\).*\(2, 3\)"),
        ({"hvp": {"layer": np.ones(6)}}, "hvp and parameter differ"),
        ({"parameter": {"layer": np.ones((2, 3), int)}}, "parameter 'layer' of dtype int64"),
        ({"parameter": {"layer": np.ones((2, 3), complex)}}, "complex128"),
        ({"gradient": {"layer": np.ones((2, 3), object)}}, "gradient 'layer' of dtype object"),
        ({"parameter": {"": np.ones(1)}, "gradient": {"": np.ones(1)}}, "use a nonempty name"),
    ],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_data_that_cannot_be_read_back_is_rejected_and_not_written(tmp_path, container, arguments, message):
    arguments = {"step": 0, "parameter": GOOD, "gradient": GOOD} | arguments
    with pytest.raises(InputError, match=message):
        Recorder(tmp_path, container).record(arguments.pop("step"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_in_npz_is_an_error_that_lists_the_possible_dtypes(tmp_path):
    tensors = {"theta": np.ones(2, ml_dtypes.bfloat16)}
    with pytest.raises(InputError, match=r"(?s)bfloat16 cannot be recorded in npz.*float16, float32, float64"):
        Recorder(tmp_path, "npz").record(0, parameter=tensors, gradient=tensors)


def test_tensors_of_torch_are_recorded_as_a_user_has_them(tmp_path, caplog):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[1].to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    loss = model[1](model[0](torch.ones(1, 3)).bfloat16()).float().square().sum()
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    assert gradients["0.bias"] is None
    recorder = Recorder(tmp_path)
    for step in range(2):
        recorder.record(step, parameter=parameters, gradient=gradients, loss=loss, learning_rate=torch.tensor(0.1))
    assert [record.getMessage() for record in caplog.records] == [
        "1 tensors have no gradient and are not recorded; the first is '0.bias'"
    ]
    content, arrays = read(tmp_path)[1]
    assert content.scalars == {"loss": loss.item(), "learning_rate": float(np.float32(0.1))}
    assert sorted(content.arrays["parameter"]) == ["0.weight", "1.bias", "1.weight"]
    for name in content.arrays["parameter"]:
        parameter = parameters[name].detach()
        for kind, tensor in (("parameter", parameter), ("gradient", gradients[name])):
            assert content.arrays[kind][name].dtype == str(tensor.dtype).removeprefix("torch.")
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            expected = bits.numpy().ravel()
            np.testing.assert_array_equal(arrays[kind, name].view(expected.dtype), expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sparse", "the tensor is sparse"),
        ("meta", "the tensor has no values yet"),
        ("lazy", "the tensor has no values yet"),
        ("complex", "of dtype complex64 cannot be recorded"),
        ("float8", "dtype torch.float8_e4m3fn cannot be converted"),
    ],
)
def test_a_tensor_of_torch_that_has_no_array_is_refused(tmp_path, name, problem):
    tensors = {
        "sparse": lambda: torch.ones(2).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "lazy": torch.nn.UninitializedParameter,
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
        "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    }
    with pytest.raises(InputError, match=problem) as refusal:
        Recorder(tmp_path).record(0, parameter={"w": tensors[name]()}, gradient={"w": torch.ones(2)})
    assert "parameter of tensor 'w'" in refusal.value.where
    assert refusal.value.remedy


def test_bfloat16_tensors_without_ml_dtypes_are_refused_with_the_remedy(tmp_path):
    code = """
import sys
sys.modules["ml_dtypes"] = None
import torch
from natgrad.recording import Recorder
tensors = {"w": torch.ones(2, dtype=torch.bfloat16)}
loss = torch.ones((), dtype=torch.bfloat16)
Recorder("log").record(0, parameter={"w": torch.ones(2)}, gradient={"w": torch.ones(2)}, loss=loss)
Recorder("other").record(0, parameter=tensors, gradient=tensors)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "do:    pip install ml_dtypes" in done.stderr
    assert read(tmp_path / "log")[0][0].scalars == {"loss": 1.0}
    assert not list((tmp_path / "other").iterdir())


def test_the_tensors_of_a_run_must_not_change(tmp_path):
    recorder, one = Recorder(tmp_path), np.ones(2)
    recorder.record(0, parameter={"a": one, "b": one}, gradient={"a": one})
    with pytest.raises(InputError, match="tensor 'b' has a new gradient"):
        recorder.record(1, parameter={"a": one, "b": one}, gradient={"a": one, "b": one})
    with pytest.raises(InputError, match="tensor 'a' has no gradient at this step"):
        recorder.record(1, parameter={"a": one, "b": one}, gradient={"b": one})
    recorder.record(1, parameter={"a": one}, gradient={"a": one})
    assert [sorted(content.arrays["parameter"]) for content, _ in read(tmp_path).values()] == [["a"], ["a"]]


@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.1), (0.1, 0.01, 0.1)])
def test_learning_rates_of_tensors_are_read_back(tmp_path, rates):
    tensors = {name: np.ones(2) for name in ("a", "00", "loss")}
    rates = dict(zip(tensors, rates, strict=True))
    Recorder(tmp_path).record(0, parameter=tensors, gradient=tensors, learning_rate=rates)
    source = open_source(tmp_path)
    with source.open(source.steps()[0]) as reader:
        content = complete(source.steps()[0], reader.content())
    assert content.optimizer.rates == rates
    assert content.scalars == ({"learning_rate": 0.1} if len(set(rates.values())) == 1 else {})
    with pytest.raises(InputError, match="cannot be recorded in npz"):
        Recorder(tmp_path / "npz", "npz").record(0, parameter=tensors, gradient=tensors, learning_rate=rates)


def test_an_unknown_container_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"(?s)unknown container 'pt'.*safetensors, npz"):
        Recorder(tmp_path, "pt")


STATE = {"parameter": {"w": np.ones(2)}, "gradient": {"w": np.ones(2)}}
STRANGE = (
    object(),
    1j,
    "text",
    b"bytes",
    [3, 4],
    print,
    Ellipsis,
    {3: 4},
    {(): ()},
    {"": np.ones(2)},
    {"w": "text"},
)


@pytest.mark.parametrize(
    "argument", ["parameter", "gradient", "hvp", "replicates", "loss", "learning_rate", "hessian_min_eigenvalue"]
)
def test_a_wrong_value_of_any_argument_is_refused_and_no_step_is_written(tmp_path, argument):
    recorder = Recorder(tmp_path)
    for value in (*STRANGE, {"w": [[1], [1, 2]]}, {"w": None}, np.ones(3), 10**400):
        with pytest.raises(InputError) as refusal:
            recorder.record(0, **STATE | {argument: value})
        assert str(tmp_path) in refusal.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1.5, "1", -1, None, True, 10**30, [1], np.array([1, 2])])
def test_a_step_must_be_a_whole_number(tmp_path, step):
    with pytest.raises(InputError, match="the step must be"):
        Recorder(tmp_path).record(step, **STATE)
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_a_recorder_are_checked(tmp_path):
    (tmp_path / "file").write_text("text")
    for folder in (3, "", b"bytes", None, "a\0b", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="folder"):
            Recorder(folder)
    for container in (3, [], "zip", np.ones(2)):
        with pytest.raises(InputError, match="unknown container"):
            Recorder(tmp_path / "log", container)
    with pytest.raises(InputError, match="resume must be"):
        Recorder(tmp_path / "log", resume="yes")
    assert not (tmp_path / "log").exists()


def test_a_recorder_may_be_used_in_a_with_statement(tmp_path):
    with contextlib.suppress(KeyError), Recorder(tmp_path / "log") as recorder:
        recorder.record(0, parameter={"w": np.ones(2)}, gradient={"w": np.ones(2)}, loss=1.0)
        raise KeyError("an error in the training loop")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["step_0.safetensors"]
