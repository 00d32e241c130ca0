"""Replicates of a stochastic rule from a log to labelled results, against the vectors themselves."""

import itertools

import numpy as np
import pytest
from logs import walk_arrays, write_trajectory
from mpmath import mp, mpf
from processing import process
from reference import exact, exact_dot
from zarr.codecs import BloscCodec

from pipeline import blocks, compute, gram, replicates, results
from pipeline.compute import compute_ledger
from pipeline.recorder import Recorder
from pipeline.run import RunFolder
from pipeline.schema import InputError, Layout, of_replicate, replicate_vectors
from pipeline.store import Ledger, Trajectory

SHAPES = {"layer.bias": (5,), "layer.weight": (7, 5), "scale": ()}
LAYOUT = Layout.from_shapes({name: (shape, "float32") for name, shape in SHAPES.items()})
SIZE, STEPS, COUNT, RATE = LAYOUT.elements, 7, 4, 0.125
U = 2.0**-53


def noisy_run(seed=0, steps=STEPS, count=COUNT, dtype="float32", noise=1.0):
    """Arrays of a noisy descent of a quadratic loss: of each state ``count`` draws of the update, made by their mean.

    All are as they are logged: parameter, gradient (step, element), replicate_parameter and replicate_hvp
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
    """Cut arrays (..., element) into tensors of their shapes, elements last."""
    return {
        t.name: values[..., t.offset : t.stop].reshape(*values.shape[:-1], *t.shape)
        if t.shape
        else values[..., t.offset]
        for t in LAYOUT.tensors
    }


def record(folder, run, container="safetensors", only=("parameter", "hvp", "loss")):
    """Write a run by the recorder and return its folder."""
    recorder = Recorder(folder, container)
    for step in range(len(run["loss"])):
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
    """Ledger of the replicates by `pipeline.replicates.ledger`, from whole tensors in memory."""
    gradient, displacement, hvp = vectors_of(run)
    parts = [slice(tensor.offset, tensor.stop) for tensor in LAYOUT.tensors]
    return np.stack([replicates.ledger(*(x[..., p] for x in (gradient, displacement, hvp))) for p in parts], axis=1)


def gram_bound(run):
    """Bound of the rounding of every entry of a ledger of the replicates, by whatever order it is summed.

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
            norms += [*np.linalg.norm(np.concatenate([mean, drawn - mean], axis=1), axis=-1).T]
            formed += [(drawn.shape[1] + 2) * U * largest] * (drawn.shape[1] + 1)
        norm, error = np.stack(norms, axis=-1), np.stack(formed, axis=-1)
        product = norm[:, :, None] * norm[:, None, :]
        crossed = norm[:, :, None] * error[:, None, :]
        bounds.append(gram.roundoff_bound(tensor.size) * product + crossed + np.swapaxes(crossed, 1, 2))
    return np.stack(bounds, axis=1)


# From the log to the ledger -----------------------------------------------------------------------------------


def test_the_store_holds_every_replicate_as_it_was_logged(run, out):
    states = Trajectory(RunFolder(out).trajectory)
    assert (states.replicates, states.array_dtypes["replicate_hvp"]) == (COUNT, "float32")
    for name in ("replicate_parameter", "replicate_hvp"):
        for replicate in range(COUNT):
            words = np.zeros((STEPS, states.chunk[1]), np.float32)
            states.read(of_replicate(name, replicate), 0, STEPS, 0, words)
            np.testing.assert_array_equal(words[:, :SIZE], run[name][:, replicate])
    np.testing.assert_array_equal(states.scalar("replicate_loss"), run["replicate_loss"])
    import zarr

    group = zarr.open_group(RunFolder(out).trajectory, mode="r")
    np.testing.assert_array_equal(group["replicate_parameter"][:], run["replicate_parameter"])
    assert group["replicate_parameter"].metadata.dimension_names == ("step", "replicate", "element")


def test_the_ledger_of_a_log_is_that_of_the_arrays_in_memory(run, out):
    book = Ledger(RunFolder(out).ledger)
    assert book.replicate_vectors == replicate_vectors(COUNT, hvp=True)
    found, expected, bound = book.read_band("replicate_gram", 0, STEPS - 1), gram_of(run), gram_bound(run)
    assert (np.abs(found - expected) <= 2 * bound).all()
    # The bound is worth the name: it tells the vectors of one step from those of the next.
    assert (np.abs(found[1:] - expected[:-1]) > 2 * bound[:-1]).mean() > 0.9


def relative_rounding(run):
    """Rounding of the products of gradient, mean displacement and mean hvp of the model, relative to their lengths."""
    chosen = [0, 1, 2 + COUNT]
    norms = np.sqrt(np.einsum("rtii->ri", gram_of(run)))[:, chosen]
    bound = 2 * gram_bound(run).sum(axis=1)[:, chosen][..., chosen]
    return (bound / (norms[:, :, None] * norms[:, None, :])).max(axis=(1, 2))


