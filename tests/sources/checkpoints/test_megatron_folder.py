"""Checkpoints of Megatron-LM.

The trainer needs a GPU, so its files are created here as in ``megatron/training/checkpointing.py``, and the
metadata of ``torch_dist`` in the form that megatron-core 0.16 writes.
"""

import argparse
import io
import pickle
import random
import sys
import types

import numpy as np
import pytest
from test_formats import TENSORS, arrays_of, has_copies, ledger_of, refusal

from damage import Payload
from lazy import Lazy
from logs import random_walk, write_log
from natgrad.schema.errors import InputError
from natgrad.sources.completion import complete
from natgrad.sources.formats import FORMATS
from opened import open_source

torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
default_planner = Lazy("torch.distributed.checkpoint.default_planner")

STATES = random_walk(3, TENSORS)
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture
def megatron(monkeypatch):
    """A module with this name, without which objects of its classes cannot be pickled."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = type("ModelType", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def state_dict(iteration, arguments, megatron, **models):
    """Return the objects that a rank saves."""
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1} | arguments
    return {
        "args": argparse.Namespace(**sizes, model_type=megatron.ModelType(), params_dtype=torch.bfloat16),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "optimizer": {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}, {"lr": 0.1}]}},
        "opt_param_scheduler": {"max_lr": 0.2, "num_steps": iteration},
        "rng_state": [
            {"random_rng_state": random.getstate(), "np_rng_state": ("MT19937", np.arange(624, dtype=np.uint32))}
        ],
        **models,
    }


def save(folder, iteration, rank, tree):
    path = folder / f"iter_{iteration:07d}" / rank / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save(tree, path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def gradients_of(folder, rename=lambda name: name):
    states = [
        {rename(key): value for key, value in state.items() if key.startswith("gradient") or key == "loss"}
        for state in STATES
    ]
    return write_log(folder, states)


def write_torch(folder, megatron):
    for iteration, state in enumerate(STATES):
        model = arrays_of(state, "parameter") | {"layers.9._extra_state": io.BytesIO(b"fp8")}
        save(folder, iteration, "mp_rank_00", state_dict(iteration, {}, megatron, model=model))
    return folder


def write_torch_dist(folder, megatron):
    for iteration, state in enumerate(STATES):
        path = folder / f"iter_{iteration:07d}"
        tree = arrays_of(state, "parameter")
        dcp.save(tree, checkpoint_id=path, no_dist=True)
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.planner_data = {}
        metadata.all_local_plans = [default_planner.create_default_local_save_plan(tree, True)]
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save(state_dict(iteration, {}, megatron), path / "common.pt")
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


@pytest.mark.parametrize(("write", "format"), [(write_torch, "megatron"), (write_torch_dist, "dcp")])
def test_both_formats_give_the_ledger_of_the_run(tmp_path, megatron, write, format):
    (tmp_path / "native").mkdir()
    expected = ledger_of(tmp_path / "native", [write_log(tmp_path / "states", STATES)])
    folder = write(tmp_path / "log", megatron)
    assert next(name for name, known in FORMATS.items() if known.find(folder)) == format
    sources = [folder, gradients_of(tmp_path / "gradients")]
    assert ledger_of(tmp_path, sources) == expected
    assert ledger_of(tmp_path / "in place", sources, in_place=True) == expected
    assert not has_copies(tmp_path / "in place")


# Pipeline stages ---------------------------------------------------------------------------------------------


def write_stages(folder, megatron, *, untied=False, rename=str, chunks=1):
    """Test two stages whose layers both have number 0; the last one has a copy of the embedding."""
    arguments = {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": untied}
    for iteration, state in enumerate(STATES):
        tensors = arrays_of(state, "parameter")
        wide, small = tensors["layers.10.weight"], tensors["layers.9.weight"]
        first = {EMBEDDING: wide, "decoder.layers.0.weight": small}
        last = {"decoder.layers.0.weight": small + 1, "output_layer.weight": wide.clone()}
        for stage, model in enumerate((first, last)):
            named = {rename(name): tensor for name, tensor in model.items()}
            models = {"model": named} if chunks == 1 else {"model0": named, "model1": {"norm": small + stage}}
            save(folder, iteration, f"mp_rank_00_{stage:03d}", state_dict(iteration, arguments, megatron, **models))
    return folder


def parameters_of(folder):
    log = open_source(folder)
    step = log.steps()[-1]
    with log.open(step) as reader:
        content = reader.content()
        values = {}
        for name, logged in content.arrays["parameter"].items():
            values[name] = np.zeros(np.prod(logged.shape, dtype=int), np.float32)
            reader.read("parameter", name, 0, values[name])
    return content, values


def test_layers_with_the_same_name_are_distinguished_by_stage(tmp_path, megatron):
    content, values = parameters_of(write_stages(tmp_path, megatron))
    small = STATES[-1]["parameter/layers.9.weight"].ravel()
    np.testing.assert_array_equal(values["stage0.decoder.layers.0.weight"], small)
    np.testing.assert_array_equal(values["stage1.decoder.layers.0.weight"], small + 1)
    assert content.scalars == {"learning_rate": 0.1}
    assert content.ties == {"stage1.output_layer.weight": f"stage0.{EMBEDDING}"}


def test_chunks_of_a_virtual_pipeline_have_distinct_names(tmp_path, megatron):
    _, values = parameters_of(write_stages(tmp_path, megatron, chunks=2))
    small = STATES[-1]["parameter/layers.9.weight"].ravel()
    np.testing.assert_array_equal(values["stage1.model0.decoder.layers.0.weight"], small + 1)
    np.testing.assert_array_equal(values["stage1.model1.norm"], small + 1)
    np.testing.assert_array_equal(values["stage0.model1.norm"], small)


def test_an_untied_output_layer_is_counted_separately(tmp_path, megatron):
    content, _ = parameters_of(write_stages(tmp_path, megatron, untied=True))
    assert content.ties == {}


def test_the_tied_embedding_is_counted_once(tmp_path, megatron):
    folder = write_stages(tmp_path / "log", megatron)
    for iteration in range(len(STATES)):
        for stage in range(2):
            path = folder / f"iter_{iteration:07d}" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt"
            tree = torch.load(path, weights_only=False)
            torch.save(tree | {"grad": tree["model"]}, path)
    log = open_source(folder)
    step = log.steps()[0]
    with log.open(step) as reader:
        content = complete(step, reader.content())
    assert list(content.arrays["parameter"]) == [
        "stage0.decoder.layers.0.weight",
        f"stage0.{EMBEDDING}",
        "stage1.decoder.layers.0.weight",
    ]


# Inconsistent files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "arguments", "why"),
    [
        ("mp_rank_01", {}, "split over 2 ranks"),
        ("mp_rank_00_001", {}, "written by 1 stages"),
        ("mp_rank_00_002", {"pipeline_model_parallel_size": 2}, "written by 2 stages"),
        (None, {"tensor_model_parallel_size": 4}, "4 tensor parallel ranks"),
        (None, {"model_parallel_size": 4}, "4 tensor parallel ranks"),
        (None, {"expert_model_parallel_size": 8}, "experts are split over 8"),
        (None, {"pipeline_model_parallel_size": 2}, "written by 2 stages, but the folders are mp_rank_00"),
    ],
)
def test_ranks_that_cannot_be_merged_are_refused(tmp_path, megatron, rank, arguments, why):
    model = arrays_of(STATES[0], "parameter")
    for name in ("mp_rank_00", rank):
        if name:
            save(tmp_path, 0, name, state_dict(0, arguments, megatron, model=model))
    refused = refusal(tmp_path)
    assert why in refused.what
    if "split" in why:
        assert "torch_dist" in refused.remedy


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, megatron):
    save(tmp_path, 0, "mp_rank_00", [torch.zeros(3)])
    assert "do not contain dictionaries" in refusal(tmp_path).what
    (tmp_path / "iter_0000000" / "mp_rank_00" / "model_optim_rng.pt").unlink()
    assert "model_optim_rng.pt" in refusal(tmp_path).what


def test_a_payload_among_the_arguments_never_runs(tmp_path, megatron):
    tree = state_dict(
        0, {"payload": Payload(tmp_path / "trace")}, megatron, model=arrays_of(STATES[0], "parameter")
    )
    save(tmp_path / "log", 0, "mp_rank_00", tree)
    source = open_source(tmp_path / "log")
    with source.open(source.steps()[0]) as reader:
        assert any("'posix.mkdir'" in note for note in reader.content().notes)
    assert not (tmp_path / "trace").exists()


def test_an_unfinished_iteration_is_omitted_with_a_warning(tmp_path, megatron, caplog):
    folder = write_torch(tmp_path, megatron)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    assert [step.number for step in open_source(folder).steps()] == [0, 1]
    assert "still contains 1" in caplog.text
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    assert [step.number for step in open_source(folder).steps()] == [0, 1, 2]


def test_an_iteration_that_contradicts_its_file_is_refused(tmp_path, megatron):
    folder = write_torch(tmp_path, megatron)
    (folder / "iter_0000002").rename(folder / "iter_0000007")
    (folder / "latest_checkpointed_iteration.txt").unlink()
    log = open_source(folder)
    with log.open(log.steps()[-1]) as reader, pytest.raises(InputError, match="the file contains iteration 2"):
        reader.content()
