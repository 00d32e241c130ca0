"""Test that files with equal keys share the meaning of their keys, but no values, and that others do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from natgrad.schema.errors import InputError
from natgrad.sources.opening import open_source
from natgrad.storage import LocalStorage

KEYS = ("parameter/a", "parameter/b", "gradient/a", "gradient/b", "grad", "model/a", "loss", "lr", "buffer")
shapes = st.sampled_from([(), (1,), (2,), (1, 2)])
files = st.dictionaries(
    st.sampled_from(KEYS), st.tuples(shapes, st.sampled_from(["float32", "float64"])), min_size=1
)

numbers = st.sampled_from(["0.5", "0.25", "no number"])


def described(path):
    """Return the contents of all steps of a log, or the errors; each may be read after others."""
    log = open_source(LocalStorage(path), format="safetensors")
    found = []
    for step in log.steps():
        try:
            with log.open(step) as reader:
                content = reader.content()
                ranges = {
                    (array, name): [(str(each.file), each.offset) for each in reader.ranges(array, name)]
                    for array, tensors in content.arrays.items()
                    for name in tensors
                }
                placement = reader.placement(content.arrays)
            found.append((step.number, content, ranges, placement))
        except InputError as error:
            found.append((step.number, (error.what, error.where), None, None))
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A log whose files replace all interpretations of earlier ones."""
    folder = tmp_path_factory.mktemp("others")
    for number in range(8):
        save_file({f"parameter/{number}": np.ones(number + 1)}, folder / f"step_{number}.safetensors")
    return folder


@settings(max_examples=30)
@given(
    st.lists(st.tuples(files, st.dictionaries(st.sampled_from(["loss", "lr"]), numbers)), min_size=1, max_size=6)
)
def test_the_files_read_before_do_not_change_what_a_file_contains(tmp_path_factory, others, steps):
    together = tmp_path_factory.mktemp("together")
    alone = [tmp_path_factory.mktemp("alone") for _ in steps]
    for number, (tensors, metadata) in enumerate(steps):
        arrays = {key: np.full(shape, number + 1, dtype) for key, (shape, dtype) in tensors.items()}
        for folder in (together, alone[number]):
            save_file(arrays, folder / f"step_{number}.safetensors", metadata=metadata)
    found = described(together)
    for own, folder in zip(found, alone, strict=True):
        described(others)
        ((number, content, ranges, _),) = described(folder)
        if ranges is None:
            content = content[0], content[1].replace(str(folder), str(together))
        else:
            ranges = {
                key: [(file.replace(str(folder), str(together)), offset) for file, offset in each]
                for key, each in ranges.items()
            }
        assert (number, content, ranges) == own[:3]
    for one in found:
        for other in found:
            if one[3] is None or other[3] is None or one[3].table != other[3].table:
                continue
            # Equal tables: only the file and the position of its first byte differ.
            (start,), (other_start,) = one[3].starts, other[3].starts
            moved = {
                key: [(str(other[3].files[0]), offset + other_start - start) for _, offset in each]
                for key, each in one[2].items()
            }
            assert moved == {key: other[2][key] for key in moved}


def test_an_error_names_the_step_of_its_own_file(tmp_path):
    for number in range(3):
        arrays = {"parameter/a": np.ones(2), "gradient/a": np.ones(2, np.float64 if number == 0 else np.int64)}
        save_file(arrays, tmp_path / f"step_{number}.safetensors")
    log = open_source(LocalStorage(tmp_path), format="safetensors")
    for step in log.steps()[1:]:
        with log.open(step) as reader, pytest.raises(InputError, match="int64") as caught:
            reader.content()
        assert f"step_{step.number}.safetensors" in caught.value.where
