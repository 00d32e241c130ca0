"""Gradient stores that Bergson built, compared with the gradients of torch at the same states."""

import contextlib
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from test_formats import refusal

from damage import LENGTHS, changes, damage, reads_only
from logs import run_writer
from natgrad.app import run as whole_run
from natgrad.app.inspection import inspect_source
from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.bergson_store import blocks
from natgrad.sources.completion import complete
from natgrad.sources.formats import find_format
from opened import ingest, open_source, open_sources, read_results
from processing import Serial

LAYOUTS = {"gpt2": "conv1d", "neox": "linear"}
LINEAR = {
    "gpt2": {
        f"transformer.h.0.{module}.weight" for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "neox": {
        f"gpt_neox.layers.0.{module}.weight"
        for module in (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    },
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bergson")
    run_writer(
        "write_bergson.py", folder, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", HF_HOME=str(folder / "cache")
    )
    return folder


def say(folder, layout, **modules):
    lines = ["[bergson]", f'layout = "{layout}"', "[bergson.modules]"]
    (folder / "natgrad.toml").write_text("\n".join(lines + [f'"{m}" = "{of}"' for m, of in modules.items()]))
    return folder


@pytest.fixture
def run(written, tmp_path):
    """Models and stores of a run of GPT-2 that tests may modify."""
    for name in ("models", "stores"):
        shutil.copytree(written / "gpt2" / name, tmp_path / name)
    return tmp_path / "models", say(tmp_path / "stores", "conv1d")


@pytest.fixture
def other(written, tmp_path):
    """Stores of other kinds for the first state of GPT-2, by name, with their model."""

    def copied(name):
        stores = shutil.copytree(written / "other" / name, tmp_path / name)
        return written / "gpt2" / "models", say(stores, "conv1d")

    return copied


def gradients_of(sources, number):
    """Return the gradients of a step by name, and the notes."""
    log = open_sources(sources)
    step = next(step for step in log.steps() if step.number == number)
    with log.open(step) as reader:
        content = complete(step, reader.content())
        read = {}
        for name, logged in content.arrays["gradient"].items():
            read[name] = np.zeros(logged.shape, logged.dtype)
            reader.read("gradient", name, 0, read[name].reshape(-1))
    return read, content.notes


def refused(sources):
    with pytest.raises(InputError) as caught:
        gradients_of(sources, 0)
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def require_close(read, truth, roundings=2, unit=2.0**-24):
    """Return a bound: Bergson rounds the sum over documents to float32, and its quotient by their number.

    The gradients themselves are of float64 on both sides; 2^-40 of the largest leaves them 2^13 roundings.
    """
    for name, value in read.items():
        assert value.shape == truth[name].shape
        expected = truth[name]
        bound = roundings * unit * (1 + unit) * abs(expected) + 2.0**-40 * abs(expected).max()
        assert (abs(value - expected) <= bound).all(), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_stores_of_a_run_are_the_gradients_of_torch(written, tmp_path, name):
    stores = say(shutil.copytree(written / name / "stores", tmp_path / "stores"), LAYOUTS[name])
    assert find_format(stores) == "bergson"
    models = written / name / "models"
    for step in range(3):
        read, notes = gradients_of([models, stores], step)
        assert read.keys() == LINEAR[name]
        with np.load(written / name / "gradients" / f"{step}.npz") as truth:
            require_close(read, truth)
        with safe_open(models / f"step-{step}" / "model.safetensors", "numpy") as saved:
            left = saved.keys() - read.keys()
        assert len(left) == 12
        assert any(all(repr(tensor) in note for tensor in left) for note in notes)
        assert any("all results of the model concern its other 4 tensors" in note for note in notes)
        assert any("loss_reduction: sum" in note for note in notes)
    assert open_source(stores / "checkpoint-1").steps()[0].number == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_descent_is_parallel_to_bergson_gradients(written, tmp_path, name):
    stores = say(shutil.copytree(written / name / "stores", tmp_path / "stores"), LAYOUTS[name])
    whole_run.ingest_run([written / name / "models", stores], tmp_path / "out")
    whole_run.analyze_run(tmp_path / "out", Serial(learning_rate=1.0))
    tree = read_results(tmp_path / "out" / "results.zarr")
    for level in ("model", "tensor"):
        angle = tree[level]["angle"].sel(descent="gradient", window=1)
        # Two roundings of the gradient; parameters are rounded by 2^-53, and updates are at least 2^-20 of them.
        assert (angle <= 2 * 2.0**-24 * (1 + 2.0**-24) + 2.0**-32).all()
    found = inspect_source([written / name / "models", stores])
    assert found.format == "safetensors, bergson"
    assert found.holds["gradient"] == "4 tensors"
    assert sum("all results of the model" in note for note in found.notes) == 1


def test_a_run_file_can_list_the_stores(run, tmp_path):
    lines = [f'[[source]]\npath = "{folder.name}"' for folder in run]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    read, _ = gradients_of([tmp_path], 2)
    again, _ = gradients_of(run, 2)
    assert read.keys() == LINEAR["gpt2"]
    assert all((again[name] == value).all() for name, value in read.items())


def test_stores_of_different_losses_are_distinguished(run, tmp_path):
    edit(run[1] / "checkpoint-1", "config.yaml", "loss_reduction: sum", "loss_reduction: mean")
    warnings = ingest(list(run), tmp_path / "out").warnings
    for reduction, step in (("sum", 0), ("mean", 1)):
        found = [warning for warning in warnings if f"loss_reduction: {reduction}" in warning]
        assert len(found) == 1
        assert found[0].endswith(f"(in step-{step})")


def test_omitted_tensors_without_gradient_are_listed(run, tmp_path):
    warnings = ingest(list(run), tmp_path / "out").warnings
    assert sum("'transformer.wte.weight'" in warning for warning in warnings) == 1


def test_one_row_per_document_is_read_as_the_mean(other, written):
    with np.load(written / "gpt2" / "gradients" / "0.npz") as truth:
        read, _ = gradients_of(other("rows"), 0)
        assert {value.dtype.name for value in read.values()} == {"float64"}
        require_close(read, truth, roundings=0)
        # Weights, activations and rows are bfloat16: compare with the mean of the rows that Bergson itself loads.
        read, notes = gradients_of(other("bfloat16"), 0)
    assert any("precision: bf16" in note for note in notes)
    store = written / "other" / "bfloat16" / "step-0"
    rows = np.fromfile(store / "gradients.bin", np.uint16).reshape(3, -1)
    rows = (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    sizes = json.loads((store / "info.json").read_text())["grad_sizes"]
    start = 0
    for module, size in sizes.items():
        value = read[f"transformer.{module}.weight"]
        expected = rows[:, start : start + size].sum(axis=0) / 3
        assert (value.T.ravel() == expected.astype(np.float32)).all()
        start += size


@pytest.mark.parametrize("name", ["biased", "biased rows"])
def test_biases_are_read_if_bergson_included_them(other, written, name):
    read, notes = gradients_of(other(name), 0)
    assert read.keys() == LINEAR["gpt2"] | {name.replace("weight", "bias") for name in LINEAR["gpt2"]}
    assert any("all results of the model concern its other 8 tensors" in note for note in notes)
    with np.load(written / "gpt2" / "gradients" / "0.npz") as truth:
        require_close(read, truth)


def test_a_module_can_have_another_layout(run):
    models, stores = run
    read, _ = gradients_of(run, 0)
    say(stores, "linear", **{"h.0.attn.c_attn": "conv1d", "h.0.mlp.c_fc": "conv1d", "h.0.mlp.c_proj": "conv1d"})
    again, _ = gradients_of([models, stores], 0)
    square = "transformer.h.0.attn.c_proj.weight"
    assert (again.pop(square) == read.pop(square).T).all()
    assert all((again[name] == value).all() for name, value in read.items())


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 40))
def test_blocks_of_a_box_are_small_and_preserve_the_order(first, rows, left, columns, most):
    box = np.arange(18 * 18).reshape(18, 18)
    found = list(blocks(slice(first, first + rows), slice(left, left + columns), limit=most))
    assert all(len(some) * len(others) <= most for some, others in found)
    parts = [box[some.start : some.stop, others.start : others.stop].ravel() for some, others in found]
    assert (np.concatenate(parts) == box[first : first + rows, left : left + columns].ravel()).all()


@given(st.sampled_from(["mean", "rows", "biased", "biased rows"]), st.data())
@reads_only
def test_any_slice_equals_that_of_the_complete_tensor(written, tmp_path, name, data):
    stores = tmp_path / name
    if not stores.exists():
        shutil.copytree(written / "gpt2" / "stores" if name == "mean" else written / "other" / name, stores)
        say(stores, "conv1d", **{"h.0.attn.c_proj": "linear"})
    log = open_sources([written / "gpt2" / "models", stores])
    step = log.steps()[0]
    with log.open(step) as reader:
        tensors = reader.content().arrays["gradient"]
        tensor = data.draw(st.sampled_from(sorted(tensors)))
        whole = np.zeros(int(np.prod(tensors[tensor].shape)), tensors[tensor].dtype)
        reader.read("gradient", tensor, 0, whole)
        start = data.draw(st.integers(0, whole.size))
        part = np.full(data.draw(st.integers(0, whole.size - start)), np.nan, whole.dtype)
        reader.read("gradient", tensor, start, part)
    assert (part == whole[start : start + part.size]).all()


ROWS, COLUMNS = 3 << 10, 2 << 10


@pytest.fixture
def large(written, tmp_path):
    """A store with one module of 6 Mi elements, and its values."""
    store = shutil.copytree(written / "gpt2" / "stores" / "checkpoint-0", tmp_path / "stores" / "checkpoint-0")
    info = json.loads((store / "info.json").read_text())
    (store / "info.json").write_text(json.dumps({**info, "grad_sizes": {"layer": ROWS * COLUMNS}}))
    stored = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    stored.tofile(store / "gradients.bin")
    say(tmp_path / "stores", "conv1d")
    return store, stored


def read_traced(sources, tensor):
    """Read a tensor of the large store; return it and the peak memory in addition to it."""
    log = open_sources(sources)
    step = log.steps()[0]
    out = np.empty(ROWS * COLUMNS, np.float32)
    with log.open(step) as reader:
        reader.content()
        tracemalloc.start()
        reader.read("gradient", tensor, 0, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return out, peak


def test_a_transposed_tensor_is_read_in_bounded_memory(large, tmp_path):
    store, stored = large
    models = parameters(tmp_path / "models", {"layer.weight": stored.T.shape})
    out, peak = read_traced([models, store.parent], "layer.weight")
    assert (out.reshape(COLUMNS, ROWS) == stored.T).all()
    # One block of 2^20 elements, and one MiB for everything else; the tensor has six such blocks.
    assert peak <= (1 << 20) * 4 + (1 << 20)


def test_the_mean_of_rows_is_computed_in_bounded_memory(large):
    store, stored = large
    edit(store, "info.json", '"num_grads": 1', '"num_grads": 2')
    edit(store, "config.yaml", "aggregation: mean", "aggregation: none")
    np.concatenate([stored.ravel(), stored.ravel() + 2]).tofile(store / "gradients.bin")
    out, peak = read_traced([store.parent], "layer")
    assert (out == stored.ravel() + 1).all()
    # One block as stored, and its sum and mean in float64.
    assert peak <= (1 << 20) * (4 + 8 + 8) + (1 << 20)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("projected", "randomly projected (projection_dim: 4)"),
        ("projected to one", "randomly projected (projection_dim: 4)"),
        ("tokens", "one row per token"),
        ("unit", "normalized to length 1 (unit_normalize: true)"),
        ("unit mean", "normalized to length 1 (normalize_aggregated_grad: true)"),
        ("normalized", "(normalizers.pth)"),
        ("sum", "(aggregation: sum)"),
        ("contrast", "(contrast/)"),
    ],
)
def test_unsuitable_stores_are_refused_with_the_reason(other, name, why):
    sources = other(name)
    for error in (refused(sources), refusal(sources[1])):
        assert "does not contain the gradient of the loss" in error.what
        assert why in error.why
        assert ";" not in error.why
        assert "--projection_dim 0 --aggregation mean" in error.remedy


def edit(store, name, old, new):
    text = (store / name).read_text()
    assert old in text
    (store / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "why"),
    [
        ("config.yaml", "optimizer_state: ''", "optimizer_state: runs/a/optimizer.pt", "(optimizer_state: runs/"),
        ("config.yaml", "hessian_path: null", "hessian_path: runs/h", "(hessian_path: runs/h)"),
        ("config.yaml", "precision: fp64", "precision: int4", "(precision: int4)"),
        ("config.yaml", "      aggregation: mean\n", "", "how its rows were computed (config.yaml)"),
        ("config.yaml", "metadata:", "- build:\n    index_cfg:\n      model: b\nmetadata:", "several builds"),
        ("processor_config.yaml", "projection_dim: null\n", "", "whether it is projected"),
        ("info.json", '"num_grads": 1', '"num_grads": 2', "has 2 rows, but a mean is one row"),
    ],
)
def test_a_store_with_incomplete_metadata_is_refused(run, name, old, new, why):
    edit(run[1] / "checkpoint-0", name, old, new)
    error = refused(run)
    assert why in error.why
    assert ";" not in error.why


