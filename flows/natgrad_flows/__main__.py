"""Run the demonstration from the command line: ``python -m natgrad_flows``.

Every process of a Dask cluster imports the module that started the program, unless that is the ``__main__`` of a
package. If the program started from `natgrad_flows.demo`, each process would import Prefect, which takes seconds.
"""

from __future__ import annotations

import logging
from typing import Any

import typer

from natgrad.app import options
from natgrad.app.cli import command_options
from natgrad.schema.text import printable


@command_options(options.DemoOptions)
def main(out: options.DemoOut = "demo", **values: Any) -> None:
    """Run the demonstration and print the paths of its results."""
    from natgrad_flows.demo import demo

    for name in ("natgrad_flows", "natgrad.experiments"):
        logging.getLogger(name).setLevel(logging.INFO)  # Prefect has set up the handlers
    logging.getLogger(__package__).info("starting Prefect")
    answer = demo(out, **values)
    for name, path in answer["results"].items():
        typer.echo(printable(f"results of {name}: {path}"))
    typer.echo(printable(f"report: {answer['report']}"))


if __name__ == "__main__":
    typer.run(main)
