"""Write the generated parts of the documentation: the import diagram, and the tables of variables.

``python docs/generate.py`` replaces the text between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
With ``--check`` nothing is written; the program fails if a page is not up to date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SOURCES = (ROOT / "pipeline", ROOT / "flows")


# Imports -----------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Return the file of each module of this project, by its name."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in SOURCES
        for path in sorted(folder.rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    """Return the names that a file imports, also inside functions; relative imports begin with a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def package_of(name: str) -> str:
    """Return the package that a module belongs to: ``natgrad.results.pairs`` to ``results``."""
    parts = name.split(".")
    folder = SOURCES[0] / "natgrad" / parts[1] if parts[0] == "natgrad" and len(parts) > 1 else None
    return parts[1] if folder is not None and folder.is_dir() else parts[0]


def imported_packages(path: Path) -> set[str]:
    """Return the packages of this project that a file imports."""
    return {package_of(name) for name in imports(path) if name.split(".")[0] in ("natgrad", "natgrad_flows")}


def package_imports() -> dict[str, set[str]]:
    """Return the packages that each package of ``natgrad`` imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        package = package_of(name)
        graph.setdefault(package, set()).update(imported_packages(path) - {package})
    return graph


def levels(graph: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return the level of each package: one more than that of the highest package that it imports.

    Raises
    ------
    ValueError
        If packages import each other in a cycle.
    """
    found: dict[str, int] = {}

    def level(package: str, above: tuple[str, ...] = ()) -> int:
        if package in above:
            raise ValueError(f"packages import each other: {' -> '.join((*above, package))}")
        if package not in found:
            found[package] = 1 + max((level(other, (*above, package)) for other in graph[package]), default=0)
        return found[package]

    for package in graph:
        level(package)
    return found


def import_diagram() -> str:
    """Draw the imports between packages: levels from top to bottom, without arrows that follow from others."""
    graph = {package: used - {"natgrad"} for package, used in package_imports().items() if package != "natgrad"}
    level = levels(graph)
    lines = ["```mermaid", "graph TD"]
    for number in sorted({*level.values()}, reverse=True):
        packages = sorted(package for package in graph if level[package] == number)
        lines += [f"  subgraph level_{number}[level {number}]", *(f"    {name}" for name in packages), "  end"]
    for package in sorted(graph, key=lambda name: (-level[name], name)):
        indirect = {far for near in graph[package] for far in _reachable(graph, near)}
        lines += [f"  {package} --> {used}" for used in sorted(graph[package] - indirect)]
    return "\n".join([*lines, "```"])


def _reachable(graph: Mapping[str, set[str]], package: str) -> set[str]:
    return {far for near in graph[package] for far in {near, *_reachable(graph, near)}}


# Variables ---------------------------------------------------------------------------------------------------


def update_variables() -> str:
    """Tabulate the variables of updates."""
    from natgrad.results.variables import VARIABLES

    rows = [
        (
            f"`{variable.name}`",
            ", ".join(variable.dimensions) + ("" if "tensor" in variable.aggregations else " (model)"),
            variable.units,
            variable.equation,
            f"{_sentence(variable.long_name)} {variable.description}",
        )
        for variable in VARIABLES.values()
    ]
    return _table(("variable", "dimensions", "unit", "equation", "meaning"), rows)


def replicate_variables() -> str:
    """Tabulate the variables of replicates."""
    from natgrad.results.replicates import REPLICATE_VARIABLES

    rows = [
        (
            f"`{variable.name}`",
            ", ".join(variable.dimensions),
            variable.units,
            variable.equation,
            f"{_sentence(variable.long_name)} {variable.description}",
        )
        for variable in REPLICATE_VARIABLES.values()
    ]
    return _table(("variable", "dimensions", "unit", "equation", "meaning"), rows)


def flags() -> str:
    """Tabulate the values of the variables of flags."""
    from natgrad.results.variables import VARIABLES

    rows = [
        (f"`{variable.name}`", str(int(flag)), f"`{flag.name.lower()}`")
        for variable in VARIABLES.values()
        for flag in variable.flags or ()
    ]
    return _table(("variable", "value", "flag"), rows)


# Python and the command line ---------------------------------------------------------------------------------


def public_names() -> str:
    """Refer to each public name, whose page mkdocstrings fills from its docstring."""
    import natgrad

    names = [name for name in natgrad.__all__ if not name.startswith("_")]
    functions = [name for name in names if not name[0].isupper()]
    classes = [name for name in names if name[0].isupper()]
    return "\n\n".join(f"::: natgrad.{name}" for name in (*functions, *classes))


def commands() -> str:
    """Describe each command with its arguments and options, as ``--help`` does."""
    import click
    from typer.main import get_command

    from natgrad_flows.cli import app

    group = get_command(app)
    parts = []
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"natgrad {name}")
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        rows = [_parameter(context, parameter) for parameter in command.params]
        table = _table(("argument or option", "meaning"), rows)
        parts.append(f"## natgrad {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n{table}")
    return "\n\n".join(parts)


def _parameter(context: Any, parameter: Any) -> tuple[str, str]:
    """Return name and description of an argument or option."""
    if parameter.param_type_name == "argument":
        default = f" [default: {parameter.default}]" if parameter.default else ""
        return f"`{parameter.metavar}`", f"{parameter.help}{default}"
    name, description = parameter.get_help_record(context)
    return f"`{name}`", description.replace("  [", " [")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Pages -------------------------------------------------------------------------------------------------------

PARTS = {
    "reference/api.md": {"public names": public_names},
    "reference/cli.md": {"commands": commands},
    "explanation/design.md": {"import diagram": import_diagram},
    "reference/variables.md": {
        "update variables": update_variables,
        "replicate variables": replicate_variables,
        "flags": flags,
    },
}
"""Function of each generated part, by page and by the name in its markers."""


def generated(page: str) -> str:
    """Return the text of a page with its generated parts as they should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, write in PARTS[page].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"{page} does not have the markers {begin} and {end}")
        text = f"{before}{begin}\n\n{write()}\n\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` report those that are not up to date."""
    stale = [page for page in PARTS if generated(page) != (DOCS / page).read_text(encoding="utf-8")]
    for page in stale:
        if "--check" in arguments:
            sys.stderr.write(f"docs/{page} is not up to date: run python docs/generate.py\n")
        else:
            (DOCS / page).write_text(generated(page), encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