@pytest.mark.parametrize("name", ["config.yaml", "processor_config.yaml"])
def test_a_store_without_its_settings_is_refused(run, name):
    (run[1] / "checkpoint-0" / name).unlink()
    assert f"({name})" in refused(run).why


def test_gradients_of_epochs_belong_to_no_state(run, tmp_path):
    folder = tmp_path / "run" / "train"
    store = shutil.copytree(run[1] / "checkpoint-0", folder / "epoch_0")
    for source in (tmp_path / "run", folder, store):
        assert find_format(source) == "bergson"
        error = refusal(source)
        assert "while the parameters changed" in error.why
        assert error.where == str(store)


def test_the_orientation_is_not_guessed(run):
    stores = run[1]
    (stores / "natgrad.toml").unlink()
    error = refused(run)
    assert 'layout = "linear"' in error.remedy
    assert 'layout = "conv1d"' in error.remedy
    assert "GPT-2" in error.why
    for table in ('layout = "conv2d"', 'modules = { "h.0.mlp.c_fc" = 3 }', 'order = "conv1d"', "layout = ["):
        (stores / "natgrad.toml").write_text(f"[bergson]\n{table}")
        assert "mapping file" in refused(run).what
    (stores / "natgrad.toml").write_text("bergson = 3")
    assert "mapping file" in refused(run).what
    say(stores, "conv1d", **{"h.1.mlp.c_fc": "linear"})
    assert "no module 'h.1.mlp.c_fc'" in refused(run).what


