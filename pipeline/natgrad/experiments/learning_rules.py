"""Compare learning rules: nine rules train one network on real MNIST digits, with the same objective.

Some rules descend by construction, some only in practice, and one does not descend. All rules start from the same
weights and use the same images at every step. The logged gradient is always the gradient of the objective,
computed by backpropagation, even if the rule does not use it.

References
----------
Oja, "Neural networks, principal components, and subspaces", International Journal of Neural Systems 1, 1989.
Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE
Transactions on Automatic Control 37, 1992.
Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015.
Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for deep
learning", Nature Communications 7, 13276, 2016.
Nøkland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad.experiments.digits import CLASSES, Digits, Split, Training, cross_entropy, load_digits, split_digits
from natgrad.recording.recorder import Recorder
from natgrad.schema.errors import InputError

__all__ = [
    "DRAWS",
    "HIDDEN",
    "IMAGES",
    "LAYERS",
    "RULES",
    "STEPS",
    "ForwardPass",
    "Rule",
    "RuleContext",
    "forward_pass",
    "log_learning_rules",
    "oja",
    "propagate_back",
]

HIDDEN, IMAGES, STEPS = 16, 1000, 100
"""Defaults: units in each hidden layer, images in the objective and number of updates."""

LAYERS = ("layer_1.weight", "layer_2.weight", "layer_3.weight")
"""Tensors of the network, shape (target, source) each: two layers of tanh units, and the scores of the classes."""

DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Decay of past gradients in momentum and Adam, decay of their squares in Adam, and epsilon of Adam."""

PERTURBATIONS, AMPLITUDE = 32, 1e-2
"""Number of perturbations for one update, and the standard deviation of their elements."""

DRAWS = 8
"""Number of draws whose mean is an update of weight perturbation. The perturbations are divided equally among the
draws, and all draws are logged."""

Floats = NDArray[np.floating[Any]]
Weights = Mapping[str, Floats]


# Network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardPass:
    """Activations, scores and loss of the network for a batch of images.

    Attributes
    ----------
    loss : float
        Mean softmax cross-entropy, in nats.
    activities : sequence of (image, source) arrays
        Inputs of each layer: the images, then the units of each hidden layer.
    scores : (image, class) array
        Outputs of the last layer.
    errors : (image, class) array
        Derivative of the loss with respect to the scores.
    """

    loss: float
    activities: Sequence[Floats]
    scores: Floats
    errors: Floats


def forward_pass(weights: Weights, inputs: Floats, labels: NDArray[np.int64]) -> ForwardPass:
    """Evaluate the network for images, shape (image, pixel), with class labels, shape (image,)."""
    *hidden, last = weights.values()
    activities = [inputs]
    for weight in hidden:
        activities.append(np.tanh(activities[-1] @ weight.T))
    scores = activities[-1] @ last.T
    loss, errors = cross_entropy(scores, labels)
    return ForwardPass(loss, activities, scores, errors)


def propagate_back(forward: ForwardPass, backward: Sequence[Floats], *, direct: bool = False) -> dict[str, Floats]:
    """Return the gradient of each layer if errors propagate back through the weights in ``backward``.

    This is the true gradient (backpropagation) if they are the weights of the layers above.

    Parameters
    ----------
    forward : ForwardPass
    backward : sequence of arrays
        For each hidden layer, the weights that propagate the errors of the layer above, shape (unit above, unit).
    direct : bool
        Propagate the output errors directly to each hidden layer; the weights then have shape (class, unit).
    """
    errors = [forward.errors]
    for units, weight in zip(reversed(forward.activities[1:]), reversed(backward), strict=True):
        above = forward.errors if direct else errors[0]
        errors.insert(0, (above @ weight) * (1.0 - units**2))
    return {
        name: error.T @ sources for name, error, sources in zip(LAYERS, errors, forward.activities, strict=True)
    }


# Rules -------------------------------------------------------------------------------------------------------


