"""Gradients recovered from the states of real optimizers, compared with those that the training loop had."""

import copy
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from lazy import Lazy
from natgrad.schema.errors import InputError
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.optimizers.recovery import GRADES, RULE_NAMES
from natgrad.sources.recovered import Recovered
from optimizer_states import MemoryLog, MemoryStep, errors, recovered, train

torch = Lazy("torch")
pytorch_optimizer = Lazy("pytorch_optimizer")

STEPS = 60


def optimizer(name, **options):
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


def lion(model):
    return pytorch_optimizer.Lion(model.parameters(), lr=1e-3, weight_decay=0.1)


def muon(**options):
    return lambda model: torch.optim.Muon(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


# The rule, its construction, the limits of the median error in float32 and bfloat16, and what its check proves.
CASES = {
    "AdamW": ("AdamW", optimizer("AdamW", lr=1e-2, weight_decay=0.1), 1.6e-7, 1e-2, "verified"),
    "AMSGrad": ("AdamW", optimizer("AdamW", lr=1e-2, amsgrad=True), 1.6e-7, 1e-2, "verified"),
    "fused": ("AdamW", optimizer("AdamW", lr=1e-2, fused=True), 1.6e-7, 1e-2, "verified"),
    "Adam": ("Adam", optimizer("Adam", lr=1e-2), 1.6e-7, 1e-2, "verified"),
    "coupled": ("Adam", optimizer("Adam", lr=1e-2, weight_decay=0.1), 3.6e-7, 2.4e-2, "rate only"),
    "maximize": (
        "Adam",
        optimizer("Adam", lr=1e-2, weight_decay=0.1, maximize=True),
        *(3.6e-7, 2.4e-2, "rate only"),
    ),
    "NAdam": ("NAdam", optimizer("NAdam", lr=1e-2), 1.6e-7, 1e-2, "verified"),
    "NAdam decoupled": (
        "NAdam",
        optimizer("NAdam", lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        *(1.6e-7, 1e-2, "verified"),
    ),
    "RAdam": ("RAdam", optimizer("RAdam", lr=1e-2), 1.6e-7, 1e-2, "verified"),
    "Adamax": ("Adamax", optimizer("Adamax", lr=1e-2), 1.6e-7, 1e-2, "verified"),
    "momentum": (
        "SGD with momentum",
        optimizer("SGD", lr=1e-2, momentum=0.9, weight_decay=0.1),
        *(2.6e-7, 1.4e-2, "rate only"),
    ),
    "nesterov": (
        "SGD with momentum",
        optimizer("SGD", lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        *(2.6e-7, 1.4e-2, "rate only"),
    ),
    "dampening": (
        "SGD with momentum",
        optimizer("SGD", lr=1e-2, momentum=0.9, dampening=0.5),
        *(2.6e-7, 1.4e-2, "rate only"),
    ),
    "Muon": ("Muon", muon(), 2.8e-7, 1.8e-2, "verified"),
    "Muon without nesterov": ("Muon", muon(nesterov=False), 2.8e-7, None, "rate only"),
    "Lion": ("Lion", lion, 4.8e-7, 3.2e-2, "verified"),
    "RMSprop": ("RMSprop", optimizer("RMSprop", lr=1e-2), 3e-6, 0.29, "none"),
    "RMSprop with momentum": (
        "RMSprop with momentum",
        optimizer("RMSprop", lr=1e-2, momentum=0.9),
        *(1.2e-7, 2e-2, "rate only"),
    ),
    "centered": ("centered RMSprop", optimizer("RMSprop", lr=1e-2, centered=True), 3.6e-7, 2e-2, "rate only"),
    "Adagrad": ("Adagrad", optimizer("Adagrad", lr=0.1, lr_decay=0.01), 3e-6, 0.29, "none"),
    "Adadelta": ("Adadelta", optimizer("Adadelta", lr=1.0), 3e-6, 0.29, "none"),
    "Adafactor": ("Adafactor", optimizer("Adafactor", lr=3e-2, weight_decay=0.1), 3e-6, 0.29, "none"),
    "SGD": ("SGD", optimizer("SGD", lr=1e-2, weight_decay=0.1), 3.4e-5, None, "none"),
}


@functools.cache
def run(name, dtype):
    """Return the states of a run, its gradients, and what is recovered from its states."""
    rule, optimizer_of, *_ = CASES[name]
    trees, truth = train(optimizer_of, STEPS, dtype, bias=rule != "Muon")
    return trees, truth, recovered(MemoryLog(trees))


def figure(figures, name):
    """Return a quantity for all updates and tensors, shape (updates, tensors)."""
    return np.array([list(each[name].values()) for each in figures])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_training_loop(name, dtype):
    rule, _, *limits, strength = CASES[name]
    limit = dict(zip(("float32", "bfloat16"), limits, strict=True))[dtype]
    if limit is None:
        with pytest.raises(InputError, match=f"{rule} .*cannot be inverted.*bfloat16"):
            run(name, dtype)
        return
    _, truth, (gradients, figures) = run(name, dtype)
    error, bound = errors(gradients, truth), figure(figures, "gradient_error_bound")
    assert np.median(error) <= limit
    # The bound assumes the worst case of every operation. It is not vacuous: rounding reaches a few percent of it.
    assert (error <= bound).all()
    assert np.median(error / bound) > 0.01
    assert {RULE_NAMES[int(number)] for number in figure(figures, "gradient_rule").ravel()} == {rule}
    assert (figure(figures, "gradient_updates") == 1).all()
    grades = {GRADES[int(number)] for number in figure(figures, "gradient_check").ravel()}
    assert grades == {strength} if dtype == "float32" else "verified" not in grades
    residual, rounding = (figure(figures, f"gradient_check_{each}") for each in ("residual", "rounding"))
    assert (residual <= rounding).all()


ADAM = {"lr": 1.5, "betas/0": 0.9, "betas/1": 0.999, "eps": 1e6}
WRONG = {
    "AdamW": {**ADAM, "weight_decay": 2.0},
    "AMSGrad": {**ADAM, "weight_decay": 10.0},
    "fused": ADAM,
    "Adam": ADAM,
    "NAdam": {**ADAM, "momentum_decay": 2.0},
    "NAdam decoupled": {"weight_decay": 2.0},
    "RAdam": ADAM,
    "Adamax": ADAM,
    "Lion": {"lr": 1.5, "betas/0": 0.9, "betas/1": 0.99, "weight_decay": 2.0},
    "Muon": {"lr": 1.5, "momentum": 0.95, "weight_decay": 100.0},
}
"""Options of the cases that are verified, and the factors by which they are wrong."""


def changed(trees, edit):
    """Return copies of states whose parameter groups are edited."""
    copies = copy.deepcopy(trees)
    for tree in copies:
        for group in tree["optimizer"]["param_groups"]:
            edit(group)
    return copies


def test_all_verified_cases_have_wrong_options():
    assert WRONG.keys() == {name for name, case in CASES.items() if case[-1] == "verified"}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, factors in WRONG.items() for key in factors])
def test_a_wrong_assumption_is_visible_where_the_gradient_is_verified(name, key):
    option, _, index = key.partition("/")

    def edit(group):
        options, place = (group[option], int(index)) if index else (group, option)
        options[place] *= WRONG[name][key]

    trees, *_ = run(name, "float32")
    with pytest.raises(InputError, match=r"does not explain the update.*differ by"):
        recovered(MemoryLog(changed(trees[:12], edit)))


@pytest.mark.parametrize("name", ["momentum", "dampening", "coupled"])
def test_the_rate_alone_is_verified_where_decay_is_coupled_or_momentum_is_used(name):
    trees, truth, _ = run(name, "float32")
    with pytest.raises(InputError, match="does not explain the update"):
        recovered(MemoryLog(changed(trees[:6], lambda group: group.update(lr=1.01 * group["lr"]))))

    def decay(group):
        group["weight_decay"] += 5.0

    gradients, figures = recovered(MemoryLog(changed(trees[:6], decay)))
    assert np.median(errors(gradients, truth[:5])) > 1.0
    assert {GRADES[int(number)] for number in figure(figures, "gradient_check").ravel()} == {"rate only"}


def test_the_second_moment_shows_what_rounding_hides_in_the_displacement():
    trees, truth, _ = run("Adam", "float32")
    # Displacements of large parameters have few digits.
    far = copy.deepcopy(trees[:12])
    for tree in far:
        tree["model"] = {name: values + 64.0 for name, values in tree["model"].items()}
    gradients, _ = recovered(MemoryLog(far))
    assert np.median(errors(gradients, truth[:11])) <= CASES["Adam"][2]
    with pytest.raises(InputError, match=r"the second moments differ by .* of their change, and rounding explains"):
        recovered(MemoryLog(changed(far, lambda group: group.update(betas=[0.89, 0.999]))))


def test_a_rate_that_is_one_percent_off_is_visible():
    trees, *_ = run("AdamW", "float32")
    with pytest.raises(InputError, match="does not explain the update") as error:
        recovered(MemoryLog(changed(trees[:3], lambda group: group.update(lr=1.01 * group["lr"]))))
    assert "step 0, gradient of tensor '0.weight'" in error.value.where
    residual = float(error.value.what.partition("differ by ")[2].split()[0])
    assert residual == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "momentum", "RMSprop"])
