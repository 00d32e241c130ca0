"""Feedback alignment on real MNIST digits (section 3.1): a linear network trained with fixed backward weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.experiments.digits import CLASSES, Digits, Training, cross_entropy, load_digits, split_digits
from natgrad.recording.recorder import Recorder

__all__ = ["HIDDEN", "IMAGES", "LEARNING_RATE", "STEPS", "log_feedback_alignment", "loss_and_descent"]

HIDDEN, IMAGES, LEARNING_RATE, STEPS = 32, 1000, 0.3, 200
"""Defaults: hidden units, images in the objective, learning rate and number of updates."""

Floats = NDArray[np.floating[Any]]


def loss_and_descent(
    weights: Mapping[str, Floats], backward: Floats, images: Floats, labels: NDArray[np.int64]
) -> tuple[float, dict[str, Floats]]:
    """Return the loss of the linear network, and the gradient if errors propagate back through ``backward``.

    The loss is the mean softmax cross-entropy: the network learns the digits several times faster than with squared
    errors. The result is the true gradient (backpropagation) if ``backward`` is the transpose of ``output.weight``,
    and the negative update direction of feedback alignment if ``backward`` is a fixed matrix.

    Parameters
    ----------
    weights : mapping
        ``hidden.weight`` (hidden, pixel) and ``output.weight`` (class, hidden).
    backward : (hidden, class) array
        Weights that propagate the output errors back to the hidden units.
    images : (image, pixel) array
        Inputs.
    labels : (image,) array of int
        Classes.

    Returns
    -------
    loss : float
        Mean over the images, in nats.
    gradient : dict
        Gradient of each tensor, by name, with the shapes and the dtype of the weights.
    """
    hidden = images @ weights["hidden.weight"].T
    loss, errors = cross_entropy(hidden @ weights["output.weight"].T, labels)
    gradient: dict[str, Floats] = {
        "hidden.weight": (errors @ backward.T).T @ images,
        "output.weight": errors.T @ hidden,
    }
    return loss, gradient


def log_feedback_alignment(
    folder: Path,
    *,
    steps: int = STEPS,
    hidden: int = HIDDEN,
    images: int = IMAGES,
    mini_batch: int | None = None,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    container: str = "safetensors",
    digits: Digits | None = None,
) -> Training:
    """Train a linear network with feedback alignment and log every state, in float32.

    The objective is the loss on a fixed batch of images, and the logged gradient is the gradient of this objective,
    computed by backpropagation. The update, in contrast, is that of feedback alignment, on the same batch or on a
    random mini-batch of it. Thus the gradients of all steps belong to one function, but an update may increase this
    function.

    Parameters
    ----------
    folder : Path
        Folder of the log.
    steps : int
        Number of updates. One more state is logged, because the last update needs the state after it.
    hidden : int
        Number of hidden units.
    images : int
        Number of images in the objective, drawn at random. The accuracy is measured on all other images.
    mini_batch : int, optional
        Number of images per update, drawn for each update. The default is all images in the objective.
    learning_rate : float
        Learning rate eta.
    seed : int
        Seed of the selected images, the weights and the mini-batches.
    container : {"safetensors", "npz"}
        Container of a step.
    digits : Digits, optional
        The default is the result of `load_digits`.

    Returns
    -------
    Training

    Raises
    ------
    InputError
        If an option is out of range, or the images cannot be loaded.
    """
    digits = digits or load_digits()
    random = np.random.default_rng(seed)
    options = (
        ("steps", steps, np.inf),
        ("hidden units", hidden, np.inf),
        ("images in a mini-batch", images if mini_batch is None else mini_batch, images),
        ("learning rate", learning_rate, float(np.finfo(np.float32).max)),
    )
    split = split_digits(digits, images, random, options)
    inputs, labels = split.inputs, split.labels

    def draw(outputs: int, sources: int) -> NDArray[np.float32]:
        drawn: Floats = random.standard_normal((outputs, sources)) / np.sqrt(sources)
        return drawn.astype(np.float32)

    def accuracy() -> float:
        answers = (split.held_out_inputs @ weights["hidden.weight"].T @ weights["output.weight"].T).argmax(axis=1)
        return float(np.mean(answers == split.held_out_labels))

    weights: dict[str, Floats] = {
        "hidden.weight": draw(hidden, inputs.shape[1]),
        "output.weight": draw(CLASSES, hidden),
    }
    # The backward weights have the same distribution as the output weights, but are independent of them. They align
    # only through learning.
    backward = draw(CLASSES, hidden).T
    recorder = Recorder(folder, container)
    accuracy_before, losses = accuracy(), []
    for step in range(steps + 1):
        loss, gradient = loss_and_descent(weights, weights["output.weight"].T, inputs, labels)
        losses.append(loss)
        recorder.record(step, parameter=weights, gradient=gradient, loss=loss, learning_rate=learning_rate)
        if step == steps:
            break
        drawn = slice(None) if mini_batch is None else random.choice(images, mini_batch, replace=False)
        _, descent = loss_and_descent(weights, backward, inputs[drawn], labels[drawn])
        weights = {name: weight - learning_rate * descent[name] for name, weight in weights.items()}
    return Training(tuple(losses), (accuracy_before, accuracy()))