def parameters(folder, shapes):
    folder.mkdir()
    np.savez(folder / "step_0.npz", **{f"parameter/{name}": np.zeros(shape) for name, shape in shapes.items()})
    return folder


GPT2 = {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "h.0.mlp.c_fc": (8, 12), "h.0.mlp.c_proj": (12, 8)}


@pytest.mark.parametrize(
    ("shapes", "what", "why"),
    [
        (
            {"other.weight": (8, 8)},
            "module 'h.0.attn.c_attn' with 192 elements does not match any tensor",
            "no tensor name is h.0.attn.c_attn",
        ),
        (
            {f"{module}.weight": shape if shape != (8, 12) else (8, 13) for module, shape in GPT2.items()},
            "module 'h.0.mlp.c_fc' with 96 elements does not match any tensor",
            "'h.0.mlp.c_fc.weight' has (8, 13)",
        ),
        (
            {f"{module}.weight": shape if shape != (8, 12) else (8, 12, 1) for module, shape in GPT2.items()},
            "module 'h.0.mlp.c_fc' with 96 elements does not match any tensor",
            "'h.0.mlp.c_fc.weight' has (8, 12, 1)",
        ),
        (
            {f"{part}.{module}.weight": shape for module, shape in GPT2.items() for part in ("a", "b")},
            "do not belong to one part",
            "prefixes 'a.', 'b.'",
        ),
        (
            {f"{shape[1]}.{module}.weight": shape for module, shape in GPT2.items()},
            "do not belong to one part",
            "no common prefix",
        ),
    ],
)
def test_modules_must_match_the_parameters(run, tmp_path, shapes, what, why):
    error = refused([parameters(tmp_path / "others", shapes), run[1]])
    assert what in error.what
    assert why in error.why


