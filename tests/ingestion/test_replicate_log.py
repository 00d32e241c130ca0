"""Replicates of a stochastic rule from a log to labelled results, compared with results of the vectors."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import zarr
from mpmath import mp, mpf
from zarr.codecs import BloscCodec

from lazy import Lazy
from logs import append_states, walk_arrays, write_trajectory
from natgrad.app.describe import describe_run
from natgrad.app.folder import RunFolder
from natgrad.app.inspection import inspect_source
from natgrad.app.run import analyze_run, ingest_run, report_run
from natgrad.app.verification import verify_run
from natgrad.compute import executors
from natgrad.compute.plan import PlanLimits, plan_pass
from natgrad.kernel import ledger_sums
from natgrad.recording.recorder import Recorder
from natgrad.results import dataset as results
from natgrad.results import replicates
from natgrad.results.inputs import replicate_products, update_table
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, Layout
from natgrad.schema.names import of_replicate, replicate_vectors
from natgrad.schema.variables import Status
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest, read_results
from processing import Serial, process
from reference import exact, exact_dot

torch = Lazy("torch")

SHAPES = {"layer.bias": (5,), "layer.weight": (7, 5), "scale": ()}
LAYOUT = Layout.from_shapes({name: (shape, "float32") for name, shape in SHAPES.items()})
SIZE, STEPS, COUNT, RATE = LAYOUT.elements, 7, 4, 0.125
U = 2.0**-53


def noisy_run(seed=0, steps=STEPS, count=COUNT, dtype="float32", noise=1.0):
    """Arrays of a noisy descent of a quadratic loss, by the mean of ``count`` draws of the update at each state.

    All have their logged form: parameter, gradient (step, element), replicate_parameter and replicate_hvp
    (step, replicate, element), loss (step), replicate_loss (step, replicate).
    """
    rng = np.random.default_rng(seed)
    hessian = rng.standard_normal((SIZE, SIZE)) / 8
    hessian = hessian + hessian.T + np.eye(SIZE)
    run = {name: [] for name in ("parameter", "gradient", "replicate_parameter", "replicate_hvp")}
    theta = rng.standard_normal(SIZE)
    for _ in range(steps):
        gradient = hessian @ theta
        draws = theta - RATE * (gradient + noise * rng.standard_normal((count, SIZE)))
        for name, value in zip(run, (theta, gradient, draws, (draws - theta) @ hessian), strict=True):
            run[name].append(value.astype(dtype))
        theta = draws.mean(axis=0)
    run = {name: np.stack(values) for name, values in run.items()}
    for name, states in (("loss", run["parameter"]), ("replicate_loss", run["replicate_parameter"])):
        states = states.astype(float)
        run[name] = np.vecdot(states, states @ hessian) / 2
    return run


def by_tensor(values):
    """Divide arrays (..., element) into tensors of their shapes, elements last."""
    return {
        t.name: values[..., t.offset : t.stop].reshape(*values.shape[:-1], *t.shape)
        if t.shape
        else values[..., t.offset]
        for t in LAYOUT.tensors
    }


def record(folder, run, steps=None, container="safetensors", only=("parameter", "hvp", "loss")):
    """Write a run with the recorder, or add some steps to an existing log, and return the folder."""
    recorder = Recorder(folder, container, resume=steps is not None)
    for step in range(len(run["loss"])) if steps is None else steps:
        drawn = {"parameter": run["replicate_parameter"][step], "hvp": run["replicate_hvp"][step]}
        recorder.record(
            step,
            parameter=by_tensor(run["parameter"][step]),
            gradient=by_tensor(run["gradient"][step]),
            loss=run["loss"][step],
            learning_rate=RATE,
            replicates=None
            if not only
            else {kind: by_tensor(values) for kind, values in drawn.items() if kind in only}
            | ({"loss": run["replicate_loss"][step]} if "loss" in only else {}),
        )
    return folder


@pytest.fixture(scope="module")
def run():
    return noisy_run()


@pytest.fixture(scope="module")
def log(run, tmp_path_factory):
    return record(tmp_path_factory.mktemp("replicates") / "log", run)


@pytest.fixture(scope="module")
def out(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("replicates") / "out"
    process(log, out)
    return out


def vectors_of(run):
    """Gradient (row, element), displacements and hvps (row, replicate, element) of the updates, in float64."""
    wide = {name: run[name][:-1].astype(float) for name in run if not name.endswith("loss")}
    displacement = wide["replicate_parameter"] - wide["parameter"][:, None]
    return wide["gradient"], displacement, wide["replicate_hvp"]


def gram_of(run):
    """Compute the ledger of the replicates by `natgrad.results.replicates.ledger`, from complete tensors."""
    gradient, displacement, hvp = vectors_of(run)
    parts = [slice(tensor.offset, tensor.stop) for tensor in LAYOUT.tensors]
    return np.stack([replicates.ledger(*(x[..., p] for x in (gradient, displacement, hvp))) for p in parts], axis=1)


def gram_bound(run):
    """Bound of the rounding of every entry of a ledger of the replicates, in any order of summation.

    An entry is a sum of n products, and each of the two vectors is formed before: of a displacement (one rounding)
    their mean (R more, of values as large as the largest), and the deviation from it (one more).
    """
    gradient, displacement, hvp = vectors_of(run)
    bounds = []
    for tensor in LAYOUT.tensors:
        part = slice(tensor.offset, tensor.stop)
        norms, formed = [np.linalg.norm(gradient[:, part], axis=-1)], [np.zeros(len(gradient))]
        for drawn in (displacement[..., part], hvp[..., part]):
            mean, largest = drawn.mean(axis=1, keepdims=True), np.linalg.norm(drawn, axis=-1).max(axis=1)
            lengths = [*np.linalg.norm(np.concatenate([mean, drawn - mean], axis=1), axis=-1).T]
            errors = [(drawn.shape[1] + 2) * U * largest] * (drawn.shape[1] + 1)
            if len(norms) == 1:
                # The residual is a difference of parts that are not longer than the gradient. Its ratio, and the
                # mean, are rounded.
                lengths.insert(1, 2 * norms[0])
                errors.insert(1, norms[0] * (errors[0] / lengths[0] + (tensor.size + 4) * U))
            norms, formed = norms + lengths, formed + errors
        norm, error = np.stack(norms, axis=-1), np.stack(formed, axis=-1)
        product = norm[:, :, None] * norm[:, None, :]
        crossed = norm[:, :, None] * error[:, None, :]
        bounds.append(ledger_sums.roundoff_bound(tensor.size) * product + crossed + np.swapaxes(crossed, 1, 2))
    return np.stack(bounds, axis=1)


# From the log to the ledger -----------------------------------------------------------------------------------


def test_the_store_contains_each_logged_replicate(run, out):
    states = open_trajectory(RunFolder.of(out).trajectory)
    assert (states.replicates, states.array_dtypes["replicate_hvp"]) == (COUNT, "float32")
    for name in ("replicate_parameter", "replicate_hvp"):
        for replicate in range(COUNT):
            words = np.zeros((STEPS, states.chunk[1]), np.float32)
            states.read(of_replicate(name, replicate), 0, STEPS, 0, words)
            np.testing.assert_array_equal(words[:, :SIZE], run[name][:, replicate])
    np.testing.assert_array_equal(states.scalar("replicate_loss"), run["replicate_loss"])
    group = zarr.open_group(RunFolder.of(out).trajectory.zarr_store(), mode="r")
    np.testing.assert_array_equal(group["replicate_parameter"][:], run["replicate_parameter"])
    assert group["replicate_parameter"].metadata.dimension_names == ("step", "replicate", "element")


def test_the_ledger_of_a_log_equals_that_of_arrays_in_memory(run, out):
    gram_ledger = open_ledger(RunFolder.of(out).ledger)
    assert gram_ledger.replicate_vectors == replicate_vectors(COUNT, hvp=True)
    found, expected, bound = gram_ledger.read_chunk("replicate_gram", 0, STEPS - 1), gram_of(run), gram_bound(run)
    assert (np.abs(found - expected) <= 2 * bound).all()
    # The bound is tight enough to distinguish the vectors of one step from those of the next.
    assert (np.abs(found[1:] - expected[:-1]) > 2 * bound[:-1]).mean() > 0.9


def relative_rounding(run):
    """Rounding of the products of gradient, mean displacement and mean hvp of the model, by their lengths."""
    chosen = [0, 1, 3 + COUNT]
    norms = np.sqrt(np.einsum("rtii->ri", gram_of(run)))[:, chosen]
    bound = 2 * gram_bound(run).sum(axis=1)[:, chosen][..., chosen]
    return (bound / (norms[:, :, None] * norms[:, None, :])).max(axis=(1, 2))


def test_the_results_of_a_log_are_those_of_the_arrays_in_memory(run, out):
    tree = read_results(RunFolder.of(out).results)["replicates"]
    options = {"loss_change": (run["replicate_loss"] - run["loss"][:, None])[:-1], "learning_rate": RATE}
    stored = open_ledger(RunFolder.of(out).ledger).read_chunk("replicate_gram", 0, STEPS - 1)
    expected = replicates.label(stored, LAYOUT, replicates=COUNT, **options)
    for group in ("model", "tensor"):
        found = tree[group].to_dataset()
        assert set(found.data_vars) == set(expected[group].data_vars)
        for name, variable in expected[group].data_vars.items():
            assert (found[name].dims, found[name].attrs) == (variable.dims, variable.attrs)
            np.testing.assert_array_equal(found[name].values, variable.values, err_msg=name)
        assert found["step"].values.tolist() == list(range(STEPS - 1))
        assert found["replicate"].values.tolist() == list(range(COUNT))
    assert tree["tensor"]["tensor"].values.tolist() == list(SHAPES)
    # The products are summed in another order, so the results agree up to rounding.
    found, rounding = tree["model"].to_dataset(), relative_rounding(run)
    expected = replicates.label(gram_of(run), LAYOUT, replicates=COUNT, **options)["model"].to_dataset()
    np.testing.assert_array_equal(found["status"], expected["status"])
    scale = found["update_norm"] * found["gradient_norm"]
    assert (np.abs(found["alignment"] - expected["alignment"]) <= rounding * scale).all()
    # The square of the sine is a difference of three products over the squares of the lengths.
    turned = 4 * rounding / np.sin(expected["angle"])
    assert (np.abs(found["angle"] - expected["angle"]) <= turned).all()
    # The derivative of the logarithm of kappa by psi is 2 / cos psi.
    relative = found["condition_number"] / expected["condition_number"] - 1
    assert (np.abs(relative) <= 4 * turned / np.cos(expected["angle"])).all()


def exact_replicates(run, row):
    """Return mean update, y and mean <Hg> of a row of the model, exactly: lists of numbers with 60 digits."""
    with mp.workdps(60):
        theta = exact(run["parameter"][row])
        y = [-x for x in exact(run["gradient"][row])]
        draws = [exact(draw) for draw in run["replicate_parameter"][row]]
        bent = [exact(draw) for draw in run["replicate_hvp"][row]]
        g = [mp.fsum(draw[i] - theta[i] for draw in draws) / COUNT / mpf(RATE) for i in range(SIZE)]
        n = [mp.fsum(draw[i] for draw in bent) / COUNT / 2 / mpf(RATE) for i in range(SIZE)]
        return y, g, n


def test_equation_19_from_a_log_is_that_of_exact_arithmetic(tmp_path):
    # The Hessian of every second update has the opposite sign: eq. (19) is definite, and needs a weight.
    run = noisy_run(seed=3, steps=5, noise=0.3)
    run["replicate_hvp"][1::2] *= -1
    tree = process(record(tmp_path / "log", run), tmp_path / "out")
    for row, rounding in enumerate(relative_rounding(run)):
        sign = (-1) ** row
        at = tree["replicates/model"].to_dataset().isel(step=row)
        y, g, n = exact_replicates(run, row)
        with mp.workdps(60):
            c, b, gg, yy, nn = (exact_dot(p, q) for p, q in ((y, g), (n, g), (g, g), (y, y), (n, n)))
            a = c - mpf(RATE) * b
            angle = mp.acos(c / mp.sqrt(yy * gg))
            deviation = [b * p - c * q for p, q in zip(y, n, strict=True)]
            weight = 0 if a * b > 0 else mpf(RATE) * exact_dot(deviation, deviation) / abs(a * b) / c
            discrete = [p - mpf(RATE) * q for p, q in zip(y, n, strict=True)]
            alpha = exact_dot(discrete, discrete) / a
            lacking = exact_dot(deviation, deviation) - alpha * b * b * c
            bound = c / b if b > 0 else alpha * -b * c * c / lacking if lacking > 0 else mp.inf
        # A result is a product of some of a, b, c and |d|^2, each of which is a sum of products. Their rounding
        # errors are relative to the summands, which may be larger than the sums.
        summed = b * b * yy + 2 * abs(b * c) * mp.sqrt(yy * nn) + c * c * nn + abs(alpha * b * b * c)
        parts = [
            (c, mp.sqrt(yy * gg)),
            (b, mp.sqrt(nn * gg)),
            (a, mp.sqrt(yy * gg) + mpf(RATE) * mp.sqrt(nn * gg)),
        ]
        parts += [(lacking, summed), (exact_dot(deviation, deviation), summed)]
        tolerance = 4 * float(rounding * sum(whole / abs(part) for part, whole in parts))
        assert tolerance < 1e-9  # nine digits; a wrong sign or step changes the first one
        assert float(at["alignment"]) == pytest.approx(float(c), rel=tolerance)
        assert float(at["angle"]) == pytest.approx(float(angle), abs=4 * rounding / float(mp.sin(angle)))
        assert float(at["stochastic_alpha"]) == pytest.approx(float(alpha), rel=tolerance)
        assert float(at["stochastic_weight"]) == pytest.approx(float(weight), rel=tolerance)
        assert float(at["learning_rate_bound"]) == pytest.approx(float(bound), rel=tolerance)
        assert bool(at["stochastic_definite"]) == (alpha > weight)
        assert (b > 0, weight == 0) == (sign > 0, sign > 0)


# Bits ---------------------------------------------------------------------------------------------------------

CUT = {"first": (37,), "second": (5, 9), "none": (0,), "third": (40,), "scalar": ()}
ELEMENTS, ROWS = 123, 20
SMALL = PlanLimits(
    least_tile_bytes=1,
    tile_bytes=8000,
    least_updates=5,
    read_block_elements=7,
    complete_chunk_bytes=1000,
    least_read_states=1,
)


def drawn_arrays(dtype="float32", hvp=True):
    """Arrays (row, element) of a trajectory, three replicates of each."""
    arrays = walk_arrays(ROWS, ELEMENTS, {"parameter": dtype, "gradient": "float32"})
    for name, array in [("replicate_parameter", "parameter"), *([("replicate_hvp", "gradient")] if hvp else [])]:
        for replicate in range(3):
            drawn = walk_arrays(ROWS, ELEMENTS, {array: dtype}, seed=1 + replicate)[array]
            arrays[of_replicate(name, replicate)] = drawn
    return arrays


def bits(ledger):
    """Return the complete contents of a ledger."""
    gram_ledger = open_ledger(ledger)
    updates, step = gram_ledger.n_updates, gram_ledger.updates_per_chunk
    chunks = [
        gram_ledger.read_chunk("replicate_gram", start, min(start + step, updates))
        for start in range(0, updates, step)
    ]
    return [array.tobytes() for array in (*gram_ledger.read(), *gram_ledger.steps(), np.concatenate(chunks))]


def test_a_longer_run_computes_only_new_updates_with_the_bits_of_one_pass(tmp_path):
    arrays = drawn_arrays()
    whole = write_trajectory(tmp_path / "whole.zarr", arrays, CUT, (1, 40))
    compute_ledger(whole, tmp_path / "at_once.zarr", limits=SMALL)
    grown = write_trajectory(
        tmp_path / "grown.zarr", {name: array[:13] for name, array in arrays.items()}, CUT, (1, 40)
    )
    updates_per_chunk = compute_ledger(grown, tmp_path / "ledger.zarr", limits=SMALL).plan.updates_per_chunk
    assert 12 % updates_per_chunk  # so the last ledger chunk was incomplete
    append_states(grown, {name: array[13:] for name, array in arrays.items()})
    assert compute_ledger(grown, tmp_path / "ledger.zarr", limits=SMALL).computed_updates == ROWS - 13
    assert bits(tmp_path / "ledger.zarr") == bits(tmp_path / "at_once.zarr")


@pytest.mark.parametrize(
    ("dtype", "steps", "hvp"), [("float32", 1, True), ("bfloat16", 3, True), ("float16", 64, False)]
)
def test_the_bits_do_not_depend_on_the_executor_or_on_the_amount_read_at_a_time(tmp_path, dtype, steps, hvp):
    arrays = drawn_arrays(dtype, hvp)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, CUT, (steps, 40))
    summary = compute_ledger(trajectory, tmp_path / "serial.zarr", limits=SMALL)
    assert summary.chunks > 2
    assert summary.plan.columns > summary.plan.tile_columns
    # Half of it in threads, and the rest separately.

    def half(job, items, digests):
        yield from executors.threads(2)(job, items[::2], digests)

    compute_ledger(trajectory, tmp_path / "resumed.zarr", executor=half, limits=SMALL)
    with pytest.raises(InputError, match="incomplete"):
        open_ledger(tmp_path / "resumed.zarr").read()
    resumed = compute_ledger(trajectory, tmp_path / "resumed.zarr", limits=SMALL)
    assert resumed.computed_chunks == summary.chunks // 2
    compute_ledger(trajectory, tmp_path / "threads.zarr", executor=executors.threads(2), limits=SMALL)
    codecs = {name: BloscCodec(cname="zstd") for name in ("gradient", "replicate_parameter")}
    write_trajectory(tmp_path / "compressed.zarr", arrays, CUT, (steps, 40), codecs)
    compute_ledger(tmp_path / "compressed.zarr", tmp_path / "unpacked.zarr", limits=SMALL)
    for name in ("resumed", "threads", "unpacked"):
        assert bits(tmp_path / f"{name}.zarr") == bits(tmp_path / "serial.zarr"), name
    # They are equal to those of the vectors: for each row and tensor, for any division.
    stops = np.cumsum([int(np.prod(shape)) for shape in CUT.values()])
    found = np.concatenate([np.frombuffer(bits(tmp_path / "serial.zarr")[-1])]).reshape(
        ROWS - 1, len(CUT), *2 * [len(replicate_vectors(3, hvp))]
    )
    for (tensor, stop), row in itertools.product(enumerate(stops), range(ROWS - 1)):
        part = slice(stop - int(np.prod(list(CUT.values())[tensor])), stop)
        wide = {name: array[row, part].astype(float) for name, array in arrays.items()}
        drawn, bent = (
            np.stack([wide[of_replicate(name, r)] for r in range(3)])
            for name in ("replicate_parameter", "replicate_hvp" if hvp else "replicate_parameter")
        )
        displacement = drawn - wide["parameter"]
        expected = replicates.ledger(wide["gradient"], displacement, bent if hvp else None)
        largest = max(np.linalg.norm(x, axis=-1).max(initial=0.0) for x in (wide["gradient"], displacement, bent))
        # Rounding of the sums, and of forming the vectors, of none longer than the longest.
        bound = 2 * ledger_sums.roundoff_bound(stop) + 20 * U
        assert np.abs(found[row, tensor] - expected).max() <= bound * largest**2


def test_a_run_without_replicates_has_no_replicate_results(tmp_path):
    tree = process(record(tmp_path / "log", noisy_run(steps=3), only=()), tmp_path / "out")
    assert "replicates" not in tree
    assert not [path for path in (tmp_path / "out").rglob("*replicate*")]
    for document in (tmp_path / "out").glob("*.zarr/zarr.json"):
        assert "replicate_" not in document.read_text()


# Logs ---------------------------------------------------------------------------------------------------------


def write_npz(folder, steps):
    folder.mkdir()
    for number, state in enumerate(steps):
        np.savez(folder / f"step_{number}.npz", **state)
    return folder


def write_hdf5(folder, steps):
    folder.mkdir()
    for number, state in enumerate(steps):
        with h5py.File(folder / f"step_{number}.h5", "w") as file:
            for key, value in state.items():
                file[key] = value
    return folder


def write_stacked(folder, steps):
    folder.mkdir()
    np.savez(folder / "run.npz", **{key: np.stack([state[key] for state in steps]) for key in steps[0]})
    return folder


def write_torch(folder, steps):
    folder.mkdir()
    for number, state in enumerate(steps):
        nested = {}
        for key, value in state.items():
            array, slash, tensor = key.partition("/")
            value = torch.from_numpy(np.asarray(value).copy())
            if slash:
                nested.setdefault(array, {})[tensor] = value
            else:
                nested[array] = value
        torch.save(nested, folder / f"checkpoint-{number}.pt")
    return folder


def steps_of(run):
    """Every step as a flat mapping of the native keys."""
    steps = []
    for step in range(len(run["loss"])):
        state = {
            "loss": run["loss"][step],
            "learning_rate": np.float64(RATE),
            "replicate_loss": run["replicate_loss"][step],
        }
        for name in ("parameter", "gradient", "replicate_parameter", "replicate_hvp"):
            state |= {f"{name}/{tensor}": np.array(value) for tensor, value in by_tensor(run[name][step]).items()}
        steps.append(state)
    return steps


@pytest.mark.parametrize("write", [write_npz, write_hdf5, write_stacked, write_torch])
def test_every_format_gives_the_same_trajectory(run, out, tmp_path, write):
    ingest(write(tmp_path / "log", steps_of(run)), tmp_path / "trajectory.zarr")
    states, others = (
        open_trajectory(path) for path in (RunFolder.of(out).trajectory, tmp_path / "trajectory.zarr")
    )
    (record_,), (other,) = states.records(), others.records()
    np.testing.assert_equal(record_["checksums"], other["checksums"])
    assert record_["scalars"] == other["scalars"]
    assert states.dtypes == others.dtypes


def test_replicates_are_mapped_by_key(run, out, tmp_path):
    names = {"replicate_parameter": "draws/theta", "replicate_hvp": "draws/bent", "replicate_loss": "draws/loss"}
    steps = [
        {
            names.get(key.partition("/")[0], key.partition("/")[0]) + key[len(key.partition("/")[0]) :]: value
            for key, value in step.items()
        }
        for step in steps_of(run)
    ]
    log = write_npz(tmp_path / "log", steps)
    ingest(log, tmp_path / "trajectory.zarr", mapping=names)
    states = open_trajectory(RunFolder.of(out).trajectory)
    assert open_trajectory(tmp_path / "trajectory.zarr").fingerprint() == states.fingerprint()
    for quantity in names:
        with pytest.raises(InputError, match=f"no {quantity} under the key 'elsewhere'"):
            ingest(log, tmp_path / "other.zarr", mapping={quantity: "elsewhere"})


def test_replicates_may_be_in_a_separate_log(run, out, tmp_path):
    logs = []
    for name in ("states", "draws"):
        parts = [
            {key: value for key, value in step.items() if key.startswith("replicate") == (name == "draws")}
            for step in steps_of(run)
        ]
        logs.append(write_npz(tmp_path / name, parts))
    ingest(logs, tmp_path / "trajectory.zarr")
    states, others = open_trajectory(RunFolder.of(out).trajectory), open_trajectory(tmp_path / "trajectory.zarr")
    assert others.fingerprint() == states.fingerprint()
    np.testing.assert_array_equal(others.scalar("replicate_loss"), run["replicate_loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"replicate_parameter/scale": lambda value: value[:-1]},
            r"replicate_parameter has shape \(3,\), but 4 replicates",
        ),
        ({"replicate_hvp/layer.bias": lambda value: value[0]}, r"replicate_hvp has shape \(5,\), but 4 replicates"),
        ({"replicate_hvp/layer.bias": None}, "tensor 'layer.bias' has no replicate_hvp"),
        ({"replicate_loss": lambda value: value[:2]}, "2 values of replicate_loss for 4 replicates"),
        ({"replicate_loss": lambda value: value[0]}, r"replicate_loss has dtype float64 and shape \(\)"),
        ({"replicate_loss": lambda value: np.array(["a"] * 4)}, "replicate_loss has dtype str"),
        ({f"replicate_parameter/{name}": None for name in SHAPES}, "without replicate_parameter"),
        ({f"replicate_parameter/{name}": lambda value: value[:0] for name in SHAPES}, "or with 0 replicates"),
        (
            {f"replicate_parameter/{name}": lambda value: value.astype(int) for name in SHAPES},
            "dtype int64 is not a float",
        ),
    ],
)
def test_replicates_that_do_not_fit_are_refused(run, tmp_path, change, message):
    steps = steps_of(run)[:2]
    for key, function in change.items():
        value = steps[1].pop(key)
        if function is not None:
            steps[1][key] = function(value)
    log = write_npz(tmp_path / "log", steps)
    with pytest.raises(InputError, match=message) as caught:
        ingest(log, tmp_path / "out.zarr")
    assert "step_1.npz" in caught.value.where
    assert not (tmp_path / "out.zarr").exists()


def test_replicates_are_logged_at_every_step_or_at_none_and_as_many(run, tmp_path):
    steps = steps_of(run)
    without = {key: value for key, value in steps[2].items() if not key.startswith("replicate")}
    fewer = {key: value[:2] if key.startswith("replicate") else value for key, value in steps[2].items()}
    for number, (third, message) in enumerate(
        [
            (without, "replicate_parameter is not logged at every step"),
            (fewer, r"shape changes from \(4, 5\) to \(2, 5\)"),
        ]
    ):
        log = write_npz(tmp_path / str(number), [*steps[:2], third, steps[3]])
        with pytest.raises(InputError, match=message):
            ingest(log, tmp_path / "out.zarr")
    log = write_npz(tmp_path / "log", steps[:2])
    assert ingest(log, tmp_path / "out.zarr").replicates == COUNT
    np.savez(log / "step_2.npz", **fewer)
    with pytest.raises(InputError, match="number of replicates changes from 4 to 2"):
        ingest(log, tmp_path / "out.zarr")
    np.savez(log / "step_2.npz", **steps[2])
    assert ingest(log, tmp_path / "out.zarr").new_steps == 1
    # If an ingested step has changed, it is from another run.
    np.savez(log / "step_1.npz", **{**steps[1], "replicate_loss": steps[1]["replicate_loss"] + 1})
    with pytest.raises(InputError, match="replicate_loss"):
        ingest(log, tmp_path / "out.zarr")
    changed = {
        key: value + np.float32(1) if key == "replicate_hvp/scale" else value for key, value in steps[1].items()
    }
    np.savez(log / "step_1.npz", **changed)
    with pytest.raises(InputError, match="a different replicate_hvp/0"):
        ingest(log, tmp_path / "out.zarr")


@pytest.mark.parametrize(
    ("replicates", "message"),
    [
        ({"hvp": {"theta": np.ones((3, 2))}}, "invalid replicates: hvp"),
        ({"parameter": {"theta": np.ones((3, 2))}, "gradient": {}}, "invalid replicates: parameter, gradient"),
        ({"parameter": {"theta": np.ones(2)}}, r"replicates of parameter have .* shapes {'theta': \(\)}"),
        ({"parameter": {"theta": np.ones((0, 2))}}, r"replicates of parameter have counts \[\(0,\)\]"),
        ({"parameter": {"other": np.ones((3, 2))}}, "replicates of parameter have .* shapes {'other'"),
        ({"parameter": {"theta": np.ones((3, 2))}, "hvp": {"theta": np.ones((4, 2))}}, r"counts \[\(3,\), \(4,"),
        ({"parameter": {"theta": np.ones((3, 2))}, "loss": [1.0, 2.0]}, r"counts \[\(2,\), \(3,\)\]"),
        ({"parameter": {"theta": np.ones((3, 2))}, "loss": np.ones((3, 2))}, "losses of replicates have shape"),
        ({"parameter": {"theta": np.ones((3, 2), int)}}, "cannot be recorded"),
    ],
)
def test_the_recorder_rejects_replicates_that_do_not_fit(tmp_path, replicates, message):
    theta = {"theta": np.ones(2)}
    with pytest.raises(InputError, match=message):
        Recorder(tmp_path).record(0, parameter=theta, gradient=theta, replicates=replicates)
    assert not list(tmp_path.iterdir())


def test_a_wide_model_is_read_a_replicate_at_a_time(run, tmp_path):
    steps = steps_of(run)
    log = write_npz(tmp_path / "log", steps)
    ingest(log, tmp_path / "trajectory.zarr", limits=IngestLimits(chunk_elements=16))
    states = open_trajectory(tmp_path / "trajectory.zarr")
    assert (states.chunk, states.columns) == ((1, 14), 3)
    for name in ("parameter", *states.replicates_of("replicate_hvp")):
        found = np.zeros((STEPS, 3 * 14), np.float32)
        for column in range(3):
            states.read(name, 0, STEPS, column, found[:, 14 * column : 14 * (column + 1)])
        array, _, replicate = name.partition("/")
        expected = run[array] if not replicate else run[array][:, int(replicate)]
        np.testing.assert_array_equal(found[:, :SIZE], expected)
    compute_ledger(tmp_path / "trajectory.zarr", tmp_path / "ledger.zarr")
    found = open_ledger(tmp_path / "ledger.zarr").read_chunk("replicate_gram", 0, STEPS - 1)
    assert (np.abs(found - gram_of(run)) <= 2 * gram_bound(run)).all()


# Damage, restarts, sweeps -------------------------------------------------------------------------------------


def ledger_alone(log, out):
    """Ingest a log and compute its ledger, but no results."""
    folder = RunFolder.of(out)
    ingest_run(log, out)
    compute_ledger(folder.trajectory, folder.ledger)
    return folder.ledger


def test_a_ledger_of_other_replicates_is_not_kept(run, log, out, tmp_path):
    other = {**run, "replicate_hvp": run["replicate_hvp"] + np.float32(1)}
    ledger_alone(log, tmp_path / "run")
    ingest_run(record(tmp_path / "log", other), tmp_path / "run", overwrite=True)
    compute_ledger(tmp_path / "run/trajectory.zarr", tmp_path / "run/ledger.zarr")
    found, before = (open_ledger(RunFolder.of(folder).ledger) for folder in (tmp_path / "run", out))
    assert [array.tobytes() for array in found.read()] == [array.tobytes() for array in before.read()]
    found, before = (gram_ledger.read_chunk("replicate_gram", 0, STEPS - 1) for gram_ledger in (found, before))
    assert (np.abs(found - gram_of(other)) <= 2 * gram_bound(other)).all()
    assert (found != before).any()


def test_a_flipped_bit_of_a_replicate_is_found_by_its_name(out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "run")
    assert verify_run(copy) == []
    changes = {
        # A chunk of one replicate contains all steps. 64 KiB of the ledger share one checksum, here the entire
        # ledger.
        "trajectory.zarr/replicate_hvp/c/0/2/0": (2 * SIZE * 4, "replicate_hvp/2", (2, 2)),
        "trajectory.zarr/replicate_loss/c/0/0": (3 * COUNT * 8, "replicate_loss", (0, STEPS - 1)),
        "ledger.zarr/replicate_gram/c/0/0/0/0": (4 * 3 * 11**2 * 8 + 9, "replicate_gram", (0, STEPS - 2)),
        "ledger.zarr/replicate_vector/c/0": (30, "replicate_vector", ()),
    }
    for name, (offset, array, steps) in changes.items():
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        assert [(damage.array, damage.steps) for damage in verify_run(copy)] == [(array, steps)], name
        path.write_bytes(whole)
    (copy / "trajectory.zarr/replicate_parameter/c/0/3/0").unlink()
    assert {damage.array for damage in verify_run(copy)} == {"replicate_parameter/3"}


def test_new_steps_and_a_restart_keep_finished_work(run, out, tmp_path):
    whole = read_results(RunFolder.of(out).results)["replicates"]
    log = record(tmp_path / "log", {name: values[:4] for name, values in run.items()})
    ledger_alone(log, tmp_path / "run")
    record(log, run, range(4, STEPS))
    tree = process(log, tmp_path / "run")["replicates"]
    for group in ("model", "tensor"):
        assert tree[group].to_dataset().equals(whole[group].to_dataset())
    # Restarted before step 5: a different draw is a new attempt of the same steps.
    other = noisy_run(seed=9)
    record(log, other, range(5, STEPS))
    tree = process(log, tmp_path / "run")["replicates"]
    attempts = tree["model"]["attempt"].values
    assert (tree["model"]["step"].values.tolist(), attempts.tolist()) == ([0, 1, 2, 3, 5], [0, 0, 0, 0, 1])
    expected = replicates.label(
        gram_of(other), LAYOUT, replicates=COUNT, learning_rate=RATE, steps=range(STEPS - 1)
    )["model"]
    found = tree["model"]["replicate_alignment"].sel(step=5)
    np.testing.assert_allclose(found, expected["replicate_alignment"].sel(step=5), rtol=1e-10)


def test_a_sweep_has_the_replicates_of_each_run(tmp_path):
    # A ledger chunk has two updates of three tensors: results are computed one ledger chunk at a time.
    limits = PlanLimits(ledger_bytes=2 * 3 * (5**2 + 12**2 + 1) * 8)
    lengths = {"a": 3, "b": 5}
    runs = {name: noisy_run(seed=length, steps=length) for name, length in lengths.items()}
    for name, run in runs.items():
        record(tmp_path / "sweep" / name, run)
    ingest_run(tmp_path / "sweep", tmp_path / "out", sweep=True)
    assert analyze_run(tmp_path / "out", Serial(), limits=limits).chunks == 4
    tree = read_results(RunFolder.of(tmp_path / "out").results)
    assert tree["replicates/tensor"]["replicate_angle"].dims == ("run", "step", "tensor", "replicate")
    for name, of_run in results.runs(tree).items():
        assert of_run["replicates/model"]["step"].values.tolist() == list(range(lengths[name] - 1))
        gram_ledger = open_ledger(ledger_alone(tmp_path / "sweep" / name, tmp_path / name))
        stored = gram_ledger.read_chunk("replicate_gram", 0, gram_ledger.n_updates)
        change = (runs[name]["replicate_loss"] - runs[name]["loss"][:, None])[:-1]
        alone = replicates.label(stored, LAYOUT, replicates=COUNT, learning_rate=RATE, loss_change=change)
        for group in ("model", "tensor"):
            for variable, values in alone[group].data_vars.items():
                np.testing.assert_array_equal(of_run["replicates"][group][variable], values)
    assert (tree["replicates/model"]["status"].sel(run="a", step=[2, 3]) == Status.NOT_LOGGED).all()


# Unknown values -----------------------------------------------------------------------------------------------


def test_without_a_learning_rate_or_after_a_divergence_the_status_states_this(run, tmp_path):
    steps = steps_of(run)
    for step, rate in ((0, 0.0), (1, None)):
        steps[step].pop("learning_rate")
        if rate is not None:
            steps[step]["learning_rate"] = np.float64(rate)
    steps[2]["replicate_parameter/layer.bias"][1, 3] = np.nan
    steps[3]["replicate_hvp/scale"][0] = np.inf
    tree = process(write_npz(tmp_path / "log", steps), tmp_path / "out")["replicates"]
    model, tensors = tree["model"].to_dataset(), tree["tensor"].to_dataset()
    names = [Status(status).name.lower() for status in model["status"].values]
    assert names[:3] == ["no_learning_rate", "no_learning_rate", "non_finite"]
    assert (model["status"][3:] <= Status.OBTUSE).all()
    assert np.argwhere((tensors["status"] == Status.NON_FINITE).values).tolist() == [[2, 0]]
    for name in ("angle", "condition_number", "stochastic_weight", "learning_rate_bound", "replicate_angle"):
        assert np.isnan(model[name][:3]).all(), name
    # An hvp that is not finite affects only the values computed from it.
    assert np.isnan([model["stochastic_alpha"][3], tensors["stochastic_alpha"][3, 2]]).all()
    assert np.isfinite([model["angle"][3], *tensors["angle"][3], *tensors["stochastic_alpha"][3, :2]]).all()
    assert not model["stochastic_definite"][:4].any()
    assert np.isfinite(model["loss_decrease"]).all()


def test_replicates_of_each_tensor_are_per_its_own_learning_rate(out):
    """Powers of two, so that other rates round to the same bits."""
    states, ledger = open_trajectory(RunFolder.of(out).trajectory), open_ledger(RunFolder.of(out).ledger)
    rows, inputs = update_table(states, ledger)
    tensors = len(inputs.layout.tensors)
    own = 2.0 ** -(np.arange(len(rows) * tensors).reshape(len(rows), tensors) % 5)

    def labelled(inputs):
        losses = states.scalar("replicate_loss")[rows]
        return replicates.label_run(inputs, replicate_products(ledger, rows), states.replicates, losses)

    inputs = replace(inputs, learning_rate=own.max(axis=1))
    tree = labelled(replace(inputs, tensor_learning_rate=own))
    assert tree["model"].to_dataset().identical(labelled(inputs)["model"].to_dataset())
    for position, tensor in enumerate(inputs.layout.names):
        expected = labelled(replace(inputs, learning_rate=own[:, position]))["tensor"].to_dataset()
        assert tree["tensor"].to_dataset().sel(tensor=tensor).identical(expected.sel(tensor=tensor))


def test_an_update_within_rounding_is_not_an_update(tmp_path):
    run = noisy_run(dtype="float64", noise=1e-3)
    # Updates by one unit in the last place of a float32, at most.
    run["parameter"] = run["parameter"].astype(np.float32)
    theta = np.broadcast_to(run["parameter"][:, None], (STEPS, COUNT, SIZE))
    moves = np.random.default_rng(0).choice([False, True], theta.shape)
    run["replicate_parameter"] = np.where(moves, np.nextafter(theta, np.float32(np.inf)), theta)
    tree = process(record(tmp_path / "log", run), tmp_path / "out")["replicates"]
    for group in ("model", "tensor"):
        found = tree[group].to_dataset()
        moved = found["update_norm"] > 0
        assert moved.any()
        assert (found["status"].values[moved.values] == Status.UNVERIFIABLE).all()
        for name in ("angle", "replicate_angle", "condition_number"):
            assert np.isnan(found[name]).all()
        assert not found["effective"].any()


def test_a_replicate_is_one_update_where_every_second_state_is_logged(run, out, tmp_path):
    whole = read_results(RunFolder.of(out).results)["replicates"]
    for step in range(0, STEPS, 2):
        record(tmp_path / "log", run, [step])
    tree = process(tmp_path / "log", tmp_path / "out")
    assert (tree["model"]["step_span"] == 2).all()
    for group in ("model", "tensor"):
        found, expected = (which["replicates"][group].to_dataset() for which in (tree, {"replicates": whole}))
        assert found.equals(expected.sel(step=[0, 2, 4]))


def test_replicates_of_states_alone_lack_what_needs_hvps_and_losses(run, out, tmp_path):
    tree = process(record(tmp_path / "log", run, only=("parameter",)), tmp_path / "out")["replicates"]
    whole = read_results(RunFolder.of(out).results)["replicates"]
    assert open_ledger(tmp_path / "out/ledger.zarr").replicate_vectors == replicate_vectors(COUNT, hvp=False)
    for group in ("model", "tensor"):
        for name in ("stochastic_weight", "learning_rate_bound", "loss_decrease", "replicate_loss_decrease"):
            assert name not in tree[group] or np.isnan(tree[group][name]).all()
        assert not tree[group]["stochastic_definite"].any()
        for name in ("status", "angle", "angle_error", "replicate_angle", "replicate_update_norm"):
            np.testing.assert_array_equal(tree[group][name], whole[group][name])


# Before and after ---------------------------------------------------------------------------------------------


def test_inspect_and_describe_count_and_size_replicates(log, out):
    found = inspect_source([log])
    assert found.holds["replicate_parameter"] == f"{COUNT} replicates of {len(SHAPES)} tensors"
    assert found.holds["replicate_loss"] == f"{COUNT} replicates"
    assert not [name for name in found.missing if name.startswith("replicate")]
    description = describe_run(out)
    assert description["replicates"] == COUNT
    assert description["dtypes"] == found.dtypes
    folder = RunFolder.of(out)
    arrays = ("parameter", "gradient", "replicate_parameter", "replicate_hvp")
    stored = sum(
        path.stat().st_size
        for name in arrays
        for path in ((folder.trajectory / name).local_path / "c").rglob("*")
        if path.is_file()
    )
    assert found.trajectory_bytes == stored
    shape = json.loads((folder.ledger / "replicate_gram" / "zarr.json").get())["shape"]
    assert found.ledger_bytes == (STEPS - 1) * len(SHAPES) * (5 * 5 + shape[-1] ** 2 + 1) * 8
    assert analyze_run(out, Serial()).projected_memory == found.worker_memory


def test_the_page_has_the_numbers_of_the_replicates(run, out, tmp_path):
    found = read_results(RunFolder.of(out).results)["replicates/model"].to_dataset()
    report_run([out])
    page = RunFolder.of(out).report.get().decode()
    assert f"the mean of {COUNT} draws of the update" in page
    effective, definite = (int(found[name].sum()) for name in ("effective", "stochastic_definite"))
    drawn = int((found["replicate_alignment"] > 0).sum())
    text = " ".join(page.split())
    assert f"effective at {effective} of the {STEPS - 1} steps" in text
    assert f"{drawn} of {COUNT * (STEPS - 1)} single draws are effective" in text
    assert f"is positive definite at {definite} of these steps" in text
    for name in (
        "angle",
        "angle_error",
        "replicate_angle",
        "condition_number",
        "loss_decrease",
        "learning_rate_bound",
    ):
        (row,) = re.findall(f'<tr id="run-1-replicates-{name}">.*', page)
        shown = [float(value) for value in re.findall('data value="([^"]+)"', row)]
        assert shown == [float(f(found[name])) for f in (np.nanmin, np.nanmedian, np.nanmax)]
    process(record(tmp_path / "log", noisy_run(steps=3), only=()), tmp_path / "out")
    report_run([tmp_path / "out"])
    assert b"replicates-" not in RunFolder.of(tmp_path / "out").report.get()


def test_the_memory_of_a_pass_is_that_of_all_replicates():
    sizes = {"states": 100, "elements": 1 << 22, "chunk": (1, 1 << 20), "tensors": 3, "vectors": 5}
    count = len(replicate_vectors(8, hvp=True))
    limits = PlanLimits()
    with_replicates = plan_pass(**sizes, itemsizes=[4] * 18, replicate_vectors=count)
    without = plan_pass(**sizes, itemsizes=[4] * 2)
    assert (with_replicates.read_states, without.read_states) == (1, 1)
    segments = 3 + 4 + 8 - 1
    ledger = with_replicates.updates_per_chunk * (5 * 5 + count**2 + 1) * 8 * (3 * segments + 2 * 3)
    state = 2 * limits.read_block_elements * 4 * 18
    checksums = (with_replicates.updates_per_chunk + 1) * 18 * 4 * 4 * 3
    assert with_replicates.projected_bytes == limits.reserved_bytes + ledger + state + checksums