@pytest.mark.parametrize("early", [False, True], ids=["saved after the scheduler", "saved before the scheduler"])
def test_the_rate_of_an_update_is_saved_with_either_state(name, early):
    rates = [1e-2 / (1 + step) for step in range(9)]

    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"] = rates[step + 1]

    trees, truth = train(CASES[name][1], 8, schedule=schedule)
    if early:
        for tree, rate in zip(trees[1:], rates, strict=False):
            tree["optimizer"]["param_groups"][0]["lr"] = rate
    gradients, figures = recovered(MemoryLog(trees))
    error = errors(gradients, truth)
    if name != "RMSprop":
        assert np.median(error) <= CASES[name][2]
    # Nothing shows the rate of a gradient that is recovered with it: the bound includes the difference.
    assert (error <= figure(figures, "gradient_error_bound")).all()


def test_a_schedule_of_the_momentum_is_followed():
    def schedule(optimizer, step):
        optimizer.param_groups[0]["betas"] = (0.9 - 0.02 * step, 0.999)

    trees, truth = train(CASES["AdamW"][1], 8, schedule=schedule)
    gradients, _ = recovered(MemoryLog(trees))
    assert np.median(errors(gradients, truth)) <= CASES["AdamW"][2]


@pytest.mark.parametrize(("name", "rule"), [("AdamW", "AdamW"), ("coupled", "Adam")])
def test_before_torch_2_7_the_check_shows_whether_decay_is_decoupled(name, rule):
    trees, truth, _ = run(name, "float32")
    old = changed(trees[:9], lambda group: group.pop("decoupled_weight_decay"))
    gradients, figures = recovered(MemoryLog(old))
    assert {RULE_NAMES[int(number)] for number in figure(figures, "gradient_rule").ravel()} == {rule}
    assert np.median(errors(gradients, truth[:8])) <= CASES[name][2]


