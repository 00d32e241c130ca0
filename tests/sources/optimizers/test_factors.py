"""Metrics of factored rules, from the files of their original libraries to the condition number in use.

The reference is the linear map that the real optimizer applies: its step from zero parameters with every unit
vector as the gradient, while it does not update its factors.
"""

import copy
import functools
import importlib
import itertools
import json
import sys
import warnings

import numpy as np
import pytest
from test_saved_state import saver, sharded

from lazy import Lazy
from natgrad.app import cli, run
from natgrad.app.run import Analysis
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.schema.names import METRIC_EIGENVALUES
from natgrad.sources.optimizers.logged_metric import read_metric
from natgrad.store import open_trajectory
from natgrad.theory.preconditioners import (
    ASYMMETRY,
)
from natgrad.theory.symmetric_operators import canonical_form
from opened import read_results, verify_trajectory
from training import training_steps

pytorch_optimizer = Lazy("pytorch_optimizer")
torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
torch_optimizer = Lazy("torch_optimizer")

STEPS = 5
UNIT = 2.0**-53
RATES = (0.1, 0.02)


def small_net():
    """Return a network with a kernel, matrices of two shapes, vectors and a number."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 3, 2)
            self.out = torch.nn.Linear(12, 4)
            self.scale = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.scale * self.out(torch.tanh(self.conv(x)).flatten(1))

    return Net()


SHAPES = {"scale": (), "conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "out.weight": (4, 12), "out.bias": (4,)}


def groups(model):
    """Return parameter groups in which the kernel and the number have another learning rate."""
    named = dict(model.named_parameters())
    fast = ("conv.weight", "conv.bias", "scale")
    return [
        {"params": [named[name] for name in fast], "lr": RATES[0]},
        {"params": [named["out.weight"], named["out.bias"]], "lr": RATES[1]},
    ]


def rate(name):
    return RATES[name.startswith("out")]


# These rules update their inverses every second step; `maps` prevents PSGD from doing so.
RULES = {
    "torch_optimizer": lambda model: torch_optimizer.Shampoo(groups(model), epsilon=0.02, update_freq=2),
    "pytorch_optimizer": lambda model: pytorch_optimizer.Shampoo(
        groups(model), matrix_eps=0.02, preconditioning_compute_steps=2
    ),
    "psgd": lambda model: pytorch_optimizer.Kron(
        groups(model), momentum=0.0, precondition_dtype=torch.float64, balance_prob=0.0
    ),
    "psgd, diagonal": lambda model: pytorch_optimizer.Kron(
        groups(model),
        momentum=0.0,
        precondition_dtype=torch.float64,
        balance_prob=0.0,
        memory_save_mode="one_diag",
    ),
}
# The steps at which a rule keeps its inverses, so that its update is linear in the gradient.
LINEAR = {"torch_optimizer": (1, 3), "pytorch_optimizer": (2,), "psgd": (0, 2), "psgd, diagonal": (1,)}


def trained(optimizer_of, save, *, dtype=None, steps=STEPS, before=None):
    """Train a network and save it before each update.

    Returns
    -------
    list
        For each step, the parameters, the gradients and, if given, the result of `before` ahead of the update.
    """
    torch.manual_seed(1)
    dtype = dtype or torch.float64
    model = small_net().to(dtype)
    optimizer = optimizer_of(model)
    x, target = torch.randn(6, 2, 3, 3, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    records = []
    for step, gradients, loss in training_steps(model, optimizer, x, target, steps):
        save(step, model, optimizer, gradients, loss)
        parameters = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
        result = None if before is None else before(step, model, optimizer)
        records.append((parameters, {name: g.numpy().copy() for name, g in gradients.items()}, result))
    return records


def copied(rule, model, optimizer):
    net = copy.deepcopy(model)
    other = RULES[rule](net)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # otherwise it shares the tensors
    return net, other


def maps(rule, model, optimizer):
    """Return the matrix of each tensor from gradient to descent, per learning rate, for the next step."""
    columns = {name: [] for name in SHAPES}
    for index in range(max(int(np.prod(shape)) for shape in SHAPES.values())):
        net, other = copied(rule, model, optimizer)
        for group in other.param_groups:
            if "pre_conditioner_update_probability" in group:
                group["pre_conditioner_update_probability"] = 0.0
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
                p.grad = torch.zeros_like(p)
                # Short enough that PSGD does not clip it; a power of two, so that nothing is rounded.
                p.grad.view(-1)[index % p.numel()] = 2.0**-10
        other.step()
        for name, p in net.named_parameters():
            columns[name].append(-p.detach().numpy().ravel() * 2.0**10 / rate(name))
    return {name: np.column_stack(found[: int(np.prod(SHAPES[name]))]) for name, found in columns.items()}


def results_of(log, out, **options):
    summary = run.ingest_run(log, out, include=["optimizer"], **options)
    run.analyze_run(out, Analysis(workers=1))
    return read_results(out / "results.zarr"), summary.warnings


def assert_eigenvalues(out, row, name, singular, basis=1.0, tables=METRIC_EIGENVALUES[:2]):
    """Compare the stored eigenvalues with those of the inverse of the matrix with these singular values."""
    states = open_trajectory(out / "trajectory.zarr")
    place = states.layout.names.index(name)
    rounding = 8 * len(singular) * UNIT * singular[0] / singular[-1] + basis**2 - 1
    for table, value in zip(tables, 1 / singular[[0, -1]], strict=True):
        assert states.scalar(table)[row, place] == pytest.approx(value, rel=rounding)


def assert_condition(found, singular, basis=1.0):
    """Compare a condition number with that of the matrix with these singular values.

    Each column of the matrix is rounded like a product of as many terms, and the error of its smallest singular
    value is the rounding error of its largest. In a basis whose condition number is not 1 (SOAP computes it in
    float32), the values are those of the diagonal times at most the squares of the singular values of the basis
    (Ostrowski).
    """
    kappa = singular[0] / singular[-1]
    assert len(singular) == 1 or kappa > 1.01
    assert float(found) == pytest.approx(kappa, rel=8 * len(singular) * UNIT * kappa + basis**2 - 1)


@pytest.mark.parametrize(
    ("rule", "writer"),
    [
        ("torch_optimizer", saver),
        ("torch_optimizer", sharded),
        ("pytorch_optimizer", saver),
        ("pytorch_optimizer", sharded),
        ("psgd", saver),
        ("psgd, diagonal", sharded),
    ],
)
def test_the_condition_number_of_a_factored_rule_is_that_of_its_update(tmp_path, rule, writer):
    def before(step, model, optimizer):
        if step not in LINEAR[rule]:
            return None
        if rule.startswith("psgd"):
            # The factors are updated before they are applied: the map is that of the factors after the step.
            gradients = [p.grad for p in model.parameters()]
            model, optimizer = copied(rule, model, optimizer)
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            torch.manual_seed(step)
            optimizer.step()
        found = maps(rule, model, optimizer)
        torch.manual_seed(step)
        return found

    records = trained(RULES[rule], writer(tmp_path / "log"), before=before)
    tree, _ = results_of(tmp_path / "log", tmp_path / "out")
    of_tensors = tree["tensor"]["preconditioner_condition_number"]
    of_model = tree["model"]["preconditioner_condition_number"]
    checked = 0
    for step, (_, _, matrices) in enumerate(records[:-1]):
        if matrices is None:
            continue
        spectra = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in matrices.items()}
        for name, singular in spectra.items():
            assert_condition(of_tensors.sel(step=step, tensor=name), singular)
            assert_eigenvalues(tmp_path / "out", step + 1, name, singular)
        whole = np.sort(np.concatenate([rate(name) * singular for name, singular in spectra.items()]))[::-1]
        if rule.startswith("psgd"):
            # It clips the update of each tensor by its length, which is not saved.
            assert np.isnan(of_model.sel(step=step))
        else:
            assert_condition(of_model.sel(step=step), whole)
        checked += 1
    assert checked == len(LINEAR[rule])


@pytest.mark.parametrize("rule", ["torch_optimizer", "pytorch_optimizer"])
def test_the_logged_metric_maps_the_update_to_the_gradient(tmp_path, rule):
    records = trained(RULES[rule], saver(tmp_path / "log"))
    checked = 0
    for step, ((start, gradients, _), (end, _, _)) in enumerate(itertools.pairwise(records)):
        if rule == "pytorch_optimizer" and step == 0:
            with pytest.raises(InputError, match="is zero: it has not been computed yet"):
                read_metric(tmp_path / "log", "out.weight", step)
            continue
        for name in SHAPES:
            metric = read_metric(tmp_path / "log", name, step)
            update = (end[name] - start[name]).ravel() / rate(name)
            form = canonical_form(metric, update, -gradients[name].ravel())
            # Parameters are rounded when the update is added. The factors are applied as sums of as many terms, and
            # their inverses and roots have the rounding error of statistics; kappa is a root of their condition.
            slipped = 2 * UNIT * np.linalg.norm(start[name]) / (rate(name) * np.linalg.norm(update))
            order = len(SHAPES[name]) * (1 if rule == "torch_optimizer" else 2)
            roots = 8 * update.size * UNIT * form.condition_number ** max(order, 1)
            assert form.mapping_residual <= slipped + roots
            assert 1 <= form.smallest_condition_number <= form.condition_number * (1 + roots)
            checked += 1
    assert checked >= 3 * len(SHAPES)


@pytest.mark.parametrize(
    ("library", "inverse"),
    [(torch_optimizer, "inv_precond"), (pytorch_optimizer, "inv_pre_cond")],
)
def test_in_single_precision_roots_are_nearly_symmetric_and_condition_is_that_of_their_singular_values(
    tmp_path, library, inverse
):
    def factors(step, model, optimizer):
        states = {name: optimizer.state[p] for name, p in model.named_parameters()}
        return {
            name: [state[f"{inverse}_{axis}"].double().numpy() for axis in range(len(SHAPES[name]))]
            for name, state in states.items()
            if step
        }

    records = trained(
        lambda model: library.Shampoo(groups(model)), saver(tmp_path / "log"), dtype=torch.float32, before=factors
    )
    tree, (note,) = results_of(tmp_path / "log", tmp_path / "out")
    assert note.startswith("the parameter groups have different learning rates: each tensor has that of its group")
    worst = 0.0
    for step, (_, _, after) in enumerate(records[1:]):
        for name, matrices in after.items():
            singular = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
            worst = max([worst, *(np.linalg.norm(m - m.T) / np.linalg.norm(m) for m in matrices)])
            found = tree["tensor"]["preconditioner_condition_number"].sel(step=step, tensor=name)
            kappa = np.prod([values[0] / values[-1] for values in singular])
            assert float(found) == pytest.approx(kappa, rel=2 * max(len(matrices), 1) * ASYMMETRY**2)
    assert worst > 2.0**-24


# SOAP --------------------------------------------------------------------------------------------------------

BETA2, EPSILON = 0.9, 1e-3


def soap(model, **options):
    return pytorch_optimizer.SOAP(
        groups(model), betas=(0.0, BETA2), eps=EPSILON, weight_decay=0.0, precondition_frequency=2, **options
    )


def rotated_maps(step, model, optimizer, *, correct_bias=True):
    """Return the matrix of each tensor from gradient to descent, per learning rate, as the rule defines it."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if "Q" not in state:
            return None  # the first call computes the basis without an update
        basis = np.ones((1, 1))
        for size, q in itertools.zip_longest(p.shape, state["Q"], fillvalue=()):
            basis = np.kron(basis, q.numpy() if len(q) else np.eye(size))
        moment = BETA2 * state["exp_avg_sq"].numpy().ravel() + (1 - BETA2) * (basis.T @ p.grad.numpy().ravel()) ** 2
        bias = np.sqrt(1 - BETA2**step) if correct_bias else 1.0
        matrix = basis @ np.diag(bias / (np.sqrt(moment) + EPSILON)) @ basis.T
        found[name] = matrix, np.linalg.cond(basis)
    return found


