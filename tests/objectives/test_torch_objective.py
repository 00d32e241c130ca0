"""Test the objective of PyTorch modules against gradients by hand, for everything that a checkpoint may contain."""

import copy

import ml_dtypes
import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.schema.errors import InputError

torch = Lazy("torch")
transformers = Lazy("transformers")


def tensors_of(module):
    return {name: one.detach().clone().numpy() for name, one in module.state_dict().items()}


def by_hand(module, loss):
    """Return the gradients of a loss, by the names of parameters."""
    module.zero_grad()
    loss.backward()
    return {name: one.grad.numpy() for name, one in module.named_parameters() if one.grad is not None}


def regression(module=None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2) if module is None else module
    return module, torch.randn(20, 3), torch.randn(20, 2)


def error_bound(gradients, elements):
    """Return a bound of the error of sums of products in single precision, relative to the largest gradient."""
    return elements * 2.0**-24 * max(abs(one).max() for one in gradients.values())


@pytest.mark.parametrize("sizes", [(20,), (12, 8), (1, 19)])
@pytest.mark.parametrize("form", ["elements", "mean and count"])
def test_batches_weigh_as_many_elements_as_they_have(sizes, form):
    module, x, y = regression()

    def loss(module, batch):
        found = (module(batch["x"]) - batch["y"]).square()
        return found if form == "elements" else (found.mean(), found.numel())

    batches = [{"x": one, "y": other} for one, other in zip(x.split(sizes), y.split(sizes), strict=True)]
    value, gradients = natgrad.TorchObjective(copy.deepcopy(module), loss, batches)(tensors_of(module))
    expected = torch.nn.functional.mse_loss(module(x), y)
    slopes = by_hand(module, expected)
    assert value == pytest.approx(expected.item(), rel=40 * 2.0**-24)
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=0, atol=error_bound(slopes, 40))


def test_a_batch_without_a_counted_element_has_no_weight():
    module, x, y = regression()

    def loss(module, batch):
        return (module(batch[0]) - batch[1]).square()

    values = [
        natgrad.TorchObjective(module, loss, batches)(tensors_of(module))[0]
        for batches in ([(x[:0], y[:0]), (x, y)], [(x, y)])
    ]
    assert values[0] == values[1]


def test_several_means_without_counts_are_refused():
    module, x, y = regression()
    with pytest.raises(InputError, match="the loss of a batch is"):
        natgrad.TorchObjective(
            module, lambda module, batch: (module(batch[0]) - batch[1]).square().mean(), [(x, y), (x, y)]
        )(tensors_of(module))


def test_dropout_is_off_and_running_statistics_are_those_of_the_checkpoint():
    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)]
    module, x, y = regression(torch.nn.Sequential(*layers))
    checkpoint = tensors_of(module) | {"1.running_mean": np.full(4, 0.5, np.float32)}
    del checkpoint["1.num_batches_tracked"]  # an integer, which formats omit
    objective = natgrad.TorchObjective(module, lambda module, batch: (module(batch) - y).square().mean(), [x])
    value, gradients = objective(checkpoint)
    other = copy.deepcopy(module).eval()
    other[1].running_mean.fill_(0.5)
    loss = (other(x) - y).square().mean()
    assert value == loss.item()
    slopes = by_hand(other, loss)
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        np.testing.assert_array_equal(gradients[name], slope)


def tied():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.unused = torch.nn.Parameter(torch.ones(2))
            self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    return Module()


@pytest.mark.parametrize("kept", [("embed.weight", "head.weight"), ("embed.weight",), ("head.weight",)])
def test_tied_parameters_have_one_gradient_under_the_name_of_the_checkpoint(kept):
    module, tokens = tied(), torch.arange(12).reshape(2, 6) % 7
    checkpoint = {name: array for name, array in tensors_of(module).items() if name in (*kept, "unused", "frozen")}
    value, gradients = natgrad.TorchObjective(copy.deepcopy(module), natgrad.causal_lm_loss, [tokens])(checkpoint)
    loss = torch.nn.functional.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    slopes = by_hand(module, loss)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert gradients.keys() == {kept[0], "unused"}
    expected = slopes["embed.weight"]
    np.testing.assert_allclose(gradients[kept[0]], expected, rtol=0, atol=error_bound(slopes, 10))
    assert not gradients["unused"].any()


def test_tied_parameters_that_differ_are_refused():
    module = tied()
    checkpoint = tensors_of(module)
    checkpoint["head.weight"] = checkpoint["head.weight"] + 1
    objective = natgrad.TorchObjective(module, natgrad.causal_lm_loss, [torch.zeros(1, 3, dtype=torch.long)])
    with pytest.raises(InputError, match="share memory in the module, but differ"):
        objective(checkpoint)


