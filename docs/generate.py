"""Write the generated parts of the documentation: imports, public names, commands and variables.

``python docs/generate.py`` replaces the text between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
With ``--check`` nothing is written; the program fails if a page is not up to date.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
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
    """Return the packages that each package of ``natgrad`` imports, except itself."""
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


def import_graph() -> dict[str, set[str]]:
    """Return the imports between packages, without those that follow from others."""
    graph = {package: used - {"natgrad"} for package, used in package_imports().items() if package != "natgrad"}
    return {
        package: used - {far for near in used for far in _reachable(graph, near)} for package, used in graph.items()
    }


def _reachable(graph: Mapping[str, set[str]], package: str) -> set[str]:
    return {far for near in graph[package] for far in {near, *_reachable(graph, near)}}


def import_table() -> str:
    """List the packages of each level, from top to bottom, with what they import."""
    graph = import_graph()
    level = levels(graph)
    rows = [
        (str(level[package]), f"`{package}`", ", ".join(f"`{used}`" for used in sorted(graph[package])))
        for package in sorted(graph, key=lambda name: (-level[name], name))
    ]
    return _table(("level", "package", "imports"), rows)


COLUMNS = {
    "app": 2,
    "compute": 1,
    "experiments": 0,
    "ingestion": 3,
    "kernel": 1,
    "natgrad_flows": 2,
    "objectives": 1,
    "optax": 2,
    "recording": 0,
    "reporting": 4,
    "results": 4,
    "schema": 2,
    "sources": 3,
    "storage": 2,
    "store": 2,
    "theory": 4,
}
"""Column of each package in the diagram, so that no arrow crosses a box. Its row is its level."""

WIDTH, HEIGHT = 128, 68
"""Distance of columns and of rows in the diagram, in pixels."""

BOX = (108, 30)
"""Width and height of a package in the diagram, in pixels."""


def import_diagram() -> str:
    """Draw the imports between packages as a vector graphic."""
    graph = import_graph()
    level = levels(graph)
    if missing := sorted(set(graph) - set(COLUMNS)):
        raise ValueError(f"add {', '.join(missing)} to COLUMNS in {__file__}")
    top = max(level.values())

    def place(package: str, above: int = 0) -> tuple[int, int]:
        return WIDTH * COLUMNS[package] + WIDTH // 2, HEIGHT * (top - level[package] - above) + HEIGHT // 2

    wide, high = WIDTH * (max(COLUMNS.values()) + 1), HEIGHT * top
    width, height = BOX
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        'role="img" font-family="sans-serif" font-size="14">',
        "<title>Imports between the packages, one row for each level</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker>',
    ]
    for package, used in sorted((package, used) for package, below in graph.items() for used in below):
        (x, y), (end, bottom) = place(package), place(used)
        path = f"M{x} {y + height // 2}"
        if level[package] - level[used] > 1:
            # A long arrow bends above its target, and goes between the boxes of the rows that it passes.
            path += f"L{end} {place(used, above=1)[1]}"
        path += f"L{end} {bottom - height // 2}"
        lines.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#head)"/>')
    for package in sorted(graph):
        x, y = place(package)
        lines.append(
            f'<rect x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="4" '
            f'fill="#e8eaf6" stroke="#3f51b5"/><text x="{x}" y="{y + 5}" text-anchor="middle">{package}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


# Formats -----------------------------------------------------------------------------------------------------


def conformance() -> str:
    """Tabulate what each format is able to do, as tests/sources/test_conformance.py verifies it.

    Raises
    ------
    ValueError
        If a format is missing.
    """
    from natgrad.sources.formats import FORMATS

    table = tomllib.loads((ROOT / "tests" / "conformance.toml").read_text(encoding="utf-8"))
    parts, refusals = [], list[str]()
    for kind, abilities in table.items():
        formats = list(next(iter(abilities.values())))
        known = {
            name
            for name, format in FORMATS.items()
            if (format.scalars is not None) == (kind == "scalars") and format.has_states
        }
        if missing := sorted(known - {name.partition(",")[0] for name in formats}):
            raise ValueError(f"tests/conformance.toml lacks {', '.join(missing)}")
        rows = []
        for name in formats:
            cells = [abilities[ability][name] for ability in abilities]
            refusals += [cell for cell in cells if cell != "yes" and cell not in refusals]
            format, comma, layout = name.partition(",")
            row = (cell if cell == "yes" else f"no ({refusals.index(cell) + 1})" for cell in cells)
            rows.append((f"`{format}`{comma}{layout}", *row))
        parts.append(_table((f"format of {kind}", *abilities), rows))
    parts += [f"{number}. Refused: {reason}" for number, reason in enumerate(refusals, 1)]
    return "\n\n".join(parts)


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
    from natgrad.results.replicate_variables import REPLICATE_VARIABLES

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
    """Refer to the docstring of each public name, in the order in which the package lists them."""
    import natgrad

    listed = re.findall(r"``(\w+)``", natgrad.__doc__ or "")
    names = [name for name in dict.fromkeys(listed) if name in natgrad.__all__]
    if missing := sorted(set(natgrad.__all__) - {*names, "__version__"}):
        raise ValueError(f"the docstring of natgrad does not list {', '.join(missing)}")
    return "\n\n".join(f"::: natgrad.{name}" for name in names)


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
        parts.append(f"## natgrad {name}\n\n{_lines(command.help)}\n\n```text\n{usage}\n```\n\n{table}")
    return "\n\n".join(parts)


def _parameter(context: Any, parameter: Any) -> tuple[str, str]:
    """Return the name and description of an argument or option."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`", parameter.help.replace("  [", " [")
    name, description = parameter.get_help_record(context)
    return f"`{name}`", description.replace("  [", " [")


def _lines(text: str) -> str:
    """Write each sentence on its own line."""
    return text.replace(". ", ".\n")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Pages -------------------------------------------------------------------------------------------------------

PARTS = {
    "reference/api.md": {"public names": public_names},
    "reference/cli.md": {"commands": commands},
    "reference/formats.md": {"conformance": conformance},
    "explanation/design.md": {"imports": import_table},
    "reference/variables.md": {
        "update variables": update_variables,
        "replicate variables": replicate_variables,
        "flags": flags,
    },
}
"""Function of each generated part, by page and by the name in its markers."""


FILES = {"images/imports.svg": import_diagram}
"""Function of each file that is generated completely."""


def generated(page: str) -> str:
    """Return the text of a file as it should be, with its generated parts."""
    if page in FILES:
        return FILES[page]()
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, write in PARTS[page].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"{page} does not have the markers {begin} and {end}")
        text = f"{before}{begin}\n\n{write()}\n\n{end}{after}"
    return text


def current(page: str) -> str:
    """Return the text of a file as it is; empty if it does not exist."""
    path = DOCS / page
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main(arguments: list[str]) -> int:
    """Write the files, or with ``--check`` report those that are not up to date."""
    stale = [page for page in (*PARTS, *FILES) if generated(page) != current(page)]
    for page in stale:
        if "--check" in arguments:
            sys.stderr.write(f"docs/{page} is not up to date: run python docs/generate.py\n")
        else:
            (DOCS / page).write_text(generated(page), encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