@pytest.mark.parametrize(
    ("options", "writer"),
    [({}, saver), ({}, sharded), ({"correct_bias": False}, saver), ({"normalize_gradient": True}, sharded)],
)
def test_the_condition_number_of_soap_is_that_in_the_rotated_basis(tmp_path, options, writer):
    before = functools.partial(rotated_maps, correct_bias=options.get("correct_bias", True))
    records = trained(functools.partial(soap, **options), writer(tmp_path / "log"), before=before)
    tree, warned = results_of(tmp_path / "log", tmp_path / "out")
    of_tensors = tree["tensor"]["preconditioner_condition_number"]
    of_model = tree["model"]["preconditioner_condition_number"]
    assert np.isnan(of_tensors.sel(step=0)).all()
    assert any("no update yet" in warning for warning in warned)
    for step, ((start, gradients, matrices), (end, _, _)) in enumerate(itertools.pairwise(records)):
        for name, (matrix, condition) in {} if matrices is None else matrices.items():
            if "normalize_gradient" not in options:
                # The map is that of the real rule: its update is that for this gradient.
                update = (end[name] - start[name]).ravel() / rate(name)
                slipped = 2 * UNIT * np.linalg.norm(start[name]) / rate(name)
                rounding = 8 * update.size * UNIT * np.linalg.norm(matrix, 2) * np.linalg.norm(gradients[name])
                assert np.linalg.norm(update + matrix @ gradients[name].ravel()) <= slipped + rounding
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert_condition(of_tensors.sel(step=step, tensor=name), singular, condition)
            assert_eigenvalues(tmp_path / "out", step + 1, name, singular, condition)
        if "normalize_gradient" in options:
            assert np.isnan(of_model.sel(step=step))
        elif matrices is not None:
            spectra = [
                rate(name) * np.linalg.svd(matrix, compute_uv=False) for name, (matrix, _) in matrices.items()
            ]
            worst = max(condition for _, condition in matrices.values())
            assert_condition(of_model.sel(step=step), np.sort(np.concatenate(spectra))[::-1], worst)
    with pytest.raises(InputError, match="that of SOAP is rotated"):
        read_metric(tmp_path / "log", "out.weight", 1)


