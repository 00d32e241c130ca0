"""Test the import rule, the libraries that each package may use, and the names that tests may use."""

import ast
import collections
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPECIFICATION = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(generate)
generate.imports = functools.cache(generate.imports)
MODULES = generate.modules()

# Packages from the bottom up: a package imports itself and packages of lower levels only. The level of a package
# is one more than that of the highest package below it.
IMPORTS = {
    "schema": set(),
    "storage": {"schema"},
    "kernel": {"schema"},
    "theory": {"schema"},
    "recording": {"schema", "kernel", "theory"},
    "experiments": {"schema", "recording"},
    "optax": {"schema", "recording"},
    "store": {"schema", "storage", "kernel", "theory"},
    "sources": {"schema", "storage", "kernel", "theory"},
    "results": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "compute": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "ingestion": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "objectives": {"schema", "storage", "kernel", "theory", "store", "sources", "compute", "recording"},
    "reporting": {"schema", "storage", "kernel", "theory", "store", "sources", "results", "compute", "ingestion"},
    "app": {
        *("schema", "storage", "kernel", "theory", "store", "sources", "results", "compute", "ingestion"),
        *("reporting", "recording", "experiments", "objectives"),
    },
}
IMPORTS["natgrad"] = set(IMPORTS)
IMPORTS["natgrad_flows"] = set(IMPORTS)
MOST_LEVELS = 8

# Which packages may import which library; a library that is not listed may be imported anywhere.
HOMES = {
    "zarr": {"store", "storage"},
    "icechunk": {"storage"},
    "xarray": {"results", "reporting", "app"},  # app: for the type of `open_results`
    "dask": {"compute"},
    "distributed": {"compute"},
    "prefect": {"natgrad_flows"},
    "numba": {"kernel"},
    "llvmlite": {"kernel"},
    "bokeh": set(),  # its JavaScript is read as files
    "numcodecs": {"store"},
    "jinja2": {"reporting"},
    "scipy": {"theory", "experiments"},
    "h5py": {"sources"},
    "tensorstore": {"sources"},
    "pyarrow": {"sources", "results"},
    "pandas": {"results", "reporting"},
    "matplotlib": {"reporting"},
    "hvplot": {"reporting"},
    "sqlite3": {"sources"},
    "fsspec": {"storage"},
    "mlxtend": {"experiments"},
    "torch": {"recording", "objectives"},
    "jax": {"objectives", "optax"},
    "optax": {"optax"},
    "transformers": {"recording"},
    "lightning": {"recording"},
}


def test_every_module_belongs_to_a_package_of_the_table():
    assert {generate.package_of(module) for module in MODULES} == set(IMPORTS)
    assert not {
        module for module in MODULES if module.count(".") == 1 and MODULES[module].name != "__init__.py"
    } - {f"natgrad_flows.{path.stem}" for path in (ROOT / "flows").rglob("*.py")}


def test_the_table_has_at_most_eight_levels():
    # `levels` refuses packages that import each other in a cycle.
    above = {"natgrad", "natgrad_flows"}
    levels = generate.levels({package: used for package, used in IMPORTS.items() if package not in above})
    assert max(levels.values()) <= MOST_LEVELS


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    package = generate.package_of(module)
    assert not any(name.startswith(".") for name in generate.imports(MODULES[module]))
    assert generate.imported_packages(MODULES[module]) <= IMPORTS[package] | {package}


def test_no_package_of_the_table_imports_less_than_it_may_only_by_name():
    # An unused entry would hide that a package could be on a lower level.
    used = generate.package_imports()
    assert "store" not in used["recording"] | used["experiments"]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, {"a": 3, "b": 2, "c": 1}),
        ({"a": set()}, {"a": 1}),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, None),
    ],
)
def test_the_level_of_a_package_is_one_more_than_that_of_the_highest_it_imports(graph, expected):
    if expected is None:
        with pytest.raises(ValueError, match="b -> c -> b"):
            generate.levels(graph)
    else:
        assert generate.levels(graph) == expected


def test_imports_inside_functions_and_relative_ones_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b as c\nfrom . import d\ndef f():\n    from natgrad.results import pairs, inputs\n")
    assert generate.imports(path) == {"a.b", "..d", "natgrad.results.pairs", "natgrad.results.inputs"}
    assert generate.imported_packages(path) == {"results"}