def test_modules_are_found_under_the_only_common_prefix(run, tmp_path):
    shapes = {f"{module}.weight": shape for module, shape in GPT2.items()}
    shapes |= {f"small.{module}.weight": (2, 2) for module in GPT2} | {"small.h.0.attn.c_proj.weight": (8, 8)}
    read, notes = gradients_of([parameters(tmp_path / "others", shapes), run[1]], 0)
    assert read.keys() == {f"{module}.weight" for module in GPT2}
    assert any("4 tensors have no gradient and are omitted: 'small." in note for note in notes)


def test_a_bias_must_match_its_parameter(other, tmp_path):
    _, stores = other("biased")
    shapes = {f"{module}.weight": shape for module, shape in GPT2.items()}
    biases = {f"{module}.bias": shape[1:] for module, shape in GPT2.items()}
    read, _ = gradients_of([parameters(tmp_path / "a", shapes | biases), stores], 0)
    assert read.keys() == shapes.keys() | biases.keys()
    error = refused([parameters(tmp_path / "b", shapes), stores])
    assert "bias of 'h.0.attn.c_attn'" in error.what
    assert error.why == "there is no such parameter"
    assert (
        "has shape (8,)" in refused([parameters(tmp_path / "c", shapes | dict.fromkeys(biases, (8,))), stores]).why
    )