def test_the_update_count_of_the_original_soap_is_used(tmp_path):
    """Test the layout of the authors' code, which is in no package: ``step`` per entry, none per group."""

    def save(step, model, optimizer, gradients, loss):
        saver(tmp_path / "package")(step, model, optimizer, gradients, loss)
        tree = torch.load(tmp_path / "package" / f"step-{step}.pt", weights_only=False)
        for group in tree["optimizer"]["param_groups"]:
            calls = group.pop("step", 0)
            for entry in group["params"]:
                if entry in tree["optimizer"]["state"]:
                    tree["optimizer"]["state"][entry]["step"] = calls - 1
        (tmp_path / "authors").mkdir(exist_ok=True)
        torch.save(tree, tmp_path / "authors" / f"step-{step}.pt")

    trained(soap, save)
    stored = []
    for log in ("package", "authors"):
        results_of(tmp_path / log, tmp_path / f"{log} out")
        states = open_trajectory(tmp_path / f"{log} out" / "trajectory.zarr")
        stored.append([states.scalar(table) for table in METRIC_EIGENVALUES[:2]])
    assert np.isfinite(stored[0]).sum() == 2 * 3 * len(SHAPES)
    np.testing.assert_array_equal(*stored)


# ScalableShampoo ---------------------------------------------------------------------------------------------


