"""The law of imports: arrows point down, there is no ring, and each library is known in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "flows")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# The house, from the ground up. A module imports from floors below its own only.
FLOORS = [
    {"pipeline", "pipeline.schema", "pipeline.sources", "pipeline.experiments"},
    {"pipeline.places.objects", "pipeline.sources.protocol_buffer"},
    {"pipeline.places", "pipeline.places.icechunk_files"},
    {"pipeline.places.repository"},
    {
        "pipeline.blocks",
        "pipeline.clusters",
        "pipeline.gram",
        "pipeline.geometry",
        "pipeline.figures.canvas",
        "pipeline.preconditioner",
        "pipeline.recorder",
        "pipeline.sources.base",
        "pipeline.sources.event_file",
        "pipeline.sources.record_files",
        "pipeline.sources.wandb_file",
        "pipeline.store.disk",
        "pipeline.sources.pickle_data",
        "pipeline.experiments.digits",
    },
    {"pipeline.sources.changes", "pipeline.sources.completion", "pipeline.sources.container"},
    {"pipeline.sources.factors", "pipeline.stream"},
    {
        "pipeline.sources.alignment",
        "pipeline.sources.optimizer",
        "pipeline.sources.npz_file",
        "pipeline.sources.safetensors_file",
        "pipeline.sources.torch_archive",
        "pipeline.sources.hdf5_file",
        "pipeline.sources.zarr_group",
        "pipeline.sources.scalar_log",
        "pipeline.sources.sweep",
        "pipeline.experiments.feedback_alignment",
        "pipeline.experiments.learning_rules",
        "pipeline.experiments.higher_order",
        "pipeline.experiments.moving_target",
        "pipeline.experiments.linear_system",
        "pipeline.store.group",
        "pipeline.store.journal",
        "pipeline.store.chunk_file",
        "pipeline.discrete_time",
        "pipeline.discrete_gradients",
        "pipeline.windows",
        "pipeline.store.writer",
        "pipeline.figures.curves",
    },
    {"pipeline.sources.names", "pipeline.figures.paper", "pipeline.store.states"},
    {"pipeline.sources.run_file", "pipeline.sources.step_folder"},
    {
        "pipeline.sources.dcp_folder",
        "pipeline.sources.joined",
        "pipeline.sources.deepspeed_folder",
        "pipeline.sources.megatron_folder",
        "pipeline.sources.orbax_folder",
        "pipeline.sources.stacked_file",
        "pipeline.sources.model_folder",
        "pipeline.store.trajectory",
        "pipeline.store.ledger",
        "pipeline.levels",
        "pipeline.metrics",
        "pipeline.experiments.demo",
        "pipeline.experiments.__main__",
    },
    {
        "pipeline.sources.bergson_store",
        "pipeline.sources.huggingface",
        "pipeline.store",
        "pipeline.store.verify",
        "pipeline.figures",
        "pipeline.results",
        "pipeline.operators",
    },
    {
        "pipeline.sources.formats",
        "pipeline.tiles",
        "pipeline.paper",
        "pipeline.replicates",
        "pipeline.report",
        "pipeline.ingest.description",
    },
    {"pipeline.sources.opening"},
    {"pipeline.logged_metric", "pipeline.compute"},
    {"pipeline.ingest.transfer", "pipeline.ingest.reading", "pipeline.inspection"},
    {"pipeline.ingest.new_rows"},
    {"pipeline.ingest.log_to_store"},
    {"pipeline.ingest"},
    {"pipeline.run"},
    {"pipeline.watch", "pipeline.options"},
    {"pipeline.cli", "flows"},
    {"flows.runs"},
    {"flows.demo", "flows.watch"},
    {"flows.deployments"},
    {"flows.cli"},
]
STRANGERS = ["pipeline.blocks", "pipeline.gram", "pipeline.geometry"]

# Who may import which library; what is not listed may be imported anywhere.
HOMES = {
    "zarr": {"pipeline.store.group", "pipeline.places.icechunk_files"},
    "icechunk": {"pipeline.places.icechunk_files"},
    "xarray": {"pipeline.results", "pipeline.replicates", "pipeline.figures.curves", "pipeline.report"},
    "dask": {"pipeline.clusters"},
    "distributed": {"pipeline.clusters", "pipeline.compute"},
    "prefect": {"flows.runs", "flows.demo", "flows.watch", "flows.deployments"},
    "numba": {"pipeline.gram", "pipeline.stream"},
    "llvmlite": {"pipeline.gram"},
    "matplotlib": {"pipeline.figures.canvas", "pipeline.figures.curves", "pipeline.figures.paper"},
    "jinja2": {"pipeline.report"},
    "scipy": {
        "pipeline.metrics",
        "pipeline.operators",
        "pipeline.discrete_gradients",
        "pipeline.experiments.linear_system",
    },
    "h5py": {"pipeline.sources.hdf5_file"},
    "tensorstore": {"pipeline.sources.zarr_group"},
    "pyarrow": {"pipeline.sources.record_files"},
    "sqlite3": {"pipeline.sources.record_files"},
    "filelock": {"pipeline.store.writer", "pipeline.watch"},
    "psutil": {"pipeline.store.writer"},
    "torch": set(),
    "upath": {"pipeline.places.objects", "pipeline.places.icechunk_files"},
    "fsspec": {"pipeline.places.objects", "pipeline.places.icechunk_files"},
    "mlxtend": {"pipeline.experiments.digits"},
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


def known(name):
    """Module of ours that an imported name is, or belongs to."""
    return name if name in MODULES else name.rpartition(".")[0]


def ours(path):
    return {known(name) for name in imports(path) if name.partition(".")[0] in ("pipeline", "flows")}


def test_every_module_has_its_floor():
    assert set().union(*FLOORS) == set(MODULES)
    assert sum(map(len, FLOORS)) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    floor = next(index for index, floor in enumerate(FLOORS) if module in floor)
    below = set().union(*FLOORS[:floor])
    assert ours(MODULES[module]) <= below


def test_the_pure_modules_are_strangers():
    for module in STRANGERS:
        assert ours(MODULES[module]) == {"pipeline.schema"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.experiments")])
def test_the_pipeline_and_the_experiments_know_nothing_of_each_other(module):
    allowed = {"pipeline.schema", "pipeline.recorder"}
    assert all(name in allowed or name.startswith("pipeline.experiments") for name in ours(MODULES[module]))


@pytest.mark.parametrize("library", HOMES)
def test_each_library_is_known_in_one_place(library):
    users = {name for name, path in MODULES.items() if library in {n.partition(".")[0] for n in imports(path)}}
    assert users == HOMES[library]


def loaded_after(statement):
    """Top-level names of the modules that are loaded after a statement, in a process of its own."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )


def test_geometry_needs_numpy_alone():
    heavy = {"numba", "scipy", "xarray", "zarr", "dask", "distributed", "prefect", "pandas", "matplotlib"}
    loaded = loaded_after("import pipeline.geometry")
    assert "numpy" in loaded
    assert not loaded & heavy


def test_the_command_line_starts_without_heavy_libraries():
    assert not loaded_after("import flows.cli") & {"numpy", "pydantic", *HOMES}


def test_what_few_runs_need_is_loaded_for_those_alone():
    few = {"distributed", "icechunk", "jinja2", "matplotlib", "prefect", "s3fs"}
    assert not loaded_after("import pipeline.run; assert 'scipy.sparse' not in sys.modules") & few
