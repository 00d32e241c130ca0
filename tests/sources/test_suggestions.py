"""Patterns and keys are suggested if names determine them, and not if they do not."""

import pytest

from natgrad.sources.steps import LoggedTensor
from natgrad.sources.suggestions import suggested_map, suggested_patterns

W, B = LoggedTensor((3, 2), "float32"), LoggedTensor((3,), "float32")
NEEDED = {"parameter", "gradient", "loss", "learning_rate", "step"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gpt2w0x.npz", "gpt2w10x.npz"], ["gpt2w{step}x.npz"]),
        (["a1b5.npz", "a2b6.npz"], ["a*b{step}.npz", "a{step}b*.npz"]),
        (["a1b5.npz", "a1b6.npz"], ["a1b{step}.npz"]),
        (["seed-1/m.npz", "seed-2/m.npz"], []),
        (["model_1.npz", "model_2.npz", "optim_1.npz", "optim_2.npz"], ["model_{step}.npz", "optim_{step}.npz"]),
        (["one.npz", "two.npz"], []),
        (["d1/sub/x.npz", "d2/sub/x.npz"], ["d{step}/sub/x.npz"]),
        (["a{1}.npz", "a{2}.npz"], []),
        (
            [f"{kind}/00{step}0/{layer}.w.npy" for kind in ("p", "g") for step in (1, 2, 3) for layer in (0, 2)],
            ["*/{step}/*.npy", "*/*/{step}*.npy"],
        ),
        (
            [f"{kind}_{layer}_{step}.npy" for kind in ("p", "g") for step in (1, 2) for layer in (0, 2)],
            ["*_{step}.npy"],
        ),
    ],
)
def test_patterns(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert suggested_patterns(tmp_path) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"net/w": W, "net/b": B, "dw/grad/w": W, "dw/grad/b": B}, {"parameter": "net", "gradient": "dw/grad"}),
        ({"theta": W, "g": W}, {"parameter": "theta", "gradient": "g"}),
        # The names do not show which of the two is the model.
        ({"x/w": W, "y/w": W, "grads/w": W}, {}),
        ({"weights/w": W, "y/w": W, "grads/w": W}, {"parameter": "weights", "gradient": "grads"}),
        ({"net/w": W, "net/b": B, "dLdw/0": W, "dLdw/1": B}, {"parameter": "net", "gradient": "dLdw"}),
        # G is a generator, not a gradient.
        ({"G/w": W, "D/w": W, "G_grads/w": W}, {"parameter": "G", "gradient": "G_grads"}),
        # Shapes differ, so these are not the gradients of these parameters.
        ({"net/w": W, "grads/w": B}, {}),
        ({"net/w": W, "optimizer/exp_avg/w": W, "grads/w": W}, {"parameter": "net", "gradient": "grads"}),
        ({"a.b.w": W, "grads.w": W}, {"parameter": "a.b", "gradient": "grads"}),
        (
            {"train/total_loss": 1.0, "val_loss": 2.0, "eta": 0.1},
            {"loss": "train/total_loss", "learning_rate": "eta"},
        ),
        ({"loss_a": 1.0, "loss_b": 2.0}, {}),
        ({"iteration": 1.0, "epoch": 1.0}, {"step": "iteration"}),
        ({"loss": LoggedTensor((5,), "float32")}, {}),
    ],
)
def test_keys(keys, expected):
    assert suggested_map(keys, NEEDED) == expected


def test_only_keys_of_missing_quantities_are_suggested():
    assert suggested_map({"net/w": W, "grads/w": W, "eta": 0.1}, {"loss"}) == {}