def scalable(model):
    return pytorch_optimizer.ScalableShampoo(
        groups(model),
        betas=(0.0, 0.9),
        start_preconditioning_step=3,
        preconditioning_compute_steps=1,
        shape_interpretation=False,
        block_size=4,
        matrix_eps=1e-2,
        use_svd=True,
    )


def own_maps(step, model, optimizer):
    """Return the matrix of the preconditioner of each tensor in the previous step, from its own method."""
    found = {}
    for name, p in model.named_parameters():
        own = optimizer.state[p].get("pre_conditioner")
        if own is not None and len(own.pre_conditioners):
            units = torch.eye(p.numel(), dtype=p.dtype).reshape(p.numel(), *p.shape)
            found[name] = np.column_stack([own.preconditioned_grad(unit).numpy().ravel() for unit in units])
    return found


def test_scalable_shampoo_blocks_are_those_of_the_optimizer(tmp_path):
    log = tmp_path / "log"
    records = trained(scalable, saver(log), before=own_maps)
    tree, warned = results_of(log, tmp_path / "without")
    assert np.isnan(tree["tensor"]["preconditioner_condition_number"]).all()
    assert any("start_preconditioning_step = N under [optimizer]" in warning for warning in warned)
    (log / "natgrad.toml").write_text("[optimizer]\nstart_preconditioning_step = 3\n")
    tree, _ = results_of(log, tmp_path / "declared")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    assert np.isnan(kappa.sel(step=[0, 1])).all()
    for step in (2, 3):
        maps_after = records[step + 1][2]
        assert set(maps_after) == {"conv.weight", "out.weight"}
        for name, matrix in maps_after.items():
            assert_condition(kappa.sel(step=step, tensor=name), np.linalg.svd(matrix, compute_uv=False))
        assert np.isnan(kappa.sel(step=step, tensor=["conv.bias", "out.bias", "scale"])).all()
    assert np.isnan(tree["model"]["preconditioner_condition_number"]).all()
    with pytest.raises(InputError, match="is split into 3 blocks"):
        read_metric(log, "out.weight", 2)
    (log / "natgrad.toml").write_text("[optimizer]\nstart_preconditioning_step = 'three'\n")
    with pytest.raises(InputError, match="has invalid values"):
        run.ingest_run(log, tmp_path / "wrong", include=["optimizer"])


