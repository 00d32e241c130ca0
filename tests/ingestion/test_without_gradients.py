"""Runs without gradients: norms, losses and the metric of the optimizer, without results that need a gradient."""

import json

import numpy as np
import pytest
import safetensors.numpy

import natgrad
from commands import natgrad as command
from lazy import Lazy
from logs import TENSORS, random_walk, walk_arrays, write_log, write_step, write_trajectory
from natgrad.compute.plan import PlanLimits
from natgrad.results import dataset
from natgrad.results.inputs import update_table
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENTS, VECTORS
from natgrad.schema.variables import WITHOUT_GRADIENTS, Status
from natgrad.sources.steps import NotYet
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest, verify_ledger, verify_trajectory

h5py, torch, zarr = Lazy("h5py"), Lazy("torch"), Lazy("zarr")

STATES = 6
OF_PARAMETERS = slice(0, VECTORS.index("gradient"))


def without(states, *arrays):
    return [{key: value for key, value in state.items() if key.partition("/")[0] not in arrays} for state in states]


def parameters(states):
    """Return the parameters of all tensors, shape (states, elements)."""
    flat = [[np.ravel(state[f"parameter/{name}"]).astype(float) for name in TENSORS] for state in states]
    return np.array([np.concatenate(parts) for parts in flat])


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_ledger_has_the_bits_of_the_parameters_of_a_run_with_gradients(tmp_path, dtype, compressed):
    # A tensor over several read blocks and chunk columns, and short ones.
    shapes, elements = {"large": (700,), "a": (30,), "b": ()}, 731
    arrays = walk_arrays(STATES, elements, {"parameter": dtype, "gradient": dtype})
    missing = {"parameter": arrays["parameter"], "gradient": np.full_like(arrays["gradient"], np.nan)}
    codecs = {name: [zarr.codecs.ZstdCodec()] for name in arrays} if compressed else None
    limits = PlanLimits(read_block_elements=128)
    grams, ratios = {}, {}
    for name, logged in (("with", arrays), ("missing", missing), ("without", {"parameter": arrays["parameter"]})):
        store = write_trajectory(tmp_path / name, logged, shapes, (2, 300), codecs)
        compute_ledger(store, tmp_path / f"{name}-ledger", limits=limits)
        grams[name], ratios[name] = open_ledger(tmp_path / f"{name}-ledger").read()
    np.testing.assert_array_equal(grams["without"], grams["missing"])
    np.testing.assert_array_equal(ratios["without"], ratios["missing"])
    found = grams["without"]
    np.testing.assert_array_equal(
        found[..., OF_PARAMETERS, OF_PARAMETERS], grams["with"][..., OF_PARAMETERS, OF_PARAMETERS]
    )
    assert np.isnan(found[..., OF_PARAMETERS.stop :, :]).all()
    assert np.isnan(found[..., :, OF_PARAMETERS.stop :]).all()
    assert not np.isnan(grams["with"]).any()


def test_the_results_have_norms_and_losses_but_no_angle(tmp_path):
    states = random_walk(STATES)
    log = write_log(tmp_path / "log", without(states, "gradient"))
    summary = ingest([log], tmp_path / "out")
    assert WITHOUT_GRADIENTS in summary.warnings
    assert not any("learning_rate" in warning for warning in summary.warnings)
    compute_ledger(tmp_path / "out", tmp_path / "ledger")
    _, table = update_table(open_trajectory(tmp_path / "out"), open_ledger(tmp_path / "ledger"))
    tree = dataset.label(table, windows=[2], variables=[])
    assert tree.attrs["gradient_source"] == "none"
    model = tree["model"].to_dataset()
    theta = parameters(states)
    sizes, moves = np.linalg.norm(theta, axis=1)[:-1], np.linalg.norm(np.diff(theta, axis=0), axis=1)
    # 17 products and their sum: the error of each is at most 1e-14 of the norms, as is that of the norms.
    for name, expected in (
        ("parameter_norm", sizes),
        ("displacement_norm", moves),
        ("update_to_weight", moves / sizes),
        ("update_norm", moves / 0.1),
    ):
        values = model[name].sel(window=1) if "window" in model[name].dims else model[name]
        np.testing.assert_allclose(values, expected, rtol=1e-13)
    losses = np.array([state["loss"] for state in states])
    np.testing.assert_array_equal(model["loss_decrease"].sel(window=2)[:-1], losses[:-2] - losses[2:])
    for descent in DESCENTS:
        assert (model["status"].sel(descent=descent) == Status.UNVERIFIABLE).all()
    for name in ("angle", "condition_number", "gradient_norm", "alignment", "objective_residual"):
        assert np.isnan(model[name]).all()
        assert name == "objective_residual" or np.isnan(tree["tensor"][name]).all()
    assert np.isfinite(tree["tensor"]["update_to_weight"]).all()


