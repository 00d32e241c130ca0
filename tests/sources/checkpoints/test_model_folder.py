"""Folders with the model of one step, and the gradients next to it."""

import numpy as np
import pytest

from lazy import Lazy
from opened import open_source

safetensors_torch = Lazy("safetensors.torch")
torch = Lazy("torch")


@pytest.mark.parametrize("name", ["gradients.bin", "grads.pt", "my_grad.pth"])
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_in_a_file_of_torch_next_to_the_model_are_read(tmp_path, name, nested):
    for step in range(3):
        (tmp_path / f"step_{step}").mkdir()
        model, gradient = (
            {"fc.weight": torch.full((2, 3), float(step))},
            {"fc.weight": torch.full((2, 3), step + 0.5)},
        )
        safetensors_torch.save_file(model, tmp_path / f"step_{step}" / "model.safetensors")
        content = {"grads": gradient, "loss": 0.25} if nested else gradient
        torch.save(content, tmp_path / f"step_{step}" / name)
        torch.save(torch.get_rng_state(), tmp_path / f"step_{step}" / "rng_state.pth")
    log = open_source(tmp_path)
    with log.open(log.steps()[2]) as reader:
        content = reader.content()
        assert content.arrays["parameter"].keys() == content.arrays["gradient"].keys() == {"fc.weight"}
        assert content.scalars == ({"loss": 0.25} if nested else {})
        found = np.zeros(6, np.float32)
        reader.read("gradient", "fc.weight", 0, found)
        assert (found == 2.5).all()