def test_objects_in_a_sharded_checkpoint_are_reported_as_unread(tmp_path):
    trained(scalable, sharded(tmp_path / "log"))
    (tmp_path / "log" / "natgrad.toml").write_text("[optimizer]\nstart_preconditioning_step = 3\n")
    tree, warned = results_of(tmp_path / "log", tmp_path / "out")
    assert np.isnan(tree["tensor"]["preconditioner_condition_number"]).all()
    assert any("of 5 tensors" in warning and "or they are objects" in warning for warning in warned)


# K-FAC -------------------------------------------------------------------------------------------------------


@functools.cache
def curvlinops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch.jit, by a dependency
        return importlib.import_module("curvlinops")


@pytest.mark.parametrize(
    ("writer", "joint", "damping"),
    [
        ("torch", True, {"damping": 0.03}),
        ("dcp", False, {"damping": (0.2, 0.03)}),
        ("torch", False, {"damping": 0.03, "use_exact_damping": True}),
        ("dcp", True, {"damping": 0.03, "use_exact_damping": True}),
        ("torch", True, {"damping": 0.03, "use_heuristic_damping": True}),
        ("torch", True, {"damping": (0.2, 0.03)}),
    ],
)
def test_the_condition_number_of_kfac_is_that_of_the_curvlinops_inverse(tmp_path, writer, joint, damping):
    kfac, log = curvlinops(), tmp_path / "log"
    log.mkdir()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 4)
    ).double()
    x, target = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    loss_function, parameters = torch.nn.MSELoss(), dict(model.named_parameters())
    records = []
    for step in range(3):
        model.zero_grad()
        loss = loss_function(model(x), target)
        loss.backward()
        operator = kfac.KFACLinearOperator(
            model,
            loss_function,
            list(parameters.values()),
            [(x, target)],
            fisher_type="empirical",
            separate_weight_and_bias=not joint,
            check_deterministic=False,
        )
        inverse = kfac.KFACInverseLinearOperator(operator, **damping)
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        descent = inverse @ list(gradients.values())
        dense = inverse @ torch.eye(inverse.shape[1], dtype=torch.float64)
        tree = {
            "model": {name: p.detach().clone() for name, p in parameters.items()},
            "gradient": gradients,
            "loss": loss.item(),
            "learning_rate": 0.1,
            "preconditioner": inverse.state_dict(),
        }
        if writer == "dcp":
            dcp.save(tree, checkpoint_id=log / f"step-{step}", no_dist=True)
        else:
            torch.save(tree, log / f"step-{step}.pt")
        records.append((dense.numpy(), {name: g.numpy() for name, g in gradients.items()}))
        with torch.no_grad():
            for p, d in zip(parameters.values(), descent, strict=True):
                p -= 0.1 * d
    tree, warned = results_of(log, tmp_path / "out")
    assert warned == [] or all("keys are not used" in warning for warning in warned)
    stops = np.cumsum([p.numel() for p in parameters.values()])
    places = dict(zip(parameters, np.split(np.arange(stops[-1]), stops[:-1]), strict=True))
    of_tensors = tree["tensor"]["preconditioner_condition_number"]
    for step, (dense, gradients) in enumerate(records[:-1]):
        for layer in ("0", "3"):
            blocks = [[f"{layer}.weight", f"{layer}.bias"]]
            for names in blocks if joint else [[name] for name in blocks[0]]:
                inside = np.concatenate([places[name] for name in names])
                block = dense[np.ix_(inside, inside)]
                for name in names:
                    found, singular = of_tensors.sel(step=step, tensor=name), np.linalg.svd(block, compute_uv=False)
                    assert_condition(found, singular)
                    assert_eigenvalues(tmp_path / "out", step, name, singular, tables=METRIC_EIGENVALUES[2:])
                # The operator that is read maps the descent back to this gradient.
                metric = read_metric(log, names[0], step)
                columns = [gradients[name].reshape(len(gradients[name]), -1) for name in names]
                gradient = np.column_stack(columns).ravel()
                descents = [
                    (dense[places[name]] @ _flat(gradients)).reshape(c.shape)
                    for name, c in zip(names, columns, strict=True)
                ]
                form = canonical_form(metric, np.column_stack(descents).ravel(), gradient)
                # The descent is a solution of linear equations: its error grows with their condition number.
                assert form.mapping_residual <= 8 * len(dense) * UNIT * form.condition_number
                assert form.condition_number == pytest.approx(
                    float(found), rel=8 * len(dense) * UNIT * float(found)
                )
        whole = np.linalg.svd(dense, compute_uv=False)
        assert_condition(tree["model"]["preconditioner_condition_number"].sel(step=step), whole)