@dataclass
class RuleContext:
    """Inputs of a rule for one update, and the state that the rule keeps between updates.

    Attributes
    ----------
    updates : int
        Number of previous updates.
    weights, gradient : mapping
        Tensors by name: theta_t and the gradient of the objective at theta_t.
    forward : ForwardPass
        Forward pass for the images of the objective.
    labels : (image,) array of int
        Classes of these images.
    loss : callable
        Objective as a function of weights.
    feedback, direct_feedback : sequence of arrays
        Fixed weights for `propagate_back`, with the same distribution as the layers' weights, but independent.
    random : numpy.random.Generator
        Random number generator.
    memory : dict
        Memory of the rule, initially empty.
    draws : list of mapping
        Updates drawn by a stochastic rule, which fills this list and returns their mean.
    """

    updates: int
    weights: Weights
    gradient: Weights
    forward: ForwardPass
    labels: NDArray[np.int64]
    loss: Callable[[Weights], float]
    feedback: Sequence[Floats]
    direct_feedback: Sequence[Floats]
    random: np.random.Generator
    memory: dict[str, Weights] = field(default_factory=dict)
    draws: list[Weights] = field(default_factory=list)

    def accumulate(self, name: str, share: float, new: Weights) -> Weights:
        """Multiply a memory by ``share``, add ``new``, and return the result."""
        past = self.memory.get(name) or {layer: np.zeros_like(value) for layer, value in new.items()}
        self.memory[name] = {layer: share * past[layer] + value for layer, value in new.items()}
        return self.memory[name]


def backpropagation(context: RuleContext) -> Weights:
    """Return the steepest descent update: g = y, so psi = 0 and kappa = 1."""
    return {layer: -slope for layer, slope in context.gradient.items()}


def momentum(context: RuleContext) -> Weights:
    """Return the momentum update: a decaying sum of all previous y, so g = y only at the first update."""
    return context.accumulate("velocity", DECAY, backpropagation(context))


def adam(context: RuleContext) -> Weights:
    """Return the update of Adam: a running mean of y divided by the root of a running mean of its square."""
    mean = context.accumulate("mean", DECAY, {k: -(1.0 - DECAY) * slope for k, slope in context.gradient.items()})
    square = context.accumulate(
        "square", SQUARE_DECAY, {k: (1.0 - SQUARE_DECAY) * slope**2 for k, slope in context.gradient.items()}
    )
    # Both means are corrected for the bias of their initial value 0.
    mean_bias, square_bias = (1.0 - decay ** (context.updates + 1) for decay in (DECAY, SQUARE_DECAY))
    return {k: mean[k] / mean_bias / (np.sqrt(square[k] / square_bias) + EPSILON) for k in mean}


def sign_descent(context: RuleContext) -> Weights:
    """Return the signs of y: y.g = |y|_1 > 0, so cos psi = |y|_1 / (sqrt(n) |y|) if n elements of y are not 0."""
    return {layer: -np.sign(slope) for layer, slope in context.gradient.items()}


def feedback_alignment(context: RuleContext) -> Weights:
    """Return the update if errors propagate back through fixed weights; the last layer needs none and descends."""
    return {layer: -slope for layer, slope in propagate_back(context.forward, context.feedback).items()}


def direct_feedback_alignment(context: RuleContext) -> Weights:
    """Return the update if output errors reach each hidden layer through its own fixed weights."""
    return {
        layer: -slope
        for layer, slope in propagate_back(context.forward, context.direct_feedback, direct=True).items()
    }