def test_a_change_of_zero_parameters_has_no_ratio(tmp_path):
    states = without(random_walk(4), "gradient")
    states[1]["parameter/scale"] = np.zeros_like(states[1]["parameter/scale"])
    ingest([write_log(tmp_path / "log", states)], tmp_path / "out")
    compute_ledger(tmp_path / "out", tmp_path / "ledger")
    _, table = update_table(open_trajectory(tmp_path / "out"), open_ledger(tmp_path / "ledger"))
    ratio = dataset.label(table, variables=[])["tensor"]["update_to_weight"].sel(tensor="scale")
    assert np.isnan(ratio.values).tolist() == [False, True, False]


def test_a_grown_run_has_the_ledger_of_one_ingest(tmp_path):
    states = without(random_walk(STATES), "gradient")
    log = write_log(tmp_path / "log", states[:3])
    for new in ([], states[3:]):
        for number, state in enumerate(new, start=3):
            write_step(log, number, state)
        summary = ingest([log], tmp_path / "out")
        compute_ledger(tmp_path / "out", tmp_path / "ledger")
    assert (summary.new_steps, summary.steps, summary.last_step_lacks) == (3, STATES, [])
    ingest([log], tmp_path / "once")
    compute_ledger(tmp_path / "once", tmp_path / "once-ledger")
    for one, other in zip(
        open_ledger(tmp_path / "ledger").read(), open_ledger(tmp_path / "once-ledger").read(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert not [*verify_trajectory(tmp_path / "out")]
    assert not [*verify_ledger(tmp_path / "ledger", open_trajectory(tmp_path / "out"))]


def test_gradients_that_appear_later_are_refused_with_advice_that_works(tmp_path):
    states = random_walk(STATES)
    log = write_log(tmp_path / "log", without(states[:3], "gradient"))
    ingest([log], tmp_path / "out")
    for number in range(3, STATES):
        write_step(log, number, states[number])
    with pytest.raises(InputError, match="the log has gradients, but OUT was created without them") as error:
        ingest([log], tmp_path / "out")
    assert "--overwrite" in error.value.remedy
    with pytest.raises(InputError, match="gradient is not logged at every step"):
        ingest([log], tmp_path / "out", overwrite=True)
    other = write_log(tmp_path / "other", states)
    summary = ingest([other], tmp_path / "out", overwrite=True)
    assert summary.dtypes["gradient"] == "float32"
    assert WITHOUT_GRADIENTS not in summary.warnings


def test_a_run_with_gradients_refuses_a_state_without_before_the_last(tmp_path):
    states = random_walk(STATES)
    log = write_log(tmp_path / "log", states[:3])
    ingest([log], tmp_path / "out")
    for number in range(3, STATES):
        write_step(log, number, without(states[number : number + 1], "gradient")[0])
    with pytest.raises(InputError, match="gradient is not logged at every step"):
        ingest([log], tmp_path / "out")


def test_the_only_state_may_wait_for_its_gradient(tmp_path):
    states = random_walk(2)
    log = write_log(tmp_path / "log", without(states[:1], "gradient"))
    with pytest.raises(NotYet, match="there is only one state, and it has no gradient"):
        ingest([log], tmp_path / "out")
    write_log(log, states)
    assert "gradient" in ingest([log], tmp_path / "out").dtypes


def test_a_key_of_gradients_that_does_not_exist_is_an_error(tmp_path):
    log = write_log(tmp_path / "log", without(random_walk(STATES), "gradient"))
    with pytest.raises(InputError, match="velocity"):
        ingest([log], tmp_path / "out", mapping={"gradient": "velocity"})


def test_hessian_vector_products_without_gradients_are_refused(tmp_path):
    states = random_walk(STATES)
    for state in states:
        state |= {key.replace("gradient", "hvp"): value for key, value in state.items() if "gradient" in key}
    log = write_log(tmp_path / "log", without(states, "gradient"))
    with pytest.raises(InputError, match="no gradients in this step"):
        ingest([log], tmp_path / "out")


@pytest.mark.parametrize("optimizer", [True, False])
def test_tensors_that_are_not_trained_are_omitted_from_checkpoints(tmp_path, optimizer):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)]
    layers[2].bias.requires_grad = False
    model = torch.nn.Sequential(*layers)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.Adam(trained.items(), lr=1e-2)  # named parameters
    inputs = torch.randn(64, 5)
    log = tmp_path / "log"
    log.mkdir()
    for step in range(STATES):
        saved = {"model": model.state_dict(), **({"optimizer": adam.state_dict()} if optimizer else {})}
        torch.save(saved, log / f"step_{step}.pt")
        adam.zero_grad()
        (model(inputs) ** 2).mean().backward()
        adam.step()
    summary = natgrad.process(log, tmp_path / "out", include=["optimizer"] if optimizer else [])
    tree = natgrad.open_results(tmp_path / "out")
    names = {str(name) for name in tree["tensor"]["tensor"].values}
    assert names == (set(trained) if optimizer else {*trained, "2.bias"})
    omitted = "that the optimizer does not update" if optimizer else "with running statistics"
    assert any(omitted in warning for warning in summary.warnings)
    assert ("preconditioner_condition_number" in tree["model"]) == optimizer
    if optimizer:
        kappa = tree["model"]["preconditioner_condition_number"].values
        assert (np.isfinite(kappa) & (kappa > 1)).any()