def _flat(gradients):
    return np.concatenate([gradient.ravel() for gradient in gradients.values()])


def kfac_pytorch(tmp_path, *, inv_update_steps=1, optimizer=None, outside=False, **user_options):
    """Write files in the layout of kfac-pytorch 0.4, from its documentation and source (it is on no index).

    ``KFACPreconditioner.state_dict()`` is {steps, .., damping, .., layers: {module: {A, G}}}.
    """
    rng = np.random.default_rng(0)
    log = tmp_path / "log"
    log.mkdir()
    truth = []
    more = [torch.nn.LayerNorm(3, bias=False)] if outside else []
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), *more).double()
    behind = optimizer and optimizer(model.parameters(), lr=0.1)
    for step in range(4):
        a, g = rng.standard_normal((6, 5)), rng.standard_normal((2, 3))
        factors = {"A": torch.tensor(a.T @ a / 6), "G": torch.tensor(g.T @ g / 2)}
        state = {
            **{"steps": step, "factor_update_steps": 1, "inv_update_steps": inv_update_steps, "damping": 0.01},
            **{"factor_decay": 0.95, "kl_clip": 0.001, "lr": 0.1, "layers": {"0": factors} if step else {}},
        }
        model(torch.ones(1, 4, dtype=torch.float64)).square().sum().backward()
        if behind:
            behind.step()
        tree = {"model": model.state_dict(), "preconditioner": state, "loss": 0.5, "learning_rate": 0.1}
        tree["gradient"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        tree |= {"optimizer": behind.state_dict()} if behind else {}
        torch.save(tree, log / f"step-{step}.pt")
        truth.append((factors["A"].numpy(), factors["G"].numpy()))
    if user_options:
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in user_options.items())
        (log / "natgrad.toml").write_text(f"[optimizer]\n{text}")
    return log, truth


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_damping_of_kfac_pytorch_follows_the_specified_inversion_method(tmp_path, method):
    log, truth = kfac_pytorch(tmp_path, compute_method=method)
    tree, _ = results_of(log, tmp_path / "out")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    for step in range(3):
        a, g = truth[step + 1]
        if method == "eigen":
            metric = np.kron(g, a) + 0.01 * np.eye(15)
        else:
            metric = np.kron(g + 0.01 * np.eye(3), a + 0.01 * np.eye(5))
        singular = np.linalg.svd(metric, compute_uv=False)
        for name in ("0.weight", "0.bias"):
            assert_condition(kappa.sel(step=step, tensor=name), singular)
        assert_condition(tree["model"]["preconditioner_condition_number"].sel(step=step), singular)
        dense = read_metric(log, "0.bias", step) @ np.eye(15)
        # A damped product of two factors is rounded three times.
        np.testing.assert_allclose(dense, metric, rtol=0, atol=8 * UNIT * singular[0])