def test_masked_tokens_are_not_counted():
    module = tied()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    batches = [
        {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])},
        {"input_ids": tokens, "labels": torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])},
    ]
    embedded = module.forward
    module.forward = lambda input_ids, attention_mask=None: embedded(input_ids)
    found = [natgrad.causal_lm_loss(module, batch) for batch in batches]
    logits = embedded(tokens)
    counted = ((0, 0), (0, 1), (0, 2), (1, 0))
    expected = [-logits[row, place].log_softmax(-1)[tokens[row, place + 1]] for row, place in counted]
    for losses in found:
        torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_causal_language_model_of_transformers(attention):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_implementation=attention
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(0, 16, (4, 8))}
    objective = natgrad.TorchObjective(model, natgrad.causal_lm_loss, [batch])
    # Safetensors stores tied tensors once.
    tensors = {name: array for name, array in tensors_of(model).items() if name != "lm_head.weight"}
    value, gradients = objective(tensors)
    assert value == pytest.approx(model(**batch, labels=batch["input_ids"]).loss.item(), rel=1e-6)
    direction = {name: np.sign(array) for name, array in gradients.items()}
    products = objective.hvp(tensors, direction)
    assert products.keys() == gradients.keys()
    # Differences of gradients in double precision.
    model.double()
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    step = 1e-5
    ends = [
        objective({name: array + sign * step * direction.get(name, 0) for name, array in wide.items()})[1]
        for sign in (1, -1)
    ]
    largest = max(abs(one).max() for one in products.values())
    for name, found in products.items():
        np.testing.assert_allclose(found, (ends[0][name] - ends[1][name]) / (2 * step), rtol=0, atol=1e-4 * largest)


def test_a_loss_that_is_linear_has_products_of_zero():
    module, x, _ = regression()
    objective = natgrad.TorchObjective(module, lambda module, batch: module(batch), [x])
    tensors = tensors_of(module)
    assert not any(product.any() for product in objective.hvp(tensors, tensors).values())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_that_wrappers_add_are_matched(prefix):
    module, x, y = regression()
    objective = natgrad.TorchObjective(module, lambda module, batch: (module(batch) - y).square().mean(), [x])
    found = objective({prefix + name: array for name, array in tensors_of(module).items()})[1]
    assert list(found) == [f"{prefix}weight", f"{prefix}bias"]


def test_checkpoints_of_less_precision_are_exact_in_the_module():
    module, x, y = regression()
    objective = natgrad.TorchObjective(module, lambda module, batch: (module(batch) - y).square().mean(), [x])
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors_of(module).items()}
    wide = {name: array.astype(np.float32) for name, array in half.items()}
    for name, gradient in objective(half)[1].items():
        np.testing.assert_array_equal(gradient, objective(wide)[1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bias"), "the checkpoint has no tensor 'bias'"),
        (lambda tensors: tensors.update(other=np.ones(1)), "the module has no tensor 'other'"),
        (lambda tensors: tensors.update(bias=np.ones(3, np.float32)), "in the module"),
        (lambda tensors: tensors.update(bias=np.ones(2)), "float64 of shape"),
    ],
)
def test_checkpoints_of_other_models_are_refused(change, message):
    module, x, y = regression()
    objective = natgrad.TorchObjective(module, lambda module, batch: (module(batch) - y).square().mean(), [x])
    tensors = tensors_of(module)
    change(tensors)
    with pytest.raises(InputError, match=message):
        objective(tensors)


def test_tensors_that_the_module_does_not_need_can_be_ignored():
    module, x, y = regression()
    objective = natgrad.TorchObjective(
        module, lambda module, batch: (module(batch) - y).square().mean(), [x], ignore=["head.*"]
    )
    assert len(objective(tensors_of(module) | {"head.weight": np.ones(3)})[1]) == 2


def test_the_fingerprint_depends_on_data_and_micro_batches():
    module, x, y = regression()

    def fingerprint(*batches):
        return natgrad.TorchObjective(module, natgrad.causal_lm_loss, batches).fingerprint

    first = fingerprint({"x": x, "y": y})
    assert first == fingerprint({"x": x.clone(), "y": y})
    assert first["data"] != fingerprint({"x": x + 1e-6, "y": y})["data"]
    assert fingerprint(x)["micro_batches"] != fingerprint(x[:10], x[10:])["micro_batches"]
    module.double()
    assert first["dtype"] != fingerprint({"x": x, "y": y})["dtype"]


def test_objectives_need_batches_and_trained_parameters():
    module, x, _ = regression()
    with pytest.raises(InputError, match="there are no batches"):
        natgrad.TorchObjective(module, natgrad.causal_lm_loss, [])
    module.requires_grad_(False)
    with pytest.raises(InputError, match="requires a gradient"):
        natgrad.TorchObjective(module, lambda module, batch: module(batch), [x])(tensors_of(module))