@pytest.mark.parametrize("container", ["npz", "h5"])
def test_a_file_of_one_state_is_not_a_run(tmp_path, container):
    arrays = {"hidden.weight": np.ones((4, 4), "float32"), "hidden.bias": np.ones(4, "float32")}

    def write(**more):
        path = tmp_path / f"model.{container}"
        if container == "npz":
            np.savez(path, **arrays, **more)
        else:
            with h5py.File(path, "w") as file:
                for name, array in (arrays | more).items():
                    file[name] = array
        return path

    with pytest.raises(InputError, match="the file has no step numbers") as error:
        ingest([write()], tmp_path / "out")
    assert "named 'step'" in error.value.remedy
    assert ingest([write(step=np.arange(4))], tmp_path / "out").steps == 4


def test_every_command_accepts_the_run(tmp_path):
    states = random_walk(STATES)
    log, out = write_log(tmp_path / "log", without(states, "gradient")), tmp_path / "out"
    inspected = json.loads(command("inspect", log, "--json").stdout)
    assert inspected["command"].startswith("natgrad process ")
    assert "gradient" in inspected["missing"]
    done = command("process", log, out, "--window", "2")
    assert done.returncode == 0
    assert WITHOUT_GRADIENTS in done.stderr
    found = json.loads(command("info", out, "--json").stdout)
    assert found["gradient_source"] == "none"
    assert found["angle"] is None
    low, median, high = found["update_to_weight"]
    assert 0 < low <= median <= high
    assert command("verify", out).returncode == 0
    page = (out / "report.html").read_text()
    assert WITHOUT_GRADIENTS[1:] in page.replace("&#39;", "'")
    assert "without gradients, there is no angle and no metric" in page
    assert "not known without gradients" in page
    assert "not larger than the rounding" not in page  # the meaning of a status that has another reason here
    scanned = natgrad.scan(tmp_path, tmp_path / "all")
    assert (scanned.processed, scanned.failed) == (1, 0)


def test_gradients_of_another_log_are_found_by_inspect(tmp_path):
    states = random_walk(STATES)
    write_log(tmp_path / "run" / "checkpoints", without(states, "gradient"))
    folder = tmp_path / "run" / "gradients"
    folder.mkdir()
    for number, state in enumerate(states):
        tensors = {key.partition("/")[2]: np.asarray(v, order="C") for key, v in state.items() if "gradient" in key}
        safetensors.numpy.save_file(tensors, folder / f"grad-{number:06d}.safetensors")
    inspected = json.loads(command("inspect", tmp_path / "run", "--json").stdout)
    assert "gradient" in inspected["holds"]
    assert not inspected["missing"].get("gradient")