def test_the_results_of_a_log_are_those_of_the_arrays_in_memory(run, out):
    tree = results.read(RunFolder(out).results)["replicates"]
    options = {"loss_change": (run["replicate_loss"] - run["loss"][:, None])[:-1], "learning_rate": RATE}
    stored = Ledger(RunFolder(out).ledger).read_band("replicate_gram", 0, STEPS - 1)
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
    # Of products that are summed in another order, the same but for what their rounding can do.
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
    """Mean update, y and mean <Hg> of a row of the whole model, exactly: lists of numbers of 60 digits."""
    with mp.workdps(60):
        theta = exact(run["parameter"][row])
        y = [-x for x in exact(run["gradient"][row])]
        draws = [exact(draw) for draw in run["replicate_parameter"][row]]
        bent = [exact(draw) for draw in run["replicate_hvp"][row]]
        g = [mp.fsum(draw[i] - theta[i] for draw in draws) / COUNT / mpf(RATE) for i in range(SIZE)]
        n = [mp.fsum(draw[i] for draw in bent) / COUNT / 2 / mpf(RATE) for i in range(SIZE)]
        return y, g, n


def test_equation_19_from_a_log_is_that_of_exact_arithmetic(tmp_path_factory):
    # One run bends along its updates and one against them: eq. (19) is definite, and needs a weight.
    for sign in (1, -1):
        run = noisy_run(seed=3, steps=3, noise=0.3)
        run["replicate_hvp"] *= sign
        tree = process(record(tmp_path_factory.mktemp("log"), run), tmp_path_factory.mktemp("out"))
        for row, rounding in enumerate(relative_rounding(run)):
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
            # A result is a product of some of a, b, c and |d|^2, of which each is a sum of products: their rounding
            # counts by how much larger the summands are.
            summed = b * b * yy + 2 * abs(b * c) * mp.sqrt(yy * nn) + c * c * nn + abs(alpha * b * b * c)
            parts = [
                (c, mp.sqrt(yy * gg)),
                (b, mp.sqrt(nn * gg)),
                (a, mp.sqrt(yy * gg) + mpf(RATE) * mp.sqrt(nn * gg)),
            ]
            parts += [(lacking, summed), (exact_dot(deviation, deviation), summed)]
            tolerance = 4 * float(rounding * sum(whole / abs(part) for part, whole in parts))
            assert tolerance < 1e-9
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
SMALL_BLOCKS = {
    **{"LEAST_TILE_BYTES": 1, "TILE_BYTES": 8000, "LEAST_ROWS": 5, "PIECE_ELEMENTS": 7},
    **{"READ_BYTES": 1000, "LEAST_READ_ROWS": 1},
}


def drawn_arrays(dtype="float32", hvp=True):
    """Arrays (row, element) of a trajectory, three replicates of each."""
    arrays = walk_arrays(ROWS, ELEMENTS, {"parameter": dtype, "gradient": "float32"})
    for name, array in [("replicate_parameter", "parameter"), *([("replicate_hvp", "gradient")] if hvp else [])]:
        for replicate in range(3):
            drawn = walk_arrays(ROWS, ELEMENTS, {array: dtype}, seed=1 + replicate)[array]
            arrays[of_replicate(name, replicate)] = drawn
    return arrays


def bits(ledger):
    """Everything that a ledger holds."""
    book = Ledger(ledger)
    bands = [
        book.read_band("replicate_gram", start, start + book.band_rows)
        for start in range(0, book.rows, book.band_rows)
    ]
    return [array.tobytes() for array in (*book.read(), *book.steps(), np.concatenate(bands))]


@pytest.mark.parametrize(
    ("dtype", "steps", "hvp"), [("float32", 1, True), ("bfloat16", 3, True), ("float16", 64, False)]
)
def test_the_bits_do_not_depend_on_who_computes_them_or_on_what_is_read_at_a_time(
    tmp_path, monkeypatch, dtype, steps, hvp
):
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(blocks, name, value)
    arrays = drawn_arrays(dtype, hvp)
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, CUT, (steps, 40))
    summary = compute_ledger(trajectory, tmp_path / "serial.zarr")
    assert summary.bands > 2
    assert summary.plan.columns > summary.plan.tile_columns
    # Half of it, in threads, and the rest by itself.

    def half(job, bands):
        yield from compute.threads(2)(job, bands[::2])

    compute_ledger(trajectory, tmp_path / "resumed.zarr", executor=half)
    with pytest.raises(InputError, match="not complete"):
        Ledger(tmp_path / "resumed.zarr").read()
    assert compute_ledger(trajectory, tmp_path / "resumed.zarr").computed_bands == summary.bands // 2
    compute_ledger(trajectory, tmp_path / "threads.zarr", executor=compute.threads(2))
    codecs = {name: BloscCodec(cname="zstd") for name in ("gradient", "replicate_parameter")}
    write_trajectory(tmp_path / "compressed.zarr", arrays, CUT, (steps, 40), codecs)
    compute_ledger(tmp_path / "compressed.zarr", tmp_path / "unpacked.zarr")
    monkeypatch.setattr(blocks, "READ_BYTES", 1 << 20)
    compute_ledger(trajectory, tmp_path / "at once.zarr")
    for name in ("resumed", "threads", "unpacked", "at once"):
        assert bits(tmp_path / f"{name}.zarr") == bits(tmp_path / "serial.zarr"), name
    # And they are those of the vectors: each row and tensor, wherever it is cut.
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
        assert np.abs(found[row, tensor] - expected).max() <= (2 * gram.roundoff_bound(stop) + 20 * U) * largest**2


def test_a_run_without_replicates_knows_nothing_of_them(tmp_path):
    tree = process(record(tmp_path / "log", noisy_run(steps=3), only=()), tmp_path / "out")
    assert "replicates" not in tree
    assert not [path for path in (tmp_path / "out").rglob("*replicate*")]
    for document in (tmp_path / "out").glob("*.zarr/zarr.json"):
        assert "replicate_" not in document.read_text()
