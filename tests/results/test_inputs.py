"""Test which updates and learning rates a table has, with the arrays of a store."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dataset import table_of, walk

from natgrad.results.inputs import replicate_products, update_table
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.names import METRIC_EIGENVALUES, OPTIMIZER_NUMBERS

SHAPES = {"a": ((3,), "float64"), "b": ((2,), "float64")}


@dataclass
class States:
    """The scalars of five states, as a trajectory returns them."""

    scalars: dict = field(default_factory=dict)
    attempts: tuple = (0, 0, 0, 0, 0)
    run: tuple = (0, 0, 0, 0, 0)
    tables: tuple = ()
    sweep: bool = False
    runs: tuple = ("first", "second")
    dtypes: dict = field(default_factory=lambda: {"parameter": "float32", "gradient": "float32"})
    has_gradient: bool = True
    gradient_source: str = "logged"
    evaluation: str = "unknown"
    storage: str = "a store"
    recorded: tuple = ()

    @property
    def array_dtypes(self):
        return self.dtypes

    @property
    def numbers(self):
        return (*self.scalars, "attempt", "run", "loss")

    def scalar(self, name):
        if name in ("attempt", "run"):
            return np.array(self.attempts if name == "attempt" else self.run)
        if name in self.scalars:
            return np.array(self.scalars[name], float)
        if name in OPTIMIZER_NUMBERS or name in METRIC_EIGENVALUES:
            return np.full((5, 2), np.nan)
        return 10.0 * np.arange(5) if name == "loss" else np.full(5, np.nan)

    def lacking(self):
        return {4: ("gradient",)}

    def current(self, attempt=None):
        newest = max(self.attempts) if attempt is None else attempt
        return np.array([number <= newest for number in self.attempts])


class Sums:
    """The ledger of the four updates between them, in which each product is the index of its update."""

    vectors = ("parameter", "displacement")
    layout = Layout.from_shapes(SHAPES)
    n_updates, updates_per_chunk = 4, 3

    def __init__(self, steps=(0, 1, 2, 3), spans=(1, 1, 1, 1)):
        self._steps = np.array(steps), np.array(spans)
        self.chunks = []

    def read_updates(self, updates):
        return updates[:, None, None, None] * np.ones((2, 2, 2))

    def steps(self):
        return self._steps

    def read_chunk(self, name, start, stop):
        self.chunks.append((name, start, stop))
        if name == "gram":
            return np.square(self.read_updates(np.arange(start, stop)))
        return np.arange(start, stop)


def test_updates_are_in_the_order_of_runs_and_steps():
    states = States(run=(1, 1, 0, 0, 0), sweep=True)
    updates, table = update_table(states, Sums(steps=(5, 6, 1, 0), spans=(1, 0, 2, 1)))
    assert updates.tolist() == [3, 2, 0]
    assert table.steps.tolist() == [0, 1, 5]
    assert table.spans.tolist() == [1, 2, 1]
    assert table.run.tolist() == [0, 0, 1]
    assert table.runs == ("first", "second")
    assert table.loss.tolist() == [30.0, 20.0, 0.0]
    assert table.next_loss.tolist() == [40.0, 30.0, 10.0]
    assert table.gram[:, 0, 0, 0].tolist() == [3.0, 2.0, 0.0]
    assert table.gradient_logged.tolist() == [[True, False], [True, True], [True, True]]
    assert table.dtypes == {"parameter": "float32", "gradient": "float32"}
    assert [(part.start, part.stop) for part in table.run_slices()] == [(0, 2), (2, 3)]
    assert table.follows().tolist() == [True, False]


def test_a_single_run_has_all_updates_and_no_names():
    updates, table = update_table(States(), Sums())
    assert updates.tolist() == [0, 1, 2, 3]
    assert (table.runs, table.run, table.optimizer, table.tensor_learning_rate) == ((), None, None, None)
    assert table.gram[:, 1, 1, 1].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert [(part.start, part.stop) for part in table.run_slices()] == [(0, 4)]
    assert table.complete(1).all()
    assert table.complete(3).tolist() == [True, True, False, False]
    assert np.isnan(table.hessian_min_eigenvalue).all()


@pytest.mark.parametrize(("attempt", "expected"), [(None, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (0, [0, 1])])
def test_an_attempt_has_the_states_that_were_current_in_it(attempt, expected):
    updates, table = update_table(States(attempts=(0, 0, 0, 1, 1)), Sums(), attempt=attempt)
    assert updates.tolist() == expected
    assert table.attempts.tolist() == [(0, 0, 0, 1)[update] for update in expected]


def test_an_attempt_that_does_not_exist_is_an_error():
    for attempt in (-1, 2):
        with pytest.raises(InputError, match="the last attempt is 1"):
            update_table(States(attempts=(0, 0, 0, 0, 1)), Sums(), attempt=attempt)
    with pytest.raises(InputError, match="no two logged states follow each other"):
        update_table(States(), Sums(spans=(0, 0, 0, 0)))


NAN = np.nan


@pytest.mark.parametrize(
    ("logged", "groups", "option", "model", "tensors"),
    [
        # Rates of the model only.
        ([1.0, NAN], [[NAN, NAN], [NAN, NAN]], 0.5, [1.0, 0.5], None),
        ([1.0, NAN], [[NAN, NAN], [NAN, NAN]], None, [1.0, NAN], None),
        # All groups have the same rate, which is that of the model if none was logged.
        ([NAN, 1.0], [[2.0, 2.0], [2.0, 2.0]], 0.5, [2.0, 1.0], None),
        # Groups have different rates in one update: the largest is that of the model.
        ([NAN, NAN], [[2.0, 4.0], [3.0, 3.0]], None, [4.0, 3.0], [[2.0, 4.0], [3.0, 3.0]]),
        ([8.0, 8.0], [[2.0, 4.0], [3.0, 3.0]], None, [8.0, 8.0], [[2.0, 4.0], [8.0, 8.0]]),
        # A group without a rate has that of the model, which is known only if all groups have one.
        ([NAN, 8.0], [[2.0, 4.0], [3.0, NAN]], 0.5, [4.0, 8.0], [[2.0, 4.0], [8.0, 8.0]]),
        ([NAN, NAN], [[2.0, NAN], [2.0, 4.0]], 0.5, [0.5, 4.0], [[0.5, 0.5], [2.0, 4.0]]),
    ],
)
def test_the_learning_rates_of_the_model_and_of_groups(logged, groups, option, model, tensors):
    scalars = {
        "learning_rate": [*logged, 1.0, 1.0, 1.0],
        "tensor_learning_rate": [*groups, *[[1.0, 1.0]] * 3],
    }
    _, table = update_table(States(scalars), Sums(), learning_rate=option)
    np.testing.assert_equal(table.learning_rate[:2], model)
    if tensors is None:
        assert table.tensor_learning_rate is None
    else:
        np.testing.assert_equal(table.tensor_learning_rate[:2], tensors)


@pytest.mark.parametrize(
    ("logged", "groups", "option", "expected"),
    [
        # Nothing is known.
        ([NAN, NAN], [[NAN, NAN], [NAN, NAN]], None, None),
        # The optimizer, then the log, then the option.
        ([0.5, NAN], [[0.25, 0.0], [NAN, 0.0]], None, [[0.25, 0.0], [NAN, 0.0]]),
        ([0.5, 0.5], [[NAN, 0.0], [NAN, NAN]], {"*": 2.0}, [[0.5, 0.0], [0.5, 0.5]]),
        ([NAN, NAN], [[0.25, NAN], [NAN, 0.0]], {"*": 2.0}, [[0.25, 2.0], [2.0, 0.0]]),
        # The last pattern that matches.
        ([NAN, NAN], [[NAN, NAN], [NAN, NAN]], {"*": 2.0, "b": 0.0}, [[2.0, 0.0], [2.0, 0.0]]),
        ([NAN, NAN], [[NAN, NAN], [NAN, NAN]], {"b": 0.0, "[ab]": 2.0}, [[2.0, 2.0], [2.0, 2.0]]),
        ([NAN, NAN], [[NAN, NAN], [NAN, NAN]], {"a": 2.0}, [[2.0, NAN], [2.0, NAN]]),
        # A decay that is 0 everywhere does not count, unless it is requested.
        ([0.0, 0.0], [[NAN, NAN], [NAN, NAN]], None, None),
        ([NAN, NAN], [[NAN, NAN], [NAN, NAN]], {"*": 0.0}, [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_weight_decay_is_that_of_the_optimizer_then_of_the_log_then_of_the_option(logged, groups, option, expected):
    scalars = {
        "decoupled_weight_decay": [*logged, 0.0, 0.0, 0.0],
        "tensor_decoupled_weight_decay": [*groups, *[[NAN, NAN]] * 3],
    }
    _, table = update_table(States(scalars), Sums(), weight_decay=option)
    if expected is None:
        assert table.weight_decay is None
    else:
        np.testing.assert_equal(table.weight_decay[:2], expected)


def test_an_option_that_differs_from_the_log_is_reported_with_both_values(caplog):
    scalars = {"decoupled_weight_decay": [0.5] * 5}
    _, table = update_table(States(scalars), Sums(), weight_decay={"b": 0.5, "a": 0.125})
    assert (table.weight_decay == 0.5).all()
    (message,) = caplog.messages
    assert message == (
        "--weight-decay sets 0.125 for tensor 'a', but the log has 0.5 at step 0: the logged value is used"
    )


def test_a_pattern_that_matches_no_tensor_is_an_error():
    with pytest.raises(InputError, match="no tensor has a name that matches 'c'") as error:
        update_table(States(), Sums(), weight_decay={"*": 0.5, "c": 0.0})
    assert "'a', 'b'" in str(error.value)


def test_the_unit_of_time_is_not_guessed_from_groups():
    scalars = {"tensor_learning_rate": np.full((5, 2), 2.0), "loss_time_derivative": [1.0, *[NAN] * 4]}
    _, table = update_table(States(scalars), Sums(), learning_rate=0.5)
    assert table.learning_rate.tolist() == [0.5] * 4


def test_the_metric_of_the_optimizer_is_that_of_its_factors_or_of_adam():
    five = np.ones((5, 2))
    adam = {
        "exp_avg_sq_min": 3.0 * five,
        "exp_avg_sq_max": 12.0 * five,
        "beta2": 0.25 * five,
        "epsilon": 1.0 * five,
        "updates": five,
        "tensor_learning_rate": np.arange(5.0)[:, None] * five,
    }
    states = States(adam, tables=("beta2", "tensor_learning_rate"))
    _, table = update_table(states, Sums(), learning_rate=0.5)
    # 1 - beta2 is 3/4.
    assert table.optimizer.smallest.tolist() == [[3.0, 3.0]] * 4
    assert table.optimizer.largest.tolist() == [[5.0, 5.0]] * 4
    # The rate is saved before the update, and the second moment after it.
    assert table.optimizer.learning_rate[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    used_low, used_high, next_low, next_high = METRIC_EIGENVALUES
    factored, rescaled = np.zeros((5, 2)), np.zeros((5, 2))
    factored[2], rescaled[4, 1] = 1.0, 1.0
    number = np.arange(5.0)[:, None]
    changed = adam | {
        "metric_factored": factored,
        "metric_rescaled": rescaled,
        used_low: np.where(number == 2, 20.0 * five, NAN),
        used_high: np.where(number == 2, 30.0 * five, NAN),
        next_low: 200.0 + number * five,
        next_high: 300.0 + number * five,
    }
    _, table = update_table(States(changed, tables=("beta2", "tensor_learning_rate")), Sums(), learning_rate=0.5)
    # Update 1 leads to the factored state 2, which has the metric that was used; update 2 starts from it.
    assert table.optimizer.smallest[:, 0].tolist() == [3.0, 20.0, 202.0, 3.0]
    assert table.optimizer.largest[:, 0].tolist() == [5.0, 30.0, 302.0, 5.0]
    assert np.isnan(table.optimizer.learning_rate).tolist() == [[False, False]] * 3 + [[False, True]]
    tables = ("beta2", "tensor_learning_rate")
    unknown = adam | {"tensor_learning_rate": np.full((5, 2), NAN), "learning_rate": 7.0 * np.ones(5)}
    assert (
        update_table(States(unknown, tables=tables), Sums())[1].optimizer.learning_rate.tolist() == [[7.0, 7.0]] * 4
    )


@given(updates=st.lists(st.integers(0, 3), unique=True, min_size=1))
def test_the_products_of_replicates_are_read_one_chunk_at_a_time(updates):
    sums = Sums()
    found = dict.fromkeys(range(len(updates)))
    for positions, products, norms in replicate_products(sums, np.array(updates)):
        found |= zip(positions.tolist(), products.tolist(), strict=True)
        # Here the norm of the parameters of each tensor is also the index of the update.
        assert norms.tolist() == [[product, product] for product in products.tolist()]
    assert list(found.values()) == updates
    expected = [(0, 3)] * (min(updates) < 3) + [(3, 4)] * (max(updates) == 3)
    assert [(start, stop) for name, start, stop in sums.chunks if name == "replicate_gram"] == expected


def test_a_table_has_its_vectors_and_the_columns_that_were_logged():
    table = table_of(walk())
    assert table.has(["gradient", "loss"])
    assert not table.has(["loss", "hvp"])
    assert not table.has(["hessian_min_eigenvalue"])
    assert not table.extended().any()