@pytest.mark.parametrize("library", HOMES)
def test_each_library_is_imported_in_one_place(library):
    users = {
        generate.package_of(name)
        for name, path in MODULES.items()
        if library in {imported.partition(".")[0] for imported in generate.imports(path)}
    }
    assert users <= HOMES[library]


def test_only_public_modules_of_zarr_are_imported():
    names = {name for path in MODULES.values() for name in generate.imports(path)}
    assert not {name for name in names if name.startswith("zarr.core") or "._" in name.removeprefix("zarr")} & {
        name for name in names if name.startswith("zarr")
    }


BELOW_THE_EDGE = [
    name for name in MODULES if generate.package_of(name) not in ("app", "natgrad", "natgrad_flows", "storage")
]


@pytest.mark.parametrize("module", BELOW_THE_EDGE)
def test_locations_are_parsed_only_at_the_edge(module):
    # `open_store`, its two openers, recorded files of a log, and the functions that a notebook calls with a path.
    openers = {
        "natgrad.store.references",
        "natgrad.store",
        "natgrad.store.group",
        "natgrad.reporting.page",
        "natgrad.sources.run_file",
        "natgrad.sources.optimizers.logged_metric",
    }
    found = {
        name
        for name in generate.imports(MODULES[module])
        if name.endswith((".open_storage", ".open_out", ".open_all"))
    }
    assert not found or module in openers


def typer_declarations(program):
    """Return the functions of a program that declare an option or argument of a command; '' outside functions."""
    found = set()

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = ast.unparse(node.func)
            if name in ("typer.Option", "typer.Argument", "Option", "Argument"):
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(program), "")
    return found


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("def f(x: Annotated[int, typer.Option(min=1)] = 1): pass", {"f"}),
        ("Out = Annotated[Path, typer.Argument()]", {""}),
        ("from typer import Option\ndef f(x=Option()): pass", {"f"}),
        ("def f(x: options.Limit = 1): pass", set()),
    ],
)
def test_declarations_of_options_are_found(program, found):
    assert typer_declarations(program) == found


def test_options_of_commands_are_declared_in_the_model_alone():
    # `natgrad.experiments` is a separate program, and the model's declarations are calls of another `Option`.
    commands = [name for name in MODULES if generate.package_of(name) in ("app", "natgrad_flows")]
    found = {
        name: typer_declarations(MODULES[name].read_text()) for name in commands if name != "natgrad.app.options"
    }
    assert {name: functions for name, functions in found.items() if functions} == {
        "natgrad.app.cli": {"_typer_parameter"}
    }


def test_only_the_flows_import_prefect():
    users = {
        name
        for name, path in MODULES.items()
        if "prefect" in {imported.partition(".")[0] for imported in generate.imports(path)}
    }
    assert users
    assert all(name.startswith("natgrad_flows.") for name in users)


def loaded_after(statement):
    """Return the top-level names of the modules that are loaded after a statement, in a separate process."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {"numba", "scipy", "xarray", "zarr", "dask", "distributed", "prefect", "pandas", "contourpy", "pydantic"}


def test_geometry_needs_numpy_alone():
    loaded = loaded_after("import natgrad.theory.geometry")
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_recording_needs_numpy_and_safetensors_alone():
    loaded = loaded_after("import natgrad.recording.recorder, natgrad.recording.torch")
    assert {"numpy", "safetensors"} <= loaded
    assert not loaded & {*HEAVY, "torch", "ml_dtypes"}


def test_the_command_line_starts_without_heavy_libraries():
    assert not loaded_after("import natgrad_flows.cli") & {"numpy", "pydantic", *HOMES}


def test_a_library_that_few_runs_need_is_loaded_for_those_alone():
    few = {"distributed", "icechunk", "jinja2", "contourpy", "prefect", "s3fs"}
    assert not loaded_after("import natgrad.app.run; assert 'scipy.sparse' not in sys.modules") & few


def loaded_by(*words):
    """Return the output of a command, and the names of the modules that it loads."""
    code = f"""
import sys
from natgrad_flows.cli import main
sys.argv = {["natgrad", *map(str, words)]!r}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.splitlines()[-1].split())