def test_decay_that_the_check_cannot_decide_is_refused_until_the_user_declares_it():
    trees, truth, _ = run("AdamW", "bfloat16")
    old = changed(trees[:9], lambda group: group.pop("decoupled_weight_decay"))
    with pytest.raises(InputError, match=r"whether weight decay is decoupled.*decoupled_weight_decay = true"):
        recovered(MemoryLog(old))
    names = replace(CHECKPOINT, optimizer={"decoupled_weight_decay": True})
    gradients, _ = recovered(MemoryLog(old, names=names))
    assert np.median(errors(gradients, truth[:8])) <= CASES["AdamW"][3]


@pytest.mark.parametrize(
    ("name", "optimizer_of"),
    [
        ("Rprop", optimizer("Rprop", lr=1e-2)),
        ("ASGD", optimizer("ASGD", lr=1e-2)),
        ("AdaBelief", lambda model: pytorch_optimizer.AdaBelief(model.parameters())),
        ("Adan", lambda model: pytorch_optimizer.Adan(model.parameters())),
        ("Prodigy", lambda model: pytorch_optimizer.Prodigy(model.parameters())),
        ("SOAP", lambda model: pytorch_optimizer.SOAP(model.parameters())),
        ("PSGD", lambda model: pytorch_optimizer.Kron(model.parameters())),
        ("schedule-free", lambda model: pytorch_optimizer.ScheduleFreeAdamW(model.parameters())),
    ],
)
def test_rules_that_cannot_be_inverted_are_refused_by_name(name, optimizer_of):
    trees, _ = train(optimizer_of, 2)
    with pytest.raises(InputError, match=rf"{name} cannot be inverted"):
        recovered(MemoryLog(trees))


