"""Archives written by torch, read without torch, and pickles read as data, including malicious ones."""

import argparse
import collections
import enum
import fractions
import itertools
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import Payload, changes, damage, reads_only
from lazy import Lazy
from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.torch_archive import TORCH_DTYPES, TorchFile
from natgrad.sources.completion import complete
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, Unreadable
from natgrad.storage import LocalStorage
from opened import ingest, open_source

torch = Lazy("torch")


@pytest.fixture(autouse=True, scope="module")
def torch_imported():
    """Import torch here, so that its time does not count for the first test."""
    assert torch.save


class Kind(enum.Enum):
    """A class that is unknown to every reader."""

    A = 1


WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def opened(path):
    return TorchFile(LoggedStep(7, LocalStorage(path)))


def saved(tmp_path, tree):
    path = tmp_path / "step_7.pt"
    torch.save(tree, path)
    return path


def words_of(tensor):
    """Return the bits of a tensor in C order, computed by torch."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def read(file, key, itemsize, start=0, stop=None):
    size = int(np.prod(file.tensors[key].shape)) if stop is None else stop
    out = np.zeros(size - start, WORDS[itemsize])
    file.read(key, start, out)
    return out


# Contents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (_, itemsize) in TORCH_DTYPES.items() if itemsize <= 8])
def test_every_torch_dtype_is_preserved_bit_by_bit(tmp_path, name):
    dtype = getattr(torch, name)
    bits = torch.arange(48, dtype=torch.uint8).repeat(2)[: 12 * dtype.itemsize] % 2
    tensor = bits.view(dtype).reshape(3, 4)
    with opened(saved(tmp_path, {"model": {"w": tensor}})) as file:
        assert file.tensors["model/w"] == LoggedTensor((3, 4), name)
        assert read(file, "model/w", dtype.itemsize).tobytes() == words_of(tensor)


# Tensors that are not in C order, or not at the start of their storage.
VIEWS = {
    "whole": lambda base: base,
    "transposed": lambda base: base.t(),
    "every second column": lambda base: base[:, ::2],
    "a column": lambda base: base[:, 3],
    "rows from the middle": lambda base: base[7:],
    "of one row, with odd strides": lambda base: base[5:6, ::3],
    "of three dimensions": lambda base: base[:, :60].reshape(-1, 6, 10).permute(2, 0, 1),
    "channels last": lambda base: base[:, :60].reshape(-1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "expanded": lambda base: base[0].expand(3, -1),
    "scalar": lambda base: base[2, 2],
    "empty": lambda base: base[:0],
}


@pytest.fixture(scope="module")
def archive_of_views(tmp_path_factory):
    base = torch.arange(300 * 61, dtype=torch.float32).reshape(300, 61)
    tensors = {name: view(base) for name, view in VIEWS.items()}
    return saved(tmp_path_factory.mktemp("log"), tensors), tensors


@given(name=st.sampled_from(list(VIEWS)), a=st.integers(0), b=st.integers(0))
def test_slices_of_tensors_in_any_strides_equal_those_of_torch(archive_of_views, name, a, b):
    path, tensors = archive_of_views
    flat = tensors[name].contiguous().flatten().numpy()
    start, stop = sorted((a % (flat.size + 1), b % (flat.size + 1)))
    with opened(path) as file:
        assert file.tensors[name].shape == tuple(tensors[name].shape)
        np.testing.assert_array_equal(read(file, name, 4, start, stop).view(np.float32), flat[start:stop])


def test_other_objects_in_trainer_checkpoints_are_skipped(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    tree = {
        "model": model.state_dict(),
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loss": np.float64(2.5),
        "best": np.float32(1.5),
        "step": 7,
        "args": argparse.Namespace(lr=0.01, path=Path("/data")),
        "rng": [torch.get_rng_state(), np.random.get_state()],  # noqa: NPY002
        "counts": collections.defaultdict(int, {"seen": 3}),
        "names": {"b", "a"},
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "large": 2**90,
        "bytes": b"\x00\xff",
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shape": torch.Size([2, 3]),
        "nothing": None,
    }
    with opened(saved(tmp_path, tree)) as file:
        for name, tensor in itertools.chain(model.state_dict().items(), [("p", tree["parameter"])]):
            key = "parameter" if name == "p" else f"model/{name}"
            assert read(file, key, tensor.element_size()).tobytes() == words_of(tensor)
        assert {key: file.numbers[key] for key in ("loss", "best", "step", "counts/seen", "large")} == {
            "loss": 2.5,
            "best": 1.5,
            "step": 7.0,
            "counts/seen": 3.0,
            "large": 2.0**90,
        }
        assert file.numbers["optimizer/param_groups/0/lr"] == 0.01


def test_a_tensor_with_attributes_is_read_and_one_of_another_class_is_not(tmp_path, monkeypatch):
    tensor = torch.nn.Parameter(torch.arange(3.0))
    plain = torch.arange(3.0)
    tensor.rank = plain.rank = 7
    with opened(saved(tmp_path, {"w": tensor, "v": plain})) as file:
        assert read(file, "w", 4).tobytes() == read(file, "v", 4).tobytes() == words_of(plain)
    units = type("Units", (torch.Tensor,), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Units", units, raising=False)  # pickle finds a class by its name
    tree = {"model": {"w": torch.ones(3), "v": torch.ones(3).as_subclass(units)}, "grad": {"w": torch.ones(3)}}
    with pytest.raises(InputError, match=r"'model/v' is an object of '.*Units'") as caught:
        content_of(write_checkpoints(tmp_path / "run", [tree]))
    assert "as_subclass" in caught.value.remedy
    assert "inert" not in str(caught.value)


def test_torch_is_not_needed_to_read_what_it_wrote(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(2)})
    code = (
        "import sys; from natgrad.sources.opening import open_source; from natgrad.storage import LocalStorage;"
        f"log = open_source(LocalStorage({str(path.parent)!r})); step = log.steps()[0];"
        "reader = log.open(step).__enter__();"
        "print(reader.content().arrays['parameter']['w'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(2,)", "False"]


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    def peak(columns, key):
        (tmp_path / str(columns)).mkdir(exist_ok=True)
        base = torch.zeros(1000, columns)
        path = saved(tmp_path / str(columns), {"plain": base, "strided": base.t()})
        out = np.zeros(20_000, np.float32)
        with opened(path) as file:
            file.read(key, 0, out[:1])
            tracemalloc.start()
            for start in (0, base.numel() // 2, base.numel() - out.size):
                file.read(key, start, out)
            top = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return top

    for key in ("plain", "strided"):
        small, large = peak(100, key), peak(3_200, key)
        # 32 times the size of the tensor; the rest is the overhead of Python calls.
        assert large < small + 16_000, key


# Meaning of keys ---------------------------------------------------------------------------------------------


def write_checkpoints(folder, trees, name="checkpoint_{}.pt", numbers=None):
    folder.mkdir(exist_ok=True)
    for number, tree in zip(numbers or range(len(trees)), trees, strict=True):
        torch.save(tree, folder / name.format(number))
    return folder


def content_of(folder, number=None, **options):
    log = open_source(folder, **options)
    steps = {step.number: step for step in log.steps()}
    step = steps[max(steps) if number is None else number]
    with log.open(step) as reader:
        return complete(step, reader.content())


def tree(step=0, **more):
    w = torch.full((2,), float(step))
    return {"model": {"w": w, "b": w + 1}, "grad": {"w": w + 2, "b": w + 3}, "loss": 1.0, "step": step, **more}


def test_common_names_are_found_without_a_mapping(tmp_path):
    folder = write_checkpoints(tmp_path, [tree(0, lr=0.1), tree(1, lr=0.2)])
    content = content_of(folder)
    assert {array: list(tensors) for array, tensors in content.arrays.items()} == {
        "parameter": ["b", "w"],
        "gradient": ["b", "w"],
    }
    assert content.scalars == {"loss": 1.0, "learning_rate": 0.2}


MAPPING = {"parameter": "net/online", "gradient": "g", "loss": "metrics/train", "learning_rate": "o/*/eta"}


def odd_tree(step, **more):
    usual = tree(step)
    return {
        "net": {"online": usual["model"], "target": usual["grad"]},
        "g": usual["grad"],
        "metrics": {"train": torch.tensor(0.5, dtype=torch.bfloat16)},
        "o": [{"eta": 0.25}, {"eta": 0.25}],
        "n": torch.tensor(step),
        **more,
    }


@pytest.mark.parametrize("in_file", [False, True])
def test_a_mapping_selects_the_keys_of_quantities(tmp_path, in_file):
    folder = write_checkpoints(tmp_path, [odd_tree(0), odd_tree(1)])
    if in_file:
        lines = [f'{quantity} = "{key}"' for quantity, key in MAPPING.items()]
        (folder / "natgrad.toml").write_text("\n".join(["[map]", *lines]))
    content = content_of(folder, mapping=None if in_file else MAPPING)
    assert list(content.arrays["parameter"]) == ["b", "w"]
    assert content.scalars == {"loss": 0.5, "learning_rate": 0.25}
    assert set(content.unused) == {"net/target/w", "net/target/b", "n"}


def test_different_rates_of_groups_are_not_used(tmp_path):
    folder = write_checkpoints(tmp_path, [odd_tree(0, o=[{"eta": 0.25}, {"eta": 0.5}])])
    content = content_of(folder, mapping=MAPPING)
    assert "learning_rate" not in content.scalars
    assert "learning_rate has different values [0.25, 0.5] at o/0/eta, o/1/eta" in content.notes[0]


def test_the_step_number_can_be_read_from_the_file(tmp_path):
    folder = write_checkpoints(tmp_path, [tree(30), tree(10)], name="epoch_{}.pt", numbers=[2, 1])
    with pytest.raises(InputError, match="no name in this folder has a step number"):
        open_source(folder, "torch").steps()
    folder = write_checkpoints(tmp_path / "other", [tree(30), tree(10)], name="model_{}.pt", numbers=[2, 1])
    with pytest.raises(InputError, match="the file contains step 30, but its name indicates step 2"):
        content_of(folder)
    assert [step.number for step in open_source(folder, mapping={"step": "step"}).steps()] == [10, 30]
    assert content_of(folder, 30, mapping={"step": "step"}).scalars == {"loss": 1.0}


@pytest.mark.parametrize(
    ("mapping", "what"),
    [
        ({"parameter": "weights"}, "no parameter under the key 'weights'"),
        ({"loss": "model"}, "no loss under the key 'model'"),
        ({"gradients": "grad"}, "gradients=grad is not a valid mapping"),
        ({"step": "loss/x"}, "'loss/x' is None"),
    ],
)
def test_a_mapping_to_a_missing_key_is_refused(tmp_path, mapping, what):
    folder = write_checkpoints(tmp_path, [tree(0)])
    with pytest.raises(InputError, match=what) as caught:
        content_of(folder, mapping=mapping)
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["[map", "[maps]\nx = 1", 'map = "x"', "[map]\nparameter = 3", "[map]\nx = 'y'"])
def test_an_invalid_mapping_file_is_refused(tmp_path, text):
    folder = write_checkpoints(tmp_path, [tree(0)])
    (folder / "natgrad.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert "natgrad.toml" in caught.value.where


def test_only_packages_listed_as_inert_are_skipped(tmp_path):
    folder = write_checkpoints(tmp_path, [tree(0, rate=fractions.Fraction(1, 3))])
    (tmp_path / "natgrad.toml").write_text('inert = ["fractions.*"]')
    assert not content_of(folder).notes
    (tmp_path / "natgrad.toml").write_text('inert = ["fraction.*"]')
    (note,) = content_of(folder).notes
    assert "'rate' was not read: its class is 'fractions.Fraction'" in note


def test_objects_of_unknown_classes_are_skipped_and_named_once(tmp_path):
    extra = {"first": fractions.Fraction(1, 2), "more": [fractions.Fraction(1, 3)] * 5, Kind.A: 1}
    folder = write_checkpoints(tmp_path, [tree(0, extra=extra)])
    content = content_of(folder)
    assert content.scalars == {"loss": 1.0}
    assert content.arrays["parameter"].keys() == {"w", "b"}
    first, second = content.notes
    assert first.startswith("'extra/first' was not read, like 5 other objects: its class is 'fractions.Fraction'")
    assert "Kind" in second
    (folder / "natgrad.toml").write_text(f'inert = ["fractions.Fraction", "{__name__}.Kind"]')
    assert not content_of(folder).notes


@pytest.mark.parametrize(
    ("entry", "value", "array", "kind", "remedy"),
    [
        ("grad", {"w": "sparse", "b": "dense"}, "gradient", "_rebuild_sparse_tensor", "to_dense"),
        ("model", {"w": "numpy", "b": "dense"}, "parameter", "numpy", "from_numpy"),
        ("model", "module", "parameter", "torch.nn.modules.linear.Linear", "state_dict"),
        ("grad", "module", "gradient", "torch.nn.modules.linear.Linear", "state_dict"),
    ],
)
def test_an_object_instead_of_tensors_is_reported_immediately(tmp_path, entry, value, array, kind, remedy):
    made = {
        "sparse": lambda: torch.ones(2).to_sparse(),
        "dense": lambda: torch.ones(()),
        "numpy": lambda: np.ones(2, np.float32),
        "module": lambda: torch.nn.Linear(2, 1),
    }
    value = {name: made[each]() for name, each in value.items()} if isinstance(value, dict) else made[value]()
    folder = write_checkpoints(tmp_path, [tree(0) | {entry: value}])
    with pytest.raises(InputError, match=re.escape(kind)) as caught:
        ingest(folder, tmp_path / "out.zarr")  # it was written just now, and is not deferred to the next pass
    assert not isinstance(caught.value, NotYet | Unreadable)
    assert caught.value.where.endswith(f"step 0, {array}")
    assert remedy in caught.value.remedy
    assert "inert" not in str(caught.value)


def test_a_complete_module_instead_of_its_state_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"the file is an object of 'torch\.nn\.modules\.linear\.Linear'"
    ) as caught:
        content_of(write_checkpoints(tmp_path, [torch.nn.Linear(2, 1)]))
    assert "model.state_dict()" in caught.value.remedy


def test_arrays_of_random_states_in_a_file_without_known_keys_are_not_parameters(tmp_path):
    trees = [{"w": torch.ones(2), "grad": {"w": torch.ones(2)}, "rng": {"numpy": ("MT19937", np.ones(3))}}]
    assert content_of(write_checkpoints(tmp_path, trees)).arrays["parameter"].keys() == {"w"}


def tied_model():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(3, 2)
            self.norm = torch.nn.BatchNorm1d(2)
            self.head = torch.nn.Linear(2, 3, bias=False)
            self.head.weight = self.embedding.weight

    return Tied()


@pytest.mark.parametrize("named", ["embedding.weight", "head.weight"])
def test_tied_weights_are_counted_once_and_buffers_are_not_counted(tmp_path, named):
    model = tied_model()
    gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    gradient[named] = gradient.pop("embedding.weight")
    folder = write_checkpoints(tmp_path, [{"model": model.state_dict(), "grad": gradient}])
    content = content_of(folder)
    assert list(content.arrays["parameter"]) == sorted([named, "norm.weight", "norm.bias"])
    assert "head.weight" in content.notes[0]
    assert "embedding.weight" in content.notes[0]
    assert content.notes[1].startswith("2 tensors without gradient")
    assert "model/norm.num_batches_tracked" in content.unused


def test_dots_separate_levels_only_below_a_mapped_prefix(tmp_path):
    model = {"model.embed.weight": torch.ones(3), "lm_head.weight": torch.ones(2)}
    more = {f"grads/{name}": tensor for name, tensor in model.items()}
    folder = write_checkpoints(tmp_path, [model | more])
    assert list(content_of(folder).arrays["parameter"]) == ["lm_head.weight", "model.embed.weight"]
    content = content_of(folder, mapping={"parameter": "model", "gradient": "grads/model"})
    assert list(content.arrays["parameter"]) == ["embed.weight"]


def test_a_plain_state_dict_provides_parameters_and_reports_missing_gradients(tmp_path):
    folder = write_checkpoints(tmp_path, [tree(0)["model"]])
    with pytest.raises(InputError, match="no gradients in this step") as caught:
        content_of(folder)
    assert "SOURCE" in caught.value.remedy


# Refused files -----------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(InputError) as caught:
        opened(path)
    assert str(path) in caught.value.where
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("place", ["value", "key", "state", "argument"])
def test_a_payload_never_runs_and_is_reported(tmp_path, place):
    trace = tmp_path / "trace"
    payload = Payload(trace)
    state = argparse.Namespace(x=payload)
    trees = {
        "value": {"w": torch.ones(2), "x": payload},
        "key": {payload: 1},
        "state": {"w": torch.ones(2), "x": state},
        "argument": {"x": [torch.ones(2), (payload,)]},
    }
    path = saved(tmp_path, trees[place])
    with opened(path) as file:
        assert [item.kind for item in file.objects.values()] == ["posix.mkdir"]
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap works


def repacked(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive again with changed members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(name for name in members if name.endswith("data.pkl")).removesuffix("data.pkl")
    change(members, root)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_compressed_member_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(1 << 22)})
    repacked(path, lambda members, root: None, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "compressed or encrypted" in refusal(path).what


def forged(tmp_path, size, shape, stride, offset=0):
    """Write an archive with one storage of 8 bytes, and a tensor with the given description."""
    path = saved(tmp_path, {"w": torch.ones(2)})

    def change(members, root):
        members[root + "data.pkl"] = (
            b"\x80\x02}X\x01\x00\x00\x00w"
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + number(size)
            + b"tQ"
            + number(offset)
            + b"("
            + b"".join(map(number, shape))
            + b"t("
            + b"".join(map(number, stride))
            + b"t\x89}tRs."
        )

    return repacked(path, change)


def number(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def test_the_forged_archive_is_readable_if_it_is_consistent(tmp_path):
    with opened(forged(tmp_path, 2, (2,), (1,))) as file:
        np.testing.assert_array_equal(read(file, "w", 4).view(np.float32), [1, 1])


@pytest.mark.parametrize(
    ("size", "shape", "stride", "offset"),
    [
        (1 << 60, (2,), (1,), 0),  # the storage
        (2, (1 << 60,), (1,), 0),  # the tensor
        (2, (1 << 60,), (0,), 0),  # only copies
        (2, (1 << 30, 1 << 30), (0, 0), 0),
        (2, (2,), (2,), 0),  # beyond the end
        (2, (2,), (1,), 1),
        (2, (2,), (1,), -1),
        (2, (-2,), (1,), 0),
        (2, (2,), (-1,), 1),
        (2, (2, 1), (1,), 0),
        (2, (1,) * 1000, (1,) * 1000, 0),
        (-2, (2,), (1,), 0),
        (2, (2.0,), (1,), 0),
        (2, (True,), (1,), 0),
    ],
)
def test_a_tensor_that_exceeds_its_storage_is_refused(tmp_path, size, shape, stride, offset):
    refusal(forged(tmp_path, size, shape, stride, offset))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m, root: m.pop(root + "data/0"), "storage '0', which does not exist"),
        (lambda m, root: m.update({root + "data/0": b""}), "should have 8 bytes, but has 0"),
        (lambda m, root: m.update({root + "byteorder": b"big"}), "little-endian"),
        (lambda m, root: m.update({"other/data.pkl": b"."}), "2 members data.pkl"),
        (lambda m, root: m.pop(root + "data.pkl"), "0 members data.pkl"),
        (lambda m, root: m.update({root + "data.pkl": b""}), "exhausted before"),
    ],
)
def test_an_inconsistent_archive_is_refused(tmp_path, change, what):
    path = repacked(saved(tmp_path, {"w": torch.ones(2)}), change)
    assert what in refusal(path).what


def test_files_of_torch_before_1_6_are_refused_with_a_remedy(tmp_path):
    path = tmp_path / "step_7.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "save it again" in refusal(path).what


def test_a_file_that_was_removed_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(2)})
    path.unlink()
    assert "rotation" in refusal(path).why


@pytest.fixture(scope="module")
def complete_archive(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("log"), tree(7, opt=[{"lr": 0.1}])).read_bytes()


@given(length=st.integers(0))
@reads_only
def test_a_truncated_archive_is_refused(tmp_path, complete_archive, length):
    path = tmp_path / "step_7.pt"
    path.write_bytes(complete_archive[: length % len(complete_archive)])
    refusal(path)


@given(changes=changes(8))
@settings(reads_only, max_examples=300)
def test_a_corrupt_archive_is_either_read_or_refused(tmp_path, complete_archive, changes):
    path = tmp_path / "step_7.pt"
    path.write_bytes(damage(complete_archive, changes))
    try:
        with opened(path) as file:
            for key, logged in file.tensors.items():
                if logged.dtype == "float32" and np.prod(logged.shape) < 100:
                    read(file, key, 4)
    except InputError:
        pass