def test_the_help_does_not_load_numpy():
    output, loaded = loaded_by("--help")
    assert "process" in output
    assert "natgrad" in loaded
    assert not loaded & {"numpy", *HEAVY, *HOMES}


def test_inspect_does_not_load_the_compiler():
    output, loaded = loaded_by("inspect", ROOT / "data" / "linear_system", "--json")
    assert '"elements"' in output
    assert "natgrad" in loaded
    assert not loaded & {"numba", "llvmlite", "xarray"}


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Return a processed run."""
    out = tmp_path_factory.mktemp("processed") / "out"
    code = f"import natgrad; natgrad.process({str(ROOT / 'data' / 'linear_system')!r}, {str(out)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    return out


def test_info_reads_results_without_xarray_and_zarr(processed):
    output, loaded = loaded_by("info", processed, "--json")
    assert '"condition_number"' in output
    assert not loaded & (HEAVY - {"pydantic"} | {"jinja2", "llvmlite", "numcodecs"})


def test_a_small_run_is_processed_without_libraries_for_large_ones(tmp_path):
    output, loaded = loaded_by("process", ROOT / "data" / "linear_system", tmp_path / "out", "--json")
    assert '"condition_number"' in output
    assert "xarray" in loaded
    assert not loaded & {"dask.array", "distributed", "scipy.special", "scipy.sparse", "contourpy", "prefect"}


def test_stores_are_verified_without_the_compiler(processed):
    assert "numba" not in loaded_after(f"import natgrad; natgrad.verify({str(processed)!r})")


def test_a_report_is_drawn_without_a_plotting_library(processed):
    output, loaded = loaded_by("report", processed, "--json")
    assert "report.html" in output
    assert "jinja2" in loaded
    assert not loaded & {"matplotlib", "PIL", "bokeh"}


# Names that tests may use --------------------------------------------------------------------------------------


def is_hidden(name):
    """Return True if a name is private (tests must not use it) or a constant (tests must not replace it)."""
    return is_private(name) or re.fullmatch("[A-Z][A-Z0-9_]+", name) is not None


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


class Uses(ast.NodeVisitor):
    """Private names of the package that a program uses, and constants of its modules that it replaces."""

    def __init__(self):
        self.imported = {}
        self.found = set()

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.partition(".")[0] in ("natgrad", "natgrad_flows"):
                top = alias.name.partition(".")[0]
                self.imported |= {alias.asname: alias.name} if alias.asname else {top: top}

    def visit_ImportFrom(self, node):
        if (node.module or "").partition(".")[0] in ("natgrad", "natgrad_flows"):
            for alias in node.names:
                self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if is_private(alias.name):
                    self.found.add(f"{node.module}.{alias.name}")

    def name_of(self, node):
        """Return the full name of an object imported from the package; None for other names."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.name_of(node.value)) is not None:
            return f"{owner}.{node.attr}"
        return None

    def visit_Attribute(self, node):
        name = self.name_of(node)
        replaces = isinstance(node.ctx, ast.Store | ast.Del) and is_hidden(node.attr)
        if name is not None and (is_private(node.attr) or replaces):
            self.found.add(name)
        self.generic_visit(node)

    def visit_Call(self, node):
        words = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
        first = self.name_of(node.args[0]) if node.args else None
        if first is not None and len(words) > 1 and isinstance(words[1], str) and is_hidden(words[1]):
            self.found.add(f"{first}.{words[1]}")  # setattr, patch.object
        if first in MODULES and isinstance(node.func, ast.Name) and node.func.id == "vars":
            self.found.add(f"vars({first})")
        if words and isinstance(words[0], str) and re.fullmatch(r"natgrad(_flows)?(\.\w+)+", words[0]):
            self.found |= {words[0]} if is_hidden(words[0].rpartition(".")[2]) else set()
        self.generic_visit(node)

    def visit_Constant(self, node):
        # Programs that tests run in separate processes.
        if isinstance(node.value, str) and "import" in node.value and "natgrad" in node.value:
            self.found |= uses(node.value) or set()