def sparse_adam():
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    for _ in range(2):
        yield model, optimizer
        optimizer.zero_grad()
        model(torch.tensor([1, 3])).square().sum().backward()
        optimizer.step()
    yield model, optimizer


def lbfgs():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        yield model, optimizer
        optimizer.step(closure)
    yield model, optimizer


@pytest.mark.parametrize(("name", "states"), [("SparseAdam", sparse_adam), ("LBFGS", lbfgs)])
def test_rules_of_another_loop_are_refused_by_name(name, states):
    trees = [copy.deepcopy({"model": m.state_dict(), "optimizer": o.state_dict()}) for m, o in states()]
    with pytest.raises(InputError, match=f"{name} cannot be inverted"):
        recovered(MemoryLog(trees))


def test_states_in_double_precision_give_gradients_in_double_precision():
    trees, truth = train(CASES["AdamW"][1], 8, "float64")
    gradients, figures = recovered(MemoryLog(trees))
    error = errors(gradients, truth)
    assert (error <= figure(figures, "gradient_error_bound")).all()
    # The ratio of the precisions of float32 and float64.
    assert np.median(error) <= CASES["AdamW"][2] * 2.0**-29


@pytest.mark.parametrize("name", CASES)
def test_a_diverged_run_has_a_gradient_of_nan(name):
    trees, *_ = run(name, "float32")
    diverged = copy.deepcopy(trees[:3])
    for values in diverged[2]["model"].values():
        values[:] = float("inf")
    for entry in diverged[2]["optimizer"]["state"].values():
        for key, values in entry.items():
            if key != "step" and isinstance(values, torch.Tensor):
                values[...] = float("inf")
    gradients, figures = recovered(MemoryLog(diverged))
    assert all(np.isfinite(values).all() for values in gradients[0].values())
    assert not any(np.isfinite(values).any() for values in gradients[1].values())
    assert (figure(figures[1:], "gradient_check") == GRADES.index("none")).all()


def test_a_rule_with_the_names_of_adam_is_refused_because_it_does_not_explain_the_update():
    trees, _ = train(lambda model: pytorch_optimizer.StableAdamW(model.parameters(), lr=1e-2), 3)
    with pytest.raises(InputError, match="does not explain the update"):
        recovered(MemoryLog(trees))


def test_parameters_that_something_else_changed_are_refused():
    def between(model, step):
        with torch.no_grad():
            model[0].weight.clamp_(-0.2, 0.2)

    trees, _ = train(CASES["AdamW"][1], 3, between=between)
    with pytest.raises(InputError, match="does not explain the update") as error:
        recovered(MemoryLog(trees))
    assert "clipping of weights" in error.value.why


@pytest.mark.parametrize("name", ["AdamW", "momentum", "dampening", "Lion", "Muon", "centered"])
@pytest.mark.parametrize("span", [3, 10])
def test_states_that_are_several_updates_apart_give_a_weighted_mean(name, span):
    trees, truth, _ = run(name, "float32")
    gradients, figures = recovered(MemoryLog(trees[::span], range(0, STEPS + 1, span)))
    (group,) = trees[0]["optimizer"]["param_groups"]
    keep = {"Lion": 0.99, "centered": 0.99}.get(name) or group.get("momentum") or group["betas"][0]
    for index, (found, numbers) in enumerate(zip(gradients, figures, strict=True)):
        weights = keep ** np.arange(span - 1.0, -1.0, -1.0)
        if index == 0 and name == "dampening":
            weights[1:] *= 0.5  # the first buffer is the gradient without dampening
        mean = {
            tensor: np.average([one[tensor] for one in truth[index * span :][:span]], axis=0, weights=weights)
            for tensor in found
        }
        decay = 0.1 if name == "momentum" else 0.0
        for tensor, values in found.items():
            error = np.linalg.norm(values - mean[tensor]) / np.linalg.norm(values)
            moved = trees[(index + 1) * span]["model"][tensor] - trees[index * span]["model"][tensor]
            # Coupled decay adds the parameters of all updates, and their first ones are subtracted.
            assert error <= numbers["gradient_error_bound"][tensor]
            assert decay == 0 or error <= 1e-4 + decay * np.linalg.norm(moved) / np.linalg.norm(values)
            assert numbers["gradient_updates"][tensor] == span
            assert GRADES[int(numbers["gradient_check"][tensor])] == "none"
            assert np.isnan(numbers["gradient_check_residual"][tensor])


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "RMSprop with momentum"])
def test_rules_that_need_every_state_are_refused_for_others(name):
    trees, *_ = run(name, "float32")
    with pytest.raises(InputError, match=r"only between consecutive states, and these are 2 updates apart"):
        recovered(MemoryLog(trees[::2], range(0, STEPS + 1, 2)))