def halved(parameters, lr):
    weight, bias = parameters
    return torch.optim.SGD([{"params": [weight], "lr": lr}, {"params": [bias], "lr": lr / 2}])


@pytest.mark.parametrize(
    ("options", "why", "known"),
    [
        ({}, "does not contain the inversion method", ()),
        ({"compute_method": "eigen", "inv_update_steps": 2}, "computes inverses every 2 steps", (0, 2)),
        ({"compute_method": "eigen", "optimizer": halved}, "weight and bias have different learning rates", ()),
        (
            {"compute_method": "eigen", "optimizer": lambda *p, **o: torch.optim.Adam(*p, **o)},
            "optimizer after the preconditioner has its own metric",
            (),
        ),
    ],
)
def test_incomplete_kfac_options_give_no_number(tmp_path, options, why, known):
    log, _ = kfac_pytorch(tmp_path, **options)
    tree, warned = results_of(log, tmp_path / "out")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    assert np.isfinite(kappa.sel(tensor="0.weight")).values.nonzero()[0].tolist() == list(known)
    assert any(why in warning for warning in warned)


def test_tensors_without_kfac_factors_are_named_and_the_model_is_unknown(tmp_path):
    log, _ = kfac_pytorch(tmp_path, compute_method="eigen", optimizer=torch.optim.SGD, outside=True)
    tree, warned = results_of(log, tmp_path / "out")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    assert np.isfinite(kappa.sel(tensor=["0.weight", "0.bias"])).all()
    assert np.isnan(kappa.sel(tensor="1.weight")).all()
    assert np.isnan(tree["model"]["preconditioner_condition_number"]).all()
    assert any(
        "tensor '1.weight' is not known: K-FAC: the preconditioner has no factors for it" in warning
        for warning in warned
    )


def test_amsgrad_is_not_mistaken_for_adam(tmp_path):
    trained(lambda model: torch.optim.Adam(groups(model), amsgrad=True), saver(tmp_path / "log"), steps=3)
    tree, warned = results_of(tmp_path / "log", tmp_path / "out")
    assert np.isnan(tree["tensor"]["preconditioner_condition_number"]).all()
    assert any("AMSGrad: its metric depends on max_exp_avg_sq" in warning for warning in warned)


# Invalid metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: f.neg_(), "not positive definite"),
        (lambda f: f.zero_(), "is zero: it has not been computed yet"),
        (lambda f: f[0, 0].fill_(torch.nan), "not finite"),
        (lambda f: f[0, 1].add_(f.diagonal().min()), "not symmetric"),
        (lambda f: f.resize_(3, 4), "the factors have shapes"),
    ],
    ids=["negative", "zero", "nan", "skew", "shape"],
)
def test_invalid_metrics_give_nan_with_a_reason(tmp_path, change, why):
    def save(step, model, optimizer, gradients, loss):
        state = optimizer.state[model.out.weight]
        kept = state.get("inv_precond_0")
        if step == 2:
            state["inv_precond_0"] = kept.clone()
            change(state["inv_precond_0"])
        saver(tmp_path / "log")(step, model, optimizer, gradients, loss)
        if step == 2:
            state["inv_precond_0"] = kept

    trained(lambda model: torch_optimizer.Shampoo(groups(model), epsilon=0.02), save, steps=3)
    tree, warned = results_of(tmp_path / "log", tmp_path / "out")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    assert np.isnan(kappa.sel(step=1, tensor="out.weight"))
    assert np.isfinite(kappa.sel(tensor=[name for name in SHAPES if name != "out.weight"])).all()
    assert np.isfinite(kappa.sel(step=0)).all()
    assert np.isnan(tree["model"]["preconditioner_condition_number"]).values.tolist() == [False, True]
    (warning,) = (warning for warning in warned if "is not known" in warning)
    assert "tensor 'out.weight'" in warning
    assert why in warning
    assert "(in step-2.pt)" in warning
    if why != "the factors have shapes":
        assert list(verify_trajectory(tmp_path / "out" / "trajectory.zarr")) == []
    with pytest.raises(InputError, match=why) as refusal:
        read_metric(tmp_path / "log", "out.weight", 1)
    assert "step 2, Shampoo metric of tensor 'out.weight'" in refusal.value.where