def weight_perturbation(context: RuleContext) -> Weights:
    """Return the mean of random perturbations, each weighted by how much it lowers the loss (section 2.2).

    The slope s = y.v along a perturbation v is measured by a central difference. The expected value of s v is y.
    The mean over n perturbations has y.g = (s_1^2 + .. + s_n^2) / n, so it descends, with cos^2 psi of about n /
    (n + D).
    """
    each = PERTURBATIONS // DRAWS
    context.draws = [
        {layer: np.zeros_like(weight) for layer, weight in context.weights.items()} for _ in range(DRAWS)
    ]
    for index in range(PERTURBATIONS):
        trial = {k: context.random.standard_normal(w.shape, w.dtype.type) for k, w in context.weights.items()}
        ahead, behind = (
            context.loss({k: w + sign * AMPLITUDE * trial[k] for k, w in context.weights.items()})
            for sign in (1, -1)
        )
        slope = (behind - ahead) / (2.0 * AMPLITUDE)
        for layer, total in context.draws[index // each].items():
            total += slope / each * trial[layer]
    return {layer: np.mean([draw[layer] for draw in context.draws], axis=0) for layer in context.weights}


def oja(weight: Floats, sources: Floats, targets: Floats) -> Floats:
    """Return the update of Oja's subspace rule: a Hebbian term minus a term that keeps the weights finite.

    If the targets are W times the sources, the update vanishes if the rows of W are orthonormal and span a
    principal subspace of the sources.
    """
    update: Floats = (targets.T @ sources - (targets.T @ targets) @ weight) / len(sources)
    return update


def hebbian(context: RuleContext) -> Weights:
    """Return the update of `oja` in each layer, with the centered labels as activities of the last units.

    No error is propagated.
    """
    teacher = np.eye(CLASSES, dtype=context.forward.scores.dtype)[context.labels]
    units = [*context.forward.activities[1:], teacher - teacher.mean(axis=0)]
    layers = zip(context.weights.items(), context.forward.activities, units, strict=True)
    return {layer: oja(weight, sources, targets) for (layer, weight), sources, targets in layers}


def partial_ascent(context: RuleContext) -> Weights:
    """Return the gradient in every second element, and 0 elsewhere, as a control: y.g < 0, so no metric exists."""
    update = {layer: slope.copy() for layer, slope in context.gradient.items()}
    for slope in update.values():
        slope.reshape(-1)[1::2] = 0.0
    return update


class Rule(NamedTuple):
    """A learning rule: a function that returns the update g, and a learning rate."""

    update: Callable[[RuleContext], Weights]
    learning_rate: float


RULES: dict[str, Rule] = {
    "backpropagation": Rule(backpropagation, 0.3),
    "momentum": Rule(momentum, 0.03),
    "adam": Rule(adam, 0.003),
    "sign-descent": Rule(sign_descent, 0.001),
    "feedback-alignment": Rule(feedback_alignment, 0.3),
    "direct-feedback-alignment": Rule(direct_feedback_alignment, 0.3),
    "weight-perturbation": Rule(weight_perturbation, 0.01),
    "hebbian": Rule(hebbian, 0.1),
    "partial-ascent": Rule(partial_ascent, 0.03),
}
"""Rules by name, each with a suitable learning rate."""


# Training ----------------------------------------------------------------------------------------------------


def log_learning_rules(
    folder: Path,
    *,
    rules: Sequence[str] = tuple(RULES),
    steps: int = STEPS,
    hidden: int = HIDDEN,
    images: int = IMAGES,
    seed: int = 0,
    container: str = "safetensors",
    digits: Digits | None = None,
) -> dict[str, Training]:
    """Train one network with several rules and log every state, in float32, with a separate folder for each rule.

    Parameters
    ----------
    folder : Path
        Folder of the logs, which are named after the rules.
    rules : sequence of str
        Names from `RULES`.
    steps : int
        Number of updates. One more state is logged, because the last update needs the state after it.
    hidden : int
        Number of units in each hidden layer.
    images : int
        Number of images in the objective, drawn at random. The accuracy is measured on all other images.
    seed : int
        Seed of the selected images, the weights, the feedback and the perturbations. The result of a rule does not
        depend on which other rules run.
    container : {"safetensors", "npz"}
        Container of a step.
    digits : Digits, optional
        The default is the result of `load_digits`.

    Returns
    -------
    dict
        `Training` by rule name.

    Raises
    ------
    InputError
        If an option is out of range, a rule is unknown, or the images cannot be loaded.
    """
    if unknown := [name for name in rules if name not in RULES]:
        raise InputError(
            f"unknown rules {', '.join(map(repr, unknown))}", remedy=f"choose from: {', '.join(RULES)}"
        )
    random = np.random.default_rng(seed)
    options = (("steps", steps, np.inf), ("hidden units", hidden, np.inf))
    split = split_digits(digits or load_digits(), images, random, options)
    widths = (split.inputs.shape[1], hidden, hidden, CLASSES)

    def draw(targets: int, sources: int) -> NDArray[np.float32]:
        drawn: Floats = random.standard_normal((targets, sources)) / np.sqrt(sources)
        return drawn.astype(np.float32)

    weights = {layer: draw(widths[n + 1], widths[n]) for n, layer in enumerate(LAYERS)}
    feedback = [draw(widths[n + 1], widths[n]) for n in range(1, len(LAYERS))]
    direct_feedback = [draw(CLASSES, width) for width in widths[1:-1]]
    return {
        name: _train(
            Recorder(Path(folder) / name, container),
            RULES[name],
            steps,
            split,
            weights,
            feedback,
            direct_feedback,
            np.random.default_rng([seed, list(RULES).index(name)]),
        )
        for name in rules
    }


def _train(
    recorder: Recorder,
    rule: Rule,
    steps: int,
    split: Split,
    weights: Weights,
    feedback: Sequence[Floats],
    direct_feedback: Sequence[Floats],
    random: np.random.Generator,
) -> Training:
    def forward(weights: Weights) -> ForwardPass:
        return forward_pass(weights, split.inputs, split.labels)

    def accuracy() -> float:
        scores = forward_pass(weights, split.held_out_inputs, split.held_out_labels).scores
        return float(np.mean(scores.argmax(axis=1) == split.held_out_labels))

    memory: dict[str, Weights] = {}
    accuracy_before, losses = accuracy(), []
    for step in range(steps + 1):
        result = forward(weights)
        gradient = propagate_back(result, list(weights.values())[1:])
        losses.append(result.loss)
        context = RuleContext(
            step,
            weights,
            gradient,
            result,
            split.labels,
            lambda weights: forward(weights).loss,
            feedback,
            direct_feedback,
            random,
            memory,
        )
        update = rule.update(context)
        recorder.record(
            step,
            parameter=weights,
            gradient=gradient,
            loss=result.loss,
            learning_rate=rule.learning_rate,
            replicates=_replicates(context, rule.learning_rate, forward),
        )
        if step < steps:
            weights = {layer: weight + rule.learning_rate * update[layer] for layer, weight in weights.items()}
    return Training(tuple(losses), (accuracy_before, accuracy()))


def _replicates(
    context: RuleContext, learning_rate: float, forward: Callable[[Weights], ForwardPass]
) -> dict[str, Any] | None:
    """Return the states after each draw of a stochastic rule, their losses, and the changes of the gradient.

    Return None for a rule that is not stochastic.
    """
    if not context.draws:
        return None
    states = [{k: w + learning_rate * draw[k] for k, w in context.weights.items()} for draw in context.draws]
    results = [forward(state) for state in states]
    gradients = [
        propagate_back(result, list(state.values())[1:]) for result, state in zip(results, states, strict=True)
    ]
    return {
        "parameter": {k: np.stack([state[k] for state in states]) for k in context.weights},
        # The change of the gradient equals the mean Hessian along the displacement times the displacement.
        "hvp": {
            k: np.stack([gradient[k] - context.gradient[k] for gradient in gradients]) for k in context.weights
        },
        "loss": [result.loss for result in results],
    }