def uses(program):
    """Return the names that `Uses` finds in a program; None if the text is not a program."""
    for text in (program, re.sub(r"\{[^{}\n]*\}", "x", program)):  # unchanged, or with fields to be filled in
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        visitor = Uses()
        visitor.visit(tree)
        return visitor.found
    return None


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("from natgrad.store import group\ngroup.open_group()", set()),
        ("from natgrad.store import group\ngroup._open()", {"natgrad.store.group._open"}),
        ("from natgrad.store import _open", {"natgrad.store._open"}),
        ("import natgrad.store\nnatgrad.store._open()", {"natgrad.store._open"}),
        ("import natgrad.store as s\ns.LIMIT = 3", {"natgrad.store.LIMIT"}),
        ("import natgrad.store as s\nprint(s.LIMIT)", set()),
        ("import os\nos._exit(0)", set()),
        ("from natgrad import store\npatch.setattr(store, 'LIMIT', 3)", {"natgrad.store.LIMIT"}),
        ("from natgrad import store\npatch.setattr(store, 'open', 3)", set()),
        ("patch.setattr('natgrad.store._LIMIT', 3)", {"natgrad.store._LIMIT"}),
        ("from natgrad.store import group\nvars(group).update(x=3)", {"vars(natgrad.store.group)"}),
        ('CODE = """\nfrom natgrad.store import group\ngroup._x = {value!r}\n"""', {"natgrad.store.group._x"}),
    ],
)
def test_uses_of_private_names_are_found(program, found):
    assert uses(program) == found


def test_tests_use_public_names_alone():
    files = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
    this = Path(__file__)
    found = {str(path.relative_to(ROOT)): uses(path.read_text()) for path in files if path != this}
    assert {path: names for path, names in found.items() if names} == {}


# Locations of tests --------------------------------------------------------------------------------------------

NO_PACKAGES = {"cluster", "docs", "packaging", "typing"}
"""Folders of tests that do not belong to a package: clusters, pages, distributions, and types."""

ACROSS_MODULES = {
    "app/test_layout_versions.py",  # every command refuses stores with a different layout
    "flows/test_recorded_runs.py",  # logs of ledgers, from the training loop to labelled results
    "ingestion/test_last_state.py",  # a state without a gradient, from the log to labelled results
    "ingestion/test_without_gradients.py",  # a run without gradients, from the log to labelled results
    "ingestion/test_recovered_gradients.py",  # recovered gradients, from the log to labelled results
    "ingestion/test_replicate_log.py",  # replicates, from the log to labelled results
    "recording/test_torch_errors.py",  # the errors and warnings of natgrad.recording.torch
    "results/test_window_status.py",  # natgrad.results.updates; a test of the kernel has its name
    "sources/test_reader_memory.py",  # one bound for all readers
    "storage/test_disk.py",  # full, read-only and limited disks, in every stage
}


def mirrors(test, modules, helpers):
    """Return True if a test, a path below the folder of tests, has the name of a module, package or helper. A test
    of a complete package is in its folder.
    """
    package, *folders = test.parts[:-1]
    name = test.stem.removeprefix("test_")
    parent = ".".join([{"flows": "natgrad_flows"}.get(package, f"natgrad.{package}"), *folders])
    whole = parent in modules and name == test.parts[-2]
    return whole or f"{parent}.{name}" in modules or name in helpers


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("a/test_b.py", True),
        ("a/test_c.py", True),
        ("a/c/test_d.py", True),
        ("a/c/test_c.py", True),
        ("a/test_helper.py", True),
        ("flows/test_e.py", True),
        ("a/test_d.py", False),
        ("a/c/test_b.py", False),
        ("e/test_e.py", False),
    ],
)
def test_names_of_modules_packages_and_helpers_are_found(test, found):
    modules = {"natgrad.a", "natgrad.a.b", "natgrad.a.c", "natgrad.a.c.d", "natgrad_flows.e"}
    assert mirrors(Path(test), modules, {"helper"}) == found


def test_names_of_test_files_are_unique():
    # pytest imports them by their names, and skips the tests of the second file with an error.
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_mirror_modules():
    tests = ROOT / "tests"
    helpers = {path.stem for path in tests.glob("*.py")}
    files = [path.relative_to(tests) for path in tests.rglob("test_*.py")]
    assert {path.name for path in files if len(path.parts) == 1} == {"test_architecture.py", "test_slow.py"}
    within = [path for path in files if len(path.parts) > 1 and path.parts[0] not in NO_PACKAGES]
    assert {str(path) for path in within if not mirrors(path, MODULES, helpers)} == ACROSS_MODULES