def test_distant_states_are_refused_unless_they_are_requested():
    trees, *_ = run("AdamW", "float32")
    log = MemoryLog(trees[::30], range(0, STEPS + 1, 30))
    with pytest.raises(InputError, match="30 updates apart, and the largest distance is 20") as error:
        recovered(log)
    assert "--largest-span 30" in error.value.remedy
    gradients, _ = recovered(log, 30)
    assert len(gradients) == 2


@pytest.mark.parametrize("name", ["AdamW", "momentum", "SGD", "Lion"])
def test_a_skipped_update_has_no_gradient(name):
    trees, truth, _ = run(name, "float32")
    # GradScaler skips the step of the optimizer after an overflow: the state stays the same.
    gradients, figures = recovered(MemoryLog([*trees[:3], *trees[2:5]]))
    skipped = gradients.pop(2)
    assert all(np.isnan(values).all() for values in skipped.values())
    assert all(not values for values in figures[2].values())
    assert np.median(errors(gradients, truth[:4])) <= CASES[name][2]


def test_a_restarted_optimizer_is_refused():
    trees, *_ = run("AdamW", "float32")
    with pytest.raises(InputError, match="counts 4 fewer updates"):
        recovered(MemoryLog([trees[5], trees[1]]))


def test_a_state_without_the_optimizer_is_refused():
    trees, *_ = run("AdamW", "float32")
    with pytest.raises(InputError, match=r"step-1.pt, step 1") as error:
        recovered(MemoryLog([trees[0], {"model": trees[1]["model"]}, trees[2]]))
    assert "save the optimizer with every state" in error.value.remedy


def test_a_tensor_is_recovered_in_slices_of_any_position():
    trees, truth, _ = run("Adafactor", "float32")
    source = Recovered(MemoryLog(trees[:3]))
    first, *_ = source.steps()
    with source.open(first) as reader:
        out = np.empty(7, np.float32)
        reader.read("gradient", "0.weight", 11, out)
    whole = recovered(MemoryLog(trees[:3]))[0][0]["0.weight"]
    np.testing.assert_array_equal(out, whole[11:18].astype(np.float32))
    assert np.linalg.norm(whole - truth[0]["0.weight"]) <= 1e-4 * np.linalg.norm(whole)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Muon"])
def test_gradients_that_were_read_are_not_computed_again_for_the_check(name, monkeypatch):
    trees, *_ = run(name, "float32")
    read = []
    own = MemoryStep.read
    monkeypatch.setattr(MemoryStep, "read", lambda *arguments: (read.append(arguments[1]), own(*arguments)))

    def checked(stops):
        source = Recovered(MemoryLog(trees[:2]))
        with source.open(source.steps()[0]) as reader:
            for tensor, logged in reader.content().arrays["gradient"].items():
                out = np.empty(int(np.prod(logged.shape)), logged.dtype)
                for start, stop in itertools.pairwise([0, *stops, len(out)] if stops is not None else []):
                    reader.read("gradient", tensor, start, out[start:stop])
            read.clear()
            return reader.recovery()

    alone = checked(None)
    assert read
    assert checked([]) == alone
    assert not read
    for figures, others in zip(alone.values(), checked([1, 2]).values(), strict=True):
        assert others == pytest.approx(figures, rel=1e-12)  # sums of at most 96 terms, in another order
    assert not read