def test_a_store_that_contradicts_its_name_is_refused(run):
    (run[1] / "checkpoint-0").rename(run[1] / "taken")
    (run[1] / "checkpoint-1").rename(run[1] / "checkpoint-0")
    assert "built from step-1, but its name indicates step 0" in refused(run).what
    edit(run[1] / "checkpoint-0", "config.yaml", "revision: null", "revision: step0")
    assert gradients_of(run, 0)[0].keys() == LINEAR["gpt2"]


def test_a_store_with_an_inconsistent_size_is_refused(run):
    with (run[1] / "checkpoint-0" / "gradients.bin").open("ab") as file:
        file.write(bytes(4))
    assert "gradients.bin has 1796 bytes, but info.json implies 1792" in refused(run).what


def test_a_store_must_be_named_after_its_step(run):
    store = (run[1] / "checkpoint-0").rename(run[1] / "gradients")
    assert "does not contain the step of its state" in refusal(store).what


def test_a_store_that_is_being_built_is_left_for_the_next_pass(run, caplog):
    (run[1] / "checkpoint-2").rename(run[1] / "checkpoint-2.part")
    assert [step.number for step in open_sources(run).steps()] == [0, 1, 2]  # the last state has no gradient yet
    assert "Bergson is still building it" in caplog.text
    for file in (run[1] / "checkpoint-2.part").rglob("*"):
        os.utime(file, (0, 0))
    assert "never completed" in refused(run).what
    assert "not complete" in refusal(run[1] / "checkpoint-2.part").why


def test_there_is_nothing_to_map(run):
    with pytest.raises(InputError, match="cannot be mapped"):
        open_source(run[1], mapping={"gradient": "a"})


def test_a_store_alone_has_no_parameters(run):
    found = inspect_source([run[1]])
    assert found.holds == {"gradient": "4 tensors"}
    assert "parameter" in found.missing
    with pytest.raises(InputError, match="no parameters"):
        gradients_of([run[1]], 0)


def read_or_refused(name, length, written, stores):
    if name == "gradients.bin" and length is not None:
        assert "cannot read" in refused([written / "gpt2" / "models", stores]).what
    with contextlib.suppress(InputError):
        gradients_of([written / "gpt2" / "models", stores], 0)


@given(
    name=st.sampled_from(["info.json", "config.yaml", "processor_config.yaml", "gradients.bin", "normalizers.pth"]),
    changes=changes(),
    length=LENGTHS,
)
@reads_only
def test_a_corrupt_store_is_either_read_or_refused(written, tmp_path, name, changes, length):
    stores = tmp_path / "stores"
    if not stores.exists():
        shutil.copytree(written / "gpt2" / "stores", stores)
        say(stores, "conv1d")
    path = stores / "checkpoint-0" / name
    whole = path.read_bytes()
    path.write_bytes(damage(whole, changes, length))
    try:
        read_or_refused(name, length, written, stores)
    finally:
        path.write_bytes(whole)