def _neither(tree):
    tree["preconditioner"]["layers"]["0"]["G"] = torch.eye(4, dtype=torch.float64)


def _negative(tree):
    tree["preconditioner"]["layers"]["0"]["A"] -= torch.eye(5, dtype=torch.float64)


def _integer(tree):
    tree["preconditioner"]["layers"]["0"]["A"] = torch.eye(5, dtype=torch.int64)


def _endless(tree):
    tree["preconditioner"]["damping"] = float("inf")


def _undamped(tree):
    tree["preconditioner"]["damping"] = 0.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_neither, "do not match its weight or bias of shape [3, 4]"),
        (_negative, "the metric is not positive definite"),
        (_integer, "a factor has dtype int64"),
        (_endless, "the metric is not positive definite"),
        (_undamped, "the metric is not positive definite"),
    ],
)
def test_kfac_factors_without_a_valid_metric_give_nan_with_a_reason(tmp_path, change, why):
    log, _ = kfac_pytorch(tmp_path, compute_method="eigen")
    tree = torch.load(log / "step-2.pt")
    change(tree)
    torch.save(tree, log / "step-2.pt")
    tree, warned = results_of(log, tmp_path / "out")
    kappa = tree["tensor"]["preconditioner_condition_number"].sel(tensor="0.weight")
    assert np.isnan(kappa).values.tolist() == [False, True, False]
    assert any(why in warning and "of 2 tensors" in warning for warning in warned)


def test_a_factor_that_is_too_large_is_reported(tmp_path):
    trained(RULES["torch_optimizer"], saver(tmp_path / "log"), steps=3)
    tree, warned = results_of(tmp_path / "log", tmp_path / "out", limits=IngestLimits(largest_factor=11))
    kappa = tree["tensor"]["preconditioner_condition_number"]
    assert np.isnan(kappa.sel(tensor="out.weight")).all()
    assert np.isfinite(kappa.sel(tensor=[name for name in SHAPES if name != "out.weight"])).all()
    assert any("'out.weight'" in w and "12 x 12 is too large" in w and "in 2 steps" in w for w in warned)


def test_metrics_that_appear_after_the_store_was_created_are_reported(tmp_path):
    log, _ = kfac_pytorch(tmp_path, compute_method="eigen", optimizer=torch.optim.SGD)
    tree = torch.load(log / "step-1.pt")
    del tree["preconditioner"]
    torch.save(tree, log / "step-1.pt")
    late = [(log / f"step-{step}.pt").rename(tmp_path / f"step-{step}.pt") for step in (2, 3)]
    run.ingest_run(log, tmp_path / "out", include=["optimizer"])
    assert not set(METRIC_EIGENVALUES) & set(open_trajectory(tmp_path / "out" / "trajectory.zarr").tables)
    for path in late:
        path.rename(log / path.name)
    _, warned = results_of(log, tmp_path / "out")
    assert any("metric_eigenvalue_max" in w and "since step 2, but are not stored" in w for w in warned)


def test_a_missing_step_or_tensor_is_refused(tmp_path):
    trained(RULES["torch_optimizer"], saver(tmp_path / "log"), steps=3)
    with pytest.raises(InputError, match="step 7 is not in the log"):
        read_metric(tmp_path / "log", "out.weight", 7)
    for tensor, step in (("out", 0), ("out.weight", 2)):
        with pytest.raises(InputError, match="no metric with Kronecker factors is saved"):
            read_metric(tmp_path / "log", tensor, step)


def test_inspect_reports_the_logged_metric(tmp_path, capsys, monkeypatch):
    trained(RULES["torch_optimizer"], saver(tmp_path / "log"), steps=2)
    monkeypatch.setattr(sys, "argv", ["natgrad", "inspect", str(tmp_path / "log"), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    records = json.loads(capsys.readouterr().out)["optimizer"]
    assert records.startswith("momentum_buffer, the metric of Shampoo of 5 tensors at step 1")
