"""The import rule: a table of packages, imports point down, and each library is imported in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT / "pipeline", ROOT / "flows")
    for path in sorted(folder.rglob("*.py"))
}

# Packages from the bottom up: a package imports itself and packages of lower levels only. The level of a package
# is one more than that of the highest package below it.
IMPORTS = {
    "schema": set(),
    "storage": {"schema"},
    "kernel": {"schema"},
    "theory": {"schema"},
    "recording": {"schema", "kernel", "theory"},
    "experiments": {"schema", "recording"},
    "store": {"schema", "storage", "kernel", "theory"},
    "sources": {"schema", "storage", "kernel", "theory"},
    "results": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "compute": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "ingestion": {"schema", "storage", "kernel", "theory", "store", "sources"},
    "reporting": {"schema", "storage", "kernel", "theory", "store", "sources", "results", "compute", "ingestion"},
    "app": {
        *("schema", "storage", "kernel", "theory", "store", "sources", "results", "compute", "ingestion"),
        *("reporting", "recording", "experiments"),
    },
}
IMPORTS["natgrad"] = set(IMPORTS)
IMPORTS["natgrad_flows"] = set(IMPORTS)
MOST_LEVELS = 8

# Which packages may import which library; a library that is not listed may be imported anywhere.
HOMES = {
    "zarr": {"store", "storage"},
    "icechunk": {"storage"},
    "xarray": {"results", "reporting"},
    "dask": {"compute"},
    "distributed": {"compute"},
    "prefect": {"natgrad_flows"},
    "numba": {"kernel"},
    "llvmlite": {"kernel"},
    "matplotlib": {"reporting"},
    "jinja2": {"reporting"},
    "scipy": {"theory", "experiments"},
    "h5py": {"sources"},
    "tensorstore": {"sources"},
    "pyarrow": {"sources"},
    "sqlite3": {"sources"},
    "upath": set(),
    "fsspec": {"storage"},
    "mlxtend": {"experiments"},
    "torch": set(),
}


def imports(path):
    """Names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module):
    """Package of the table that a module, or a name imported from it, belongs to."""
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if top == "natgrad" and name in IMPORTS else top


def imported_packages(module):
    """Packages of this project that a module imports."""
    ours = (name for name in imports(MODULES[module]) if name.partition(".")[0] in ("natgrad", "natgrad_flows"))
    return {package_of(name) for name in ours}


def level(package):
    return 1 + max(map(level, IMPORTS[package]), default=0)


def test_every_module_belongs_to_a_package_of_the_table():
    assert {package_of(module) for module in MODULES} == set(IMPORTS)
    assert not {
        module for module in MODULES if module.count(".") == 1 and MODULES[module].name != "__init__.py"
    } - {f"natgrad_flows.{path.stem}" for path in (ROOT / "flows").rglob("*.py")}


def test_the_table_has_at_most_eight_levels():
    # `level` would not return if packages imported each other in a cycle.
    levels = {package: level(package) for package in IMPORTS if package not in ("natgrad", "natgrad_flows")}
    assert max(levels.values()) <= MOST_LEVELS


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    package = package_of(module)
    assert imported_packages(module) <= IMPORTS[package] | {package}


def test_no_package_of_the_table_imports_less_than_it_may_by_name_only():
    # An entry that nothing uses would hide that a package could sit lower.
    used = {}
    for module in MODULES:
        used.setdefault(package_of(module), set()).update(imported_packages(module))
    assert "store" not in used["recording"] | used["experiments"]


@pytest.mark.parametrize("library", HOMES)
def test_each_library_is_imported_in_one_place(library):
    users = {
        package_of(name)
        for name, path in MODULES.items()
        if library in {imported.partition(".")[0] for imported in imports(path)}
    }
    assert users <= HOMES[library]


def test_only_public_modules_of_zarr_are_imported():
    names = {name for path in MODULES.values() for name in imports(path)}
    assert not {name for name in names if name.startswith("zarr.core") or "._" in name.removeprefix("zarr")} & {
        name for name in names if name.startswith("zarr")
    }


BELOW_THE_EDGE = [
    name for name in MODULES if package_of(name) not in ("app", "natgrad", "natgrad_flows", "storage")
]


@pytest.mark.parametrize("module", BELOW_THE_EDGE)
def test_locations_are_parsed_at_the_edge_only(module):
    # `open_store`, its two openers, and the functions that a notebook calls with a path.
    openers = {
        "natgrad.store",
        "natgrad.store.group",
        "natgrad.reporting.page",
        "natgrad.sources.run_file",
        "natgrad.sources.optimizers.logged_metric",
    }
    found = {
        name for name in imports(MODULES[module]) if name.endswith((".open_storage", ".open_out", ".open_all"))
    }
    assert not found or module in openers


def test_only_the_flows_import_prefect():
    users = {name for name, path in MODULES.items() if "prefect" in {n.partition(".")[0] for n in imports(path)}}
    assert users
    assert all(name.startswith("natgrad_flows.") for name in users)


def loaded_after(statement):
    """Top-level names of the modules that are loaded after a statement, in a process of its own."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {"numba", "scipy", "xarray", "zarr", "dask", "distributed", "prefect", "pandas", "matplotlib", "pydantic"}


def test_geometry_needs_numpy_alone():
    loaded = loaded_after("import natgrad.theory.geometry")
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_recording_needs_numpy_and_safetensors_alone():
    loaded = loaded_after("import natgrad.recording.recorder")
    assert {"numpy", "safetensors"} <= loaded
    assert not loaded & HEAVY


def test_the_command_line_starts_without_heavy_libraries():
    assert not loaded_after("import natgrad_flows.cli") & {"numpy", "pydantic", *HOMES}


def test_a_library_that_few_runs_need_is_loaded_for_those_alone():
    few = {"distributed", "icechunk", "jinja2", "matplotlib", "prefect", "s3fs"}
    assert not loaded_after("import natgrad.app.run; assert 'scipy.sparse' not in sys.modules") & few
